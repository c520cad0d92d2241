"""What every tier must pass: subclass `TierContract` in a test module and say how to open one.

    class TestSpillFile(TierContract):
        @pytest.fixture
        def world(self, tmp_path: Path) -> Iterator[World]: ...

A `World` is one place where tiers are kept. `records` makes records that cannot be told from real ones by a
tier. The state machine is in `machine`; faults are injected by `faulty`.
"""

import random
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import pytest

from tmem.backends.tiers.contract import (
    MAX_BATCH_RECORDS,
    MAX_LOCATION,
    MAX_RECORD_BYTES,
    MIN_RECORD_BYTES,
    Tier,
    TierIdentity,
)
from tmem.errors import TierFullError

IDENTITY = TierIdentity(0x1234_5678_9ABC_DEF0, 3, 7)
OTHERS = (
    TierIdentity(0x1234_5678_9ABC_DEF1, 3, 7),
    TierIdentity(0x1234_5678_9ABC_DEF0, 4, 7),
    TierIdentity(0x1234_5678_9ABC_DEF0, 3, 8),
)


class World(Protocol):
    """Where tiers of the kind under test live."""

    capacity_records: int
    """How many records of `MAX_RECORD_BYTES` must fit, and at most twice as many do; 0: there is no bound."""

    def open(self, identity: TierIdentity, writer: bool) -> Tier:
        """Open the tier of `identity`, which a writer makes if there is none."""
        ...


@lru_cache(maxsize=8192)
def record(seed: int, length: int | None = None) -> bytes:
    """Return record number `seed`; its length follows from it unless it is given."""
    rng = random.Random(seed)
    if length is None:
        any_length = rng.randrange(MIN_RECORD_BYTES, MAX_RECORD_BYTES + 1)
        length = rng.choice((MIN_RECORD_BYTES, 200, 1850, 1851, 4000, MAX_RECORD_BYTES, any_length))
    return rng.randbytes(length)


def records(first: int, count: int) -> list[bytes]:
    """Return `count` records from number `first` on."""
    return [record(first + i) for i in range(count)]


def check(tier: Tier, locations: Sequence[int], expected: Sequence[bytes]) -> None:
    """Check that exactly these records are there."""
    for location, got, want in zip(locations, tier.read(locations), expected, strict=True):
        assert got is not None, f"nothing at {location}"
        assert got[: len(want)] == want, f"something else at {location}"


def check_locations(locations: Sequence[int], count: int) -> None:
    """Check that locations are as the contract wants them."""
    assert len(locations) == count
    assert len(set(locations)) == count
    assert all(1 <= location <= MAX_LOCATION for location in locations)


