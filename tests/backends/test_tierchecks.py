"""``doctor`` of tiers: where files lie, whether servers may be trusted, each with what mends it."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends import tierchecks, tiering
from tmem.backends.paths import SegmentPaths
from tmem.cli.main import run

from .tiers.servers import single

if TYPE_CHECKING:
    from tmem.backends import _native

SIZE = 8 << 20


def looked(segment: "_native.Segment", **changes: Path) -> tuple[bool, str, str]:
    ((name, *found),) = tierchecks.examine(SegmentPaths.of("default"), segment, **changes)
    assert name == "one"
    well, detail, remedy = found
    return bool(well), str(detail), str(remedy)


def test_a_spill_file(segment: "_native.Segment", tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = segment.client("one")
    segment.client("without")
    file = tmp_path / "one.spill"
    tiering.assign(SegmentPaths.of("default"), segment, client, str(file), SIZE)
    device = file.stat().st_dev
    number = f"{device >> 8 & 0xFFF}:{device & 0xFF | device >> 12 & 0xFFF00}"

    def on(kind: str, source: str) -> Path:
        mounts = tmp_path / "mountinfo"
        mounts.write_text(f"21 1 {number} / /x rw shared:1 - {kind} {source} rw\n")
        return mounts

    assert looked(segment, mounts=on("ext4", "/dev/sda1"))[0]
    for kind, source in (("tmpfs", "tmpfs"), ("ext4", "/dev/zram0")):
        well, detail, remedy = looked(segment, mounts=on(kind, source))
        assert not well
        assert "is memory" in detail
        assert "tmem --name default set one --tier none" in remedy
    run(["doctor", "--json"])
    assert '"tier"' in capsys.readouterr().out
    file.rename(tmp_path / "elsewhere")
    well, detail, _ = looked(segment)
    assert (well, "cannot be reached" in detail) == (False, True)
    (tmp_path / "elsewhere").rename(file)
    tiering.withdraw(SegmentPaths.of("default"), segment, client)


def test_servers(segment: "_native.Segment", tmp_path: Path) -> None:
    paths, client = SegmentPaths.of("default"), segment.client("one")
    with single(tmp_path) as server:
        tiering.assign(paths, segment, client, f"redis://{server.address}/0?replicas=0", 0)
        assert looked(segment)[0]
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
