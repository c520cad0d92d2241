"""Signals that end a command, while something must be put right first, or must not be interrupted.

In the main thread only; elsewhere both do nothing, since Python runs handlers nowhere else.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def as_interrupt() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt as SIGINT does, so that contexts are left in order."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # One that is ignored (nohup) or handled already stays so.
    with _handled(interrupt, [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]):
        yield


@contextmanager
def once() -> Iterator[None]:
    """Make the first SIGINT, SIGTERM or SIGHUP raise KeyboardInterrupt, and ignore those that follow.

    For a block that has much to take down when it is left: whoever presses Ctrl-C again does not cut that
    off half-way.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    with _handled(interrupt, numbers):
        yield


@contextmanager
def deferred() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP wait until the end of the block."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    with _handled(note, [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]):
        yield
    if came:
        signal.raise_signal(came[0])


@contextmanager
def ignored() -> Iterator[None]:
    """Ignore SIGINT, SIGTERM and SIGHUP in the block, which must end soon, and the command after it."""
    with _handled(signal.SIG_IGN, list(_ENDING)):
        yield


@contextmanager
def _handled(handler: object, numbers: list[signal.Signals]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
