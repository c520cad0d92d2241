"""The spill file: the contract, and what is special about a file on a disk."""

import os
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis.stateful import run_state_machine_as_test

from tmem.backends.tiers import spill
from tmem.backends.tiers.contract import MAX_RECORD_BYTES, Tier, TierIdentity
from tmem.errors import TierCorruptError, TierDownError, TierError, TierFullError

from ...waiting import DEADLINE_S
from ..machine import bounded
from .contract import IDENTITY, OTHERS, TierContract, World, check, record, records
from .machine import TierMachine

BIG = 1 << 20


class Files:
    """A directory of spill files."""

    def __init__(self, directory: Path, capacity_records: int) -> None:
        self.directory = directory
        self.capacity_records = capacity_records

    def path(self, identity: TierIdentity) -> Path:
        return self.directory / f"{identity.nonce:x}-{identity.client}-{identity.serial}"

    def open(self, identity: TierIdentity, writer: bool) -> Tier:
        path = self.path(identity)
        if writer and not path.exists():
            blocks = 2 + self.capacity_records * (MAX_RECORD_BYTES + 48) // spill.BLOCK_BYTES
            spill.create(path, identity, blocks * spill.BLOCK_BYTES)
        return spill.SpillFile(path, identity, writer)


class TestSpillFile(TierContract):
    @pytest.fixture
    def world(self, tmp_path: Path) -> World:
        return Files(tmp_path, 512)


class SpillMachine(TierMachine):
    def new_world(self) -> World:
        self.temporary = TemporaryDirectory()
        return Files(Path(self.temporary.name), 200)

    def end_world(self) -> None:
        self.temporary.cleanup()


def test_random_use() -> None:
    run_state_machine_as_test(SpillMachine, settings=bounded(15, 30))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[spill.SpillFile]:
    spill.create(tmp_path / "spill", IDENTITY, BIG)
    opened = spill.SpillFile(tmp_path / "spill", IDENTITY, writer=True)
    opened.retain([])
    yield opened
    opened.close()


def test_all_of_it_is_allocated_and_only_ours(file: spill.SpillFile) -> None:
    status = file.path.stat()
    assert status.st_size == BIG
    assert status.st_blocks * 512 >= BIG
    assert status.st_mode & 0o777 == 0o600
    assert spill.identity_of(file.path) == IDENTITY


def test_another_one_is_refused(file: spill.SpillFile) -> None:
    for other in OTHERS:
        with pytest.raises(TierCorruptError, match="somebody else"):
            spill.SpillFile(file.path, other, writer=False)


def test_two_writers_are_refused(file: spill.SpillFile) -> None:
    with pytest.raises(TierDownError, match="in use by another manager"):
        spill.SpillFile(file.path, IDENTITY, writer=True)
    with pytest.raises(TierDownError, match="in use by another manager"):
        spill.create(file.path, OTHERS[0], BIG)
    check(file, file.write(records(0, 3)), records(0, 3))


