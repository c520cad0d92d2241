"""``contain`` and ``watermarks`` as people use them; here they only say what they would do."""

import os
from pathlib import Path

import pytest

from tmem.backends import cgroup

from .conftest import Tmem


@pytest.fixture(autouse=True)
def untouched() -> None:
    if cgroup.version() is None:
        pytest.skip("no memory controller")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--share", "user.slice"], "write GROUP=PERCENT"),
        (["--share", "user.slice=0"], "write GROUP=PERCENT"),
        (["--share", "a=60", "--share", "b=60"], "more than 100 percent"),
        (["--share", "a=60", "--share", "a=10"], "write GROUP=PERCENT"),
        (["--undo", "--room", "1G"], "--undo goes with"),
        (["--force"], "--force goes with --undo"),
        (["--room", "much"], "not a size"),
    ],
)
def test_wrong_usage(tmem: Tmem, arguments: list[str], reason: str) -> None:
    result = tmem("contain", *arguments)
    assert result.status == 2
    assert reason in result.err


def test_a_dry_run_changes_nothing(tmem: Tmem, runtime_dir: Path) -> None:
    root = cgroup.mount_point()
    assert root is not None
    before = {path.name: cgroup.limit_of(path) for path in root.iterdir() if path.is_dir()}
    result = tmem("contain", "--dry-run", "--memory", "64M", "--room", "64M")
    assert result.status == 0, result.err
    assert "64M for segments" in result.out
    assert "limited to" in result.out
    assert "into" in result.out or "systemctl set-property" in result.out
    assert {path.name: cgroup.limit_of(path) for path in root.iterdir() if path.is_dir()} == before
    assert list(runtime_dir.glob(".contain*")) == []


def test_what_does_not_fit(tmem: Tmem) -> None:
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    result = tmem("contain", "--dry-run", "--memory", str(ram))
    assert result.status == 1
    assert "make the segment smaller" in result.err
    assert result.err.count("\n") == 1


def test_the_segment_that_is_there_counts(tmem: Tmem) -> None:
    assert tmem("start", "-d", "--memory", "32M").status == 0
    refused = tmem("contain", "--dry-run", "--memory", "64M")
    assert (refused.status, "leave out --memory" in refused.err) == (1, True)
    same = tmem("contain", "--dry-run")
    assert "32M for segments" in same.out
    assert "ceiling" not in same.err
    assert "--memory 16M changes nothing" in tmem("contain", "--dry-run", "--memory", "16M").err
    assert (
        tmem("--name", "other", "contain", "--dry-run", "--memory", "96M").out.count("128M for segments") == 1
    )


def test_a_ceiling_counts_whatever_the_limit_is_now(tmem: Tmem) -> None:
    """The limits of groups stay when the segment grows, and nobody may have to think of that then."""
    assert tmem("start", "-d", "--memory", "16M..64M").status == 0
    assert tmem("resize", "24M").status == 0
    result = tmem("contain", "--dry-run")
    assert "64M for segments" in result.out
    assert "counts with its ceiling, 64M, though it may take no more than 24M now" in result.err
    assert tmem("resize", "64M").status == 0
    assert "ceiling" not in tmem("contain", "--dry-run").err


def test_nothing_to_undo(tmem: Tmem, root: None) -> None:
    result = tmem("contain", "--undo")
    assert (result.status, result.out) == (0, "")
    assert "nothing to undo" in result.err
    assert "nothing to undo" in tmem("watermarks", "--undo").err


def test_watermarks_dry(tmem: Tmem, runtime_dir: Path) -> None:
    before = Path("/proc/sys/vm/min_free_kbytes").read_text()
    result = tmem("watermarks", "--dry-run")
    assert result.status == 0, result.err
    assert "vm." in result.out or "nothing to do" in result.err
    assert Path("/proc/sys/vm/min_free_kbytes").read_text() == before
    assert list(runtime_dir.glob(".watermarks*")) == []


def test_a_manager_that_runs_cannot_become_realtime(tmem: Tmem) -> None:
    assert tmem("start", "-d", "--memory", "16M").status == 0
    result = tmem("start", "-d", "--realtime")
    assert result.status == 1
    assert "not under SCHED_RR" in result.err
    assert result.err.count("\n") == 1
