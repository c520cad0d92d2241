"""What the driver of a test and the processes of its loads tell each other: words of shared memory.

A board is made before its load is forked, and survives it: a load that was killed is started again on the
same board. Every word has one writer at a time; words are aligned, so no reader sees half of one.
"""

import ctypes
import enum
import mmap
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 40.0
"""How long anything that must happen may take; a load that waits longer has lost its device."""

_NS = 1_000_000_000
_ROOM_BYTES = 4096
_PR_SET_PDEATHSIG = 1


def wait(condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Poll until `condition` is true; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.001)


class Wanted(enum.IntEnum):
    """What the driver wants of a load."""

    WORK = 0
    REST = 1
    """Let everything be answered, verify all of it, and wait."""
    END = 2
    """The same, and end."""


class State(enum.IntEnum):
    """What a load does."""

    STARTING = 0
    WORKING = 1
    RESTING = 2
    ENDED = 3
    FAILED = 4


class Word(enum.IntEnum):
    """The words of a board."""

    WANTED = 0
    STATE = 1
    ANSWERED = 2
    """Requests answered."""
    LONGEST_NS = 3
    """The longest time without an answer since the load last rested."""
    CONNECTIONS = 4
    """How often it connected, or opened its files."""
    SENT_AGAIN = 5
    """Requests that were sent once more after a connection broke."""
    REFUSED = 6
    """Writes that were answered with ENOSPC."""
    FAILED = 7
    """Requests that were answered with another error that was to be expected."""
    FILLS_WANTED = 8
    """How often the driver asked to empty the device and fill it from its beginning."""
    FILLS_DONE = 9
    FILLED = 10
    """Blocks written by the fill that is going on."""


class Board:
    """The words of one load, for all processes forked from the one that made it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _ROOM_BYTES)
        self._words = memoryview(self._memory).cast("Q")

    def __getitem__(self, word: Word) -> int:
        return self._words[word]

    def __setitem__(self, word: Word, value: int) -> None:
        self._words[word] = value

    def add(self, word: Word, value: int = 1) -> None:
        """Add to a word of which the caller is the writer."""
        self._words[word] += value


class Clock:
    """The load's half of the times: how long it had to wait for an answer."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._last_ns = time.monotonic_ns()

    def restart(self) -> None:
        """Begin to measure now: nothing was asked for until now."""
        self._last_ns = time.monotonic_ns()

    def answered(self) -> None:
        """Note an answer."""
        now = time.monotonic_ns()
        if now - self._last_ns > self._board[Word.LONGEST_NS]:
            self._board[Word.LONGEST_NS] = now - self._last_ns
        self._last_ns = now
        self._board.add(Word.ANSWERED)


class Child:
    """A load in a process of its own, forked here: started, killed, started again.

    `body` runs in it, once a start. What it raises is kept and raised here by `check`. The process that makes
    this should have one thread.
    """

    def __init__(self, board: Board, body: Callable[[], None], errors: Path) -> None:
        self.board = board
        self.pid = 0
        self._body = body
        self._errors = errors

    def start(self) -> None:
        """Fork it."""
        self.board[Word.STATE] = State.STARTING
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self._body()
            self.board[Word.STATE] = State.ENDED
            status = 0
        except BaseException:
            self._errors.write_text(traceback.format_exc())
            self.board[Word.STATE] = State.FAILED
        finally:
            os._exit(status)

    def check(self) -> None:
        """Raise AssertionError if it has found something wrong."""
        if self.board[Word.STATE] == State.FAILED:
            raise AssertionError(f"a load failed:\n{self._errors.read_text()}")

    def kill(self) -> None:
        """SIGKILL it, if it runs, and collect it."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def work(self) -> None:
        """Let it go on."""
        if self.board[Word.WANTED] != Wanted.WORK:
            self.board[Word.LONGEST_NS] = 0
        self.board[Word.WANTED] = Wanted.WORK
        self.wait(lambda: self.board[Word.STATE] == State.WORKING, "the load works")

    def rest(self) -> None:
        """Let it verify everything and rest; AssertionError if it found something wrong."""
        self.board[Word.WANTED] = Wanted.REST
        self.wait(lambda: self.board[Word.STATE] == State.RESTING, "everything is answered and verified")

    def end(self) -> None:
        """Let it verify everything and end; AssertionError if it found something wrong."""
        self.board[Word.WANTED] = Wanted.END
        self.wait(lambda: self.board[Word.STATE] == State.ENDED, "everything is answered and verified")
        os.waitpid(self.pid, 0)
        self.pid = 0

    def proceed(self, answers: int) -> None:
        """Wait until it got so many more answers."""
        wanted = self.board[Word.ANSWERED] + answers
        self.wait(lambda: self.board[Word.ANSWERED] >= wanted, f"{answers} more answers")

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
        """`wait`, but not for a load that failed."""

        def settled() -> bool:
            return bool(condition()) or self.board[Word.STATE] == State.FAILED

        wait(settled, what, timeout_s)
        self.check()

    @property
    def longest_s(self) -> float:
        """The longest time without an answer since it last rested."""
        return self.board[Word.LONGEST_NS] / _NS
