"""The defects of the historic code, by their numbers in docs/semantics.md: none comes back.

10.2 is in `test_weights`. Of 10.13 the part that a remote client can reach is ``tests/nbd/test_rules.py``, of
10.10 the command ``tests/cli/test_service.py``. Of 10.16 here is a page that is moved in memory; what goes to
a tier and comes back is ``tests/native/tiers.c``.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tmem.backends import _native
from tmem.errors import PoolError, SegmentError
from tmem.types import PAGE_SIZE

from . import activities
from . import operations as op
from .activities import put_block
from .model import indexes
from .operations import Where, fill, page_at
from .pages import KINDS, oid, page, pages
from .places import Worker
from .records import read
from .sums import check_sums

OBJECT = oid(1)
UUID = b"a piece of past."
ROOT = Path(__file__).parents[2]


def share(small: _native.Segment, *names: str) -> list[_native.Pool]:
    pools = []
    for name in names:
        small.client(name).authorise(UUID)
        pools.append(small.client(name).new_pool(persistent=False, uuid=UUID))
    return pools


def nothing_left(segment: _native.Segment, before: dict[str, int]) -> None:
    """All memory has come back but for what a few empty objects may hold."""
    segment.reap()
    s = segment.statistics()
    assert s["persistent_pages"] + s["ephemeral_pages"] == 0
    assert s["chunks_used"] <= before["chunks_used"] + 4
    assert segment.check() == []


@pytest.mark.parametrize("old", KINDS)
def test_10_1_no_old_page_survives_a_put_refused_for_lack_of_space(small: _native.Segment, old: str) -> None:
    """Puts are refused, whether or not there was a page before, until a page that went makes room."""
    client = small.client("guest")
    pool = client.new_pool(persistent=True)
    assert pool.put(OBJECT, 0, b"".join(pages(old, 0, 50))) == 50
    fill(client.new_pool(persistent=True))
    refused = {index for index in range(60) if not pool.put(OBJECT, index, page("random", 900 + index))}
    assert refused
    for index in range(60):
        assert page_at(pool, index) == (None if index in refused else page("random", 900 + index))
    assert indexes(pool.present(OBJECT, 0, 60)) == set(range(60)) - refused


def test_10_3_a_client_that_is_gone_has_no_weight(small: _native.Segment) -> None:
    """Two that are left share what three had; `test_weights` has it with processes that are killed."""
    clients = [small.client(name) for name in ("light", "other", "heavy")]
    clients[2].weight = 65535
    pools = [client.new_pool(persistent=False, exclusive=False) for client in clients]
    for pool in pools:
        put_block(small, Where(pool.client.name, pool.id), OBJECT, 0, 3000, "random", 100)
    clients[2].destroy()
    for first in range(0, 6000, 100):
        for client, pool in zip(clients[:2], pools, strict=False):
            put_block(small, Where(client.name, pool.id), oid(2), first, 100, "random", 100)
    shares = [client.statistics()["ephemeral_bytes"] for client in clients[:2]]
    assert abs(shares[0] - shares[1]) <= 0.1 * sum(shares)
    assert sum(shares) > 0.8 * small.statistics()["chunks_used"] * 65536


def test_10_4_a_get_into_a_bad_buffer_leaves_the_page_whole(small: _native.Segment) -> None:
    """In its object and in the queue of eviction: later it is got, or evicted, as if nothing had been."""
    pool = small.client("mount").new_pool(persistent=False)
    data = pages("random", 0, 200)
    assert pool.put(OBJECT, 0, b"".join(data)) == 200
    for index in range(200):
        for bad in (bytes(PAGE_SIZE), bytearray(PAGE_SIZE - 1), memoryview(bytearray(2 * PAGE_SIZE))[::2]):
            with pytest.raises((BufferError, TypeError, ValueError)):
                pool.get(OBJECT, index, bad)
    assert small.check() == []
    assert pool.statistics()["pages"] == 200
    assert [page_at(pool, index) for index in range(100)] == data[:100]
    small.evict(1 << 40)
    assert pool.statistics()["evictions"] == 100
    assert small.check() == []


@pytest.mark.parametrize("leaver", [0, 1])
def test_10_5_a_sharer_that_leaves_does_not_stop_eviction(small: _native.Segment, leaver: int) -> None:
    pools = share(small, "a", "b", "c")
    pools[leaver].destroy()
    left = pools[2]
    stored = 0
    for first in range(0, 5000, 100):
        stored += left.put(OBJECT, first, b"".join(pages("random", 0, 100)))
    assert stored == 5000
    assert left.statistics()["evictions"] > 2000
    small.evict(1 << 40)
    assert left.statistics()["pages"] == 0
    taker = small.client("d").new_pool(persistent=True)
    assert left.put(OBJECT, 0, b"".join(pages("random", 0, 100))) == 100
    fill(taker)
    assert left.statistics()["pages"] == 0


def test_10_6_only_the_shared_pool_changes_hands(small: _native.Segment) -> None:
    """Of the leaver's other ephemeral pools not one page: neither their account nor their turn to go."""
    first, second = share(small, "a", "b")
    private = [first.client.new_pool(persistent=False, exclusive=False) for _ in range(3)]
    for number, pool in enumerate((first, *private)):
        assert pool.put(oid(number), 0, b"".join(pages("random", 50 * number, 50))) == 50
    assert page_at(second, 0, oid(0)) is not None
    before = [client.statistics()["ephemeral_pages"] for client in (first.client, second.client)]
    first.destroy()
    after = [client.statistics()["ephemeral_pages"] for client in (private[0].client, second.client)]
    assert (before, after) == ([200, 0], [150, 50])
    second.client.evict(1 << 40)
    assert second.statistics()["pages"] == 0
    assert [pool.statistics()["pages"] for pool in private] == [50] * 3
    check_sums(small)


