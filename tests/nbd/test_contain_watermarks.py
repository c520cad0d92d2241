"""The kernel's watermarks, on machines made of files: what changes, what never does, and the way back."""

from pathlib import Path

import pytest

from tmem.errors import TmemError
from tmem.nbd import watermarks
from tmem.nbd.watermarks import BOOST, FREE


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 6291456 kB\n")
    write(tmp_path, {FREE: 67584, BOOST: 15000})
    return tmp_path


def write(proc: Path, values: dict[str, int]) -> None:
    for name, value in values.items():
        (proc / "sys/vm" / name).write_text(f"{value}\n")


def test_there_and_back(proc: Path) -> None:
    changes = watermarks.wanted(proc)
    assert changes == {FREE: 8388608 // 20, BOOST: 0}
    watermarks.apply(changes, proc, proc)
    assert watermarks.current(proc) == changes
    # Once more is no change, and does not take ours for what was there before.
    assert watermarks.wanted(proc) == {}
    watermarks.apply({}, proc, proc)
    assert watermarks.undo(proc, proc) == {FREE: 67584, BOOST: 15000}
    assert watermarks.current(proc) == {FREE: 67584, BOOST: 15000}
    assert watermarks.undo(proc, proc) == {}


def test_nothing_is_lowered(proc: Path) -> None:
    write(proc, {FREE: 900000})
    assert watermarks.wanted(proc) == {BOOST: 0}


def test_a_small_machine(proc: Path) -> None:
    (proc / "meminfo").write_text("MemTotal: 131072 kB\nMemAvailable: 98304 kB\n")
    write(proc, {FREE: 1024})
    assert watermarks.wanted(proc)[FREE] == 16384
    (proc / "meminfo").write_text("MemTotal: 131072 kB\nMemAvailable: 20480 kB\n")
    with pytest.raises(TmemError, match="only 20M are available: end something"):
        watermarks.wanted(proc)


def test_a_kernel_without_boost(proc: Path) -> None:
    (proc / "sys/vm" / BOOST).unlink()
    changes = watermarks.wanted(proc)
    assert changes.keys() == {FREE}
    watermarks.apply(changes, proc, proc)
    assert watermarks.undo(proc, proc) == {FREE: 67584}