def test_a_left_over_file_is_used_again(file: spill.SpillFile) -> None:
    file.close()
    spill.create(file.path, OTHERS[0], BIG // 2)
    assert spill.identity_of(file.path) == OTHERS[0]
    assert file.path.stat().st_size == BIG // 2


@pytest.mark.parametrize("there", [False, True])
def test_who_dies_while_it_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:
        spill.create(tmp_path / "spill", OTHERS[0], BIG)
    die = [True]
    allocate = os.posix_fallocate

    def dying(descriptor: int, offset: int, length: int) -> None:
        allocate(descriptor, offset, length)
        if die[0]:
            die[0] = False
            os._exit(7)

    monkeypatch.setattr(os, "posix_fallocate", dying)
    if not (pid := os.fork()):
        spill.create(tmp_path / "spill", IDENTITY, BIG)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert not list(tmp_path.iterdir())
    die[0] = False
    spill.create(tmp_path / "spill", IDENTITY, BIG)
    spill.SpillFile(tmp_path / "spill", IDENTITY, writer=True).close()


@pytest.mark.parametrize("content", [b"dear diary\n", bytes(8192), b"tmemspl\n" + b"\xff" * 8192])
def test_what_is_no_spill_file_stays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "diary"
    path.write_bytes(content)
    with pytest.raises(TierCorruptError, match="stays as it is"):
        spill.create(path, IDENTITY, BIG)
    with pytest.raises(TierCorruptError, match="not a spill file"):
        spill.SpillFile(path, IDENTITY, writer=True)
    assert path.read_bytes() == content


@pytest.mark.parametrize("size_bytes", [0, 65535, (1 << 40) + 4096])
def test_sizes_that_are_not_possible(tmp_path: Path, size_bytes: int) -> None:
    with pytest.raises(TierError, match="give 64K to 1T"):
        spill.create(tmp_path / "spill", IDENTITY, size_bytes)
    assert not (tmp_path / "spill").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "spill").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TierDownError, match="cannot be opened"):
        spill.create(tmp_path / "spill", IDENTITY, BIG)
    assert not (tmp_path / "elsewhere").exists()


def test_neighbours_are_written_side_by_side(file: spill.SpillFile) -> None:
    """So that one read brings several; no two records share a byte."""
    batch = [record(n, 1000) for n in range(64)]
    locations = file.write(batch)
    begins = [location & ((1 << 34) - 1) for location in locations]
    assert [after - before for before, after in pairwise(begins)] == [16] * 63


def test_full_of_holes_it_takes_what_fits(file: spill.SpillFile) -> None:
    """Every other block is kept: no run is longer than one block, and records go there one by one."""
    batch = [record(n, 4096) for n in range(255)]
    locations = file.write(batch)
    assert len(locations) == 255
    kept = dict(list(zip(locations, batch, strict=True))[::2])
    file.retain(sorted(kept))
    small = [record(1000 + n, 2000) for n in range(200)]
    more = dict(zip(file.write(small), small, strict=True))
    with pytest.raises(TierFullError, match="is full"):
        file.write([record(n, 4096) for n in range(60)])
    with pytest.raises(TierFullError):
        file.write([record(1, MAX_RECORD_BYTES)])
    check(file, list(kept), list(kept.values()))
    check(file, list(more), list(more.values()))


def test_cut_off_behind_our_back(file: spill.SpillFile) -> None:
    batch = [record(n, 4000) for n in range(20)]
    locations = file.write(batch)
    os.truncate(file.path, 10 * 4096)
    found = file.read(locations)
    assert None in found
    for got, want in zip(found, batch, strict=True):
        assert got is None or got[: len(want)] == want


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    image, mounted = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(bytes(2 << 20))
    mounted.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True, timeout=DEADLINE_S)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True, timeout=DEADLINE_S)
    yield mounted
    subprocess.run(["umount", mounted], check=True, timeout=DEADLINE_S)


def test_a_full_disk_is_refused_at_once(small_disk: Path) -> None:
    with pytest.raises(TierFullError, match="the disk is full; give a smaller size or another disk"):
        spill.create(small_disk / "spill", IDENTITY, 8 << 20)
    assert not (small_disk / "spill").exists()
    spill.create(small_disk / "spill", IDENTITY, 1 << 20)
    opened = spill.SpillFile(small_disk / "spill", IDENTITY, writer=True)
    opened.retain([])
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "rest").write_bytes(bytes(4 << 20))
    batch = [record(n, 4000) for n in range(200)]  # of others' full disk it needs nothing any more
    check(opened, opened.write(batch), batch)
    opened.close()


def test_a_destroyed_file_takes_no_room_although_somebody_has_it_open(tmp_path: Path) -> None:
    path = tmp_path / "spill"
    spill.create(path, IDENTITY, BIG)
    with path.open("rb") as reader:
        assert os.fstat(reader.fileno()).st_blocks * 512 >= BIG
        spill.SpillFile(path, IDENTITY, writer=True).destroy()
        assert os.fstat(reader.fileno()).st_blocks == 0
