"""Rules of docs/semantics.md that a file system front end must keep, with real mounts.

Named as ``tests/backends/test_rules.py`` does: K4 and K5 are about its pool, D2 about what was refused.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

CONTENT = random.Random(1).randbytes(200 * PAGE_SIZE)


@pytest.fixture
def two(segment: "_native.Segment", mounter: Mounter, tmp_path: Path) -> list[Place]:
    """Two mounts, of clients ``first`` and ``second``, that have put their file's pages."""
    places = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(CONTENT)
        places.append(mounter(f"timeout=0,client={name}", tmp_path / name, tmp_path / f"{name} mounted"))
        assert (places[-1].point / "file").read_bytes() == CONTENT
    return places


def pages_of(segment: "_native.Segment", name: str) -> int:
    return segment.client(name, create=False).statistics()["ephemeral_pages"]


def test_k4_unmounting_destroys_the_mounts_pool_and_no_other(
    two: list[Place], segment: "_native.Segment"
) -> None:
    assert [pages_of(segment, name) for name in ("first", "second")] == [200, 200]
    hits = two[1].statistics().hit_pages
    two[0].umount()
    assert [client.name for client in segment.clients()] == ["second"]
    assert pages_of(segment, "second") == 200
    assert (two[1].point / "file").read_bytes() == CONTENT
    assert two[1].statistics().hit_pages == hits + 200
    assert segment.check() == []


def test_k5_a_mount_whose_pool_is_gone_touches_nobody_elses(
    two: list[Place], segment: "_native.Segment"
) -> None:
    """Its client is destroyed; a newcomer gets the same numbers; then the mount writes, flushes and ends."""
    old = segment.client("first", create=False)
    numbers = old.id, old.pools()[0].id
    old.destroy()
    newcomer = segment.client("newcomer")
    pool = newcomer.new_pool(persistent=True)
    assert (newcomer.id, pool.id) == numbers
    data = random.Random(2).randbytes(100 * PAGE_SIZE)
    for number in range(4):
        assert pool.put(number.to_bytes(24, "little"), 0, data) == 100
    assert (two[0].point / "file").read_bytes() == CONTENT
    (two[0].point / "file").write_bytes(CONTENT[::-1])
    (two[0].point / "other").write_bytes(b"x")
    (two[0].point / "file").unlink()
    two[0].umount()
    assert pool.alive
    assert pool.statistics()["flushes"] == pool.statistics()["object_flushes"] == 0
    buffer = bytearray(len(data))
    for number in range(4):
        assert pool.get(number.to_bytes(24, "little"), 0, buffer) == 100
        assert buffer == data


def test_d2_a_refused_put_never_brings_old_bytes_back(two: list[Place], segment: "_native.Segment") -> None:
    """What is read and written while all puts are refused is right then, and when they are taken again."""
    path = two[0].point / "file"
    client = segment.client("first", create=False)
    expected = bytearray(CONTENT)
    rng = random.Random(3)
    for round_ in range(20):
        client.cap_bytes = 1 if round_ % 2 == 0 else 0
        for _ in range(5):
            at, data = rng.randrange(len(expected) - 9000), rng.randbytes(rng.randrange(1, 9000))
            with path.open("r+b") as file:
                file.seek(at)
                file.write(data)
            expected[at : at + len(data)] = data
        assert path.read_bytes() == expected
        assert (two[0].lower / "file").read_bytes() == expected
    assert client.statistics()["allocation_failures"] > 0
    assert two[0].statistics().hit_pages > 0