def test_10_7_one_client_alone_may_use_a_shared_pool(
    directory: Path, small: _native.Segment, workers: list[Worker]
) -> None:
    """Once it brought the host down: made, used, evicted, left, made again, and its process killed in it."""
    before = small.statistics()
    for round_ in range(20):
        (pool,) = share(small, "alone")
        assert pool.put(OBJECT, 0, b"".join(pages("mixed", round_, 300))) == 300
        assert page_at(pool, 7) == pages("mixed", round_ + 7, 1)[0]
        assert pool.flush(OBJECT, 0, 100) == 100
        small.evict(10 * 65536)
        assert (pool.owner, pool.sharers) == (pool.client, [pool.client])
        if round_ % 2:
            pool.destroy()
        else:
            pool.client.destroy()
    nothing_left(small, before)
    (pool,) = share(small, "alone")
    worker = workers[0]
    worker.attach(directory / "small")
    worker.start(activities.churn, [Where("alone", pool.id)], 1, 10_000_000)
    while pool.statistics()["puts"] < 1000:
        pass
    worker.process.kill()
    worker.process.wait()
    assert small.reap() == 1
    assert small.check() == []
    pool.destroy()
    nothing_left(small, before)


@pytest.mark.parametrize("npages", [0, 1, 2, 3])
def test_10_8_no_page_is_skipped_when_they_are_saved(small: _native.Segment, npages: int) -> None:
    """The first of each pool was, and nobody noticed for nine years; ``test_12`` restores them too."""
    client = small.client("guest")
    pools = [client.new_pool(persistent=True) for _ in range(4)]
    for number, pool in enumerate(pools):
        for index in range(npages):
            assert pool.put(oid(number), index, page("text", 10 * number + index)) == 1
    for number, pool in enumerate(pools):
        records = dict(read(op.export(small, Where("guest", pool.id), False, 8192)))
        assert records == {(oid(number), index): page("text", 10 * number + index) for index in range(npages)}


@pytest.mark.parametrize("phase", ["copying", "frozen", "departed"])
@pytest.mark.parametrize("what", ["pool", "client"])
def test_10_9_what_is_destroyed_during_a_handoff_is_gone(
    small: _native.Segment, phase: str, what: str
) -> None:
    before = small.statistics()
    client = small.client("guest")
    pool = client.new_pool(persistent=True)
    assert pool.put(OBJECT, 0, b"".join(pages("random", 0, 500))) == 500
    exporter, buffer = None, bytearray(8192)
    for step in ("copy", "freeze", "depart")[: ("copying", "frozen", "departed").index(phase) + 1]:
        client.handoff(step)
        if exporter is None:
            exporter = pool.export(changes=True)
            assert exporter.fill(buffer) > 0
    assert exporter is not None
    if what == "pool":
        pool.destroy()
        assert client.pools() == []
        client.handoff("end")
    client.destroy()
    with pytest.raises(PoolError):
        exporter.fill(buffer)
    nothing_left(small, before)


def test_10_10_destroying_destroys(small: _native.Segment) -> None:
    """It did no more than thaw."""
    before = small.statistics()
    client = small.client("guest")
    pools = [client.new_pool(persistent=bool(number % 2)) for number in range(4)]
    for pool in pools:
        assert pool.put(OBJECT, 0, b"".join(pages("random", 0, 100))) == 100
    client.mode = "frozen"
    client.destroy()
    assert not any(pool.alive for pool in pools)
    assert small.clients() == []
    nothing_left(small, before)
    reborn = small.client("guest")
    assert (reborn.mode, reborn.pools()) == ("on", [])
    pool = reborn.new_pool(persistent=True)
    assert page_at(pool, 0) is None
    assert pool.put(OBJECT, 0, page("text", 1)) == 1


