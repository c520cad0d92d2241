"""Demotion: cold persistent pages go from memory to their client's tier, in the background.

The manager calls `Demotion.round` again and again, in a worker thread. It demotes while persistent pages
are short of memory: little of the segment is free or evictable, or a client is near its cap; between two
marks, so that it does not begin and stop with each page. Pages that were not used between two looks go first
(a clock, `native/demote.c`); only when even that is not enough, any. The order is always: copy, write, have
it acknowledged, then let go of the memory, so a failure costs nothing but another try.

Not for what a put does when it finds no memory (it evicts ephemeral pages, then refuses), nor for who has
which tier (`tiering`). Threading: one thread at a time; the only writer of all tiers of the segment.
"""

import contextlib
import logging
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tmem.backends import tiering
from tmem.backends.paths import SegmentPaths
from tmem.backends.tiers.contract import Tier
from tmem.errors import TierError, TierFullError, TmemError
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native

BATCH_BYTES = 1 << 20
BATCH_PAGES = 2048
LEAST_PAGES = 32
ROUND_S = 0.5
"""How long a round goes on demoting at most, so that the manager looks at other things."""
GRACE_MS = 200
"""How long to wait for readers before room in a tier is used again; else next time."""
LAP_S = 1.0
"""How long a page must not have been used to be cold, at least."""
RETRY_S = 1.0
"""How long to leave a tier alone that failed or is full."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """How much memory is wanted, and whether pages that are in use may go for it."""

    size_bytes: int
    urgent: bool


@dataclass(frozen=True)
class Marks:
    """Demotion begins below `low` and goes on up to `high`: shares of memory that are free or evictable."""

    low: float = 1 / 8
    high: float = 3 / 16


class ClientDemotion:
    """One client's pages on their way to its tier."""

    def __init__(self, client: "_native.Client", tier: Tier, url: str, epoch: int) -> None:
        self.client = client
        self.tier = tier
        self.url = url
        self.epoch = epoch
        """Of the client when the tier was opened: the core demotes for no other."""
        self.demoted_pages = 0
        self.problem = ""
        """Why nothing can be demoted now; empty if something can."""
        self._buffer = bytearray(BATCH_BYTES + 8192)
        self._hand = 0
        self._lap_s: float | None = None  # when this lap of the clock began
        self._lap_pages = 0  # that it has found
        self._empty_laps = 0  # one after the other
        self._any = False
        self._ready = False  # the tier knows what lives
        self._rest_until = 0.0

    def batch(self, need: "Need", now_s: float) -> int | None:
        """Demote up to a batch of pages; the number, None if there is nothing to be done now."""
        if now_s < self._rest_until:
            return None
        try:
            if not self._ready and not self._tidy():
                return None
            return self._batch(need, now_s)
        except TierFullError as error:
            # What pages have left behind there may do: the next batch asks for it first.
            self._ready = False
            if not self.problem:
                self.problem = str(error)
                return 0
            self._rest(error, now_s)
        except TierError as error:
            self._ready = False
            self._rest(error, now_s)
        return None

    def _rest(self, error: TierError, now_s: float) -> None:
        if not self._rest_until:
            _log.warning("pages of %s stay in memory: %s", self.client.name, error)
        self.problem = str(error)
        self._rest_until = now_s + RETRY_S

    def _tidy(self) -> bool:
        """Tell the tier what lives; False while somebody may still read something else."""
        live = self.client.live(GRACE_MS)
        if live is None:
            return False
        self.tier.retain(memoryview(live).cast("Q"))
        self._ready = True
        return True

    def _batch(self, need: "Need", now_s: float) -> int | None:
        urgent = need.urgent
        most = min(max(need.size_bytes // PAGE_SIZE, LEAST_PAGES), BATCH_PAGES)
        if not self._hand:  # once around
            if self._lap_s is not None and now_s < self._lap_s + LAP_S and not urgent:
                return None
            # The first time around finds nothing, for it only takes marks away. Without any cold page after
            # that, those that are not may have to do.
            self._empty_laps = 0 if self._lap_s is None or self._lap_pages else self._empty_laps + 1
            self._any = urgent and self._empty_laps >= 2
            self._lap_s, self._lap_pages = now_s, 0
        self._hand, places, pages = self.client.collect(self._hand, self._buffer, most, self._any, self.epoch)
        self._lap_pages += len(places)
        if self._any and not self._hand and not self._lap_pages:
            return None  # there is nothing but pages of one repeated word
        if not places:
            return 0
        with memoryview(self._buffer) as view:
            records = [view[at : at + length] for at, length in places]
            locations = self.tier.write(records)
            for record in records:
                record.release()
        demoted = self.client.demote(pages, array("Q", locations))
        self.demoted_pages += demoted
        self.problem, self._rest_until = "", 0.0
        return demoted


class Demotion:
    """Demotion of all clients of a segment that have tiers."""

    def __init__(
        self,
        paths: SegmentPaths,
        segment: "_native.Segment",
        marks: Marks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = paths
        self._segment = segment
        self._marks = marks or Marks()
        self._clock = clock
        self._clients: dict[tuple[int, int], ClientDemotion] = {}
        self._complaints: dict[str, str] = {}
        self._short: set[tuple[int, int]] = set()

    @property
    def demoted_pages(self) -> int:
        """Pages that went to tiers since this began."""
        return sum(client.demoted_pages for client in self._clients.values())

    def problems(self) -> dict[str, str]:
        """Return why pages of clients stay in memory, by the client's name."""
        found = dict(self._complaints)
        found.update({one.client.name: one.problem for one in self._clients.values() if one.problem})
        return found

    def round(self) -> bool:
        """Look at all clients once, and demote for a while where memory is short; True: soon again."""
        self._look()
        until = self._clock() + ROUND_S
        hurry = False
        for key, client in list(self._clients.items()):
            try:
                while (need := self._need(key, client)) is not None and self._clock() < until:
                    if client.batch(need, self._clock()) is None:
                        break
                hurry = hurry or key in self._short
            except TmemError:  # the client ends; the next look sees it
                continue
        return hurry and not self.problems()

    def _need(self, key: tuple[int, int], client: ClientDemotion) -> Need | None:
        """Return what is to be demoted of the client now, None if nothing."""
        if client.client.phase != "none" or not client.client.tiered:
            return None
        free, base_bytes = self._free_share(client)
        mark = self._marks.high if key in self._short else self._marks.low
        if free >= mark:
            self._short.discard(key)
            client.problem = ""
            return None
        self._short.add(key)
        return Need(int((self._marks.high - free) * base_bytes), free < self._marks.low / 2)

    def _free_share(self, client: ClientDemotion) -> tuple[float, int]:
        """Return which share of the memory is free for persistent pages, and of how much."""
        # Holes in chunks that are in use take pages too, or chunks are freed by moving pages together.
        base_bytes = self._segment.limits[1]
        share = (self._segment.freeable_bytes() + self._segment.occupied[2]) / base_bytes
        cap_bytes = client.client.cap_bytes
        if cap_bytes:
            below = 1 - client.client.statistics()["used_bytes"] / cap_bytes
            if below < share:
                return below, cap_bytes
        return share, base_bytes

    def _look(self) -> None:
        """Open the tiers of new clients; close and remove those of clients that are no more."""
        # The links first: a client of a link that is not there after that is no more, and not yet to come.
        links = list(tiering.assigned_tiers(self._paths))
        lives = {(client.id, client.serial): client for client in self._segment.clients()}
        for assigned in links:
            key = (assigned.client, assigned.serial)
            name = lives[key].name if key in lives else assigned.link.name
            try:
                if key not in lives:
                    self._drop(key)
                    tiering.end(self._segment, assigned)
                else:
                    self._follow(key, lives[key])
                self._complaints.pop(name, None)
            except TierError as error:
                self._complain(name, error)
            except TmemError:  # the client ends; the next look sees it
                continue
        assigned_now = {(one.client, one.serial) for one in tiering.assigned_tiers(self._paths)}
        for key in self._clients.keys() - assigned_now:
            self._drop(key)
        for name in [name for name in self._complaints if name.startswith("ended-")]:
            if not (self._paths.state / name).is_symlink():
                del self._complaints[name]
        for ended in tiering.ended_tiers(self._paths):
            try:
                tiering.end(self._segment, ended)
                self._complaints.pop(ended.link.name, None)
            except TierError as error:
                self._complain(ended.link.name, error)

    def _follow(self, key: tuple[int, int], client: "_native.Client") -> None:
        """Open the tier that the client has, unless that is open. The epoch is read first: if the link is of
        a later tier, the core refuses to demote, and the next look opens it anew."""
        epoch = client.tier_epoch
        url = tiering.of(self._paths, client)
        have = self._clients.get(key)
        if have is not None and (have.url, have.epoch) == (url, epoch):
            return
        self._drop(key)
        if url is not None:
            tier = tiering.open_tier(url, tiering.identity(self._segment, client), writer=True)
            self._clients[key] = ClientDemotion(client, tier, url, epoch)

    def _complain(self, name: str, error: TierError) -> None:
        if self._complaints.get(name) != str(error):
            _log.warning("tier of %s: %s", name, error)
        self._complaints[name] = str(error)

    def _drop(self, key: tuple[int, int]) -> None:
        if (gone := self._clients.pop(key, None)) is not None:
            gone.tier.close()
        self._short.discard(key)

    def close(self) -> None:
        """Let go of all tiers; records stay."""
        with contextlib.suppress(KeyError):
            while True:
                _key, client = self._clients.popitem()
                client.tier.close()
