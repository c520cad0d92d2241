"""The mounts in ``tmem top``: what happened between two answers of each, asked beside the drawing.

A mount may not answer, and a frame must not wait for one: a thread asks (`tmem.fs.asking`, whose processes do
the waiting), and a frame shows what is known by then. Nobody is asked unless somebody looks: a round costs a
process of some 30 ms. Not for how it is drawn (`toptables`). Threading: for one thread; the asker is used by
the one of the round only.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tmem.backends.paths import SegmentPaths

if TYPE_CHECKING:
    from tmem.fs.statistics import MountStatistics


@dataclass(frozen=True)
class MountsLook:
    """All mounts of a segment at one moment."""

    at_ns: int
    """Monotonic."""
    mounts: "dict[str, tuple[str, MountStatistics | None]]" = field(default_factory=dict)
    """By mount point: the client, and what was told; None by one that does not answer."""


@dataclass(frozen=True)
class MountRow:
    """One mount over a while; None for what is not known or makes no sense."""

    name: str
    """The mount point, in characters that a terminal shows."""
    client: str
    state: str
    """ "on", "aside" (it has stepped aside), "no pool", or "no answer"."""
    reads_per_s: float | None = None
    hit_share: float | None = None
    """Of the pages that the pool was asked for."""
    hit_bytes_per_s: float | None = None
    lower_bytes_per_s: float | None = None
    misses_per_s: float | None = None
    """Pages."""
    errors: int | None = None
    """Reads of the lower that failed since it was mounted."""
    trouble: bool = False
    """Whether it does not answer, or its lower has failed meanwhile."""


Looks = tuple[MountsLook | None, MountsLook | None]
"""The last but one, and the last."""

UNASKED: Looks = (None, None)


def asked_by(paths: SegmentPaths) -> Callable[[], MountsLook]:
    """Return the function that asks the mounts of the segment, and takes `asking.DEADLINE_S` at most."""
    from tmem.fs import asking  # not above: who looks at pools need not pay for it

    asker = asking.Asker()

    def ask() -> MountsLook:
        found = asking.recorded(paths)
        told = asker.ask(mount.mountpoint for mount in found)
        return MountsLook(
            time.monotonic_ns(), {one.mountpoint: (one.client, told[one.mountpoint]) for one in found}
        )

    return ask


class MountWatcher:
    """Has mounts asked, one round at a time, and keeps the last two."""

    def __init__(self, ask: Callable[[], MountsLook]) -> None:
        self._ask = ask
        self._looks = UNASKED
        self._round: threading.Thread | None = None

    @property
    def looks(self) -> Looks:
        """What is known by now; the same object until something new is."""
        return self._looks

    def begin(self) -> None:
        """Have the mounts asked, unless that goes on already."""
        if self._round is None or not self._round.is_alive():
            self._round = threading.Thread(target=self._once, name="mounts", daemon=True)
            self._round.start()

    def wait(self) -> None:
        """Wait for the end of the round, which is bounded."""
        if self._round is not None:
            self._round.join()

    def _once(self) -> None:
        with contextlib.suppress(OSError):  # no process can be had: then what was known stays
            self._looks = (self._looks[1], self._ask())


def mount_rows(looks: Looks) -> list[MountRow]:
    """Return one row a mount, in the order of their mount points."""
    before, now = looks
    if now is None:
        return []
    found = []
    for mountpoint, (client, told) in sorted(now.mounts.items()):
        _, then = before.mounts.get(mountpoint, (client, None)) if before else (client, None)
        if told is None:
            found.append(MountRow(shown(mountpoint), client, "no answer", trouble=True))
            continue
        seconds = (now.at_ns - before.at_ns) / 1e9 if before else 0

        def since(
            *names: str, told: "MountStatistics" = told, then: "MountStatistics | None" = then
        ) -> int | None:
            gained = sum(getattr(told, name) - getattr(then, name) for name in names) if then else -1
            return gained if gained >= 0 else None  # fewer than before: another mount has come there

        def rate(number: int | None, seconds: float = seconds) -> float | None:
            return None if number is None or seconds <= 0 else number / seconds

        hits, misses = since("hit_pages"), since("miss_pages")
        asked = (hits or 0) + (misses or 0)
        found.append(
            MountRow(
                shown(mountpoint),
                client,
                "aside" if told.stepped_aside else "on" if told.pool_active else "no pool",
                rate(since("hit_reads", "miss_reads", "passthrough_reads")),
                hits / asked if asked and hits is not None and misses is not None else None,
                rate(since("hit_bytes")),
                rate(since("lower_bytes")),
                rate(misses),
                told.lower_errors,
                trouble=bool(since("lower_errors")),
            )
        )
    return found


def shown(path: str) -> str:
    """Return a path so that a terminal shows it and does nothing else: a mount point may have any name."""
    plain = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in plain
    )
