"""Floors: memory that a client was promised is there when it needs it, whatever all others do meanwhile."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from . import operations as op
from .activities import put_block
from .operations import Where
from .pages import oid, page, pages
from .places import Worker
from .sums import CHUNK

MEMORY_BYTES = 16 << 20
FLOOR_BYTES = 5 << 20
RAW_BYTES = 4160
PROMISED = FLOOR_BYTES // RAW_BYTES
"""Pages that do not compress which fit the floor."""
OBJECT = oid(1)


@pytest.fixture
def segment(directory: Path) -> Iterator[_native.Segment]:
    made = _native.create(str(directory / "segment"), MEMORY_BYTES)
    yield made
    assert made.check() == []
    made.close()


@pytest.fixture
def floored(segment: _native.Segment) -> _native.Client:
    client = segment.client("floored")
    client.floor_bytes = FLOOR_BYTES
    return client


def crowd(segment: _native.Segment, persistent: bool) -> _native.Pool:
    """Another client takes whatever it can get."""
    other = segment.client("crowd")
    other.weight = 65535
    pool = other.new_pool(persistent, exclusive=False)
    for number, kind in enumerate(("random", "text", "tail", "sparse", "near")):
        put_block(segment, Where("crowd", pool.id), oid(number), 0, 6000, kind, 100)
    return pool


def put_promised(pool: _native.Pool, npages: int = PROMISED, o: bytes = OBJECT, first: int = 0) -> None:
    """Put so many pages that do not compress, one by one: none is refused."""
    for number in range(npages):
        assert pool.put(o, first + number, page("random", number)) == 1, f"refused page {number} of {npages}"


@pytest.mark.parametrize("crowded", ["persistent", "ephemeral"])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_promised_memory_is_there(
    segment: _native.Segment, floored: _native.Client, crowded: str, persistent: bool, when: str
) -> None:
    """Others may fill what is left, before or after; what was promised they never get, nor take back."""
    pool = floored.new_pool(persistent, exclusive=False)
    if when == "before":
        crowd(segment, crowded == "persistent")
    put_promised(pool)
    if when == "after":
        crowd(segment, crowded == "persistent")
    assert pool.statistics()["pages"] == PROMISED
    assert pool.statistics()["evictions"] == 0
    buffer = bytearray(PROMISED * PAGE_SIZE)
    assert pool.get(OBJECT, 0, buffer) == PROMISED
    assert buffer == b"".join(pages("random", 0, PROMISED))


@pytest.mark.parametrize("spread", ["in order", "at random", "in objects of 64 pages"])
def test_the_index_of_what_was_promised_is_there_too(
    segment: _native.Segment, floored: _native.Client, spread: str
) -> None:
    pool = floored.new_pool(persistent=True)
    crowd(segment, persistent=True)
    numbers = list(range(PROMISED))
    if spread == "at random":
        random.Random(1).shuffle(numbers)
    for number in numbers:
        o, index = (oid(100 + number // 64), number % 64) if "objects" in spread else (OBJECT, number)
        assert pool.put(o, index, page("random", number)) == 1
    assert floored.statistics()["used_bytes"] == PROMISED * RAW_BYTES


def test_others_fill_all_but_the_promise(segment: _native.Segment, floored: _native.Client) -> None:
    """Nothing is wasted: what was not promised, or was given back, others may have."""
    pool = crowd(segment, persistent=True)
    used = segment.client("crowd").statistics()["used_bytes"]
    assert used > segment.statistics()["chunks_total"] * CHUNK - FLOOR_BYTES * 17 // 16 - (3 << 20)
    assert pool.put(oid(50), 0, page("random", 1)) == 0
    floored.floor_bytes = 0
    more = put_block(segment, Where("crowd", pool.id), oid(60), 0, 3000, "random", 100)
    assert more * RAW_BYTES > FLOOR_BYTES - (1 << 20)
    with pytest.raises(PoolError, match="promised"):
        floored.floor_bytes = FLOOR_BYTES
    assert floored.floor_bytes == 0
    assert pool.flush(oid(60), 0, 3000) == more
    floored.floor_bytes = FLOOR_BYTES - (1 << 20)  # not quite as much: the others' index has grown
    put_promised(floored.new_pool(persistent=True), (FLOOR_BYTES - (1 << 20)) // RAW_BYTES)


@pytest.mark.parametrize("seed", range(4))
def test_after_churn_that_fragments(segment: _native.Segment, floored: _native.Client, seed: int) -> None:
    """Pages of all sizes come and go, of both clients and in the same chunks; each page within the floor is
    stored at once, and in the end the whole floor with pages that do not compress."""
    rng = random.Random(seed)
    other = segment.client("other").new_pool(persistent=True)
    pool = floored.new_pool(persistent=True)
    source = page("random", seed)
    for _ in range(8):
        for _ in range(3000):
            index, length = rng.randrange(4000), rng.randrange(40, 4000)
            data = source[:length].ljust(PAGE_SIZE, b"\0")
            within = floored.statistics()["used_bytes"] + RAW_BYTES <= FLOOR_BYTES
            if rng.random() < 0.6 or not within:
                other.put(oid(2), index, data)
            else:
                assert pool.put(OBJECT, index, data) == 1
        for each, o in ((pool, OBJECT), (other, oid(2))):
            for _ in range(2000):
                each.flush(o, rng.randrange(4000), rng.choice((1, 1, 1, 30)))
    crowd(segment, persistent=True)
    kept = rng.sample(range(4000), 300)
    for index in set(range(4000)) - set(kept):
        pool.flush(OBJECT, index)
    left = (FLOOR_BYTES - floored.statistics()["used_bytes"]) // RAW_BYTES
    put_promised(pool, left, oid(3))
    assert segment.check() == []


@pytest.mark.parametrize(
    "kinds", [(True,), (False,), (True, True, False)], ids=["persistent", "ephemeral", "both"]
)
@pytest.mark.parametrize("seed", range(3))
def test_each_of_several_clients_gets_what_it_was_promised(
    segment: _native.Segment, kinds: tuple[bool, ...], seed: int
) -> None:
    """Four with floors and two without put and flush pages of all sizes: none is refused within its floor."""
    rng = random.Random(seed)
    clients = [segment.client(f"client {i}") for i in range(6)]
    for client in clients[:4]:
        client.floor_bytes = rng.randrange(1 << 18, 5 << 19)
    pools = [[client.new_pool(kind, exclusive=False) for kind in kinds] for client in clients]
    source = page("random", seed)
    for step in range(15_000):
        number, index = rng.randrange(6), rng.randrange(3000)
        pool = rng.choice(pools[number])
        if rng.random() < (0.9 if step // 2500 % 2 == 0 else 0.65):
            length = PAGE_SIZE if rng.random() < 0.3 else rng.randrange(16, 4000)
            client = clients[number]
            within = client.statistics()["used_bytes"] + RAW_BYTES <= client.floor_bytes
            stored = pool.put(OBJECT, index, source[:length].ljust(PAGE_SIZE, b"\0"), keep_old=True)
            assert stored or not within, f"refused in step {step}: {segment.statistics()}"
        else:
            pool.flush(OBJECT, index, rng.choice((1, 1, 5, 60)))


def test_only_what_is_above_the_floor_is_evicted_for_others(
    segment: _native.Segment, floored: _native.Client
) -> None:
    """By whole chunks: so up to one less than the floor may be left."""
    floored.weight = 0
    pool = floored.new_pool(persistent=False, exclusive=False)
    put_promised(pool, 2 * PROMISED)
    crowd(segment, persistent=False)
    crowd(segment, persistent=True)
    left = floored.statistics()["used_bytes"]
    assert pool.statistics()["evictions"] > 0
    assert FLOOR_BYTES - CHUNK <= left <= FLOOR_BYTES + 2 * CHUNK


def test_its_own_pages_it_may_evict(floored: _native.Client) -> None:
    """A floor is a promise to the client, not to its ephemeral pages: its own puts come first."""
    ephemeral, persistent = floored.new_pool(False, False), floored.new_pool(True)
    put_promised(ephemeral)
    floored.cap_bytes = FLOOR_BYTES
    put_promised(persistent)
    assert ephemeral.statistics()["pages"] == 0
    assert persistent.put(oid(5), 0, page("random", 1)) == 0


def test_promises_are_bounded(segment: _native.Segment) -> None:
    """Clients ask until one is refused; then each gets all that it was promised, whoever comes first."""
    clients = [segment.client(f"client {i}") for i in range(20)]
    promised: list[_native.Client] = []
    for client in clients:
        try:
            client.floor_bytes = 1 << 20
        except PoolError:
            assert client.floor_bytes == 0
            break
        promised.append(client)
    assert 8 <= len(promised) <= MEMORY_BYTES >> 20
    with pytest.raises(PoolError):
        promised[0].floor_bytes = MEMORY_BYTES
    assert promised[0].floor_bytes == 1 << 20
    crowd(segment, persistent=True)
    for client in reversed(promised):
        put_promised(client.new_pool(persistent=True), (1 << 20) // RAW_BYTES)


def test_memory_that_others_keep_cannot_be_promised(segment: _native.Segment) -> None:
    """Persistent pages cannot be taken away; ephemeral ones can, but for those within another's floor."""
    crowd(segment, persistent=True)
    client = segment.client("late")
    with pytest.raises(PoolError, match="promised"):
        client.floor_bytes = FLOOR_BYTES
    segment.client("crowd").destroy()
    crowd(segment, persistent=False)
    client.floor_bytes = FLOOR_BYTES
    put_promised(client.new_pool(persistent=True))
    full = segment.client("full")
    full.floor_bytes = FLOOR_BYTES
    put_promised(full.new_pool(persistent=False, exclusive=False))
    with pytest.raises(PoolError, match="promised"):
        segment.client("later").floor_bytes = FLOOR_BYTES


