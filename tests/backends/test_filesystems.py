"""Where a file lies, by what real kernels say of real file systems on loop devices."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.waiting import DEADLINE_S
from tmem.backends import filesystems
from tmem.backends.tiers import spill
from tmem.backends.tiers.contract import TierIdentity
from tmem.errors import TierFullError

IDENTITY = TierIdentity(7, 1, 1)
MIB = 1 << 20
Disk = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Make a file system in an image and mount it: ``disk("mkfs.ext4", options="data=journal")``."""

    def run(*argv: object) -> None:
        subprocess.run([*map(str, argv)], check=True, timeout=DEADLINE_S, capture_output=True)

    with ExitStack() as mounted:

        def made(*make: str, size: int = 16 * MIB, options: str = "noatime") -> Path:
            image, point = tmp_path / f"{make[0]}.image", tmp_path / make[0]
            with image.open("wb") as file:
                file.truncate(size)
            point.mkdir()
            run(*make, image)
            run("mount", "-o", f"loop,{options}", image, point)
            mounted.callback(run, "umount", point)
            return point

        yield made


def test_a_disk_in_a_file(disk: Disk, tmp_path: Path) -> None:
    """The loop device, and the disk that its file is on."""
    file = disk("mkfs.ext4", "-q") / "file"
    file.write_bytes(b"content")
    place = filesystems.place_of(file)
    assert (place.kind, place.direct, place.rewrites_in_place) == ("ext4", True, True)
    assert place.devices[0].startswith("loop")
    below = filesystems.place_of(tmp_path).devices
    assert place.devices[1:] == below
    assert 0 < place.free_bytes < 16 * MIB
    assert place.source == f"/dev/{place.devices[0]}"


def test_direct_io_that_is_none(disk: Disk) -> None:
    """ext4 that journals data takes O_DIRECT and goes through the page cache."""
    file = disk("mkfs.ext4", "-q", options="data=journal") / "spill"
    spill.create(file, IDENTITY, MIB)
    assert filesystems.place_of(file).direct is (None if os.uname().release < "6.1" else False)


def test_partitions_maps_and_rotation(tmp_path: Path) -> None:
    """By a tree like /sys: a map on a partition of a disk that rotates."""
    block = tmp_path / "class/block"
    disk = tmp_path / "devices/sda"
    for directory in (disk / "sda2", tmp_path / "devices/dm-0/slaves/sda2", disk / "queue", block):
        directory.mkdir(parents=True)
    (disk / "sda2/partition").write_text("2\n")
    (disk / "queue/rotational").write_text("1\n")
    for name, target in (("sda", disk), ("sda2", disk / "sda2"), ("dm-0", tmp_path / "devices/dm-0")):
        (block / name).symlink_to(target)
    (tmp_path / "block").mkdir()
    (tmp_path / "block/sda").symlink_to(disk)
    file = tmp_path / "file"
    file.touch()
    number = file.stat().st_dev
    (tmp_path / "dev/block").mkdir(parents=True)
    (tmp_path / f"dev/block/{os.major(number)}:{os.minor(number)}").symlink_to(tmp_path / "devices/dm-0")
    place = filesystems.place_of(file, sys=tmp_path)
    if not os.major(number):
        pytest.skip("needs a temporary directory on one disk")
    assert place.devices == ("dm-0", "sda2", "sda")
    assert place.rotating == "sda"
    (disk / "queue/rotational").write_text("0\n")
    assert filesystems.place_of(file, sys=tmp_path).rotating is None


def test_swap_areas(disk: Disk, tmp_path: Path) -> None:
    file = disk("mkfs.ext4", "-q") / "swap file"
    file.touch()
    swaps = tmp_path / "swaps"
    escaped = str(file).replace(" ", "\\040")
    swaps.write_text(f"Filename Type Size Used Priority\n{escaped} file 1 0 -2\n")
    found = filesystems.swap_disks(swaps)
    assert {*found.values()} == {str(file)}
    assert [*found] == [*filesystems.place_of(file).devices]
    assert filesystems.swap_disks(tmp_path / "none") == {}


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as rest:
        while True:
            rest.write(os.urandom(MIB))
            os.fsync(rest.fileno())


def test_a_full_btrfs_takes_what_is_written_again(disk: Disk) -> None:
    """It writes elsewhere what is written again, and finds no room there, unless the file is told to stay."""
    point = disk("mkfs.btrfs", "-q", size=160 * MIB)
    spill.create(point / "spill", IDENTITY, 8 * MIB)
    with (point / "plain").open("wb") as plain:
        os.posix_fallocate(plain.fileno(), 0, 8 * MIB)
    place, other = (filesystems.place_of(point / name) for name in ("spill", "plain"))
    assert (place.kind, place.rewrites_in_place, other.rewrites_in_place) == ("btrfs", True, False)
    assert place.devices[0].startswith("loop")
    records = [os.urandom(4032) for _ in range(1900)]
    with closing(spill.SpillFile(point / "spill", IDENTITY, writer=True)) as file:
        file.retain([])
        file.write(records)
        with pytest.raises(OSError, match="No space"):
            fill(point / "rest")
        for _ in range(3):
            file.retain([])
            locations = file.write(records)
            assert [bytes(one or b"")[:4032] for one in file.read(locations)] == records
        with pytest.raises(TierFullError, match="is full"):
            file.write(records)
