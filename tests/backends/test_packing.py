"""Cold neighbours are stored together: what it saves and costs, and that nobody notices."""

import json
import random
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.backends.compacting import LEAST_HOLES_BYTES, Compactor
from tmem.backends.condensing import ROUND_S

from . import operations as op
from .pages import oid
from .saving import saved
from .test_condensing import Machine, everything

OID = oid(1)
SECOND_NS = 10**9


def page(number: int) -> bytes:
    """Text as programs keep it, half of which the neighbours have, too."""
    rng, shared = random.Random(number), random.Random(number // 8)
    own = [{"id": number, "score": rng.random(), "name": f"user{rng.randrange(10**9)}"} for _ in range(24)]
    rows = [{"id": shared.random(), "name": f"group{shared.randrange(10**9)}"} for _ in range(40)]
    return json.dumps(own + rows).encode().ljust(_native.PAGE_SIZE)[: _native.PAGE_SIZE]


def fill(pool: _native.Pool, npages: int) -> None:
    for index in range(npages):
        assert pool.put(OID, index, page(index)) == 1


def intact(pool: _native.Pool, indexes: range) -> bool:
    return all(op.page_at(pool, index) == page(index) for index in indexes)


@pytest.fixture
def machine(small: _native.Segment) -> Machine:
    assert not small.packing, "it is off at first"
    return Machine(small, packing=True)


def packed(segment: _native.Segment) -> int:
    return segment.statistics()["packed_pages"]


def pack_all(segment: _native.Segment) -> None:
    everything(segment)
    assert op.pack(segment, warm=True)


def test_neighbours_that_nobody_wants_are_packed(
    small: _native.Segment, client: _native.Client, persistent: _native.Pool, machine: Machine
) -> None:
    fill(persistent, 600)
    machine.run(2 * ROUND_S + 20)
    assert packed(small) == 0, "what was put a minute ago is warm"
    small.packing = False
    machine.run(4 * ROUND_S)
    assert packed(small) == 0, "it is off"
    before = client.statistics()["used_bytes"]
    small.packing = True
    machine.run(4 * ROUND_S)
    counts, one = small.statistics(), client.statistics()
    assert counts["packed_pages"] == persistent.statistics()["packed_pages"] > 560
    assert counts["packs"] == one["packs"] < counts["packed_pages"] / 2.5
    assert counts["pages_packed"] >= counts["packed_pages"]
    assert one["used_bytes"] == persistent.statistics()["bytes"] + one["pack_bytes"]
    assert before * 0.9 > before - counts["pages_packed_bytes"] == one["used_bytes"]
    assert counts["packing_ns"] > 0
    figures = machine.condenser.figures()
    assert figures["packed_now_pages"] == counts["packed_pages"]
    assert figures["packed_now_bytes"] == counts["pages_packed_bytes"]
    assert figures["condensed_now_pages"] == counts["condensed_pages"] == 600
    assert intact(persistent, range(600))
    assert small.timing()["expand"][0] > 5
    assert persistent.put(OID, 7, page(1007)) == 1
    assert op.page_at(persistent, 7) == page(1007)
    assert op.page_at(persistent, 6) == page(6)
    buffer = bytearray(100 * _native.PAGE_SIZE)
    assert persistent.get(OID, 300, buffer) == 100
    assert buffer == b"".join(page(index) for index in range(300, 400))


def test_what_is_read_again_and_again_leaves_its_pack(
    small: _native.Segment, persistent: _native.Pool, machine: Machine
) -> None:
    fill(persistent, 80)
    pack_all(small)
    assert packed(small) > 70
    for _ in range(4):
        assert intact(persistent, range(40))
        machine.run(ROUND_S)
    counts = small.statistics()
    assert 20 < counts["packed_pages"] <= 44
    assert counts["pages_unpacked"] >= 28
    assert intact(persistent, range(80))


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_memory_of_pages_that_are_freed_goes_back(
    small: _native.Segment, client: _native.Client, persistent: _native.Pool, share: float
) -> None:
    npages = 1600
    fill(persistent, npages)
    everything(small)
    apart = client.statistics()["used_bytes"]
    assert op.pack(small, warm=True)
    assert packed(small) > npages * 0.9
    assert client.statistics()["used_bytes"] < apart * 0.9
    order = random.Random(1).sample(range(npages), int(npages * share))
    for index in order:
        persistent.flush(OID, index)
    lost = small.statistics()["packs"] * 4 - packed(small)
    assert 0.9 * lost <= small.pack_losses <= lost
    assert op.unpack(small)
    assert client.statistics()["used_bytes"] <= apart * (1 - share) * 1.02, "more than without packs"
    assert small.check() == []
    rest = sorted(set(range(npages)) - set(order))
    assert all(op.page_at(persistent, index) == page(index) for index in rest)
    assert small.pack_losses <= small.statistics()["packs"], "of three pages, or four"


@pytest.mark.parametrize("of", [4, 8])
def test_the_manager_sees_to_it_at_once(tmp_path: Path, of: int) -> None:
    """One page of `of` is left: one in each pack, or one in every other pack, between holes."""
    npages = 12000
    segment = _native.create(str(tmp_path / "segment"), 64 << 20)
    persistent = segment.client("guest").new_pool(persistent=True)
    now_ns = 0
    compactor = Compactor(segment, lambda: now_ns)
    fill(persistent, npages)
    pack_all(segment)
    full, packs = persistent.client.statistics()["used_bytes"], segment.statistics()["packs"]
    for index in range(npages):
        if index % of:
            persistent.flush(OID, index)
    left = segment.statistics()["packs"]
    assert left <= packs * 4 / of * 1.05, "packs without pages go at once"
    for _ in range(20):
        now_ns += SECOND_NS // 10
        compactor.step()
        if not compactor.many_holes:
            break
    assert segment.statistics()["packs"] < left / 2
    assert persistent.client.statistics()["used_bytes"] < 2 / of * full
    used, _, holes = segment.occupied
    assert holes < max(used / 8, LEAST_HOLES_BYTES)
    assert intact(persistent, range(0, npages, of))
    assert segment.check() == []
    segment.close()


def test_a_part_of_a_packed_page_is_written(small: _native.Segment, persistent: _native.Pool) -> None:
    device = _native.Device(persistent, OID, 100 * _native.PAGE_SIZE)
    fill(persistent, 100)
    pack_all(small)
    assert packed(small) > 90
    device.pwrite(None, b"x" * 512, 512, 0)
    expected = bytearray(page(0))
    expected[512:1024] = b"x" * 512
    assert op.page_at(persistent, 0) == bytes(expected)
    assert intact(persistent, range(1, 100))


def test_a_save_file_has_pages_as_ever(small: _native.Segment, persistent: _native.Pool) -> None:
    """Whoever restores it need not know of packs."""
    fill(persistent, 60)
    before = saved(small, "guest")
    pack_all(small)
    assert packed(small) > 50
    assert len(saved(small, "guest")) == len(before)
    assert intact(persistent, range(60))