@pytest.mark.parametrize("persistent", [True, False])
def test_who_is_refused_hears_what_would_not_be(segment: _native.Segment, persistent: bool) -> None:
    """To the byte, whoever has what: so much is granted, and one byte more is not."""
    client, other = segment.client("one"), segment.client("floored")
    for other_bytes in (0, 3 << 20):
        other.floor_bytes = other_bytes
        for _ in range(2):  # once beside nobody's pages, once beside many
            most = client.most_floor_bytes
            assert client.floor_bytes == 0
            with pytest.raises(PoolError, match="most_floor_bytes"):
                client.floor_bytes = most + 1
            client.floor_bytes = most
            assert client.most_floor_bytes == most
            client.floor_bytes = 0
            put_block(
                segment, Where("crowd", crowd_pool(segment, persistent).id), oid(9), 0, 1000, "random", 9
            )
    assert segment.client("crowd").statistics()["used_bytes"] > 3 << 20
    with pytest.raises(AttributeError):
        client.most_floor_bytes = 1  # type: ignore[misc]


def crowd_pool(segment: _native.Segment, persistent: bool) -> _native.Pool:
    client = segment.client("crowd")
    return next(iter(client.pools()), None) or client.new_pool(persistent, exclusive=False)


@pytest.mark.parametrize("value", [-1, 2**64, "1", 1.5, None])
def test_what_is_no_size(floored: _native.Client, value: object) -> None:
    for name in ("floor_bytes", "cap_bytes", "weight"):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            setattr(floored, name, value)
    with pytest.raises(ValueError, match="65535"):
        floored.weight = 65536
    assert (floored.floor_bytes, floored.cap_bytes, floored.weight) == (FLOOR_BYTES, 0, 100)


