"""When pages in the pool may be served, and when bytes that were read may be put.

*Foreign changes* (made underneath the mount) are found at open: `Coherence.validate` compares the lower
file's version with the one its pages were validated for, and drops the object when they differ. So the mount
is coherent from open to open, as NFS is. Never trusted is a version whose time stamp is too young to show the
next change, and one that is seen while somebody has the file open for writing: the stamps of a write come
before its bytes (`writers`). A file that this mount has not validated yet (a new daemon, a forgotten inode)
starts empty. The kernel drops pages of its own only by the reply to an open: a change that was found
otherwise (by a read, by an open that failed or that nobody waited for) stays *untold* until the next.

*Own changes* (through the mount) bracket the lower operation: flush, change, flush. They change the version
too; if the file was as validated just before and nobody opened it meanwhile, the version after it is adopted
(the rule of NFS' weak cache consistency) and all other pages stay. What this cannot see is a foreign write to
another page of the same file while one of our own writes to it is in the kernel; a report of it
can (`reported`). A lower that is elsewhere may take long, also to tell the version: so it is asked by the
thread that makes the change, just before and after it, and judged when the bracket ends. One that was open
for more than a second costs all pages.

*Reads that are overtaken.* A miss reads lower bytes, and before it puts them a write may flush, write and
flush: the put would bring stale bytes back for good. So each file has an epoch, which every change raises
when it begins. A miss notes the epoch before it reads (`read_token`, None while a change is under way), and
`put_if` puts under the file's lock only if the epoch is still the same; flushes take the same lock. Either
the put sees the new epoch and does nothing, or it ends before the change's first flush, which then removes
its pages. (So the flush after the change finds nothing as long as this holds; it stays, as tmem's rule and a
second line.) What the native reader reads and puts itself follows the same rule by the file's gate, which
has a counter of its own that `overtake` and `show` raise, waiting for a put under way.

For a pool of the mount's own; `sharing` has the rules for one that other mounts use too. Threading: the event
loop's thread, except `put_if` and `Change.flush`, which any thread may call.
"""

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from tmem.fs.identity import Version, is_settled, version_at, version_of
from tmem.fs.precache import Precache
from tmem.fs.state import SavedFileState, SavedVersion
from tmem.fs.writers import is_quiet
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends._native import Gate

LONG_SECONDS = 1.0
"""What a change elsewhere may take: beyond that a foreign one beside it, which nobody tells, is likely."""

REMEMBERED_FILES = 100_000
"""Versions kept of files that the kernel has forgotten; beyond that the oldest start empty again."""


@dataclass(eq=False)
class FileState:
    """Coherence of one file's pages. Fields are read everywhere and written by the event loop's thread."""

    name: bytes
    """Names the file, see `identity.object_id`."""
    oid: bytes
    """The object of its pages in the pool."""
    fine_stamps: bool = False
    """Whether the file's file system gives each change that follows a stat a time stamp of its own."""
    size: int = 0
    """The lower file's size as last seen."""
    version: Version | None = None
    """What the pages in the pool are valid for; None: nothing may be served after the next open."""
    quiet: bool = False
    """Whether nobody had the file open for writing when `version` was seen: none of its bytes came later."""
    epoch: int = 0
    """Raised when a change begins or is found; bytes read in an older epoch may not be put."""
    changes: int = 0
    """Own changes under way."""
    suspect: bool = False
    """The changes under way met a foreign one or an open: drop all pages when they end."""
    left: Version | None = None
    """The newest version that one of several changes elsewhere has left, as long as others are under way."""
    served: bool = True
    """Whether the pool may be asked for its pages."""
    top: int = 0
    """No page at this index or above was ever put."""
    gone: bool = False
    """Whether the file is known to have lost its last link."""
    untold: bool = False
    """Whether the kernel may have pages of its own from before `version`: the next open has it drop them."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Orders puts and the flushes that follow changes; held for one call into the pool, by any thread."""
    gate: "Gate | None" = field(default=None, repr=False)
    """Tells the native reader whether it may answer, and from where (`reading`)."""
    takes: bool = False
    """Whether the native reader may put what it reads of the lower file; see `Coherence.admit`."""

    def show(self) -> None:
        """Tell the native reader what has changed of `oid`, `size`, `version`, `served` and `changes`."""
        if self.gate is not None:
            # Of an empty file it is asked in `files`: some file systems say so of files that have content.
            serving = self.served and not self.changes and self.size > 0
            known = None if self.untold else self.version  # by which the kernel keeps its pages
            self.gate.set(self.oid, self.size, serving, self.takes, known)

    def told(self, dropped: bool) -> None:
        """Note whether the kernel drops its own pages, or may not have heard that it should."""
        if self.untold == dropped:
            self.untold = not dropped
            self.show()

    def overtake(self) -> None:
        """Void what was read until now; then nothing of it is being put by the native reader, either."""
        self.epoch += 1
        if self.gate is not None:
            self.gate.overtake()

    @property
    def turn(self) -> tuple[int, int]:
        """Another one once an own change has begun or ended; without any under way the second is 0."""
        return self.epoch, self.changes

    @property
    def reach(self) -> int:
        """No page at this index or above was ever put, by whomever."""
        return self.top if self.gate is None else max(self.top, self.gate.top)

    def saved(self) -> SavedFileState:
        """Return all of it for `restored`. Of a file that is being changed, nothing will be trusted."""
        trusted = None if self.changes or self.untold else self.version
        version = None if trusted is None else (*trusted,)
        return self.name, self.oid, self.fine_stamps, self.size, version, self.epoch, self.served, self.reach

    @classmethod
    def restored(cls, saved: SavedFileState) -> "FileState":
        """Return the state that was `saved`."""
        name, oid, fine_stamps, size, version, epoch, served, top = saved
        known = None if version is None else Version(*version)
        return cls(name, oid, fine_stamps, size, known, epoch=epoch, served=served, top=top)


