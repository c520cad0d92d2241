"""Millions of operations of several processes, each outcome compared; and that the comparison finds faults.

The seed is new each time and printed with a failure; TMEM_SEED repeats the operations of each pool.
TMEM_LONG=1 does forty times as many.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tmem.backends import _native

from .endurance import Endurance
from .faults import FAULTS, Faulty
from .lean import Lean
from .liar import Liar
from .model import Violation
from .operations import Where, new_pool
from .places import Worker

MEMORY_BYTES = 12 << 20
PROCESSES = 2
OPERATIONS = 2_500_000
BURSTS = 1000
KINDS = [(True, None), (False, None), (False, False), (True, True)]


@contextmanager
def seeded() -> Iterator[int]:
    """A seed, which a failure names."""
    seed = int(os.environ.get("TMEM_SEED", random.SystemRandom().getrandbits(32)))
    try:
        yield seed
    except Violation as error:
        raise Violation(f"{error}\nTMEM_SEED={seed} repeats these operations") from None


@pytest.fixture
def two_workers() -> Iterator[list[Worker]]:
    made: list[Worker] = []
    try:
        made += [Worker() for _ in range(PROCESSES)]
        yield made
    finally:
        for worker in made:
            worker.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_endurance(
    directory: Path, two_workers: list[Worker], effort: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with seeded() as seed:
        segment = _native.create(str(directory / "segment"), MEMORY_BYTES)
        run = Endurance(segment, directory / "segment", two_workers, seed)
        while run.operations < OPERATIONS * effort:
            run.phase(BURSTS)
        counts = [lean.model().counts for leans in run.leans.values() for lean in leans]
        segment.close()
    with capsys.disabled():
        rate = run.operations / run.seconds
        print(f"\n{run.operations} operations in {run.phases} phases, {rate:,.0f} a second, seed {seed}")
    # Every outcome that the model tells apart came about.
    for key in ("puts_stored", "puts_replaced", "puts_flushed", "gets_hit", "gets_taken", "flushes_found"):
        assert sum(count[key] for count in counts) > 0, key
    assert sum(count["gets"] - count["gets_hit"] for count in counts) > 0
    assert run.frozen > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_follow_from_the_seed(small: _native.Segment, kind: tuple[bool, bool | None]) -> None:
    """Whatever comes of them, and in however many pieces they are done."""
    traces: list[list[object]] = []
    for cap_bytes in (0, 0, 1):
        pool = small.client("a").new_pool(*kind)
        pool.client.cap_bytes = cap_bytes
        lean = Lean(Where("a", pool.id), kind[0], pool.exclusive, "some seed")
        trace: list[object] = []
        for _ in range(20):
            lean.run(Faulty(pool, None, trace), 100)
        lean.compare(pool.statistics())
        traces.append(trace)
    assert traces[0] == traces[1] == traces[2]
    assert len(traces[0]) >= 2000


def objection_of(lean: Lean, liar: Liar) -> Violation | None:
    """Do one operation; what the lean model says against its outcome."""
    try:
        lean.run(liar, 1)
    except Violation as error:
        return error
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_the_lean_model_demands_what_the_model_demands(kind: tuple[bool, bool | None], effort: int) -> None:
    """A store that invents its outcomes, some of them illegal: both object to the same ones, and agree."""
    persistent, exclusive = kind[0], kind[1] if kind[1] is not None else not kind[0]
    objections = agreements = 0
    for number in range(20 * effort):
        lean = Lean(Where("a", 0), persistent, exclusive, f"lies {number}")
        liar = Liar(persistent, exclusive, random.Random(f"{kind} {number}"))
        while lean.operations < 400:
            objection = objection_of(lean, liar)
            assert bool(objection) is bool(liar.objection), f"one objects: {objection}; {liar.objection}"
            if objection:
                objections += 1
                break
            model = lean.model()
            assert model.pages == liar.model.pages
            assert +model.counts == +liar.model.counts
            agreements += 1
            assert lean.ghosts == 0
    assert objections >= 10
    assert agreements >= 1000


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_store_is_found(small: _native.Segment, fault: str) -> None:
    """One operation in 10,000 goes wrong: it is noticed when the run would be over."""
    persistent, exclusive, every = FAULTS[fault]
    where = new_pool(small, "a", persistent, exclusive)
    pool = small.client("a").pool(where.pool)
    if fault == "keeps the old page":
        pool.client.cap_bytes = 1 << 20
    lean = Lean(where, persistent, pool.exclusive, "seed of faults")
    faulty = Faulty(pool, fault, [], every)
    with pytest.raises(Violation):
        run_and_compare(lean, faulty)
    assert faulty.faults > 0


def run_and_compare(lean: Lean, faulty: Faulty) -> None:
    """What the processes of an endurance run do with a pool in two phases, or less if something is wrong."""
    for _ in range(2000):
        lean.run(faulty, 100)
        assert faulty.faults or lean.ghosts == 0
        lean.compare(faulty.pool.statistics())