class TierContract:
    """The behaviour of one tier. A subclass brings the fixture `world`."""

    @pytest.fixture
    def tier(self, world: World) -> Tier:
        tier = world.open(IDENTITY, writer=True)
        tier.retain([])
        return tier

    def test_what_was_written_is_read(self, tier: Tier) -> None:
        batch = records(0, 40)
        locations = tier.write(batch)
        check_locations(locations, 40)
        check(tier, locations, batch)
        order = random.Random(1).sample(range(40), 17)
        check(tier, [locations[i] for i in order], [batch[i] for i in order])
        statistics = tier.statistics()
        assert statistics.records == statistics.written_records == 40
        assert statistics.used_bytes >= sum(map(len, batch))
        assert statistics.read_records == 57
        tier.close()

    def test_every_length(self, tier: Tier) -> None:
        batch = [record(n, n) for n in (*range(17, 4113, 61), 4095, 4096, 4097, 4111, 4112)]
        check(tier, tier.write(batch), batch)
        tier.close()

    def test_any_buffer_goes(self, tier: Tier) -> None:
        one = record(1, 1000)
        kept = bytearray(one)
        locations = tier.write([memoryview(kept), bytearray(one), one])
        kept[:] = bytes(len(kept))
        check(tier, locations, [one, one, one])
        tier.close()

    def test_nothing(self, tier: Tier) -> None:
        assert tier.write([]) == []
        assert tier.read([]) == []
        tier.close()

    def test_a_large_batch(self, tier: Tier, world: World) -> None:
        count = min(MAX_BATCH_RECORDS, (world.capacity_records or MAX_BATCH_RECORDS) // 2)
        batch = [record(n, 1000 + n % 900) for n in range(count)]
        locations = tier.write(batch)
        check_locations(locations, count)
        check(tier, locations, batch)
        tier.close()

    def test_locations_are_not_used_twice(self, tier: Tier) -> None:
        seen: set[int] = set()
        for n in range(5):
            locations = tier.write(records(n * 10, 10))
            assert not seen & set(locations)
            seen.update(locations)
        tier.close()

    def test_what_is_retained_stays(self, tier: Tier) -> None:
        batch = records(0, 60)
        locations = tier.write(batch)
        kept = dict(sorted(zip(locations, batch, strict=True))[::3])
        tier.retain(list(kept))
        assert tier.statistics().records == 20
        for n in range(4):
            later = tier.write(records(100 * n + 100, 15))
            assert not set(later) & set(kept)
            tier.retain(sorted(kept))
            check(tier, list(kept), list(kept.values()))
        tier.close()

    def test_retain_is_told_of_what_never_was(self, tier: Tier) -> None:
        batch = records(0, 3)
        locations = tier.write(batch)
        tier.retain(sorted({*locations, 1, 12345, MAX_LOCATION - 1, MAX_LOCATION}))
        check(tier, locations, batch)
        check_locations(tier.write(records(5, 5)), 5)
        tier.close()

    def test_room_comes_back(self, tier: Tier, world: World) -> None:
        """Far more is written than ever fits, and what is kept is spread over it."""
        rng = random.Random(2)
        kept: dict[int, bytes] = {}
        for n in range(40):
            count = max(world.capacity_records // 8, 1) if world.capacity_records else 50
            batch = [record(1000 * n + i, MAX_RECORD_BYTES - i % 50) for i in range(count)]
            kept.update(zip(tier.write(batch), batch, strict=True))
            kept = dict(rng.sample(sorted(kept.items()), min(len(kept), count)))
            tier.retain(sorted(kept))
            check(tier, list(kept), list(kept.values()))
        tier.close()

    def test_a_full_tier_refuses_a_batch_as_a_whole(self, tier: Tier, world: World) -> None:
        if not world.capacity_records:
            tier.close()
            return
        batch = [record(n, MAX_RECORD_BYTES) for n in range(max(world.capacity_records // 8, 1))]
        kept: dict[int, bytes] = {}

        def fill() -> None:
            for _ in range(20):
                kept.update(zip(tier.write(batch), batch, strict=True))

        with pytest.raises(TierFullError):
            fill()
        assert len(kept) >= world.capacity_records - len(batch)
        assert tier.statistics().refused == 1
        assert tier.statistics().records == len(kept)
        check(tier, list(kept), list(kept.values()))
        few = dict(sorted(kept.items())[: len(batch)])
        tier.retain(list(few))
        few.update(zip(tier.write(batch), batch, strict=True))
        check(tier, list(few), list(few.values()))
        tier.close()

    def test_it_tells_whether_it_is_there_and_how_full(self, tier: Tier) -> None:
        tier.check()
        tier.write(records(0, 20))
        tier.check()
        told = tier.statistics()
        assert (told.failures, told.records) == (0, 20)
        assert told.used_bytes > 0
        if told.capacity_bytes is not None:
            assert told.free_bytes is not None
            assert 0 <= told.free_bytes <= told.capacity_bytes - told.used_bytes
        tier.close()

    def test_readers_elsewhere_find_it(self, tier: Tier, world: World) -> None:
        before = records(0, 5)
        locations = tier.write(before)
        reader = world.open(IDENTITY, writer=False)
        after = records(10, 5)
        locations += tier.write(after)
        check(reader, locations, before + after)
        tier.close()
        check(reader, locations, before + after)
        reader.close()

    def test_another_writer_goes_on(self, tier: Tier, world: World) -> None:
        batch = records(0, 20)
        locations = tier.write(batch)
        kept = dict(sorted(zip(locations, batch, strict=True))[::2])
        tier.close()
        again = world.open(IDENTITY, writer=True)
        check(again, list(kept), list(kept.values()))
        again.retain(list(kept))
        later = again.write(records(50, 20))
        assert not set(later) & set(kept)
        check(again, list(kept), list(kept.values()))
        check(again, later, records(50, 20))
        again.close()

    def test_others_do_not_meet(self, tier: Tier, world: World) -> None:
        batch = records(0, 10)
        locations = tier.write(batch)
        for other in OTHERS:
            stranger = world.open(other, writer=True)
            stranger.retain([])
            for got, want in zip(stranger.read(locations), batch, strict=True):
                assert got is None or got[: len(want)] != want
            theirs = stranger.write(records(100, 10))
            check(stranger, theirs, records(100, 10))
            stranger.retain([])
            check(tier, locations, batch)
            stranger.destroy()
            check(tier, locations, batch)
        tier.close()

    def test_destroyed_is_gone(self, tier: Tier, world: World) -> None:
        batch = records(0, 10)
        locations = tier.write(batch)
        tier.destroy()
        again = world.open(IDENTITY, writer=True)
        again.retain([])
        for got, want in zip(again.read(locations), batch, strict=True):
            assert got is None or got[: len(want)] != want
        check(again, again.write(batch), batch)
        again.destroy()

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_batches_overlap(self, tier: Tier, order: tuple[int, int]) -> None:
        """Either may be acknowledged first, and buffers are the caller's again before that."""
        batches = [records(0, 60), records(100, 60)]
        kept = [[bytearray(one) for one in batch] for batch in batches]
        writings = []
        for batch in kept:
            writings.append(tier.begin(batch))
            for one in batch:
                one[:] = bytes(len(one))
        locations: dict[int, list[int]] = {}
        for which in order:
            locations[which] = writings[which].end()
            check_locations(locations[which], 60)
        assert not set(locations[0]) & set(locations[1])
        for which in order:
            check(tier, locations[which], batches[which])
        tier.retain(sorted(locations[0] + locations[1]))
        assert tier.statistics().records == 120
        tier.close()

    @pytest.mark.parametrize("dropped", [0, 1])
    def test_a_batch_that_is_given_up(self, tier: Tier, dropped: int) -> None:
        """The other one knows nothing of it, and its room is used again after the next retain."""
        batches = [records(0, 60), records(100, 60)]
        writings = [tier.begin(batch) for batch in batches]
        writings[dropped].drop()
        locations = writings[1 - dropped].end()
        check(tier, locations, batches[1 - dropped])
        tier.retain(sorted(locations))
        check(tier, locations, batches[1 - dropped])
        later = tier.write(records(300, 60))
        assert not set(locations) & set(later)
        check(tier, later, records(300, 60))
        assert tier.statistics().records == 120
        tier.close()

    def test_closing_twice_is_once(self, tier: Tier) -> None:
        tier.close()
        tier.close()

    def test_readers_run_beside_the_writer(self, tier: Tier, world: World) -> None:
        """What is kept reads right at any time, whatever else is written and forgotten."""
        batch = [record(n, 1500) for n in range(8)]
        locations = sorted(tier.write(batch))
        kept = dict(zip(locations, (tier.read([at])[0] for at in locations), strict=True))
        ended = threading.Event()
        wrong: list[str] = []
        rounds = 0

        def read() -> None:
            nonlocal rounds
            reader = world.open(IDENTITY, writer=False)
            while not ended.is_set():
                for location, got in zip(locations, reader.read(locations), strict=True):
                    want = kept[location]
                    if got is None or want is None or got[:1500] != want[:1500]:
                        wrong.append(f"location {location}")
                rounds += 1
            reader.close()

        thread = threading.Thread(target=read)
        thread.start()
        try:
            n = 0
            while (n < 30 or rounds < 3) and thread.is_alive() and not wrong:
                tier.write([record(100 + 10 * n + i) for i in range(8)])
                tier.retain(locations)
                n += 1
        finally:
            ended.set()
            thread.join()
        assert not wrong
        assert rounds >= 3
        tier.close()
