"""Which files a mount caches, by size and name. Values and plain functions; not for when it pays: `worth`.

A pattern is one of `fnmatch`: ``*`` any bytes, ``?`` one, ``[...]`` one of these. A pattern with a slash is
matched against the path below the lower directory (``*`` matches slashes too), any other against the last
part of it. Case counts.
"""

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

_DELETED = " (deleted)"


@dataclass(frozen=True)
class Rules:
    """What is cached; everything by default."""

    cache_files: tuple[str, ...] = ()
    """Patterns: only what matches one of these is cached; none: all."""
    skip_files: tuple[str, ...] = ()
    """Patterns: what matches one of these is not cached."""
    least_bytes: int = 0
    """Smaller files are not cached."""
    most_bytes: int | None = None
    """Larger files are not cached."""

    def decline(self, size_bytes: int, path: Callable[[], str]) -> bool:
        """Say whether a file is not to be cached; `path` (see `path_below`) is called only if need be."""
        if size_bytes < self.least_bytes or (self.most_bytes is not None and size_bytes > self.most_bytes):
            return True
        if not self.cache_files and not self.skip_files:
            return False
        where = path()
        if self.cache_files and not _matches(where, self.cache_files):
            return True
        return _matches(where, self.skip_files)


EVERYTHING = Rules()


def path_below(root: int, descriptor: int) -> str:
    """Return the path by which the open file was found, below the directory open at `root`.

    The kernel follows renames. Of several hard links it is the one that `descriptor` was opened by; a file
    without links keeps its last name; of a file outside `root` the whole path comes back. A path that is too
    long for the kernel to tell (4,096 bytes) is empty.
    """
    top = os.readlink(f"/proc/self/fd/{root}").rstrip("/") + "/"  # noqa: PTH115 - per open
    try:
        path = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return ""
    if path.endswith(_DELETED) and not os.fstat(descriptor).st_nlink:
        path = path.removesuffix(_DELETED)
    return path.removeprefix(top)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    name = path.rpartition("/")[2]
    return any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)