def test_10_11_where_presence_cannot_be_noted_nothing_is_put(small: _native.Segment) -> None:
    """The index is the map of what is here; without memory for it, also pages that need none are refused."""
    client = small.client("guest")
    pool = client.new_pool(persistent=True)
    fill(pool)
    refused = []
    for number in range(3000):
        for index in (0, 70, 600, 5000, 2**31):
            stored = pool.put(oid(number), index, page("word32", number))
            assert page_at(pool, index, oid(number)) == (page("word32", number) if stored else None)
            assert pool.present(oid(number), index, 1) == [(index, 1)] * stored
            refused += [(number, index)] * (not stored)
    assert refused
    fill(pool, "text", oid(901))
    assert all(page_at(pool, index, oid(number)) is None for number, index in refused)


class Bad:
    """Neither a number, nor a text, nor a buffer."""


def refuses(call: Callable[[Any], object], argument: Any) -> bool:
    try:
        call(argument)
    except (TypeError, ValueError, OverflowError, BufferError, PoolError, ZeroDivisionError):
        return True
    return False


def test_10_12_whatever_is_passed_is_looked_at_first(small: _native.Segment) -> None:
    """Numbers out of range, negative ones, names and buffers of the wrong kind: an exception each time."""
    client = small.client("guest")
    pool = client.new_pool(persistent=True)
    assert pool.put(OBJECT, 0, page("text", 1)) == 1
    odd: list[Any] = [
        -1,
        2**31,
        2**32,
        2**63,
        2**64,
        1.5,
        "x",
        "",
        None,
        Bad(),
        [],
        b"",
        bytes(23),
        bytes(25),
    ]
    calls: list[Callable[[Any], object]] = [
        lambda x: client.new_pool(True, id=x) if x is not None else 1 / 0,
        lambda x: client.new_pool(False, uuid=x) if x is not None else 1 / 0,
        client.pool,
        client.authorise,
        client.revoke,
        client.handoff,
        lambda x: small.client(x) if x != "x" else 1 / 0,
        lambda x: small.stage(x) if x != "x" else 1 / 0,
        lambda x: pool.put(x, 0, page("text", 1)),
        lambda x: pool.put(OBJECT, x, page("text", 1)) if x != 2**31 else 1 / 0,
        lambda x: pool.put(OBJECT, 0, x) if x != b"" else 1 / 0,
        lambda x: pool.get(x, 0, bytearray(PAGE_SIZE)),
        lambda x: pool.get(OBJECT, x, bytearray(PAGE_SIZE)) if x != 2**31 else 1 / 0,
        lambda x: pool.get(OBJECT, 0, x),
        lambda x: pool.flush(x, 0),
        lambda x: pool.flush(OBJECT, x) if x != 2**31 else 1 / 0,
        lambda x: pool.flush(OBJECT, 1, x) if x != 2**31 else 1 / 0,
        lambda x: pool.present(OBJECT, 1, x) if x != 2**31 else 1 / 0,
        pool.flush_object,
        lambda x: pool.import_records(x) if x != b"" else 1 / 0,
        lambda x: pool.export().fill(x),
        lambda x: setattr(client, "mode", x),
        lambda x: setattr(client, "weight", x),
        lambda x: setattr(client, "floor_bytes", x),
        lambda x: _native.Device(x, OBJECT, 4096),
        lambda x: _native.Device(pool, x, 4096),
    ]
    for number, call in enumerate(calls):
        for x in odd:
            assert refuses(call, x), f"call {number} takes {x!r}"
    assert page_at(pool, 0) == page("text", 1)
    assert (client.mode, client.weight, client.floor_bytes, client.phase) == ("on", 100, 0, "none")
    assert [c.name for c in small.clients()] == ["guest"]


def test_10_12_nobody_reaches_another_client(small: _native.Segment) -> None:
    """A number is looked up within its client, also of a pool that others have."""
    mine, theirs = small.client("mine"), small.client("theirs")
    pool = theirs.new_pool(persistent=True)
    assert pool.put(OBJECT, 0, page("text", 1)) == 1
    for number in range(20):
        with pytest.raises(PoolError, match="no pool"):
            mine.pool(number)
    staged = small.stage("hidden")
    staged.new_pool(persistent=True)
    assert "hidden" not in [client.name for client in small.clients()]
    with pytest.raises(PoolError, match="no client"):
        small.client("hidden", create=False)
    staged.destroy()


