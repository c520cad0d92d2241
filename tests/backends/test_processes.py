"""Several processes, and several threads, on one segment."""

from pathlib import Path

from hypothesis.stateful import run_state_machine_as_test

from tmem.backends import _native

from . import activities
from . import operations as op
from .control import ControlMachine
from .machine import bounded
from .model import check_identities
from .operations import Where
from .pages import oid, pages
from .places import Local, Place, Worker

MEMORY_BYTES = 16 << 20


def three_pools(segment: _native.Segment) -> list[Where]:
    """A persistent pool, an ephemeral one, and another client's ephemeral one whose gets leave the page."""
    return [
        op.new_pool(segment, "guest", persistent=True),
        op.new_pool(segment, "guest", persistent=False),
        op.new_pool(segment, "mount", persistent=False, exclusive=False),
    ]


def check(segment: _native.Segment, wheres: list[Where], dead: int = 0) -> None:
    """Check that the segment is sound; `dead` threads ended without saying so since the last time."""
    assert segment.reap() == dead
    assert segment.check() == []
    for where in wheres:
        check_identities(op.statistics(segment, where))


def test_random_operations_one_process_at_a_time(directory: Path, workers: list[Worker], effort: int) -> None:
    class Machine(ControlMachine):
        parent = directory

    Machine.workers = workers
    run_state_machine_as_test(Machine, settings=bounded(10 * effort, 60))


def test_15_all_at_once_each_with_its_own_pages(directory: Path, workers: list[Worker], effort: int) -> None:
    segment = _native.create(str(directory / "shared"), MEMORY_BYTES)
    wheres = three_pools(segment)
    for seed in range(2 * effort):
        for owner, worker in enumerate(workers):
            worker.attach(directory / "shared")
            worker.start(activities.verify_own, wheres, owner, seed, 1500)
        assert activities.verify_own(segment, wheres, 9, seed, 500) > 0
        assert all(worker.finish(activities.verify_own) > 0 for worker in workers)
        check(segment, wheres)
    segment.close()


def test_15_all_at_once_on_the_same_pages(directory: Path, workers: list[Worker], effort: int) -> None:
    segment = _native.create(str(directory / "shared"), MEMORY_BYTES)
    wheres = three_pools(segment)
    for seed in range(2 * effort):
        for owner, worker in enumerate(workers):
            worker.attach(directory / "shared")
            worker.start(activities.contend, wheres, owner, seed, 4000)
        assert activities.contend(segment, wheres, 9, seed, 1000) >= 0
        assert sum(worker.finish(activities.contend) for worker in workers) > 0
        check(segment, wheres)
    segment.close()


def test_pools_come_and_go_beside_others(directory: Path, workers: list[Worker]) -> None:
    """Chunks, leaves and pool ids are used again while other processes read and write."""
    segment = _native.create(str(directory / "shared"), MEMORY_BYTES)
    wheres = three_pools(segment)
    for worker in workers:
        worker.attach(directory / "shared")
    workers[0].start(activities.fill_and_drop, "coming", 60)
    workers[1].start(activities.verify_own, wheres, 1, 1, 2000)
    workers[2].start(activities.fill_and_drop, "going", 60)
    activities.verify_own(segment, wheres, 2, 2, 1000)
    assert workers[0].finish(activities.fill_and_drop) > 0
    assert workers[1].finish(activities.verify_own) > 0
    assert workers[2].finish(activities.fill_and_drop) > 0
    check(segment, wheres)
    segment.close()


def test_15_threads_of_one_process(small: _native.Segment) -> None:
    wheres = three_pools(small)
    results = activities.in_threads(small, wheres, [1, 2, 3, 4], 1, 300)
    assert len(results) == 8
    check(small, wheres)


def test_15_threads_of_several_processes(directory: Path, workers: list[Worker]) -> None:
    segment = _native.create(str(directory / "shared"), MEMORY_BYTES)
    wheres = three_pools(segment)
    for number, worker in enumerate(workers):
        worker.attach(directory / "shared")
        worker.start(activities.in_threads, wheres, [3 * number, 3 * number + 1], number, 300)
    for worker in workers:
        assert len(worker.finish(activities.in_threads)) == 4
    check(segment, wheres)
    segment.close()


def test_fork_after_attach(directory: Path, workers: list[Worker]) -> None:
    """Parent and child go on with the same objects; the child's threads register anew."""
    segment = _native.create(str(directory / "shared"), MEMORY_BYTES)
    wheres = three_pools(segment)
    workers[0].attach(directory / "shared")
    for seed in range(10):
        assert workers[0].do(activities.fork_and_verify, wheres, 1 + 3 * seed, seed, 100) == 0
        check(segment, wheres, dead=1)
    segment.close()


def test_threads_come_and_go(small: _native.Segment) -> None:
    """The record of a thread that ended is used again: there are 1024 for all processes."""
    wheres = three_pools(small)
    for seed in range(300):
        activities.in_threads(small, wheres, [seed % 50, 50 + seed % 50, 100], seed, 1)
        for owner in (seed % 50, 50 + seed % 50, 100):
            for where in wheres:
                op.flush_object(small, where, oid(1000 + owner))
    check(small, wheres)


def test_what_one_process_puts_another_gets(directory: Path, workers: list[Worker]) -> None:
    segment = _native.create(str(directory / "shared"), MEMORY_BYTES)
    persistent, ephemeral, _ = three_pools(segment)
    places: list[Place] = [Local(), *workers]
    for place in places:
        place.attach(directory / "shared")
    for i, place in enumerate(places):
        data = pages("mixed", i * 40, 40)
        assert place.do(op.put, persistent, oid(i), 5, b"".join(data)) == 40
        assert place.do(op.put, ephemeral, oid(i), 5, b"".join(data)) == 40
        for other in places:
            assert other.do(op.get, persistent, oid(i), 5, 41) == data
        assert places[i - 1].do(op.get, ephemeral, oid(i), 5, 41) == data
        assert place.do(op.get, ephemeral, oid(i), 5, 41) == []
    check(segment, [persistent, ephemeral])
    segment.close()
