"""Segments by name: create, attach and destroy, and the directories around them.

Makes the run-time directory (for root a tmpfs of our own, which the kernel cannot swap out where it knows
``noswap``) and the state directory, and refuses a size that this machine or the caller's control group cannot
carry. Not for pools and pages: those are methods of the native objects. Threading: plain functions, callable
from any thread; `prepare_runtime_dir` takes a lock, so two processes at once mount only one tmpfs.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tmem.backends import cgroup, procfiles
from tmem.backends.paths import SegmentPaths, runtime_dir
from tmem.errors import SegmentError
from tmem.types import SizeRange, format_size, size_within

if TYPE_CHECKING:
    from tmem.backends import _native

MIN_MEMORY_BYTES = 8 << 20
"""The smallest segment that the core accepts."""

PROCESS_ROOM_BYTES = 64 << 20
"""What a limit must leave beside the segment for the manager, the servers and their page tables."""

_RUN_TMEM = Path("/run/tmem")
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8


@dataclass(frozen=True)
class Capacity:
    """The largest segment that may be created here, and why not more."""

    limit_bytes: int
    reason: str


def capacity() -> Capacity:
    """Return how large a segment of the calling process may be: bounded by RAM and by its control group."""
    ram = _ram_bytes()
    best = Capacity(ram - max(PROCESS_ROOM_BYTES, ram // 8), f"this machine has {format_size(ram)} of RAM")
    limit = cgroup.memory_limit()
    if limit is not None and limit.limit_bytes - PROCESS_ROOM_BYTES < best.limit_bytes:
        best = Capacity(
            limit.limit_bytes - PROCESS_ROOM_BYTES,
            f"the control group {limit.group} is limited to {format_size(limit.limit_bytes)}",
        )
    return best


def default_memory_bytes() -> int:
    """Return the size of a segment nobody chose one for: half of RAM, within the control group."""
    return min(_ram_bytes() // 2, capacity().limit_bytes)


def exists(name: str) -> bool:
    """Say whether there is a segment called `name`; it may still be damaged."""
    return SegmentPaths.of(name).segment.exists()


def create(name: str, memory_bytes: int) -> "_native.Segment":
    """Create the segment called `name`, bounded to `memory_bytes`, and attach it.

    Raises `SegmentError` if it exists, if the size is out of range, or if the directories cannot be made.
    """
    paths = SegmentPaths.of(name)
    _check_size(memory_bytes)
    prepare_runtime_dir()
    prepare_state_dir(paths)
    try:
        made: _native.Segment = core().create(str(paths.segment), memory_bytes)
    except FileExistsError:
        raise SegmentError(
            f"segment {name!r} exists already: use it, or end it with 'tmem --name {name} destroy --all'"
        ) from None
    except OSError as error:
        raise SegmentError(
            f"cannot create {paths.segment}: {error.strerror or error}; look at that directory, or set "
            "TMEM_RUNTIME_DIR to another one on a tmpfs"
        ) from error
    return made


def resize(opened: "_native.Segment", size: SizeRange) -> int:
    """Bound the segment to a size below its ceiling, or to a range in which the manager moves it.

    Returns the limit of now, which stays above what persistent pages and floors need. Memory beyond it
    goes with ``shrink``. Raises `SegmentError` for sizes that the segment cannot have.
    """
    ceiling = opened.memory_bytes
    if size.most_bytes > ceiling:
        raise SegmentError(
            f"the segment was created with {size_within(ceiling)}: use at most that, or end it and create a "
            "larger one"
        )
    if size.least_bytes < MIN_MEMORY_BYTES:
        raise SegmentError(f"a segment has at least {format_size(MIN_MEMORY_BYTES)}: use that or more")
    least, most = opened.size_range
    opened.size_within(size.least_bytes, size.most_bytes)
    if size.least_bytes == size.most_bytes:
        return opened.set_limits(size.most_bytes, size.most_bytes)
    limit, persistent = opened.limits
    if least == most:  # nobody asked yet what the machine can spare: what it has it keeps, more when it can
        limit = sum(opened.occupied[:2])
    limit = min(max(limit, size.least_bytes), size.most_bytes)
    return opened.set_limits(limit, min(max(persistent, limit), size.most_bytes))


def attach(name: str) -> "_native.Segment":
    """Attach the segment called `name`. Raises `SegmentError` if it is missing, not ours or damaged."""
    paths = SegmentPaths.of(name)
    try:
        status = paths.segment.lstat()
    except FileNotFoundError:
        raise SegmentError(
            f"there is no segment {name!r}: create it with 'tmem --name {name} start -d'"
        ) from None
    except OSError as error:
        raise SegmentError(
            f"cannot reach {paths.segment}: {error.strerror}; run this as the user of the segment, or look "
            "at TMEM_RUNTIME_DIR"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise SegmentError(
            f"{paths.segment} is no file, and so no segment: move it away, or use another --name"
        )
    if not os.access(paths.segment, os.R_OK | os.W_OK):
        raise SegmentError(
            f"segment {name!r} belongs to user {status.st_uid}: run this as that user or as root"
        )
    attached: _native.Segment = core().attach(str(paths.segment))
    return attached


def destroy(name: str) -> None:
    """End the segment called `name`: its pages, also those in tiers, and its state directory.

    Everybody must have let go of it.

    Raises `SegmentError` if there is none. Safe to repeat after a failure half-way.
    """
    import shutil  # with the next not above: every command imports this module

    from tmem.backends import tiering

    paths = SegmentPaths.of(name)
    if not paths.segment.exists() and not paths.state.exists():
        raise SegmentError(f"there is no segment {name!r}: nothing to destroy")
    if paths.segment.exists() and not stat.S_ISREG(paths.segment.lstat().st_mode):
        raise SegmentError(f"{paths.segment} is no file, and so no segment: move it away")
    nonce = _ending_nonce(paths)
    if paths.segment.exists():
        try:
            _remove(paths.segment)
        except OSError as error:
            raise SegmentError(
                f"cannot remove {paths.segment} ({error.strerror or error}): run this as its user or as root"
            ) from error
    if nonce is not None:
        tiering.end_all(paths, nonce)
    shutil.rmtree(paths.state, ignore_errors=True)


def _ending_nonce(paths: SegmentPaths) -> int | None:
    """Return which life of the segment is to end, also if that has begun and whoever did was killed."""
    record = paths.state / "ending"
    nonce = _nonce(paths.segment)
    if nonce is None:
        with contextlib.suppress(OSError, ValueError):
            nonce = int(record.read_text(encoding="ascii"))
    else:
        with contextlib.suppress(OSError):  # no room: then what tiers hold stays, if we are killed now
            record.write_text(str(nonce), encoding="ascii")
    return nonce


def _nonce(path: Path) -> int | None:
    """Return which life of the segment it is; None if nobody can tell any more."""
    try:
        segment: _native.Segment = core().attach(str(path))
    except (SegmentError, OSError):
        return None
    nonce = segment.nonce
    segment.close()
    return nonce


def _remove(path: Path) -> None:
    try:
        core().destroy(str(path))
    except SegmentError:
        # Damaged, or of another version: nobody can use it. By its place it is ours.
        path.unlink(missing_ok=True)


def core() -> ModuleType:
    """Return the native core, imported at the first call. Raises `SegmentError` if it is not built."""
    try:
        from tmem.backends import _native
    except ImportError as error:
        raise SegmentError(
            f"the native core is not built for this Python ({error}): run 'pip install -e .' in the project"
        ) from error
    return _native


def prepare_state_dir(paths: SegmentPaths) -> None:
    """Make the directory of sockets and records (mode 0700) unless it is there."""
    try:
        paths.state.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SegmentError(
            f"cannot make {paths.state}: {error.strerror}; "
            "set TMEM_RUNTIME_DIR to a directory on a tmpfs that you can write"
        ) from error


def prepare_runtime_dir() -> Path:
    """Make the run-time directory unless it is there, for root with a tmpfs of our own; return it."""
    directory = runtime_dir()
    ours = not os.environ.get("TMEM_RUNTIME_DIR")
    try:
        directory.mkdir(mode=0o755 if directory == _RUN_TMEM else 0o700, parents=not ours, exist_ok=True)
    except OSError as error:
        raise SegmentError(
            f"cannot make {directory}: {error.strerror}; "
            "set TMEM_RUNTIME_DIR to a directory that you can write"
        ) from error
    if ours and directory == _RUN_TMEM:
        _mount_once(directory)
    elif ours:
        _check_private(directory)
    return directory


def mount_options(directory: Path) -> tuple[str, frozenset[str]] | None:
    """Return (file system type, super-block options) of what is mounted on `directory` itself, or None."""
    found = None
    wanted = re.sub(r"[ \t\n\\]", lambda found: f"\\{ord(found[0]):03o}", str(directory))
    for line in procfiles.lines(procfiles.MOUNTS):
        before, _, after = line.partition(" - ")
        if before.split(" ")[4] == wanted:
            fields = after.split(" ")
            found = (fields[0], frozenset(fields[2].split(",")))  # the last mount is the one on top
    return found


def _mount_once(directory: Path) -> None:
    """Mount a tmpfs on `directory` unless one is there. The lock is on the directory below the mount."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        mounted = mount_options(directory)
        if mounted is None:
            _mount_tmpfs(directory)
        elif mounted[0] != "tmpfs":
            raise SegmentError(f"{directory} is a {mounted[0]} mount, not a tmpfs: unmount it")
    finally:
        os.close(descriptor)


