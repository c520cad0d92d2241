"""Weights: under contention the ephemeral memory is divided in their ratio, whoever puts faster.

What is measured is `ephemeral_bytes`, the chunks that a client's ephemeral pages occupy. Each client is a
process of its own; in each round all put at once, each as many pages as its rate says. Nothing sleeps: a test
ends when the ratios of the shares have stayed within 5 % of those of the weights for some rounds, or fails
after many.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from tmem.backends import _native

from . import operations as op
from .activities import put_block
from .operations import Where
from .pages import oid
from .places import Worker

MEMORY_BYTES = 64 << 20
NAMES = ("a", "b", "c", "d")
TOLERANCE = 0.05
STEADY_ROUNDS = 10
MOST_ROUNDS = 3000
STEP = 64
"""Pages that a client with a rate of 1 puts in a round."""


@pytest.fixture(scope="module")
def four_workers() -> Iterator[list[Worker]]:
    made: list[Worker] = []
    try:
        made += [Worker() for _ in NAMES]
        yield made
    finally:
        for worker in made:
            worker.close()


@pytest.fixture
def segment(directory: Path) -> Iterator[_native.Segment]:
    made = _native.create(str(directory / "segment"), MEMORY_BYTES)
    yield made
    assert made.check() == []
    made.close()


class Contest:
    """Clients that put ephemeral pages at different rates, and what they have of the memory."""

    def __init__(
        self,
        segment: _native.Segment,
        workers: Sequence[Worker],
        weights: Sequence[int],
        rates: Sequence[int],
        kinds: Sequence[str],
    ) -> None:
        self.segment = segment
        self.workers = list(workers[: len(weights)])
        self.rates = list(rates)
        self.kinds = list(kinds)
        self.clients = [segment.client(name) for name in NAMES[: len(weights)]]
        self.wheres = [op.new_pool(segment, client.name, False, False) for client in self.clients]
        self.rounds = 0
        for client, weight, worker in zip(self.clients, weights, self.workers, strict=True):
            client.weight = weight
            worker.attach(Path(segment.path))

    def round(self) -> None:
        """Let every client put what its rate says, all at once."""
        for worker, where, rate, kind in zip(self.workers, self.wheres, self.rates, self.kinds, strict=True):
            worker.start(put_block, where, oid(1), self.rounds * rate * STEP, rate * STEP, kind, STEP)
        for worker in self.workers:
            worker.finish(put_block)
        self.rounds += 1

    def drop_out(self, number: int) -> None:
        """Client `number` puts no more."""
        for each in (self.workers, self.wheres, self.rates, self.kinds, self.clients):
            del each[number]

    def bytes(self) -> list[int]:
        return [client.statistics()["ephemeral_bytes"] for client in self.clients]

    def deviation(self) -> float:
        """Return by how much the ratio of any two clients' shares is off that of their weights, at most."""
        each = [have / client.weight for have, client in zip(self.bytes(), self.clients, strict=True)]
        return max(each) / min(each) - 1 if min(each) else float("inf")

    def settle(self) -> None:
        """Go on until the shares are right and stay right; fail if they do not become so."""
        steady = 0
        for _ in range(MOST_ROUNDS):
            self.round()
            full = self.segment.statistics()["chunks_free"] <= 16
            good = full and self.deviation() <= TOLERANCE
            steady = steady + 1 if good else 0
            if steady == STEADY_ROUNDS:
                return
        pytest.fail(f"after {self.rounds} rounds {self.bytes()} bytes, off by {self.deviation()}")


CONTESTS = [
    pytest.param((100, 100), (1, 10), ("random", "random"), id="equal weights, one is ten times as fast"),
    pytest.param((100, 200), (10, 1), ("text", "random"), id="1:2, the lighter is ten times as fast"),
    pytest.param((100, 200), (1, 10), ("random", "text"), id="1:2, the heavier is ten times as fast"),
    pytest.param((1, 3, 6), (10, 3, 1), ("random", "text", "tail"), id="1:3:6, the lightest is fastest"),
    pytest.param((600, 300, 100), (1, 10, 10), ("tail", "near", "text"), id="6:3:1"),
    pytest.param((1, 1, 2, 4), (10, 1, 5, 1), ("text", "random", "tail", "near"), id="1:1:2:4"),
]


@pytest.mark.parametrize(("weights", "rates", "kinds"), CONTESTS)
def test_8_shares_converge_to_the_weights(
    segment: _native.Segment,
    four_workers: list[Worker],
    weights: tuple[int, ...],
    rates: tuple[int, ...],
    kinds: tuple[str, ...],
) -> None:
    Contest(segment, four_workers, weights, rates, kinds).settle()


