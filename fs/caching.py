"""Which files the kernel keeps copies of itself, beside the pool.

A file that is opened with direct_io is kept once, in the pool, and each read of it comes to the daemon. A
file that the kernel caches is read again without anybody's help, but is there twice. So by default the kernel
may keep *small* files as long as memory is in *plenty*: then a second copy costs nothing that anybody wants,
the kernel takes it back before anything else once somebody does, and what it saves is largest: opening,
reading and closing such a file is two requests instead of five, none of them a read. Larger files stay
direct: streams are faster past the kernel (1 MiB at a time, of bindfs: direct 1.1 to 1.4, filling the
kernel's cache from the pool 0.6), and a second copy of them is much.

Never what is opened to append (O_APPEND): a write that goes by way of the kernel's copies is cut where one of
these ends, and what others append underneath, or through another mount, would come in between.

On kernels before 6.6 files with direct_io cannot be mapped shared, so there the kernel caches all. Threading:
the event loop's thread.
"""

import os
import time
from collections.abc import Callable

from tmem.backends import pressure
from tmem.fs.options import Cache

SMALL_BYTES = 128 << 10
"""What the kernel reads with one request."""
PLENTY = 1 / 4
"""Of memory that can be had, the kernel's copies among it: of the machine, and of our own control groups."""
_ANY_BYTES = (1 << 63) - 1
_LOOK_SECONDS = 5.0
"""Between two looks, which take 1.2 ms; to be late costs a copy that the kernel drops again."""


def plenty() -> bool:
    """Say whether memory is in plenty."""
    return all(room.available_bytes >= room.total_bytes * PLENTY for room in pressure.rooms())


class CacheRule:
    """Says of each file that is opened whether the kernel caches it; `clock` is monotonic, in seconds."""

    def __init__(
        self,
        wanted: Cache,
        plenty: Callable[[], bool] = plenty,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wanted = wanted
        self._all = wanted is not Cache.DIRECT
        self._plenty = plenty
        self._clock = clock
        self._next_look = float("-inf")
        self._small = False
        self._direct_mmap = True

    def settle(self, direct_mmap: bool) -> None:
        """Decide, knowing whether files with direct_io can be mapped shared."""
        self._direct_mmap = direct_mmap
        self._all = self._wanted is Cache.KERNEL or (self._wanted is Cache.AUTO and not direct_mmap)

    def most_bytes(self) -> int:
        """Return how large files are that the kernel caches, from one byte on; 0: none."""
        if self._all:
            return _ANY_BYTES
        return SMALL_BYTES if self._wanted is not Cache.DIRECT and self._looked() else 0

    def __call__(self, status: os.stat_result, appends: bool = False) -> bool:
        """Say whether the kernel caches the file with this status, opened to append or not."""
        if appends and self._direct_mmap:
            return False
        # Some file systems say 0 of files that have content.
        if self._all or self._wanted is Cache.DIRECT or not 0 < status.st_size <= SMALL_BYTES:
            return self._all
        return self._looked()

    def _looked(self) -> bool:
        """Say whether small files are cached, as of the last look."""
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            try:
                self._small = self._plenty()
            except (OSError, ValueError, LookupError):  # what served /proc in a container is gone, say
                self._small = False
        return self._small
