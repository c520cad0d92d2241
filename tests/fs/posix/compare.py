"""Doing the same on a plain directory and through a mount, and comparing everything that shows.

`Twins` holds a mount and a plain directory beside its lower one, on the same file system. A *case* is a
directory of its own in both: it is staged alike underneath, an operation is done in both by an `Actor` (a
process that is some user), and what has become of it is compared: plain against lower, and plain against the
mount's view. Times are compared as "as staged", "set to this" and "changed"; so staged files have old ones.
"""

import ctypes
import errno
import multiprocessing
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ATIME_NS, MTIME_NS = 1_000_000_000_000_000_001, 1_100_000_000_000_000_002
"""The times of staged files; the access comes first, so that relatime shows the next one."""

RECENT_NS = 1_600_000_000_000_000_000
"""Later times were made by the clock."""

Operation = Callable[[str], object]
"""Does something in the directory that is given, and returns what is to be compared."""


@dataclass(frozen=True)
class User:
    """Who does it: user id, group id, further groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = User("root", 0, 0)
OWNER = User("owner", 1234, 1234, (2345,))
MEMBER = User("member", 1235, 1235, (1234,))
OTHER = User("other", 1236, 1236)
USERS = (ROOT, OWNER, MEMBER, OTHER)

_libc = ctypes.CDLL(None, use_errno=True)


class Actor:
    """A process that does operations as `user`. They are named by their place in `table`."""

    def __init__(self, user: User, table: dict[str, Operation]) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_act, args=(user, table, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def do(self, operation: str, directory: Path) -> object:
        """Return what the operation returned, or the name of the errno that it failed with."""
        self._pipe.send((operation, str(directory)))
        if not self._pipe.poll(30):
            raise TimeoutError(f"{operation} in {directory} hangs")
        result: object = self._pipe.recv()
        return result

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)  # other actors hold copies of our end: closing it would tell nothing
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _act(user: User, table: dict[str, Operation], pipe: Connection) -> None:
    os.umask(0o022)
    if user.uid:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    while True:
        wanted = pipe.recv()
        if wanted is None:
            return
        name, directory = wanted
        pipe.send(outcome(table[name], directory))


def outcome(operation: Operation, directory: str) -> object:
    """Return what the operation returns, or the name of its errno."""
    try:
        return operation(directory)
    except OSError as error:
        return errno_name(error)


def errno_name(error: OSError) -> str:
    """Return ``ENOENT`` for 2."""
    if error.errno == errno.EOPNOTSUPP:  # has two names
        return "EOPNOTSUPP"
    return errno.errorcode.get(error.errno or 0, str(error))


@dataclass
class Twins:
    """A mount at `point` of `lower`, and a `plain` directory beside it."""

    plain: Path
    lower: Path
    point: Path
    contents_only: bool = False
    """Whether operations on names and attributes need not be tried."""
    native: bool = True
    """Whether requests that pyfuse3 does not know are answered."""
    cases: int = 0

    def stage(self, build: Callable[[Path], object]) -> str:
        """Begin a new case: have `build` fill a directory in both, underneath. Returns its name."""
        self.cases += 1
        name = f"case{self.cases}"
        for root in (self.plain, self.lower):
            directory = root / name
            directory.mkdir()
            directory.chmod(0o777)  # whatever the umask is
            build(directory)
            age(directory)
        return name

    def compare(
        self, name: str, act: Callable[[Path], object], views: tuple[str, ...] = ("lower", "mount")
    ) -> list[str]:
        """Do it in both directories of the case; return what differs in the result and the `views`."""
        before = [stamps(root / name) for root in (self.plain, self.lower)]
        expected, result = act(self.plain / name), act(self.point / name)
        differences = []
        if result != expected:
            differences.append(f"gives {result!r} instead of {expected!r}")
        roots = {"": self.plain, "lower": self.lower, "mount": self.point}
        seen = {view: statuses(roots[view] / name) for view in ("", *views)}  # before reading any
        plain = shown(seen[""], before[0])
        for view in views:
            found = shown(seen[view], before[1])
            differences += [f"{view}: {line}" for line in differing(plain, found)]
        return differences


def age(directory: Path) -> None:
    """Give a staged case old times, innermost first."""
    for path in [*sorted(directory.rglob("*"), reverse=True), directory]:
        os.utime(path, ns=(ATIME_NS, MTIME_NS), follow_symlinks=False)


def walk(directory: Path) -> Iterator[Path]:
    """Yield a directory and all below it, without changing an access time where that can be avoided."""
    yield directory
    if not stat.S_ISDIR(directory.lstat().st_mode):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME)
    try:
        names = sorted(os.listdir(descriptor))  # noqa: PTH208 - of a descriptor
    finally:
        os.close(descriptor)
    for name in names:
        yield from walk(directory / name)


Statuses = list[tuple[str, Path, os.stat_result]]


def statuses(directory: Path) -> Statuses:
    """Return name, path and status of a case and of all in it."""
    return [(str(path.relative_to(directory)), path, path.lstat()) for path in walk(directory)]


def stamps(directory: Path) -> dict[int, int]:
    """Return the ctime of every inode of a case."""
    return {status.st_ino: status.st_ctime_ns for _, _, status in statuses(directory)}


def shown(found: Statuses, before: dict[int, int]) -> dict[str, dict[str, object]]:
    """Return everything that shows of a case, by name; `before` are its `stamps` before the operation."""
    return {name: _shown_one(path, status, before) for name, path, status in found}


def _shown_one(path: Path, status: os.stat_result, before: dict[int, int]) -> dict[str, object]:
    fields: dict[str, object] = {
        "mode": oct(status.st_mode),
        "nlink": status.st_nlink,
        "owner": (status.st_uid, status.st_gid),
        "size": status.st_size,
        "blocks": status.st_blocks,
        "rdev": status.st_rdev,
        "atime": clocked(status.st_atime_ns),
        "mtime": clocked(status.st_mtime_ns),
        "ctime": "as before" if before.get(status.st_ino) == status.st_ctime_ns else "changed",
    }
    if stat.S_ISLNK(status.st_mode):
        fields["target"] = str(path.readlink())
    elif stat.S_ISREG(status.st_mode):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME)
        try:
            fields["bytes"] = os.read(descriptor, 1 << 22)
        finally:
            os.close(descriptor)
    attributes = os.listxattr(path, follow_symlinks=False)
    fields["xattrs"] = {name: os.getxattr(path, name, follow_symlinks=False) for name in sorted(attributes)}
    return fields


def clocked(time_ns: int) -> object:
    """Return a time if somebody has set it, or that the clock has."""
    return time_ns if time_ns < RECENT_NS else "now"


def differing(expected: dict[str, dict[str, object]], found: dict[str, dict[str, object]]) -> Iterable[str]:
    """Yield a line for all that is not as expected."""
    for path in sorted(expected.keys() | found.keys()):
        if path not in found or path not in expected:
            yield f"{path} {'is missing' if path not in found else 'should not be there'}"
            continue
        for field, value in expected[path].items():
            if found[path].get(field) != value:
                yield f"{path}: {field} is {_short(found[path].get(field))} instead of {_short(value)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 120 else f"{text[:100]}... ({len(text)} characters)"


UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2


def utimensat(path: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set times given as seconds and nanoseconds, UTIME_NOW or UTIME_OMIT; a link's own."""
    times = (ctypes.c_long * 4)(*atime, *mtime)
    _check(_libc.utimensat(-100, os.fsencode(path), times, 0x100))


def fallocate(descriptor: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2), which Python lacks."""
    _check(_libc.fallocate(descriptor, mode, ctypes.c_long(offset), ctypes.c_long(size)))


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Return an access control list, version 2, of (tag, rights, id)."""
    return b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little")
        + rights.to_bytes(2, "little")
        + (identity & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, rights, identity in entries
    )


USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHERS = 1, 2, 4, 8, 0x10, 0x20
