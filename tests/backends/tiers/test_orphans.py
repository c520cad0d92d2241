"""Which spill files are orphans."""

import os
from pathlib import Path

from tmem.backends.tiers import orphans, spill

from .contract import IDENTITY, OTHERS

BOOT_S = 1_700_000_000.0


def made(path: Path, age_s: float = 100) -> Path:
    spill.create(path, IDENTITY, 1 << 20)
    os.utime(path, (BOOT_S - age_s, BOOT_S - age_s))
    return path


def test_only_what_nobody_reads_again_is_removed(tmp_path: Path) -> None:
    orphan = made(tmp_path / "tmem-default-guest1.spill")
    made(tmp_path / "tmem-default-later.spill", age_s=-1)
    made(tmp_path / "mine.spill")
    made(tmp_path / "tmem-default-held.spill")
    (tmp_path / "tmem-default-other.spill").write_bytes(b"dear diary\n")
    os.utime(tmp_path / "tmem-default-other.spill", (1, 1))
    (tmp_path / "tmem-default-link.spill").symlink_to(tmp_path / "mine.spill")
    holder = spill.SpillFile(tmp_path / "tmem-default-held.spill", IDENTITY, writer=True)
    there = set(tmp_path.iterdir())
    assert orphans.remove(tmp_path, {IDENTITY.nonce}, BOOT_S) == []
    assert orphans.remove(tmp_path, {other.nonce for other in OTHERS} - {IDENTITY.nonce}, BOOT_S) == [orphan]
    holder.close()
    assert set(tmp_path.iterdir()) == there - {orphan}


def test_nothing_is_older_than_a_machine_that_has_just_started() -> None:
    assert orphans.started_s() < Path("/proc/self").stat().st_mtime + 1