TALKATIVE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tmem.backends import _native
from tmem.errors import TmemError
from tests.backends.pages import oid, pages
segment = _native.attach(sys.argv[1])
client = segment.client("guest")
pool = client.new_pool(True)
data = b"".join(pages("random", 0, 4000))
for mode in ("on", "frozen", "off", "on"):
    client.mode = mode
    for _ in range(20):
        pool.put(oid(1), 0, data)
        pool.get(oid(2), 0, bytearray(4096))
        pool.flush(oid(3), 0, 5)
def refused(call):
    try:
        call()
    except (TmemError, TypeError, ValueError, OverflowError):
        return
    raise AssertionError(call)
for _ in range(200):
    refused(lambda: client.pool(77))
    refused(lambda: client.new_pool(False, uuid=b"not authorised.."))
    refused(lambda: segment.client("x" * 100))
    refused(lambda: pool.put(oid(1), 2**40, b""))
    refused(lambda: setattr(client, "floor_bytes", 1 << 50))
    refused(lambda: client.handoff("depart"))
    refused(lambda: pool.import_records(b"rubbish" * 100))
"""


def test_10_13_nothing_a_client_does_writes_a_log_line(directory: Path, small: _native.Segment) -> None:
    """Refused puts, bad names and numbers, a thousand times: the caller is told, and nobody else."""
    result = subprocess.run(
        [sys.executable, "-c", TALKATIVE, str(directory / "small"), str(ROOT)],
        capture_output=True,
        check=False,
        cwd=ROOT,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_10_14_processes_come_and_go_amid_eviction(directory: Path, workers: list[Worker]) -> None:
    """Attaching, evicting and closing at once, and the end of the segment under all of them."""
    path = directory / "short"
    for round_ in range(6):
        segment = _native.create(str(path), 8 << 20)
        wheres = [op.new_pool(segment, "guest", persistent) for persistent in (True, False)]
        for number, worker in enumerate(workers):
            worker.attach(path)
            worker.start(activities.evict_and_leave, str(path), wheres, number, 40)
        if round_ % 2:
            while segment.statistics()["evicted_pages"] < 1000:
                pass
            _native.destroy(str(path))
        for worker in workers:
            try:
                worker.finish(activities.evict_and_leave)
            except (PoolError, SegmentError):
                assert round_ % 2, "only a segment that was destroyed may be missed"
        if round_ % 2 == 0:
            segment.reap()
            assert segment.check() == []
            assert segment.statistics()["evicted_pages"] > 0
            _native.destroy(str(path))
        segment.close()


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_10_15_a_pool_is_destroyed_under_its_users(
    directory: Path, small: _native.Segment, workers: list[Worker], persistent: bool, shared: bool
) -> None:
    """In the window between looking a pool up and using it: three processes use it all the time."""
    if shared and persistent:
        return
    before = small.statistics()
    client = small.client("guest")
    client.authorise(UUID)
    for worker in workers:
        worker.attach(directory / "small")
    for _ in range(25):
        pool = client.new_pool(persistent, uuid=UUID if shared else None)
        for number, worker in enumerate(workers):
            worker.start(activities.use_until_gone, Where("guest", pool.id), number)
        while not all(pool.present(oid(10 + number), 0, 1) for number in range(3)):
            pass
        pool.destroy()
        again = client.new_pool(persistent, uuid=UUID if shared else None)
        assert again.id == pool.id
        assert [worker.finish(activities.use_until_gone) for worker in workers] == ["gone"] * 3
        assert again.statistics()["puts"] == again.statistics()["flushes"] == 0
        assert again.present(oid(0), 0, 2**32) == []
        again.destroy()
    nothing_left(small, before)


@pytest.mark.parametrize("persistent", [True, False])
def test_10_16_a_page_that_is_moved_is_not_put_over_a_newer_one(
    directory: Path, small: _native.Segment, workers: list[Worker], persistent: bool
) -> None:
    """Whoever moves a page looks, at the end, whether it is still the one that was read."""
    where = op.new_pool(small, "guest", persistent, exclusive=False)
    for worker in workers:
        worker.attach(directory / "small")
    workers[0].start(activities.supersede, where, oid(1), 60_000)
    workers[1].start(activities.supersede, where, oid(2), 60_000)
    workers[2].start(activities.squeeze, 1500)
    counts = [worker.finish(activities.supersede) for worker in workers[:2]]
    workers[2].finish(activities.squeeze)
    assert min(counts) > 0
    s = small.statistics()
    assert s["evicted_pages"] + s["relocated_pages"] > 0
