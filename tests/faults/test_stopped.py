"""A process that uses the segment is stopped at random moments (SIGSTOP, Ctrl-Z): the swap device goes on.

Stopped inside one of the segment's short critical sections it keeps a lock; who waits for that continues it.
"""

import random
import signal
import time
from pathlib import Path

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import Process
from tmem.types import OID_SIZE

from .board import Board, Child, Wanted, Word
from .ledger import content
from .serving import Serving, load, serving
from .world import check, signal_process

STOPS = 300
STALL_S = 5.0
"""So long without answers, while the other process is stopped, is a stall: nobody continues it. On a quiet
machine a hundredth of a second is usual, on a busy one there is no telling."""


def work(path: Path, board: Board) -> None:
    """Put and flush pages like the device's own, in its pool, as fast as can be: they share all locks."""
    segment = _native.attach(str(path))
    (pool,) = segment.client("guest1", create=False).pools()
    oid = bytes(OID_SIZE - 1) + b"1"
    pages = [content(block, 2) for block in range(64)]
    number = 0
    while board[Word.WANTED] != Wanted.END:
        pool.put(oid, number % 64, pages[number % 61])
        if number % 64 == 0:
            pool.flush_object(oid)
            segment.trim(0)
        number += 1
        board.add(Word.ANSWERED)


def stops(busy: Child, swap: Child, rng: random.Random, count: int) -> list[float]:
    """Stop `busy` so often, each time until `swap` got on; how long those took that reached STALL_S."""
    stalls = []
    process = Process.of(busy.pid)
    assert process is not None
    for _ in range(count):
        busy.proceed(1)
        time.sleep(rng.random() * 0.002)
        assert signal_process(process, signal.SIGSTOP)
        try:
            begin, wanted = time.monotonic(), swap.board[Word.ANSWERED] + 24
            while swap.board[Word.ANSWERED] < wanted and time.monotonic() < begin + STALL_S:
                time.sleep(0.0005)
            if swap.board[Word.ANSWERED] < wanted:
                stalls.append(time.monotonic() - begin)
        finally:
            signal_process(process, signal.SIGCONT)
    return stalls


def test_a_stopped_process_stalls_nobody(
    segment: _native.Segment, paths: SegmentPaths, tmp_path: Path, seed: str
) -> None:
    board = Board()
    busy = Child(board, lambda: work(paths.segment, board), tmp_path / "busy.error")
    with (
        serving(Serving(paths, segment, "guest1", 8 << 20)) as made,
        load(made, tmp_path / "e", seed) as swap,
    ):
        try:
            busy.start()
            found = stops(busy, swap, random.Random(seed), STOPS)
            print(f"{len(found)} stalls in {STOPS} stops, longest wait {swap.longest_s:.3f} s")
            assert not found
            busy.board[Word.WANTED] = Wanted.END
            busy.proceed(0)
        finally:
            busy.kill()
        swap.rest()
        check(segment)
