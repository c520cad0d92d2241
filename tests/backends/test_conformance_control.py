"""Conformance tests of docs/semantics.md: 10, shared pools, and 12, save and handoff.

What goes with a sharer that leaves is in `test_rules_destruction` (K2). Of 12 here is what the core does;
`test_save` and `test_handoff` go on. See `test_conformance` for the others.
"""

from typing import Any

import pytest

from tmem.backends import _native
from tmem.errors import PoolError
from tmem.types import MAX_INDEX

from . import operations as op
from .model import Handle
from .operations import Where
from .operations import page_at as get
from .pages import oid, page, pages
from .records import apply, read
from .sums import check_sums

OBJECT = oid(1)
UUID = b"conformance test"


# 10: shared pools (what goes with a leaver: `test_rules_destruction`, K2)


def sharers(small: _native.Segment, *names: str) -> list[_native.Pool]:
    pools = []
    for name in names:
        small.client(name).authorise(UUID)
        pools.append(small.client(name).new_pool(persistent=False, uuid=UUID))
    return pools


def test_10_who_is_not_authorised_is_refused_loudly(small: _native.Segment) -> None:
    """Never with a private pool instead, as once; and the pages stay out of reach."""
    (pool,) = sharers(small, "a")
    assert pool.put(OBJECT, 0, page("text", 1)) == 1
    stranger = small.client("stranger")
    for uuid in (UUID, bytes(15) + b"1"):
        with pytest.raises(PoolError, match="authorise"):
            stranger.new_pool(persistent=False, uuid=uuid)
    stranger.authorise(bytes(15) + b"1")
    with pytest.raises(PoolError, match="authorise"):
        stranger.new_pool(persistent=False, uuid=UUID)
    assert stranger.pools() == []
    other = stranger.new_pool(persistent=False, uuid=bytes(15) + b"1")
    assert get(other, 0) is None
    assert other.present(OBJECT, 0, 2**32) == []
    assert pool.sharers == [pool.client]


def test_10_what_cannot_be_shared(small: _native.Segment) -> None:
    client = small.client("a")
    bad: Any  # also what the type checker would object to
    for bad in (b"", UUID[:-1], UUID + b"1", bytes(16), b"\xff" * 16, UUID.decode(), bytearray(UUID)):
        for call in (client.authorise, client.revoke, lambda uuid: client.new_pool(False, uuid=uuid)):
            with pytest.raises((ValueError, TypeError), match="16"):
                call(bad)
    client.authorise(UUID)
    for persistent, exclusive in ((True, None), (True, True), (False, True)):
        with pytest.raises((PoolError, ValueError), match="shared"):
            client.new_pool(persistent, exclusive, uuid=UUID)
    client.new_pool(False, uuid=UUID)
    with pytest.raises(PoolError, match="already"):
        client.new_pool(False, uuid=UUID)
    assert len(client.pools()) == 1


def test_10_authorisations_are_bounded_and_can_be_withdrawn(small: _native.Segment) -> None:
    client = small.client("a")
    uuids = [number.to_bytes(16, "big") for number in range(1, 18)]
    for uuid in uuids[:16]:
        client.authorise(uuid)
        client.authorise(uuid)
    assert sorted(client.authorised()) == uuids[:16]
    with pytest.raises(PoolError, match="16"):
        client.authorise(uuids[16])
    assert [client.revoke(uuids[3]) for _ in range(2)] == [True, False]
    client.authorise(uuids[16])
    with pytest.raises(PoolError, match="authorise"):
        client.new_pool(False, uuid=uuids[3])
    assert client.new_pool(False, uuid=uuids[16]).uuid == uuids[16]


def test_10_accounting_moves_exactly(small: _native.Segment) -> None:
    """The owner pays; with the ownership all of the shared pool's account moves, and nothing else."""
    first, second = sharers(small, "a", "b")
    private = [pool.client.new_pool(persistent=False, exclusive=False) for pool in (first, second)]
    for number, pool in enumerate((first, second, *private)):
        assert pool.put(oid(number), 0, b"".join(pages("text", 100 * number, 70))) == 70
    for number in range(2):
        assert get(second, 0, oid(number)) is not None
    own = [pool.statistics()["bytes"] for pool in private]
    shared = first.statistics()["bytes"]
    used = [pool.client.statistics()["used_bytes"] for pool in private]
    assert used == [own[0] + shared, own[1]]
    check_sums(small)
    first.destroy()
    used = [pool.client.statistics()["used_bytes"] for pool in private]
    assert used == [own[0], own[1] + shared]
    check_sums(small)


