"""What one mount has counted since it started.

Counters are kept by the event loop's thread only (worker threads return their numbers to it), so they need no
lock. Not for the segment's own counters: `tmem.backends.statistics`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MountStatistics:
    """A snapshot of a mount's counters."""

    hit_reads: int
    """Read requests answered from the pool alone."""
    miss_reads: int
    """Read requests that needed the lower file although a pool was there."""
    passthrough_reads: int
    """Read requests answered without a pool: there is none, it is off, or the file is declined."""
    hit_pages: int
    """Pages that came from the pool."""
    miss_pages: int
    """Pages that the pool did not have and the lower file was read for."""
    hit_bytes: int
    """Bytes of file data in the replies counted by `hit_reads`."""
    lower_bytes: int
    """Bytes read from lower files."""
    lower_ns: int
    """Time spent reading lower files for the pool, all threads together."""
    lower_errors: int
    """Reads of lower files that failed, read ahead or because somebody asked."""
    put_pages: int
    """Pages that the pool accepted."""
    put_ns: int
    """Time spent putting pages, all threads together."""
    ahead_pages: int
    """Pages that were read and put before anybody asked for them, a part of `put_pages`."""
    refused_pages: int
    """Pages that the pool refused."""
    overtaken_pages: int
    """Pages that were not put because a change overtook the read, or because one could not be ruled out."""
    flushed_pages: int
    """Pages dropped from the pool because of writes, truncation or removal."""
    foreign_changes: int
    """Files that were found changed underneath the mount, so that their pages were dropped."""
    declined_opens: int
    """Opens of files that are passed through: the rules decline them, or the mount had stepped aside."""
    backed_opens: int
    """Those of them that the kernel reads and writes by itself, uncounted (`backing`)."""
    stepped_aside: bool
    """Whether files opened now are passed through because caching has not paid lately (`worth`)."""
    noticed_changes: int
    """Reports of changes underneath that concerned files which the kernel knows (`watch`)."""
    lost_reports: int
    """How often such reports were lost, so that everything was suspected."""
    watching: bool
    """Whether changes underneath are reported."""
    tier_up: bool
    """Whether the servers of the mount's tier are asked right now."""
    tier_hit_pages: int
    """Pages that came from the tier instead of from the lower file: missed in the pool, or read ahead."""
    tier_miss_pages: int
    """Pages that the tier was asked for and had not."""
    tier_sent_pages: int
    """Pages that the tier was given."""
    tier_dropped_pages: int
    """Pages that it was not given: too many were waiting, or it was not there."""
    tier_wrong_values: int
    """Values of the tier that were not what their names say."""
    tier_failures: int
    """How often the tier was found slow or not there, and stepped around."""
    io_uring: bool
    """Whether requests come over io_uring."""
    pool_active: bool
    """Whether a pool is in use right now: it is there, and neither the client nor the segment is off."""


@dataclass(frozen=True)
class BeyondStatistics:
    """What one mount did with the servers."""

    up: bool = False
    """Whether they are asked."""
    hit_pages: int = 0
    """Pages that came from there instead of from the lower file."""
    miss_pages: int = 0
    """Pages that they were asked for and had not."""
    sent_pages: int = 0
    """Pages that they were given."""
    dropped_pages: int = 0
    """Pages that were left out: too many were waiting, or the servers were not there."""
    wrong_values: int = 0
    """Values that were not what their names say."""
    failures: int = 0
    """How often they were found slow or not there."""


@dataclass(frozen=True)
class RestartStatus:
    """What a mount's daemon tells about restarts with other code (`restart`)."""

    pid: int = 0
    """The daemon's process; it stays the same."""
    start_ticks: int = 0
    """When that process began; see `processes.Process`."""
    count: int = 0
    """Restarts since it was mounted."""
    attempts: int = 0
    """Restarts that were asked for."""
    under_way: bool = False
    """Whether one is being tried right now."""
    failure: str = ""
    """Why the last one did not come about; empty if it did."""
    pause_ns: int = 0
    """How long requests waited for the last one."""


@dataclass
class Counters:
    """The mutable counterpart of `MountStatistics`."""

    hit_reads: int = 0
    miss_reads: int = 0
    passthrough_reads: int = 0
    hit_pages: int = 0
    miss_pages: int = 0
    hit_bytes: int = 0
    lower_bytes: int = 0
    lower_ns: int = 0
    lower_errors: int = 0
    put_pages: int = 0
    put_ns: int = 0
    ahead_pages: int = 0
    refused_pages: int = 0
    overtaken_pages: int = 0
    flushed_pages: int = 0
    foreign_changes: int = 0
    noticed_changes: int = 0
    lost_reports: int = 0
    declined_opens: int = 0
    backed_opens: int = 0

    def snapshot(
        self,
        pool_active: bool,
        stepped_aside: bool,
        watching: bool = False,
        tier: BeyondStatistics = BeyondStatistics(),
        io_uring: bool = False,
    ) -> MountStatistics:
        """Return the counters as they are now."""
        beyond = {f"tier_{name}": value for name, value in vars(tier).items()}
        return MountStatistics(
            pool_active=pool_active,
            stepped_aside=stepped_aside,
            watching=watching,
            io_uring=io_uring,
            **beyond,
            **vars(self),
        )
