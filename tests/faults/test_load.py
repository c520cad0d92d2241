"""The loads notice what they are for: a page that is lost, one that is old, one that is another's."""

from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.types import OID_SIZE, PAGE_SIZE

from .blocks import BlockLoad
from .board import Board, Child
from .files import PAGES, FileLoad, make
from .ledger import Ledger, content
from .serving import Serving, serving


@pytest.mark.parametrize("damage", ["lost", "old", "another"])
def test_a_wrong_block_is_noticed(
    segment: _native.Segment, paths: SegmentPaths, tmp_path: Path, seed: str, damage: str
) -> None:
    made = Serving(paths, segment, "guest1", 8 << 20)
    ledger, board = Ledger(2048), Board()
    swap = Child(board, BlockLoad(made.export.uri, ledger, board, seed).run, tmp_path / "error")
    with serving(made):
        try:
            swap.start()
            swap.work()
            swap.proceed(2000)
            swap.rest()
            harm(segment.client("guest1", create=False).pools()[0], damage)
            with pytest.raises(AssertionError, match=r"holds (zeros|version \d+ of block \d+) instead of"):
                swap.end()
        finally:
            swap.kill()


def harm(pool: _native.Pool, damage: str) -> None:
    """Change one block behind the load's back."""
    oid, page = bytes(OID_SIZE), bytearray(PAGE_SIZE)
    for index in range(500):
        if pool.get(oid, index, page) and page[:8] != page[8:16]:  # neither zeros nor one word repeated
            break
    match damage:
        case "lost":
            assert pool.flush(oid, index) == 1
        case "old":
            assert pool.put(oid, index, content(index, 2 * 10**6)) == 1
        case _:
            assert pool.put(oid, index + 1, page) == 1


def test_a_wrong_page_of_a_file_is_noticed(tmp_path: Path, seed: str) -> None:
    """The load of files, on a directory without a mount."""
    ledger, board = make(tmp_path, 2), Board()
    child = Child(board, FileLoad(tmp_path, ledger, board, seed).run, tmp_path / "error")
    try:
        child.start()
        child.work()
        child.proceed(500)
        child.rest()
        with (tmp_path / "file1").open("r+b") as file:
            file.seek(5 * PAGE_SIZE)
            file.write(content(PAGES + 5, 2 * 10**6))
        with pytest.raises(AssertionError, match=f"block {PAGES + 5} holds version {2 * 10**6}"):
            child.end()
    finally:
        child.kill()


def test_in_doubt_a_block_is_old_or_new() -> None:
    ledger = Ledger(3)
    ledger.issue(0, 3)
    ledger.acknowledge(0, 3)
    old = [content(block, 2) for block in range(3)]
    ledger.verify(0, b"".join(old))
    new = ledger.issue(0, 2)
    assert ledger.doubtful() == [0, 1]
    with pytest.raises(AssertionError, match="instead of version 2"):
        ledger.verify(0, new)
    for wrong in (content(0, 6), bytes(PAGE_SIZE), new[PAGE_SIZE:]):
        with pytest.raises(AssertionError, match="neither version 2 nor 4"):
            ledger.settle(0, wrong)
    ledger.settle(0, old[0] + new[PAGE_SIZE:])
    assert ledger.doubtful() == []
    ledger.verify(0, old[0] + new[PAGE_SIZE:] + old[2])
