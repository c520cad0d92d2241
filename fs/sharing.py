"""When pages may be served and put in a pool that other mounts use too.

What `coherence` knows of a pool of its own, it knows by itself: nobody else puts. In a shared pool it could
not tell who put a page, and for which version. So here every version of a file is an object of its own
(`identity.version_object_id`), and a page is put only if its bytes are certainly those of that version:

- when the version was seen, nobody had the file open for writing (`writers`), so none of its writes was still
  under way; and it was old enough, or the stamps fine enough, that every later change shows;
- after the bytes were read, the file still has that version: no change has begun since.

Such pages are right for ever, whoever reads them, and need neither locks between mounts nor repair when one
is killed: a change of any kind, by any mount or underneath, makes another version, whose object is empty. The
mount that changes a file drops the old version's object all the same, before and after: the memory comes
back, and other mounts that have the file open see the change at once instead of at their next open. What a
mount has changed itself it does not ask the pool for until the next open.

The price: a write, a rename or a chmod costs a file all its pages, and while somebody has it open for
writing, or where the file system knows no leases, nothing is put. This suits files that many read and few
write.

Threading: as `coherence`.
"""

import os
from collections.abc import Callable

from tmem.fs.coherence import Coherence, FileState
from tmem.fs.identity import Version, version_at, version_object_id, version_of


class SharedCoherence(Coherence):
    """The rules above for all files of a mount.

    Pages of a file that loses its last link and that nobody here has opened stay behind, to be evicted.
    """

    takes_below = False  # the version is asked for before each put

    def recall(self, name: bytes, fine_stamps: bool) -> FileState:
        """Return the state of a file that is opened for the first time since the kernel knows it."""
        state = super().recall(name, fine_stamps)
        state.served = False  # until it is validated
        return state

    def validate(self, state: FileState, status: os.stat_result, descriptor: int) -> bool:
        """Turn to the pages of the version that the lower file has now; True if it is the one before."""
        if not state.changes:
            state.served = False  # the size is not shown with another version's object
            state.show()
        unchanged = super().validate(state, status, descriptor)
        if not state.changes:
            state.oid = version_object_id(state.name, version_of(status))
            state.served = True
            state.show()
        return unchanged

    def _suspect(self, state: FileState) -> None:
        state.served = False  # until it is opened again
        state.show()
        super()._suspect(state)

    def _may_put(self, state: FileState, descriptor: int) -> bool:
        known = state.version is not None and state.version == version_at(descriptor)
        return known and super()._may_put(state, descriptor)

    def _drop_range(self, state: FileState, start: int, end: int | None) -> int:
        with state.lock:
            return self._precache.flush_object(state.oid)

    def _begin(self, state: FileState, see: Callable[[], Version | None]) -> None:
        state.overtake()
        state.served = False
        state.version = None
        if not state.changes:
            self._compare(state, None, see())
        state.changes += 1

    def _compare(self, state: FileState, expected: Version | None, version: Version | None) -> None:
        if version is not None:
            state.oid = version_object_id(state.name, version)

    def _end(self, state: FileState, version: Version | None) -> None:
        if version is not None:
            state.size = version.size
        state.changes -= 1
        if not state.changes:
            self._drop(state)
