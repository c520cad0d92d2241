"""``doctor`` of tiers: where files lie, whether servers may be trusted, each with what mends it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends import tierchecks, tiering
from tmem.backends.filesystems import Place
from tmem.backends.paths import SegmentPaths
from tmem.cli.main import run

from .tiers.servers import single

if TYPE_CHECKING:
    from tmem.backends import _native

SIZE = 8 << 20


DISK = Place("ext4", "/dev/sda1", ("sda1", "sda"), 1 << 30, True, True, None)


def looked(segment: "_native.Segment", *local: str) -> tuple[bool, str, str]:
    (found,) = tierchecks.examine(SegmentPaths.of("default"), segment, local)
    assert found.client == "one"
    return found.well, found.detail, found.remedy


def test_a_spill_file(
    segment: "_native.Segment", tmp_path: Path, runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, client = SegmentPaths.of("default"), segment.client("one")
    segment.client("without")
    file = tmp_path / "one.spill"
    tiering.assign(paths, segment, client, str(file), SIZE)
    assert looked(segment)[0]
    assert [*tierchecks.examine(paths, segment, only="without")] == []
    run(["doctor", "--json"])
    assert '"tier"' in capsys.readouterr().out
    file.rename(tmp_path / "elsewhere")
    well, detail, _ = looked(segment)
    assert (well, "cannot be reached" in detail) == (False, True)
    (tmp_path / "elsewhere").rename(file)
    with file.open("r+b") as opened:
        opened.truncate(1 << 20)
        opened.truncate(SIZE)
    assert "has holes" in looked(segment)[1]
    tiering.withdraw(paths, segment, client)


def test_one_in_memory_is_told_when_it_is_made(
    segment: "_native.Segment", runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runtime directories of tests are on a tmpfs, which takes direct I/O from Linux 6.6 on."""
    segment.client("one")
    if run(["set", "one", "--tier", str(runtime_dir / "one.spill"), "--tier-size", "8M"]):
        assert "no direct I/O" in capsys.readouterr().err
        return
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("tmem: the tier of one: ")
    well, detail, remedy = looked(segment)
    assert not well
    assert "is memory" in detail
    assert "tmem --name default set one --tier none" in remedy
    assert told.endswith(f"{detail}; {remedy}")
    assert run(["set", "one", "--tier", "none"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("place", "local", "guest"),
    [
        (DISK, None, None),
        (replace(DISK, kind="xfs", devices=("dm-0", "nvme0n1p2", "nvme0n1")), None, None),
        (replace(DISK, kind="fuseblk"), None, None),
        (replace(DISK, direct=None, rewrites_in_place=None), None, None),
        (replace(DISK, kind="tmpfs", devices=()), "!is memory", "!is memory"),
        (replace(DISK, devices=("dm-0", "zram0")), "!/dev/zram0, which is memory", "!/dev/zram0, which is"),
        (replace(DISK, kind="nfs4", devices=()), "!nfs4, which is over a network", "waits for that"),
        (replace(DISK, kind="fuse.sshfs", devices=()), "!a process serves", "a process serves"),
        (replace(DISK, devices=("nbd0",)), "!/dev/nbd0, which is over a network", "/dev/nbd0"),
        (replace(DISK, direct=False), "!through the page cache", "!through the page cache"),
        (replace(DISK, kind="btrfs", rewrites_in_place=False), "1G are free now", "1G are free now"),
        (replace(DISK, rotating="sda"), "sda, which rotates", "sda, which rotates"),
        (replace(DISK, devices=("sdb1", "sdb")), "the swap area /dev/sdb2", "the swap area /dev/sdb2"),
    ],
    ids=lambda one: f"{one.kind}-{'-'.join(one.devices)}" if isinstance(one, Place) else "",
)
def test_a_place(place: Place, local: str | None, guest: str | None) -> None:
    """What is told of a device that this machine swaps to, and of a guest's; ``!``: it is no place for it."""
    for here, expected in ((True, local), (False, guest)):
        found = tierchecks.of_place(place, here, {"sdb": "/dev/sdb2"})
        if expected is None:
            assert found is None
            continue
        assert found is not None
        assert expected.removeprefix("!") in found.detail
        assert found.minor is not expected.startswith("!")
        assert found.remedy


def test_servers(segment: "_native.Segment", tmp_path: Path) -> None:
    paths, client = SegmentPaths.of("default"), segment.client("one")
    with single(tmp_path) as server:
        tiering.assign(paths, segment, client, f"redis://{server.address}/0?replicas=0", 0)
        assert looked(segment)[0]
        well, detail, _ = looked(segment, "one")
        assert (well, "this machine swaps to the device" in detail) == (False, True)
        server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        well, detail, remedy = looked(segment)
        assert not well
        assert "evicts pages" in detail
        assert "config set maxmemory-policy noeviction" in remedy
        server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        server.kill()
        well, detail, remedy = looked(segment)
        assert not well
        assert server.address in detail
        assert remedy
        server.start()
        tiering.withdraw(paths, segment, client)
