"""The overlay file system: all handlers together, and what the mount says about itself.

`build` makes one from a lower directory; `Overlay.close` gives back what it holds. What pyfuse3 does not
offer fails or falls back as the kernel decides, such as unnamed files (O_TMPFILE), unless it comes past
libfuse (`shortcuts`); locks are the mount's own. Threading: see `base`.
"""

import contextlib
import dataclasses
import json
import os
import resource
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pyfuse3

from tmem.fs.base import Waiting
from tmem.fs.coherence import Coherence
from tmem.fs.directories import Directories
from tmem.fs.fanotify import Events
from tmem.fs.files import Files
from tmem.fs.identity import has_fine_stamps
from tmem.fs.inodes import InodeTable
from tmem.fs.lifetimes import Lifetimes
from tmem.fs.mounts import PID_ATTRIBUTE, RESTART_ATTRIBUTE, STATISTICS_ATTRIBUTE
from tmem.fs.openfile import Pause, no_pause
from tmem.fs.policy import DEFAULT, Policy
from tmem.fs.precache import Precache
from tmem.fs.reading import Reading
from tmem.fs.sharing import SharedCoherence
from tmem.fs.shortcuts import Shortcuts
from tmem.fs.state import SavedOverlay
from tmem.fs.statistics import BeyondStatistics, MountStatistics, RestartStatus
from tmem.fs.watch import Watch

if TYPE_CHECKING:
    from pyfuse3 import RequestContext

    from tmem.fs.beyond import Beyond


class Overlay(Files, Directories):
    """The file system that pyfuse3 serves."""

    supports_dot_lookup = (
        False  # "." of a directory that the kernel has forgotten: only needed to export over NFS
    )
    enable_acl = True  # or default_permissions would ignore access control lists
    restarts = RestartStatus()
    """What there is to say about restarts; set by `serving`."""

    def read_by(self, reading: Reading | None) -> None:
        """Have hits answered by a native reader from now on, or not any more; what it can, past libfuse."""
        super().read_by(reading)
        if reading is not None:
            reading.reader.set_listings(self.listings)
            if self.watch is not None:
                reading.reader.watched()
            reading.answer_with(Shortcuts(self, reading.reader))

    def statistics(self) -> MountStatistics:
        """Return what the mount has counted."""
        self.count_native_hits()
        beyond = BeyondStatistics() if self.beyond is None else self.beyond.statistics()
        return self.precache.counters.snapshot(
            self.precache.pool() is not None,
            self._worth.resting,
            self.watch is not None,
            beyond,
            io_uring=self.reading is not None and self.reading.rings is not None,
        )

    def ask_beyond(self, beyond: "Beyond") -> None:
        """Ask servers that other hosts ask, too, before the lower; owns `beyond`."""
        self.beyond = beyond

    def watch_with(self, events: Events | None) -> None:
        """Have changes underneath show at once if there are reports of them; owns `events`."""
        if events is None or not self.table.opens_handles:
            return
        self.watch = Watch(events, self.table, self.coherence, self.kernel, self.precache.counters)
        self.lifetimes.attributes_told = True

    def connect(self, device: int, request: bytes) -> None:
        """Tell the kernel through `device`, a descriptor of /dev/fuse, whose INIT request was `request`."""
        self.kernel.connect(device, request)
        self.lifetimes.names_told = self.watch is not None and self.kernel.drops_names

    async def getxattr(self, inode: int, name: bytes, ctx: "RequestContext") -> bytes:
        """Return an extended attribute; the root directory has three more, which `mounts` asks for."""
        if inode == pyfuse3.ROOT_INODE:
            if name == PID_ATTRIBUTE:
                return b"%d" % os.getpid()
            if name == STATISTICS_ATTRIBUTE:
                return json.dumps(dataclasses.asdict(self.statistics())).encode()
            if name == RESTART_ATTRIBUTE:
                return json.dumps(dataclasses.asdict(self.restarts)).encode()
        return await super().getxattr(inode, name, ctx)

    def saved(self) -> SavedOverlay:
        """Return everything that the kernel relies on, for `restore` in the code that takes over.

        Exact once no request is in hand; before that, good enough to try it out with.
        """
        self.count_native_hits()
        if self.watch is not None:
            self.watch.tell_the_rest()
        inodes, places = self.table.saved(self.used_by_files())
        files, next_file = self.saved_files(places)
        listings, next_listing = self.saved_listings(places)
        return SavedOverlay(
            inodes=inodes,
            files=files,
            next_file=next_file,
            listings=listings,
            next_listing=next_listing,
            remembered=self.coherence.saved(),
            distrusted=self.coherence.distrusted(),
            pool=self.precache.saved(),
            counters=vars(self.precache.counters).copy(),
            fine_stamps=self._fine_stamps,
            mark=self.instances.mark,
            reports=self.watch.descriptor if self.watch else -1,
        )

    def restore(self, saved: SavedOverlay) -> None:
        """Become, from new, what was `saved`. Owns its descriptors then, and leaves the pool to `claim`."""
        self.instances.keep(saved["mark"])
        inodes = self.table.restore(saved["inodes"])
        self.restore_files(saved["files"], saved["next_file"], inodes)
        self.restore_listings(saved["listings"], saved["next_listing"], inodes)
        self.coherence.restore(saved["remembered"], saved["distrusted"])
        if saved["reports"] >= 0:
            self.watch_with(Events(saved["reports"]))
        counters = vars(self.precache.counters)
        counters.update((name, value) for name, value in saved["counters"].items() if name in counters)

    def close(self) -> None:
        """Close every descriptor, and destroy the pool."""
        if self.beyond is not None:
            self.beyond.close()
        if self.watch is not None:
            self.watch.close()
        self.close_files()
        self.close_directories()
        self.table.close()
        self.instances.close()
        self.precache.close()


def build(
    root: int,
    precache: Precache,
    *,
    timeout_seconds: float | None = None,
    cached: Callable[[os.stat_result, bool], bool] = lambda status, appends: False,
    most_cached: Callable[[], int] | None = None,
    waiting: Waiting = contextlib.nullcontext,
    pause: Pause = no_pause,
    policy: Policy = DEFAULT,
    clock: Callable[[], float] = time.monotonic,
    fine_stamps: bool | None = None,
    now_ns: Callable[[], int] = time.time_ns,
) -> Overlay:
    """Return an overlay on the directory open at `root` (O_RDONLY), which it then owns.

    `most_cached` as for `Opening`; `fine_stamps` None tries the file system out; `now_ns` is the wall clock,
    `clock` a monotonic one in seconds.
    """
    if fine_stamps is None:
        fine_stamps = has_fine_stamps(root)
    coherence = Coherence if precache.shared is None else SharedCoherence
    quota = raise_descriptor_limit() // 2  # the other half is for files that are open
    table = InodeTable(root, quota, clock)
    return Overlay(
        table,
        precache,
        coherence(precache, now_ns),
        fine_stamps,
        Lifetimes(timeout_seconds, table.device, now_ns),
        waiting,
        cached=cached,
        most_cached=most_cached,
        pause=pause,
        policy=policy,
        clock=clock,
    )


def raise_descriptor_limit() -> int:
    """Raise this process' limit of open files as far as it may; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