def ended(worker: Worker) -> None:
    worker.close()


def killed(worker: Worker) -> None:
    worker.process.kill()
    worker.process.wait()


@pytest.mark.parametrize("end", [ended, killed])
def test_the_promise_ends_with_the_processes_of_the_client(
    segment: _native.Segment, floored: _native.Client, end: Callable[[Worker], None]
) -> None:
    """Its persistent pages stay; what it had not used, and its ephemeral pages, others may take."""
    persistent, ephemeral = floored.new_pool(persistent=True), floored.new_pool(False, exclusive=False)
    put_promised(persistent, 300)
    put_promised(ephemeral, 300)
    with Worker() as worker:
        worker.attach(Path(segment.path))
        worker.do(op.hold, "floored")
        crowd(segment, persistent=True)
        assert (persistent.statistics()["pages"], ephemeral.statistics()["pages"]) == (300, 300)
        before = segment.client("crowd").statistics()["used_bytes"]
        end(worker)
    segment.reap()
    assert not floored.held
    crowd(segment, persistent=True)
    assert (persistent.statistics()["pages"], ephemeral.statistics()["pages"]) == (300, 0)
    assert segment.client("crowd").statistics()["used_bytes"] > before + FLOOR_BYTES - 300 * RAW_BYTES - (
        1 << 20
    )
    assert [op.page_at(persistent, number) for number in range(300)] == pages("random", 0, 300)


def test_the_promise_holds_for_who_was_never_held(segment: _native.Segment, floored: _native.Client) -> None:
    """Nobody serves a device yet that is being set up: its room must be kept for it."""
    assert not floored.held
    crowd(segment, persistent=True)
    put_promised(floored.new_pool(persistent=True))


def test_a_destroyed_client_is_promised_nothing(segment: _native.Segment, floored: _native.Client) -> None:
    floored.destroy()
    crowd(segment, persistent=True)
    used = segment.client("crowd").statistics()["used_bytes"]
    assert used > MEMORY_BYTES - (3 << 20)
    assert segment.client("floored").floor_bytes == 0
