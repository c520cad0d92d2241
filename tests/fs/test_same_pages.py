"""Two mounts of two directories with equal files, on a shared pool: pages are kept once, unnoticed."""

import os
import random
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

UUID = uuid.UUID("0123456789abcdef0123456789abcdef")
FILES, PAGES = 24, 16
Pair = tuple[Place, Place]


def content(number: int) -> bytes:
    return random.Random(number).randbytes(PAGES * PAGE_SIZE - number)


def read_all(place: Place) -> None:
    for number in range(FILES):
        assert (place.point / f"file{number}").read_bytes() == content(number)


def pair_all(segment: "_native.Segment") -> None:
    assert segment.dedup(0, 10**10, warm=True)[0] == 0


def misses(pair: Pair) -> int:
    return sum(place.statistics().miss_pages for place in pair)


@pytest.fixture
def pair(segment: "_native.Segment", mounter: Mounter, tmp_path: Path) -> Pair:
    """Two mounts whose files were read and are kept once; the pool is the first one's, who allows that."""

    def mount(name: str) -> Place:
        segment.client(name).authorise(UUID.bytes)
        lower = tmp_path / f"{name}-lower"
        lower.mkdir()
        for number in range(FILES):
            (lower / f"file{number}").write_bytes(content(number))
        options = f"timeout=0,client={name},shared={UUID}"
        return mounter(options, lower=lower, point=tmp_path / name)

    one, two = mount("web1"), mount("web2")
    read_all(one)
    read_all(two)
    before = segment.client("web1").statistics()
    assert before["ephemeral_pages"] == 2 * FILES * PAGES
    pair_all(segment)
    assert segment.statistics()["dedup_pages"] == 0, "nobody has allowed it"
    segment.client("web1").dedup = True
    pair_all(segment)
    after = segment.client("web1").statistics()
    assert (after["twin_pages"], after["original_pages"]) == (2 * FILES * PAGES, FILES * PAGES)
    assert after["used_bytes"] * 2 == before["used_bytes"]
    assert segment.check() == []
    return one, two


def test_both_hit_what_is_kept_once(pair: Pair, segment: "_native.Segment") -> None:
    before = misses(pair)
    for place in pair:
        read_all(place)
    assert misses(pair) == before
    assert segment.statistics()["twin_pages"] == 2 * FILES * PAGES


def test_a_change_of_one_is_not_the_others(pair: Pair, segment: "_native.Segment") -> None:
    one, two = pair
    changed = bytearray(content(3))
    changed[PAGE_SIZE + 5 : PAGE_SIZE + 8] = b"new"
    with (two.point / "file3").open("rb", buffering=0) as held:
        (one.lower / "file3").write_bytes(changed)  # underneath
        assert (one.point / "file3").read_bytes() == changed
        assert held.read() == content(3)
    with (two.point / "file5").open("r+b", buffering=0) as file:  # through the mount
        os.pwrite(file.fileno(), b"own", 0)
    assert (two.point / "file5").read_bytes() == b"own" + content(5)[3:]
    assert (one.point / "file5").read_bytes() == content(5)
    assert (two.point / "file3").read_bytes() == content(3)
    pair_all(segment)
    assert (one.point / "file3").read_bytes() == changed
    assert segment.check() == []


def test_memory_is_short(pair: Pair, segment: "_native.Segment") -> None:
    """Originals are evicted while files are read, and paired anew: every read is right."""
    for turn in range(6):
        segment.evict((FILES * PAGES * PAGE_SIZE) // (turn % 3 + 1))
        read_all(pair[turn % 2])
        if turn % 2:
            pair_all(segment)
        read_all(pair[1 - turn % 2])
    assert segment.statistics()["twin_pages"] > 0
    assert segment.check() == []


def test_the_owner_leaves(pair: Pair, segment: "_native.Segment") -> None:
    one, two = pair
    one.umount()
    read_all(two)
    pair_all(segment)
    read_all(two)
    assert segment.check() == []
    two.umount()
    segment.reap()
    assert (segment.statistics()["original_pages"], segment.statistics()["ephemeral_pages"]) == (0, 0)
    assert segment.check() == []