def _mount_tmpfs(directory: Path) -> None:
    # The store bounds itself, so the size only has to be out of its way.
    base = "mode=0755,size=100%"
    code = _mount(directory, f"{base},noswap")
    if code == errno.EINVAL:  # kernels before 6.4 do not know noswap
        code = _mount(directory, base)
    if code:
        raise SegmentError(
            f"cannot mount a tmpfs on {directory}: {os.strerror(code)}; "
            "run this as root of the machine, or set TMEM_RUNTIME_DIR to a directory on a tmpfs"
        )


def _mount(directory: Path, options: str) -> int:
    """Mount a tmpfs and return 0, or the errno."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    result: int = libc.mount(b"tmem", os.fsencode(directory), b"tmpfs", flags, options.encode())
    return ctypes.get_errno() if result else 0


def _check_private(directory: Path) -> None:
    """Refuse a directory in a world-writable place that somebody else made before us."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SegmentError(
            f"{directory} is not a private directory of yours: remove it, or set TMEM_RUNTIME_DIR"
        )


def _check_size(memory_bytes: int) -> None:
    if memory_bytes < MIN_MEMORY_BYTES:
        raise SegmentError(
            f"a segment of {format_size(memory_bytes)} is too small: "
            f"use at least {format_size(MIN_MEMORY_BYTES)}"
        )
    most = capacity()
    if memory_bytes > most.limit_bytes:
        raise SegmentError(
            f"a segment of {format_size(memory_bytes)} is too large: {most.reason}; "
            f"use at most {size_within(max(most.limit_bytes, 0))}"
        )


def _ram_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
