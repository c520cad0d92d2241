"""What a mount's daemon hands to the code that takes its place: all that the kernel believes it to know.

The state goes into a memory file that stays open across exec, as plain values (numbers, bytes, tuples,
...) in Python's own pickle, whose reader here makes nothing else. In front stands the number of the
format: code that does not know it must not touch the mount (`load` refuses). Whoever changes what is in
these types raises `FORMAT`, and either teaches `load` the old one or gives up restarts across the change.

Rows refer to inodes by their place in `SavedInodes.nodes`. Not for making or using any of it: the classes
do so by themselves (`saved`, `restore`); not for anything that outlives the process. Threading: plain
functions.
"""

import io
import os
import pickle
import struct
from collections.abc import Iterator
from typing import NoReturn, TypedDict, cast

from tmem.errors import AttachError
from tmem.fs.policy import SavedPolicy

FORMAT = 5
_BEFORE = 4  # is read as well

_HEADER = struct.Struct("<8sI4x")
_MAGIC = b"tmemfuse"

SavedVersion = tuple[int, int, int]
"""The fields of `identity.Version`."""

SavedFileState = tuple[bytes, bytes, bool, int, SavedVersion | None, int, bool, int]
"""name, oid, fine_stamps, size, version, epoch, served and top of a `FileState` that nothing is changing."""

SavedInode = tuple[
    int, int, int, int, int, int, bytes | None, bool, bool, SavedFileState | None, int, int, bool
]
"""nodeid, device and number of the lower inode, kind, descriptor (-1: closed), lookups, handle, whether its
node id leads to it, whether its lower identity does, the coherence of its pages, its generation, the number
of its backing file (0: none), and whether it may be written without our knowledge."""

SavedFile = tuple[int, int, int, bool, bool, bool]
"""Handle, inode, descriptor, writable, append and declined of an open file."""

SavedListing = tuple[int, int, int, list[bytes]]
"""Handle, inode, descriptor and names of an open directory."""


class SavedInodes(TypedDict):
    """An `InodeTable`; the nodes whose descriptors may be closed come first, the oldest first."""

    root: int
    next_foreign: int
    last_generation: int
    nodes: list[SavedInode]


class SavedPool(TypedDict):
    """What a `Precache` uses; `segment` is device and number of the segment's file, `lock` a descriptor."""

    segment: tuple[int, int] | None
    client: int
    pool: int
    lock: int


class SavedOverlay(TypedDict):
    """Everything of an `Overlay`."""

    inodes: SavedInodes
    files: list[SavedFile]
    next_file: int
    listings: list[SavedListing]
    next_listing: int
    remembered: list[tuple[bytes, SavedVersion, int]]
    """Versions and tops of files that the kernel has forgotten, the oldest first."""
    distrusted: list[bytes]
    """Names of files whose lower could not write what it had taken. Since format 5."""
    pool: SavedPool
    counters: dict[str, int]
    fine_stamps: bool
    mark: bytes
    """Of the lower directory's file system (`instances`)."""
    reports: int
    """The descriptor of `fanotify.Events`, -1 without."""


class SavedPlan(TypedDict):
    """What is mounted where and how (`serving.Plan`)."""

    lower: str
    mountpoint: str
    segment_name: str
    segment_directory: str
    client: str
    shared: bytes | None
    cache: str
    loop: str
    allow_other: bool
    timeout_seconds: float | None
    watch: str
    passthrough: str
    policy: SavedPolicy
    flags: int
    ignored: tuple[str, ...]
    tier: str | None
    settled_seconds: float
    detached: bool
    code: tuple[str, ...]
    drain_seconds: float


class SavedDevice(TypedDict):
    """The FUSE device, and what was settled with the kernel."""

    descriptor: int
    request: bytes
    reply: bytes


class SavedRestarts(TypedDict):
    """Restarts so far, this one counted, and when requests began to wait (CLOCK_MONOTONIC)."""

    count: int
    attempts: int
    stopped_ns: int


class State(TypedDict):
    """All of it."""

    plan: SavedPlan
    device: SavedDevice
    overlay: SavedOverlay
    restarts: SavedRestarts


def dump(state: State) -> int:
    """Return a descriptor (close-on-exec) of a memory file that holds `state`."""
    descriptor = os.memfd_create("tmem-mount", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(_HEADER.pack(_MAGIC, FORMAT))
            pickle.dump(state, file, protocol=5)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def load(descriptor: int) -> State:
    """Return what `dump` has written. AttachError if it is no state or of a format unknown here."""
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    if len(content) < _HEADER.size or content[:8] != _MAGIC:
        raise AttachError("this is no state of a mount: it is handed over by 'tmem mount --restart' only")
    written = _HEADER.unpack_from(content)[1]
    if written not in (_BEFORE, FORMAT):
        raise AttachError(
            f"the mount's state has format {written}, the new code reads {FORMAT}: unmount and mount again"
        )
    try:
        state = cast(State, _PlainReader(io.BytesIO(content[_HEADER.size :])).load())
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError) as error:
        raise AttachError(f"the mount's state cannot be read: {error}") from None
    if written == _BEFORE:
        state["overlay"]["distrusted"] = []
    return state


def descriptors(state: State) -> Iterator[int]:
    """Yield every descriptor that the state refers to."""
    overlay = state["overlay"]
    yield state["device"]["descriptor"]
    yield overlay["inodes"]["root"]
    if overlay["pool"]["lock"] >= 0:
        yield overlay["pool"]["lock"]
    if overlay["reports"] >= 0:
        yield overlay["reports"]
    for node in overlay["inodes"]["nodes"]:
        if node[4] >= 0 and node[4] != overlay["inodes"]["root"]:
            yield node[4]
    for _, _, descriptor, *_ in overlay["files"]:
        yield descriptor
    for _, _, descriptor, _ in overlay["listings"]:
        yield descriptor


class _PlainReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")
