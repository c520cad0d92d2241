"""End a mount although its lower does not answer: the last resort of a daemon that was told to end.

A handler that waits for its lower (a dead server, a device that is gone) cannot be cancelled, and one that
waits on the event loop's thread keeps even the signal from being delivered to that thread. So signals are
blocked everywhere but in a thread of its own, which waits for nothing else. It passes them on to trio (as the
C handler reports them, `signal.set_wakeup_fd`), and if the process is still there some seconds after one that
ends it, or after the event loop has failed, ends it as SIGKILL would, but unmounted. Programs get ENOTCONN;
the pool is swept by whoever uses the client next. Threading: `LastResort` on the main thread, before others
are started.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from tmem.fs.restart import SIGNALS

log = logging.getLogger(__name__)

_LISTEN, _BE_DEAF, _END = 200, 201, 202  # beyond the numbers of signals
_TURN_SECONDS = 1.0


class LastResort:
    """Ends the process if nobody else does within `seconds` of a signal that is to end it, or of `end`.

    Until `close`.
    """

    def __init__(self, seconds: float) -> None:
        self._give_up: Callable[[], None] = lambda: None
        self._seconds = seconds
        self._next = -1
        self._turned = threading.Event()
        self._closed = threading.Event()
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # before any other thread inherits it
        self._thread = threading.Thread(target=self._watch, name="last-resort", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def listening(self, give_up: Callable[[], None]) -> Iterator[None]:
        """Let signals come within this block, inside trio; `give_up` is what to do before the end."""
        self._give_up = give_up
        self._next = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._turn(_LISTEN)
        try:
            yield
        finally:
            signal.set_wakeup_fd(self._next, warn_on_full_buffer=False)

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """Let signals wait within this block, for the code that may take the process over in it."""
        self._turn(_BE_DEAF)
        try:
            yield
        finally:
            self._turn(_LISTEN)

    def end(self) -> None:
        """Have the process end as after a signal that is to end it: nobody reads requests any more."""
        with contextlib.suppress(OSError):  # full: it has been told
            self._writing.send(bytes([_END]))

    def close(self) -> None:
        """Do nothing any more."""
        self._closed.set()
        self._writing.close()
        self._thread.join()
        self._reading.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _turn(self, command: int) -> None:
        self._turned.clear()
        self._writing.send(bytes([command]))
        self._turned.wait(_TURN_SECONDS)  # in vain if the process is ending

    def _watch(self) -> None:
        ends = False
        while not ends:
            numbers = self._reading.recv(64)
            if not numbers:
                return
            for number in numbers:
                if number in (_LISTEN, _BE_DEAF):
                    how = signal.SIG_UNBLOCK if number == _LISTEN else signal.SIG_BLOCK
                    signal.pthread_sigmask(how, SIGNALS)
                    self._turned.set()
                elif number == _END:
                    ends = True
                else:
                    self._pass_on(number)
                    ends = ends or number in _ENDING
        if self._closed.wait(self._seconds):
            return
        log.error("requests wait for the lower directory for more than %g s: giving them up", self._seconds)
        try:
            self._give_up()
        finally:
            os._exit(1)

    def _pass_on(self, number: int) -> None:
        if self._next >= 0:
            with contextlib.suppress(OSError):  # full: it has been told
                os.write(self._next, bytes([number]))


_ENDING = SIGNALS - {signal.SIGUSR1}
