"""What is mounted where and how: all that a mount's daemon was told. A value without behaviour of its own."""

import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from tmem.backends.paths import SegmentPaths
from tmem.fs.options import Cache, Loop, MountOptions, Passthrough, Watching
from tmem.fs.policy import Policy
from tmem.fs.state import SavedPlan


@dataclass(frozen=True)
class Successor:
    """How the code is replaced (`restart`)."""

    code: tuple[str, ...] = (sys.executable, "-P", "-m", "tmem.fs.takeover")
    """The command that serves a mount after a restart, to which a descriptor's number is appended: by default
    whatever is then installed where this code came from."""
    drain_seconds: float = 10.0
    """How long requests in hand may take to be answered, before the old code goes on."""


@dataclass(frozen=True)
class Plan:
    """One mount, its places absolute and resolved."""

    lower: str
    mountpoint: str
    options: MountOptions
    paths: SegmentPaths
    """The segment to cache in, if it is there."""
    detached: bool = False
    """Whether it is served by a daemon, which has no terminal to log to."""
    successor: Successor = Successor()
    locked: bool = True
    """Whether the daemon's memory is kept in RAM (`memory`); after a restart it is in any case."""

    def saved(self) -> SavedPlan:
        """Return the plan for `restored`."""
        options = self.options
        return SavedPlan(
            lower=self.lower,
            mountpoint=self.mountpoint,
            segment_name=self.paths.name,
            segment_directory=str(self.paths.directory),
            client=options.client,
            shared=options.shared.bytes if options.shared else None,
            cache=options.cache.value,
            loop=options.loop.value,
            allow_other=options.allow_other,
            timeout_seconds=options.timeout_seconds,
            watch=options.watch.value,
            passthrough=options.passthrough.value,
            policy=options.policy.saved(),
            flags=options.flags,
            ignored=options.ignored,
            tier=options.tier,
            settled_seconds=options.settled_seconds,
            detached=self.detached,
            code=self.successor.code,
            drain_seconds=self.successor.drain_seconds,
        )

    @classmethod
    def restored(cls, saved: SavedPlan) -> "Plan":
        """Return the plan that was `saved`."""
        options = MountOptions(
            saved["client"],
            uuid.UUID(bytes=saved["shared"]) if saved["shared"] else None,
            Cache(saved["cache"]),
            Loop(saved["loop"]),
            saved["allow_other"],
            saved["timeout_seconds"],
            Watching(saved["watch"]),
            Passthrough(saved["passthrough"]),
            Policy.restored(saved["policy"]),
            saved["flags"],
            saved["ignored"],
            saved["tier"],
            saved["settled_seconds"],
        )
        paths = SegmentPaths(saved["segment_name"], Path(saved["segment_directory"]))
        successor = Successor(saved["code"], saved["drain_seconds"])
        return cls(saved["lower"], saved["mountpoint"], options, paths, saved["detached"], successor)