# 12: what save, restore and handoff are made of


@pytest.mark.parametrize("npages", [0, 1, 2, 200])
@pytest.mark.parametrize("exclusive", [False, True])
def test_12_as_many_pages_come_out_as_went_in(small: _native.Segment, npages: int, exclusive: bool) -> None:
    """All of every pool, from the first to the last (10.8), in every kind and at the edges of the index."""
    client = small.client("a")
    pools = [client.new_pool(True, exclusive) for _ in range(3)]
    put: list[dict[Handle, bytes]] = [{}, {}, {}]
    for number, held in enumerate(put[:2]):
        for i, data in enumerate(pages("mixed", number, npages)):
            handle = oid(i % 5), (0, 15, 500, 4090, 2**19 - 2, MAX_INDEX - 10_000)[i % 6] + i
            assert pools[number].put(*handle, data) == 1
            held[handle] = data
    records = [op.export(small, Where("a", pool.id), False, 8192) for pool in pools]
    assert [dict(read(some)) for some in records] == put
    found = op.restore(
        small, "b", [(pool.id, exclusive, r) for pool, r in zip(pools, records, strict=True)], True
    )
    assert found == {pool.id: len(held) for pool, held in zip(pools, put, strict=True)}
    for pool, held in zip(small.client("b", create=False).pools(), put, strict=True):
        assert (pool.persistent, pool.exclusive) == (True, exclusive)
        assert {(o, i): get(pool, i, o) for o, i in held} == held
    check_sums(small)


@pytest.mark.parametrize("kind", ["sparse", "text", "near", "random"])
def test_12_a_full_segment_comes_out_whole(small: _native.Segment, kind: str) -> None:
    """Down to the last block of the last chunk, where the file ends."""
    pool = small.client("a").new_pool(True)
    assert pool.put(oid(900), 0, page("random", 1)) == 1
    small.populate(1 << 40)  # then the last chunks are taken first, for pages
    npages = op.fill(pool, kind, npages=60_000 if kind == "sparse" else 6000)
    assert small.statistics()["chunks_free"] <= 8
    records = dict(read(op.export(small, Where("a", pool.id), False, 1 << 20)))
    assert len(records) == npages
    assert all(records[oid(900), i] == get(pool, i, oid(900)) for i in range(npages))


def test_12_changes_during_a_copy(small: _native.Segment) -> None:
    """Flushes, duplicate puts and refused ones, and a pool that is destroyed, while the client works on."""
    client = small.client("a")
    pool, doomed = client.new_pool(True), client.new_pool(True)
    for each in (pool, doomed):
        assert each.put(OBJECT, 0, b"".join(pages("mixed", 0, 100))) == 100
    client.handoff("copy")
    copy: dict[Handle, bytes] = {}
    assert len(apply(copy, op.export(small, Where("a", pool.id), True, 8192))) == 100
    assert pool.flush(OBJECT, 3) == 1
    assert pool.put(OBJECT, 4, page("random", 44)) == 1
    assert pool.put(OBJECT, 100, page("random", 45)) == 1
    client.cap_bytes = 1
    assert pool.put(OBJECT, 5, page("random", 46)) == 0
    doomed.destroy()
    client.cap_bytes = 0
    assert {i for _, i in apply(copy, op.export(small, Where("a", pool.id), True, 8192))} == {3, 4, 5, 100}
    assert pool.put(OBJECT, 3, page("text", 47)) == 1
    client.handoff("freeze")
    assert {i for _, i in apply(copy, op.export(small, Where("a", pool.id), True, 8192))} == {3}
    assert copy == {(OBJECT, i): get(pool, i) for i in range(101) if i != 5}
    client.handoff("end")
    with pytest.raises(PoolError):
        op.export(small, Where("a", doomed.id), True, 8192)
