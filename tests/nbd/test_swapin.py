"""Reading swapped-out pages in: which ones, how many at once, and how fast."""

import ctypes
import os
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from tmem.nbd import swapin

PRESENT, SWAPPED, FILE = 1 << 63, 1 << 62, 1 << 61


@given(st.lists(st.sampled_from([0, PRESENT | 77, SWAPPED | 0x3FF, SWAPPED | FILE, FILE, PRESENT | SWAPPED])))
def test_runs_are_of_swapped_pages_that_are_not_there(entries: list[int]) -> None:
    piece = b"".join(entry.to_bytes(8, "little") for entry in entries)
    away = [bool(entry & SWAPPED) and not entry & PRESENT for entry in entries]
    wanted, at = [], 0
    for is_away, group in groupby(away):
        count = len(list(group))
        if is_away:
            wanted.append((at, count))
        at += count
    assert list(swapin.swapped_runs(piece)) == wanted


@given(st.lists(st.tuples(st.integers(0, 1 << 36), st.integers(1, 3000))))
def test_batches_have_every_page_once_and_are_full(runs: list[tuple[int, int]]) -> None:
    made = list(swapin.batches(iter(runs)))
    sizes = [sum(count for _, count in batch) for batch in made]
    assert all(size == swapin.BATCH_PAGES for size in sizes[:-1])
    assert all(0 < size <= swapin.BATCH_PAGES for size in sizes)
    pages = [first + at for batch in made for first, count in batch for at in range(count)]
    assert pages == [first + at for first, count in runs for at in range(count)]


def test_what_is_spent_is_paid_for() -> None:
    """Also while there is nothing to read, as in the holes of a large process."""
    slept: list[float] = []
    spent = swapin._Spent(slept.append)
    spent.pause(0.5)
    assert slept.pop() >= 0.5
    while not slept:
        sum(range(1000))
        spent.pause()
    assert slept[0] >= 0.002 * (swapin.CPU_SHARE - 1)


def test_the_kernel_takes_the_call() -> None:
    """On pages that are there it does nothing; of a process that is gone it says so."""
    memory = ctypes.create_string_buffer(b"here", 8192)
    first = ctypes.addressof(memory) // 4096
    descriptor = os.pidfd_open(os.getpid())
    try:
        swapin._will_need(descriptor, [(first, 1), (first + 1, 1)])
    finally:
        os.close(descriptor)
    assert memory.value == b"here"