def test_8_hits_do_not_count_against_weights(segment: _native.Segment, four_workers: list[Worker]) -> None:
    """A client whose pages are all got again and again keeps its best pages, but no more than its share."""
    contest = Contest(segment, four_workers, (100, 300), (10, 1), ("random", "random"))
    pool = op.find(segment, contest.wheres[0])
    for _ in range(60):
        contest.round()
        for first in range(0, contest.rounds * 10 * STEP, 256):
            pool.get(oid(1), first, bytearray(256 * 4096))
    contest.settle()


def test_8_weights_can_be_changed(segment: _native.Segment, four_workers: list[Worker]) -> None:
    contest = Contest(segment, four_workers, (100, 100), (3, 1), ("random", "text"))
    contest.settle()
    contest.clients[1].weight = 400
    contest.settle()
    contest.clients[0].weight = 1600
    contest.settle()


def test_8_who_is_alone_has_everything(segment: _native.Segment, four_workers: list[Worker]) -> None:
    """Weights limit nobody while there is memory that nobody else wants."""
    contest = Contest(segment, four_workers, (1, 65535), (10, 1), ("random", "random"))
    contest.drop_out(1)
    contest.settle()
    s = segment.statistics()
    assert contest.bytes()[0] > 0.95 * (s["chunks_total"] - s["chunks_free"]) * 65536


def test_8_pages_without_weight_go_first(segment: _native.Segment, four_workers: list[Worker]) -> None:
    contest = Contest(segment, four_workers, (0, 1), (10, 1), ("random", "random"))
    for _ in range(30):
        contest.round()
    while contest.bytes()[0] > 0:
        contest.rates = [0, 10]
        assert contest.rounds < MOST_ROUNDS
        before = op.statistics(segment, contest.wheres[1])["evictions"]
        left = contest.bytes()[0]
        contest.round()
        if left > 10 * STEP * 4160 * 2:
            assert op.statistics(segment, contest.wheres[1])["evictions"] == before


def destroyed(contest: Contest, number: int) -> None:
    contest.clients[number].destroy()


def killed(contest: Contest, number: int) -> None:
    """Its process held the client, and is killed."""
    contest.workers[number].do(op.hold, contest.clients[number].name)
    contest.round()
    assert contest.clients[number].held
    contest.workers[number].process.kill()
    contest.workers[number].process.wait()
    assert contest.segment.reap() > 0
    assert not contest.clients[number].held


@pytest.mark.parametrize("end", [destroyed, killed])
def test_8_the_weight_of_a_client_that_is_gone_is_gone(
    segment: _native.Segment, end: Callable[[Contest, int], None]
) -> None:
    """Its pages go first, and what is left is divided by the other weights alone."""
    made = [Worker() for _ in range(3)]
    try:
        contest = Contest(segment, made, (100, 300, 10_000), (1, 3, 10), ("random", "text", "random"))
        contest.settle()
        heavy = contest.clients[2]
        end(contest, 2)
        contest.drop_out(2)
        gone_first(contest, heavy)
        contest.settle()
        assert sum(contest.bytes()) > 0.9 * segment.statistics()["chunks_used"] * 65536
    finally:
        for worker in made:
            worker.close()


def gone_first(contest: Contest, dead: _native.Client) -> None:
    """Put until all ephemeral pages of a client that is gone are evicted, and none of the others before."""
    if dead not in contest.segment.clients():
        return
    before = [op.statistics(contest.segment, where)["evictions"] for where in contest.wheres]
    left = [dead.statistics()["ephemeral_bytes"]]
    while left[-1] > 4 << 20:
        contest.round()
        left.append(dead.statistics()["ephemeral_bytes"])
        assert contest.rounds < MOST_ROUNDS
    assert all(later <= earlier for earlier, later in pairwise(left))
    after = [op.statistics(contest.segment, where)["evictions"] for where in contest.wheres]
    assert after == before
    while dead.statistics()["ephemeral_bytes"]:
        contest.round()
        assert contest.rounds < MOST_ROUNDS


def test_10_2_it_is_the_client_over_its_share_that_is_evicted(segment: _native.Segment) -> None:
    """The comparison that was the wrong way round from 2009 to 2018, with the numbers of that note."""
    over, under = segment.client("over"), segment.client("under")
    over.weight, under.weight = 10, 90
    pools = [client.new_pool(False, False) for client in (over, under)]
    chunks = segment.statistics()["chunks_free"]
    for pool, part in zip(pools, (50, 1), strict=True):
        put_block(
            segment, Where(pool.client.name, pool.id), oid(1), 0, chunks * 15 * part // 60, "random", 60
        )
    evictions = [pool.statistics()["evictions"] for pool in pools]
    for first in range(0, chunks * 15 // 3, 60):
        put_block(segment, Where("under", pools[1].id), oid(2), first, 60, "random", 60)
    assert pools[1].statistics()["evictions"] == evictions[1] == 0
    assert pools[0].statistics()["evictions"] > evictions[0]
