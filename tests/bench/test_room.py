"""What does not fit is refused in one line, before anything is begun."""

from pathlib import Path

import pytest

from tmem.bench import room, running, swap
from tmem.bench.grounds import FIRST
from tmem.bench.parts import Effort, Plan
from tmem.errors import TmemError
from tmem.nbd.swap import SwapEntry

MIB = 1 << 20


def plan(memory_bytes: int = 0, disk_bytes: int = 0, refused: str | None = None) -> Plan:
    return Plan(memory_bytes, disk_bytes, 1, 1.0, "nothing", refused)


def test_parts_run_one_after_the_other(tmp_path: Path) -> None:
    room.check([plan(60 * MIB), plan(60 * MIB)], 100 * MIB, tmp_path)
    with pytest.raises(TmemError, match=r"needs 101M of memory and 100M can be spared: .*--quick"):
        room.check([plan(60 * MIB), plan(101 * MIB)], 100 * MIB, tmp_path)


def test_less_than_nothing_reads_as_nothing(tmp_path: Path) -> None:
    with pytest.raises(TmemError, match="and 0B can be spared"):
        room.check([plan(1)], -5 * MIB, tmp_path)


def test_the_disk_counts_too(tmp_path: Path) -> None:
    with pytest.raises(TmemError, match=f"in {tmp_path} and .* are free there"):
        room.check([plan(0, 1 << 60)], 100 * MIB, tmp_path)


def test_what_cannot_be_measured_does_not_stop_the_rest() -> None:
    report = running.begin({"swap": plan(1 << 60, refused="needs root"), "nbd": plan()}, Effort())
    assert [(one.what, one.reason) for one in report.failed] == [("swap", "needs root")]
    with pytest.raises(TmemError, match="needs root"):
        running.begin({"swap": plan(refused="needs root")}, Effort())


def test_another_area_that_comes_first_is_refused(monkeypatch: pytest.MonkeyPatch, root: None) -> None:
    """Areas of one priority share the pages: the figures would be of both."""
    taken = SwapEntry("/dev/other", MIB, 0, FIRST)
    monkeypatch.setattr("tmem.bench.swap.entries", lambda: [taken])
    assert swap.plan(Effort()).refused == (
        "/dev/other is swapped to first, and would take pages: swapoff /dev/other"
    )
