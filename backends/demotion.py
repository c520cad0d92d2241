"""Demotion: cold persistent pages go from memory to their client's tier, in the background.

The manager calls `Demotion.round` again and again, in a worker thread. It demotes while persistent pages
are short of memory: little of the segment is free or evictable, or a client is near its cap; between two
marks, so that it does not begin and stop with each page. Pages that were not used between two looks go first
(a clock, `native/demote.c`); only when even that is not enough, any. The order is always: copy, write, have
it acknowledged, then let go of the memory, so a failure costs nothing but another try.

With `tier_cold_s` set, pages that nobody has used for so long go although there is memory: by laps of the
same clock that are so far apart, in a tenth of the time. While there is plenty pages come back
(`prefetching`).

Each client's tier is opened, written and asked in a thread of its own, and tiers that have ended are
removed in another: one that hangs delays its own client, and the others by `PATIENCE_S` at most, once.

Not for what a put does when it finds no memory (it evicts ephemeral pages, then refuses), nor for who has
which tier (`tiering`). Threading: one thread at a time calls; the only writer of all tiers of the segment.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tmem.backends import tiering
from tmem.backends.batches import Batches
from tmem.backends.errands import Errand
from tmem.backends.paths import SegmentPaths
from tmem.backends.prefetching import QUIET_S, Prefetch
from tmem.backends.tierlooks import LATE_S, LOOK_S, TierFigures, TierLook
from tmem.backends.tiers.contract import Tier, TierIdentity
from tmem.errors import PoolError, TierDownError, TierError, TierFullError, TmemError
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native

BATCH_PAGES = 2048
LEAST_PAGES = 32
ROUND_S = 0.5
"""How long a round goes on demoting at most, so that the manager looks at other things."""
COLD_ROUND_S = 0.1
"""How long a round begins batches of cold pages: a tenth of the time, in which reads of the tier may wait."""
PATIENCE_S = 1.0
"""How long a round waits for tiers at most; those that take longer are not waited for again."""
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
    """One client's pages on their way to its tier, in a thread of their own."""

    def __init__(
        self,
        segment: "_native.Segment",
        client: "_native.Client",
        url: str,
        epoch: int,
        open_tier: Callable[[], Tier],
        clock: Callable[[], float],
    ) -> None:
        self.client = client
        self.name = client.name
        """The client's, also when that is no more."""
        self.url = url
        self.epoch = epoch
        """Of the client before its URL was read: the core demotes for no other."""
        self.cold_pages = 0
        """Pages that went although there was memory."""
        self.problem = ""
        """Why nothing can be demoted now; empty if something can, or need not."""
        self.short = False
        """Memory is short for this client: demotion goes on up to the high mark."""
        self.errand = Errand(f"tier of {self.name}")
        self.prefetch = Prefetch(segment, client, clock)
        self._open_tier = open_tier
        self._clock = clock
        self._tier: Tier | None = None
        self._batches = Batches(client, epoch, tiering.batch_bytes(url), tiering.batches_at_once(url))
        self._ended = False
        self._complaint = ""  # why the tier cannot be opened
        self._hand = 0
        self._lap_s: float | None = None  # when this lap of the clock began
        self._lap_pages = 0  # that it has found
        self._empty_laps = 0  # one after the other
        self._any = False
        self._ready = False  # the tier knows what lives
        self._rest_until = 0.0
        self._look = TierLook(clock(), "", None)
        self._look_s = 0.0  # when the tier is to be looked at again
        self._marks_s = clock()  # when marks were taken away last, as far as we know
        self._cold_hand = 0  # where a lap for cold pages goes on; 0: none is under way
        self._quiet_from_s = clock() + QUIET_S  # from when on memory is in plenty again

    @property
    def demoted_pages(self) -> int:
        """Pages that have left memory for this tier."""
        return self._batches.demoted_pages

    @property
    def trouble(self) -> str:
        """What people should know: why its tier is not open, or nothing can be demoted."""
        return self._complaint or self.problem

    def seen(self, now_s: float) -> TierFigures | None:
        """Return how the tier was when its thread looked last; None before it has, unless it takes long."""
        look = self._look
        known = look.statistics is not None or look.down or now_s - look.at_s > LATE_S
        return look.figures(now_s) if known else None

    def go(
        self,
        need: "Callable[[ClientDemotion], Need | None]",
        until_s: float,
        cold_s: int = 0,
        back_pages: int = 0,
    ) -> None:
        """Demote as long as there is need, until the clock says `until_s`; or a batch of cold pages. Without
        need for long, bring up to `back_pages` back."""
        try:
            if self._tier is None:
                self._open()
            if cold_s:
                self._cool(cold_s, need)
            while (wanted := need(self)) is not None and self._clock() < until_s and not self._ended:
                self._quiet_from_s = self._clock() + QUIET_S
                self.prefetch.stop()
                if not self.batch(wanted, self._clock()):
                    break
            self._land()
            if self._ready and not (self.client.tiered and self.client.tier_epoch == self.epoch):
                # Whoever took the tier away may have removed what is there before the last batch came.
                self._tidy()
                self._ready = False
            self._see()
            if not self.trouble and self._clock() >= self._quiet_from_s:
                self.prefetch.round(back_pages, cold_s > 0, lambda: self._may_come_back(need))
            self._complaint = ""
        except PoolError:  # the client ends; the next look sees it
            pass
        except Exception as error:  # whatever it is, nothing goes, and people shall know
            if self._complaint != (words := _words(error)):
                _log.warning("tier of %s: %s", self.name, words)
            self._complaint = words
            self._note(words)
        finally:
            self._batches.drop()  # nothing is under way unless this fails

    def _note(self, down: str) -> None:
        """Keep what is known of the tier, for who asks."""
        self._look = TierLook(self._clock(), down, None if self._tier is None else self._tier.statistics())

    def _see(self) -> None:
        """Look at the tier now and then: nothing may go there for days, and it be down or full of what nobody
        needs any more."""
        if self._tier is None or (now_s := self._clock()) < self._look_s:
            return
        if not (self.client.tiered and self.client.tier_epoch == self.epoch):
            self._note(self._look.down)  # it is being taken away; this thread does not hang
            return
        self._look_s = now_s + LOOK_S
        down = ""
        try:
            self._tier.check()
            if self.client.phase == "none" and self._has_garbage():
                self._tidy()
        except TierError as error:
            self._ready, down = False, str(error)
        self._note(down)

    def _has_garbage(self) -> bool:
        """Whether the tier has not been told yet what lives, or a quarter of its records does not."""
        assert self._tier is not None
        records = self._tier.statistics().records
        return not self._ready or self.client.statistics()["tier_pages"] * 4 < records * 3

    def _may_come_back(self, need: "Callable[[ClientDemotion], Need | None]") -> bool:
        return need(self) is None and self.client.tiered and self.client.phase == "none" and not self._ended

    def _open(self) -> None:
        self._tier = self._open_tier()
        self._complaint = ""  # so that pages may come back at once

    def end(self) -> None:
        """Let go of the tier, once what is under way is done; waits for that, but not for long."""
        self._ended = True
        self.errand.end(self._close, PATIENCE_S)

    def _close(self) -> None:
        tier, self._tier = self._tier, None
        if tier is not None:
            tier.close()

    def batch(self, need: "Need", now_s: float) -> bool:
        """Have the tier begin with a batch of pages, or wait for one; False if nothing can be done now."""
        if now_s < self._rest_until:
            return False
        acknowledged = self._batches.acknowledged
        try:
            goes_on = self._batch(need, now_s)
        except TierError as error:
            return self._failed(error, now_s)
        self._landed(acknowledged)
        return goes_on

    def _land(self) -> None:
        """Wait for what is under way."""
        acknowledged = self._batches.acknowledged
        try:
            self._batches.land_all()
        except TierError as error:
            self._failed(error, self._clock())
        else:
            if self._clock() >= self._rest_until:  # else a later one could not even begin
                self._landed(acknowledged)

    def _landed(self, before: int) -> None:
        """See whether batches have landed since there were `before`."""
        if self._batches.acknowledged != before:
            self.problem, self._rest_until = "", 0.0
            if self._look.down:
                self._note("")

    def _failed(self, error: TierError, now_s: float) -> bool:
        """See to what a tier says; whether to ask it again at once."""
        self._ready = False
        self._note("" if isinstance(error, TierFullError) else str(error))
        if isinstance(error, TierFullError) and not self.problem:
            # What pages have left behind there may do: the next batch asks for it first.
            self.problem = str(error)
            return True
        if not self._rest_until:
            _log.warning("pages of %s stay in memory: %s", self.name, error)
        self.problem = str(error)
        self._rest_until = now_s + RETRY_S
        return False

    def _tidy(self) -> bool:
        """Tell the tier what lives; False while somebody may still read something else."""
        assert self._tier is not None
        self._ready = self._batches.tidy(self._tier, GRACE_MS)
        return self._ready

    def _cool(self, cold_s: int, need: "Callable[[ClientDemotion], Need | None]") -> None:
        """Demote cold pages, a batch or as many as there are in `COLD_ROUND_S`, while memory is not short."""
        until_s = self._clock() + COLD_ROUND_S
        while need(self) is None and self.cold_batch(cold_s, self._clock()) and not self._ended:
            if self._clock() >= until_s:
                break

    def cold_batch(self, cold_s: int, now_s: float) -> bool:
        """Demote a batch of the pages that have not been used for `cold_s`, or make the next ones colder.

        True if the lap goes on.

        Marks are taken away in laps of which each begins so long after the end of the one before, so a page
        without a mark has not been used for that time at least, and goes before twice that (and a lap).
        """
        if not self._cold_hand and now_s < self._marks_s + cold_s:
            return False
        if self.client.phase != "none" or not self.client.tiered:
            return False
        try:
            # Once a lap: what flushed and rewritten pages left in the tier may be used again.
            if not self._cold_hand and not self._tidy():
                return False
            before = self.demoted_pages
            self._cold_hand, _ = self._start(self._cold_hand, BATCH_PAGES, any_page=False)
            self._batches.land_all()  # one at a time: reads may wait for it, and nobody waits for memory
            self.cold_pages += self.demoted_pages - before
        except TierError as error:  # full, or down: nothing that anybody waits for
            _log.info("cold pages of %s stay in memory: %s", self.name, error)
            self._note("" if isinstance(error, TierFullError) else str(error))
            self._ready, self._cold_hand, self._marks_s = False, 0, now_s
        return self._cold_hand != 0

    def _start(self, hand: int, most: int, any_page: bool) -> tuple[int, int]:
        """Begin with a batch of the pages from the hand on: where it is then, and how many they are."""
        self._marks_s = self._clock()
        assert self._tier is not None
        return self._batches.start(self._tier, hand, most, any_page)

    def _batch(self, need: "Need", now_s: float) -> bool:
        if not self._ready and not self._tidy():
            return False
        urgent, under_way_bytes = need.urgent, self._batches.under_way_bytes
        if under_way_bytes and (under_way_bytes >= need.size_bytes or not self._hand):
            # Enough is on its way; or a lap has ended, and the next one would find the same pages again.
            self._batches.land()
            return True
        most = min(max((need.size_bytes - under_way_bytes) // PAGE_SIZE, LEAST_PAGES), BATCH_PAGES)
        if not self._hand:  # once around
            if self._lap_s is not None and now_s < self._lap_s + LAP_S and not urgent:
                return False
            # The first time around finds nothing, for it only takes marks away. Without any cold page after
            # that, those that are not may have to do.
            self._empty_laps = 0 if self._lap_s is None or self._lap_pages else self._empty_laps + 1
            self._any = urgent and self._empty_laps >= 2
            self._lap_s, self._lap_pages = now_s, 0
        self._cold_hand = 0  # its marks are younger from here on
        self._hand, found = self._start(self._hand, most, self._any)
        self._lap_pages += found
        # Else there is nothing but pages of one repeated word.
        return not (self._any and not self._hand and not self._lap_pages)


class Demotion:
    """Demotion of all clients of a segment that have tiers."""

    def __init__(
        self,
        paths: SegmentPaths,
        segment: "_native.Segment",
        marks: Marks | None = None,
        clock: Callable[[], float] = time.monotonic,
        room: Callable[[], int] = lambda: 0,
    ) -> None:
        """`room` says how many bytes of pages may come back into memory now."""
        self._paths = paths
        self._segment = segment
        self._marks = marks or Marks()
        self._clock = clock
        self._room = room
        self._clients: dict[tuple[int, int], ClientDemotion] = {}
        self._leaving: list[tuple[tuple[int, int], ClientDemotion]] = []
        """Those that were dropped and have not let go of their tiers yet."""
        self._complaints: dict[str, str] = {}
        self._unfollowed: dict[str, str] = {}  # why a client's tier is not looked after at all
        self._before_pages = self._before_cold_pages = 0  # that went to tiers which have ended
        self._before_prefetched_pages = self._before_prefetching_ns = 0  # of those tiers
        self._ending = Errand("tiers that have ended")

    @property
    def demoted_pages(self) -> int:
        """Pages that went to tiers since this began."""
        return self._before_pages + sum(client.demoted_pages for client in self._clients.values())

    @property
    def cold_pages(self) -> int:
        """Of those, pages that went although there was memory."""
        return self._before_cold_pages + sum(client.cold_pages for client in self._clients.values())

    @property
    def prefetched_pages(self) -> int:
        """Pages that came back because there was plenty of memory."""
        return self._before_prefetched_pages + sum(one.prefetch.pages for one in self._clients.values())

    @property
    def prefetching_ns(self) -> int:
        """How long that took."""
        return self._before_prefetching_ns + sum(one.prefetch.spent_ns for one in self._clients.values())

    def problems(self) -> dict[str, str]:
        """Return why pages of clients stay in memory, by the client's name."""
        found = {**self._complaints, **self._unfollowed}
        found.update({one.name: one.trouble for one in self._clients.values() if one.trouble})
        return found

    def tiers(self) -> dict[str, TierFigures]:
        """Return what was seen of each client's tier last, by the client's name. Asks no tier."""
        now_s = self._clock()
        found = {one.name: one.seen(now_s) for one in list(self._clients.values())}
        return {name: figures for name, figures in found.items() if figures is not None}

    def round(self) -> bool:
        """Look at all clients once, and demote for a while where memory is short; True: soon again."""
        self._look()
        until_s = self._clock() + ROUND_S
        errands = [self._ending] if self._ending.begin(self._remove_ended) else []
        cold_s, back_pages = self._segment.tier_cold_s, self._back_pages()
        for client in self._clients.values():
            if client.errand.begin(partial(client.go, self._need, until_s, cold_s, back_pages)):
                errands.append(client.errand)
        patience_ends = time.monotonic() + PATIENCE_S
        for errand in errands:
            errand.wait(max(patience_ends - time.monotonic(), 0))
        return any(one.short and not one.trouble and not one.errand.busy for one in self._clients.values())

    def _back_pages(self) -> int:
        """Return how many pages may come back for each client."""
        if not self._clients or any(client.short for client in self._clients.values()):
            return 0
        try:
            return self._room() // PAGE_SIZE // len(self._clients)
        except (TmemError, OSError, ValueError):  # what is not known is not there; demotion needs none of it
            return 0

    def _need(self, client: ClientDemotion) -> Need | None:
        """Return what is to be demoted of the client now, None if nothing."""
        if client.client.phase != "none" or not client.client.tiered:
            return None
        free, base_bytes = self._free_share(client)
        mark = self._marks.high if client.short else self._marks.low
        if free >= mark:
            client.short = False
            client.problem = ""
            return None
        client.short = True
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
        """Follow who has which tier now. Asks no tier anything."""
        # The links first: a client of a link that is not there after that is no more, and not yet to come.
        links = list(tiering.assigned_tiers(self._paths))
        lives = self._lives()
        unfollowed = {}
        for assigned in links:
            key = (assigned.client, assigned.serial)
            if key not in lives:
                continue
            with contextlib.suppress(PoolError):  # the client ends; the next look sees it
                name = lives[key].name
                try:
                    self._follow(key, lives[key])
                    if not lives[key].tiered:  # whoever was killed at it cannot say so
                        unfollowed[name] = (
                            "its tier is being taken away; if no command is at that, give it again: "
                            f"tmem --name {self._paths.name} set {name} --tier {tiering.shown(assigned.url)}"
                        )
                except (OSError, MemoryError, RuntimeError) as error:  # the last: no thread can be started
                    unfollowed[name] = words = _words(error)
                    if self._unfollowed.get(name) != words:
                        _log.warning("tier of %s: %s", name, words)
        self._unfollowed = unfollowed
        there = {(one.client, one.serial) for one in tiering.assigned_tiers(self._paths)}
        for key in [key for key in self._clients if key not in there or key not in lives]:
            self._drop(key)

    def _remove_ended(self) -> None:
        """Remove what tiers hold of clients that are no more, or whose tier was taken away."""
        links = list(tiering.assigned_tiers(self._paths))
        lives = self._lives()
        # What is on its way there would come once all was removed: servers have no lock that says so.
        used = {(of, one.url) for of, one in list(self._leaving) if not one.errand.ended}
        gone = []
        for one in links:
            key = (one.client, one.serial)
            if key not in lives and key not in self._clients:
                gone.append(one)
        complaints = {}
        for assigned in [*gone, *tiering.ended_tiers(self._paths)]:
            if ((assigned.client, assigned.serial), assigned.url) in used:
                continue
            name = assigned.link.name
            try:
                tiering.end(self._segment, assigned)
            except TierError as error:
                complaints[name] = str(error)
                if self._complaints.get(name) != str(error):
                    _log.warning("tier of %s: %s", name, error)
        self._complaints = complaints

    def _lives(self) -> "dict[tuple[int, int], _native.Client]":
        return {(client.id, client.serial): client for client in self._segment.clients()}

    def _follow(self, key: tuple[int, int], client: "_native.Client") -> None:
        """Have the tier that the client has, unless we have. The epoch is read first: if the link is of a
        later tier, the core refuses to demote, and the next look sees to it."""
        epoch = client.tier_epoch
        url = tiering.of(self._paths, client)
        have = self._clients.get(key)
        if have is not None and (have.url, have.epoch) == (url, epoch):
            return
        self._drop(key)
        if url is not None:
            who = tiering.identity(self._segment, client)
            opened = partial(self._open, key, url, who)
            self._clients[key] = ClientDemotion(self._segment, client, url, epoch, opened, self._clock)

    def _open(self, key: tuple[int, int], url: str, who: TierIdentity) -> Tier:
        """Open a tier, in the thread of its client; `TierDownError`.

        Files have a lock. Servers do not, and a writer that has just begun removes what it finds there and
        nobody named when it looked: what another one that came after it has written, if both go on at a time.
        """
        if tiering.spill_path(url) is None:
            for of, one in list(self._leaving):
                if of == key and not one.errand.ended and tiering.spill_path(one.url) is None:
                    raise TierDownError(
                        f"waits for the tier before, {tiering.shown(one.url)}, to be let go of"
                    )
        return tiering.open_tier(url, who, writer=True)

    def _drop(self, key: tuple[int, int]) -> None:
        if (gone := self._clients.pop(key, None)) is not None:
            gone.end()
            self._leaving = [(of, one) for of, one in self._leaving if not one.errand.ended]
            self._leaving.append((key, gone))
            self._before_pages += gone.demoted_pages
            self._before_cold_pages += gone.cold_pages
            self._before_prefetched_pages += gone.prefetch.pages
            self._before_prefetching_ns += gone.prefetch.spent_ns

    def close(self) -> None:
        """Let go of all tiers; records stay. Those that hang are left to the end of the process."""
        for key in list(self._clients):
            self._drop(key)
        self._ending.end(lambda: None, PATIENCE_S)


def _words(error: Exception) -> str:
    """Return what there is to say about an error; some have no words of their own."""
    return str(error) or type(error).__name__
