"""Which files a mount caches: rules by size and name, as values and on a real mount."""

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.errors import TmemError
from tmem.fs.options import MountOptions
from tmem.fs.policy import DEFAULT, Policy
from tmem.fs.rules import Rules, path_below
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native


def policy(*words: str) -> Policy:
    return MountOptions.parse(list(words), "/mnt").policy


@pytest.mark.parametrize(
    ("words", "path", "declined"),
    [
        ("cache_files=*.db:*.parquet", "a/b.parquet", False),
        ("cache_files=*.db:*.parquet", "a/b.parquet.old", True),
        ("skip_files=*.log", "a/b.log", True),
        ("skip_files=*.log", "a.log/b", False),  # without a slash it is about names
        ("skip_files=tmp/*", "tmp/a/b", True),
        ("skip_files=tmp/*", "a/tmp/b", False),
        ("skip_files=*/tmp/*", "a/tmp/b", True),
        ("skip_files=*.LOG", "a.log", False),
        ("cache_files=*.db,skip_files=old*", "old.db", True),  # both must agree
        ("skip_files=*.a,skip_files=*.b", "x.a", True),  # given twice, they add up
        ('skip_files="a,b*",ro', "a,b.txt", True),
        ('skip_files="a,b*",ro', "a", False),
        ("skip_files=[ab]?.x", "b1.x", True),
    ],
)
def test_patterns(words: str, path: str, declined: bool) -> None:
    assert policy(words).rules.decline(1, lambda: path) is declined


@pytest.mark.parametrize(
    ("size", "declined"), [(4095, True), (4096, False), (1 << 30, False), (1 << 31, True)]
)
def test_sizes(size: int, declined: bool) -> None:
    rules = policy("least_size=4K", "most_size=1G").rules
    assert rules.decline(size, lambda: pytest.fail("nobody asked for names")) is declined


def test_everything_is_cached_unless_told_otherwise() -> None:
    assert policy() == DEFAULT
    assert not DEFAULT.rules.decline(0, lambda: pytest.fail("nobody asked for names"))


def test_the_other_options() -> None:
    assert policy("read_ahead=0,step_aside=never") == Policy(ahead_bytes=0, steps_aside=False)
    assert policy("read_ahead=64M,step_aside=auto").ahead_bytes == 64 << 20


@pytest.mark.parametrize(
    "word",
    ["skip_files=", "cache_files=:", "least_size=x", "read_ahead=-1", "step_aside=yes", 'skip_files="a'],
)
def test_what_is_not_understood_is_refused(word: str) -> None:
    with pytest.raises(TmemError, match="use "):
        policy(word)


def test_a_policy_is_restored_as_it_was() -> None:
    told = Policy(Rules(("*.db",), ("a/*", "b"), 1, 2), 3, False)
    assert Policy.restored(told.saved()) == told
    assert Policy.restored(DEFAULT.saved()) == DEFAULT


def test_paths_follow_renames_and_survive_unlinking(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file (deleted)").touch()
    root = os.open(tmp_path, os.O_RDONLY)
    descriptor = os.open(tmp_path / "a" / "file (deleted)", os.O_PATH)
    try:
        assert path_below(root, descriptor) == "a/file (deleted)"
        (tmp_path / "a").rename(tmp_path / "b")
        assert path_below(root, descriptor) == "b/file (deleted)"
        (tmp_path / "b" / "file (deleted)").unlink()
        assert path_below(root, descriptor) == "b/file (deleted)"
        outside = os.open("/", os.O_PATH)
        assert path_below(outside, descriptor) == str(tmp_path / "b" / "file (deleted)")[1:]
        os.close(outside)
    finally:
        os.close(descriptor)
        os.close(root)


@pytest.fixture
def place(segment: "_native.Segment", mounter: Mounter) -> Place:
    """A mount that caches files of one page or more that are no logs."""
    return mounter("timeout=0,client=web,skip_files=*.log,least_size=4K")


def hits(place: Place, path: Path) -> int:
    """Read a file of the mount twice; the pages that came from the pool."""
    before = place.statistics()
    content = path.read_bytes()
    assert path.read_bytes() == content == (place.lower / path.relative_to(place.point)).read_bytes()
    return place.statistics().hit_pages - before.hit_pages


def test_declined_files_are_passed_through(place: Place, segment: "_native.Segment") -> None:
    content = random.Random(1).randbytes(10 * PAGE_SIZE)
    for name in ("file", "file.log"):
        (place.lower / name).write_bytes(content)
    (place.lower / "small").write_bytes(b"x" * 4095)
    assert hits(place, place.point / "file") == 10
    before = place.statistics()
    assert hits(place, place.point / "file.log") == hits(place, place.point / "small") == 0
    after = place.statistics()
    assert after.declined_opens - before.declined_opens == 4
    assert after.put_pages == before.put_pages
    (pool,) = segment.client("web", create=False).pools()
    assert pool.statistics()["pages"] == 10


def test_names_count_as_they_are_when_the_first_one_opens(place: Place) -> None:
    path = place.point / "file.log"
    (place.lower / "file.log").write_bytes(b"x" * 10 * PAGE_SIZE)
    with path.open("rb") as held:
        path.rename(place.point / "file")
        assert hits(place, place.point / "file") == 0  # as whoever has it open
        assert held.read() == b"x" * 10 * PAGE_SIZE
    assert hits(place, place.point / "file") == 10
    os.link(place.point / "file", path)
    assert hits(place, path) == 20  # of several links, the one that the mount found first


def test_changes_of_a_declined_file_show(place: Place) -> None:
    path = place.lower / "file.log"
    path.write_bytes(b"old" * 5000)
    with (place.point / "file.log").open("r+b", buffering=0) as held:
        assert held.read() == b"old" * 5000
        os.pwrite(held.fileno(), b"new", 0)
        assert path.read_bytes()[:3] == b"new" == os.pread(held.fileno(), 3, 0)
        path.write_bytes(b"two" * 5000)
        assert os.pread(held.fileno(), 3, 0) == b"two"


def test_rules_and_what_they_declined_survive_a_restart(place: Place) -> None:
    for name in ("file.log", "other.log", "other"):
        (place.lower / name).write_bytes(b"x" * 10 * PAGE_SIZE)
    with (place.point / "file.log").open("rb", buffering=0) as held:
        (place.point / "file.log").rename(place.point / "file")
        place.restart()
        before = place.statistics()
        assert before.declined_opens == 1
        for _ in range(2):
            assert os.pread(held.fileno(), PAGE_SIZE, 0) == b"x" * PAGE_SIZE
        assert place.statistics().put_pages == before.put_pages
    assert hits(place, place.point / "other.log") == 0
    assert hits(place, place.point / "other") == 10
