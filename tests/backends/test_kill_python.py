"""SIGKILL at random moments: what was acknowledged is intact, nothing leaks, and the others go on.

The processes are forked from a worker, so that one costs milliseconds. That the death falls into every window
between two stores is the business of the crash harness in C; here the whole way through Python is meant.
"""

import os
import random
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.backends import _native

from . import activities, storm
from . import operations as op
from .model import check_identities, demand
from .operations import Where
from .places import Worker

PERSISTENT = [True, True, False]
EXCLUSIVE = [False, True, False]


class Killer:
    """Runs storms in children of a worker and kills them."""

    def __init__(self, worker: Worker, fifo: Path, wheres: list[Where]) -> None:
        self.worker = worker
        self.fifo = fifo
        self.wheres = wheres

    def kill(self, seed: int, rng: random.Random) -> bytes:
        """Begin storm `seed`, kill it at a random moment, and return what it acknowledged."""
        reader = os.open(self.fifo, os.O_RDONLY | os.O_NONBLOCK)
        try:
            child = self.worker.do(storm.fork, self.wheres, seed, str(self.fifo))
            try:
                acknowledged = self._read(reader, rng.randrange(1, 150))
                moment = time.perf_counter() + rng.random() * 0.0005
                while time.perf_counter() < moment:
                    pass
            finally:
                os.kill(child, signal.SIGKILL)
                status = self.worker.do(storm.wait, child)
            demand(status == -signal.SIGKILL, f"the storm ended by itself: {status}")
            return acknowledged + self._read(reader, None)
        finally:
            os.close(reader)

    @staticmethod
    def _read(reader: int, enough: int | None) -> bytes:
        """Read until there are `enough` bytes, or all that there ever will be."""
        got, deadline = b"", time.monotonic() + 60
        while enough is None or len(got) < enough:
            demand(time.monotonic() < deadline, "a storm does not get on")
            if not select.select([reader], [], [], 1)[0]:
                continue
            more = os.read(reader, 4096)
            if not more and (enough is None or got):
                break
            got += more
        return got


@pytest.fixture
def segment(directory: Path) -> Iterator[_native.Segment]:
    made = _native.create(str(directory / "segment"), 8 << 20)
    yield made
    made.close()


def prepare(segment: _native.Segment, worker: Worker, directory: Path) -> Killer:
    wheres = [
        op.new_pool(segment, "guest", persistent, exclusive)
        for persistent, exclusive in zip(PERSISTENT, EXCLUSIVE, strict=True)
    ]
    worker.attach(directory / "segment")
    os.mkfifo(directory / "fifo")
    return Killer(worker, directory / "fifo", wheres)


def test_11_one_process_is_killed(
    segment: _native.Segment, workers: list[Worker], directory: Path, effort: int
) -> None:
    killer, witness = prepare(segment, workers[0], directory), storm.Witness(PERSISTENT, EXCLUSIVE)
    rng = random.Random(5)
    for seed in range(50 * effort):
        witness.replay(seed, killer.kill(seed, rng))
        assert segment.reap() == 1
        assert segment.check() == []
        witness.verify(segment, killer.wheres)
    assert op.statistics(segment, killer.wheres[2])["evictions"] > 0


def test_11_others_go_on(
    segment: _native.Segment, workers: list[Worker], directory: Path, effort: int
) -> None:
    """Two processes verify their own pages all the time; nobody calls for a repair until the end."""
    killer, witness = prepare(segment, workers[0], directory), storm.Witness(PERSISTENT, EXCLUSIVE)
    own = [op.new_pool(segment, f"other {i}", persistent=i % 2 == 0) for i in range(4)]
    rng = random.Random(6)
    for seed in range(5 * effort):
        for number, worker in enumerate(workers[1:]):
            worker.attach(directory / "segment")
            worker.start(activities.verify_own, own[2 * number : 2 * number + 2], number, seed, 400)
        for kill in range(3):
            witness.replay(3 * seed + kill, killer.kill(3 * seed + kill, rng))
        for worker in workers[1:]:
            assert worker.finish(activities.verify_own) > 0
        witness.verify(segment, killer.wheres)
    segment.reap()
    assert segment.check() == []
    for where in own:
        counters = op.statistics(segment, where)
        demand(counters["corrupt_pages"] == 0, f"{where}: {counters}")
        if counters["persistent"]:
            check_identities(counters)