class Coherence:
    """The rules above for all files of a mount. `now_ns` is the wall clock."""

    takes_below = True

    def __init__(self, precache: Precache, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._precache = precache
        self._now_ns = now_ns
        self._remembered: OrderedDict[bytes, tuple[Version, int]] = OrderedDict()
        self._distrusted: set[bytes] = set()
        self.on_name: Callable[[bytes, bool], None] = lambda name, known: None
        """Told of each name of which something is known from now on, or not any more."""

    def saved(self) -> list[tuple[bytes, SavedVersion, int]]:
        """Return what is known of files that the kernel has forgotten, for `restore`."""
        return [(name, (*version,), top) for name, (version, top) in self._remembered.items()]

    def distrusted(self) -> list[bytes]:
        """Return the names of the files that `distrust` was told of, for `restore`."""
        return list(self._distrusted)

    def restore(self, saved: list[tuple[bytes, SavedVersion, int]], distrusted: list[bytes]) -> None:
        """Know what was `saved` and `distrusted`; the pool must be the same, or empty."""
        self._remembered.update((name, (Version(*version), top)) for name, version, top in saved)
        self._distrusted.update(distrusted)
        for name in (*self._remembered, *self._distrusted):
            self.on_name(name, True)

    @property
    def remembers_some(self) -> bool:
        """Whether anything is known of any file that the kernel has forgotten."""
        return bool(self._remembered)

    def remembers(self, name: bytes) -> bool:
        """Say whether pages may be there of a file that the kernel has forgotten."""
        return name in self._remembered

    def recall(self, name: bytes, fine_stamps: bool) -> FileState:
        """Return the state of a file that is opened for the first time since the kernel knows it."""
        version, top = self._unremember(name)
        return FileState(name, name, fine_stamps, version=version, top=top)

    def _unremember(self, name: bytes) -> tuple[Version | None, int]:
        known = self._remembered.pop(name, None)
        if known is None:
            return None, 0
        self.on_name(name, False)
        return known

    def remember(self, state: FileState) -> None:
        """Keep what is known of a file that the kernel has forgotten: its pages outlive its inode.

        Nothing is put by way of `state` any more: reads that were given up may be under way, and changes by
        way of the next one would not overtake them.
        """
        with state.lock:  # a put that has begun counts for `reach`
            state.overtake()
        if state.version is not None and not state.changes:
            if state.name not in self._remembered:
                self.on_name(state.name, True)
            self._remembered[state.name] = (state.version, state.reach)
            while len(self._remembered) > REMEMBERED_FILES:
                self.on_name(self._remembered.popitem(last=False)[0], False)

    def discard(self, name: bytes, state: FileState | None) -> None:
        """Drop all pages of a file that has lost its last link."""
        self._unremember(name)
        if name in self._distrusted:
            self._distrusted.remove(name)
            self.on_name(name, False)
        if state is None:
            self._precache.counters.flushed_pages += self._precache.flush_object(name)
            return
        state.gone = True
        self._suspect(state)

    def distrust(self, state: FileState) -> None:
        """Keep no pages of a file any more: what its lower was given to write, it could not.

        Its page cache shows the new bytes until it drops them, the old ones later, and no time stamp tells.
        """
        if state.name not in self._distrusted:
            self._distrusted.add(state.name)
            self.on_name(state.name, True)
        state.takes = False
        self._forget(state)
        state.show()

    def validate(self, state: FileState, status: os.stat_result, descriptor: int) -> bool:
        """Compare the lower file with what its pages are valid for, as every open must; True if unchanged.

        Since the last time: what was found then the kernel may not know yet (`FileState.untold`).
        `descriptor` is one of the file, not O_PATH, and best open for reading only (see `is_quiet`).
        """
        version = version_of(status)
        if state.changes:
            state.suspect = True  # whether the file is as expected cannot be told while it changes
            self._drop(state)
            return False
        state.size = version.size  # shown with the pages that belong to it only: the last one is padded
        if state.version == version:
            state.show()
            return True
        if state.version is not None:
            self._precache.counters.foreign_changes += 1
        state.untold = True
        self._start_over(state, version, is_quiet(descriptor))  # in this order: not before `status`
        state.show()
        return False

    def reported(self, state: FileState, descriptor: int) -> None:
        """Drop every page of a file that is reported to have changed underneath.

        Unless they are valid for what it is now: then they came after the change. Not so if that version is
        one that an own change has left, which a foreign one beside it may have had a part in. `descriptor`
        may be O_PATH.
        """
        version = version_at(descriptor)
        if version is not None and state.version == version and state.quiet:
            return
        self._precache.counters.foreign_changes += state.version is not None
        self._suspect(state)
        if state.changes:
            state.suspect = True
        elif version is not None:
            state.size = version.size
        state.show()

    def _suspect(self, state: FileState) -> None:
        """Drop every page; those that come from now on are good for who has the file open already."""
        self._forget(state)

    def _forget(self, state: FileState) -> None:
        """Drop every page, put none that was read before, and trust no version until the next open."""
        state.overtake()
        state.version = None
        self._drop(state)

    def admit(self, state: FileState) -> None:
        """Say whether the native reader may put pages of a file: where the epoch is all that matters."""
        state.takes = self.takes_below and state.name not in self._distrusted

    def read_token(self, state: FileState) -> int | None:
        """Return what `put_if` needs to put bytes that are read from now on; None: they may not be put."""
        return None if state.changes else state.epoch

    def put_if(
        self, state: FileState, token: int | None, descriptor: int, index: int, data: memoryview
    ) -> int | None:
        """Put whole pages, read from `descriptor`, unless a change overtook the read.

        The pages stored, None if overtaken.
        """
        if token is None or not self._may_put(state, descriptor):  # may ask the lower: not with the lock
            return None
        with state.lock:
            if state.epoch != token:
                return None
            state.top = max(state.top, index + len(data) // PAGE_SIZE)
            return self._precache.put(state.oid, index, data)

    def change(self, state: FileState | None, descriptor: int) -> "Change":
        """Return the bracket around an own change of the file open (O_PATH will do) at `descriptor`."""
        return Change(self, state, descriptor)

    def change_elsewhere(self, state: FileState | None) -> "ChangeElsewhere":
        """Return the bracket around an own change of a file whose lower may not answer."""
        return ChangeElsewhere(self, state)

    def _may_put(self, state: FileState, descriptor: int) -> bool:
        """Say whether what was just read from `descriptor` may stay when the file is opened again."""
        return state.name not in self._distrusted  # else, whatever it was, the version tells

    def _drop(self, state: FileState) -> None:
        """Drop every page."""
        with state.lock:
            dropped = self._precache.flush_object(state.oid)
        self._precache.counters.flushed_pages += dropped

    def _drop_range(self, state: FileState, start: int, end: int | None) -> int:
        """Drop the pages that bytes `start` to `end` touch; their number."""
        with state.lock:
            first = start // PAGE_SIZE
            last = state.reach if end is None else min(-(-end // PAGE_SIZE), state.reach)
            return self._precache.flush(state.oid, first, last - first)

    def _start_over(self, state: FileState, version: Version, quiet: bool | None) -> None:
        """Drop every page, and make what is read from now on valid for `version`.

        `quiet` says whether nobody had the file open for writing after `version` was seen, as `is_quiet`
        does.
        """
        state.overtake()
        self._drop(state)
        state.version = self._trusted(state, version, quiet)
        state.quiet = quiet is True

    def _trusted(self, state: FileState, version: Version, quiet: bool | None) -> Version | None:
        if quiet is None:  # an old stamp is then all that speaks against a write under way
            settled = is_settled(version, self._now_ns(), fine_stamps=False)
        else:
            settled = quiet and is_settled(version, self._now_ns(), state.fine_stamps)
        return version if settled else None

    def _begin(self, state: FileState, see: Callable[[], Version | None]) -> None:
        """Begin a change of a file that has the version that `see` returns."""
        if not state.changes:
            state.suspect = False
            if state.version is not None:
                self._compare(state, state.version, see())
        state.overtake()
        state.changes += 1

    def _compare(self, state: FileState, expected: Version | None, version: Version | None) -> None:
        """Note what the version was before the first of the changes under way, if one was `expected`."""
        if expected is not None and expected != version:
            self._precache.counters.foreign_changes += 1
            state.suspect = True

    def _end(self, state: FileState, version: Version | None) -> None:
        """End a change that has left a file with `version`."""
        if version is not None:
            state.size = version.size
        state.changes -= 1
        if version is None:  # the change is done, but what it has made cannot be told
            state.suspect = True
        if state.changes:
            return
        if version is None:
            state.overtake()
            self._drop(state)
            state.version = None
        elif state.suspect:
            self._start_over(state, version, quiet=False)
        elif state.version is not None:
            state.version = self._trusted(state, version, quiet=True)  # it was when it was validated
            state.quiet = False


class Change:
    """A context manager around one own change, for the event loop's thread; pages are named in bytes.

    Without a state (a file that nobody has opened) it does nothing. The pages that the change touches must be
    dropped before it and again after it, with `flush`.
    """

    def __init__(self, coherence: Coherence, state: FileState | None, descriptor: int = -1) -> None:
        self._coherence = coherence
        self._precache = coherence._precache
        self._state = state
        self._descriptor = descriptor
        self._dropped = 0

    def __enter__(self) -> Self:
        if self._state is not None:
            self._begin(self._state)
            self._state.show()
        return self

    def _begin(self, state: FileState) -> None:
        self._coherence._begin(state, lambda: version_at(self._descriptor))

    def _end(self, state: FileState) -> None:
        self._coherence._end(state, version_at(self._descriptor))

    @contextlib.contextmanager
    def seen(self, descriptor: int) -> Iterator[None]:
        """Bracket the system calls, in whatever thread makes them: of a file that is open at `descriptor`."""
        yield

    def __exit__(self, *_: object) -> None:
        if self._state is not None:
            self._precache.counters.flushed_pages += self._dropped
            self._end(self._state)
            self._state.show()

    def flush(self, start: int, end: int | None) -> None:
        """Drop the pages that bytes `start` to `end` (None: the end of the file) touch.

        For any thread, one at a time: waits for a put that is under way.
        """
        if self._state is not None:
            self._dropped += self._coherence._drop_range(self._state, start, end)


class ChangeElsewhere(Change):
    """The same for a file whose lower may not answer: what it has to be asked for is asked within `seen`.

    So this begins and ends at once, and may be open for long.
    """

    _before: Version | None = None
    _after: Version | None = None

    def _begin(self, state: FileState) -> None:
        self._begun = time.monotonic()
        self._is_first = not state.changes
        self._expected = expected = state.version
        self._coherence._begin(state, lambda: expected)

    def _end(self, state: FileState) -> None:
        if self._is_first:
            self._coherence._compare(state, self._expected, self._before)
        if time.monotonic() - self._begun > LONG_SECONDS:
            state.suspect = True
        after = self._after
        if after is not None and state.left is not None:  # a later change may have ended, and told, first
            after = max(after, state.left, key=lambda version: version.ctime_ns)
        state.left = after if state.changes > 1 else None
        self._coherence._end(state, after)

    @contextlib.contextmanager
    def seen(self, descriptor: int) -> Iterator[None]:
        """Bracket the system calls, in whatever thread makes them: of a file that is open at `descriptor`."""
        if self._state is None:
            yield
            return
        self._before = version_at(descriptor)
        try:
            yield
        finally:
            self._after = version_at(descriptor)
