"""Listings that the kernel keeps: believed while nothing has changed, never when something has."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import wait_until

from .conftest import Mounter


def names(directory: Path) -> set[str]:
    return {entry.name for entry in os.scandir(directory)}


def switches(pid: int) -> int:
    """Return how often the daemon's main thread has waited: about once for each request."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


@pytest.mark.parametrize(
    "options", ["loop=native,timeout=60,watch=off", "timeout=60,watch=off", "", "loop=native"]
)
def test_a_change_shows_in_the_next_listing(mounter: Mounter, options: str) -> None:
    place = mounter(options)
    (place.lower / "d").mkdir()
    wanted: set[str] = set()
    for turn in range(40):
        name = f"{turn:03d}"
        if turn % 3 == 2:
            victim = sorted(wanted)[turn % len(wanted)]
            (place.lower / "d" / victim).unlink()
            wanted.remove(victim)
        else:
            where = place.lower if turn % 3 else place.point
            (where / "d" / name).touch()
            wanted.add(name)
        assert names(place.point / "d") == wanted
        assert names(place.point / "d") == wanted


def test_the_kernel_keeps_a_listing(mounter: Mounter, eventually: Callable[..., None]) -> None:
    """A listing of 3,000 names takes some hundred requests; one that was kept takes a few."""
    place = mounter("loop=native,timeout=60,watch=off")
    directory = place.lower / "d"
    directory.mkdir()
    for number in range(3000):
        (directory / f"{number:04d}{'x' * 100}").touch()
    past = time.time() - 100
    os.utime(directory, (past, past))
    costs = []
    listed = set()

    def kept() -> bool:
        # Where time stamps are coarse, nothing is kept until the directory has been as it is for two seconds.
        nonlocal listed
        before = switches(place.pid)
        listed = names(place.point / "d")
        costs.append(switches(place.pid) - before)
        return costs[-1] < 20 < costs[0]

    eventually(kept)
    assert len(listed) == 3000
    (directory / "new").touch()
    assert len(names(place.point / "d")) == 3001


def settle(directory: Path) -> None:
    """Wait until the next change must show in the directory's stamps, so that a listing may be kept."""
    wait_until(lambda: int(time.time()) - 2 > int(directory.stat().st_ctime), what="it is old enough")


@pytest.mark.parametrize("waits", [False, True], ids=["at-once", "later"])
def test_who_is_amid_a_kept_listing_gets_all_names(mounter: Mounter, waits: bool) -> None:
    """Names that were read are removed, and the kernel loses what it had to another listing.

    Could the later one be kept, too, who is amid the first would go on with that, by other numbers.
    """
    place = mounter("loop=native,timeout=60,watch=off")
    directory = place.point / "d"
    directory.mkdir()
    for number in range(1000):
        (place.lower / "d" / f"{number:04d}{'x' * 100}").touch()
    settle(place.lower / "d")
    left = names(directory)
    assert names(directory) == left
    with os.scandir(directory) as entries:
        seen = [next(entries).name for _ in range(500)]
        for name in seen[10:60]:
            (directory / name).unlink()
            left.remove(name)
        if waits:
            settle(place.lower / "d")
        assert names(directory) == left
        seen += [entry.name for entry in entries]
    assert len(seen) == 1000
    assert left < set(seen)


def test_a_listing_is_as_old_as_its_attributes_at_most(mounter: Mounter) -> None:
    """With lifetimes of nothing, nothing is kept."""
    place = mounter("loop=native,timeout=0,watch=off")
    first: list[int] = []
    again: list[int] = []
    for directory in "abc":
        (place.lower / directory).mkdir()
        for number in range(1000):
            (place.lower / directory / f"{number:04d}{'x' * 100}").touch()
        for costs in (first, again, again):
            before = switches(place.pid)
            assert len(names(place.point / directory)) == 1000
            costs.append(switches(place.pid) - before)
    assert min(again) * 4 > min(first)  # a busy machine adds to some of them


def test_a_listing_of_young_files_is_asked_for_again(mounter: Mounter, tmp_path: Path) -> None:
    """The kernel may believe their attributes for a second only, and would ask for them one by one."""
    lower = tmp_path / "young"
    (lower / "d").mkdir(parents=True)
    for number in range(1000):
        (lower / "d" / f"{number:04d}").touch()
    place = mounter("loop=native", lower=lower)  # after that: a report of a change has them asked for, too
    begun = time.monotonic()
    costs: list[int] = []
    while time.monotonic() < begun + 4 or len(costs) < 3:  # the directory is settled after two seconds
        before = switches(place.pid)
        assert sum(entry.stat().st_size for entry in os.scandir(place.point / "d")) == 0
        costs.append(switches(place.pid) - before)
    # Not each second; once they may become too old between a listing and its stats.
    assert sum(cost >= 500 for cost in costs) <= 1, [cost for cost in costs if cost >= 100]
