"""Errands: what may wait for a disk or a server for long, done in a thread of its own beside everybody else.

An `Errand` does one thing at a time. Who asks for it may wait a while, but never has to: what hangs, hangs
alone. The thread is there from the start, for none can be started once memory is out, and ends with the
process whatever it is doing. Not for what must be done before the process may end. Threading: one thread
asks.
"""

import logging
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Errand:
    """A thread called `name`. RuntimeError if none can be started."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether it has not done yet what it was asked for last."""
        return not self._idle.is_set()

    @property
    def ended(self) -> bool:
        """Whether the thread has ended, after `end`."""
        return not self._thread.is_alive()

    def begin(self, do: Callable[[], None]) -> bool:
        """Have `do` done; False if it is busy. What `do` raises is logged."""
        if self.busy:
            return False
        self._idle.clear()
        self._todo.put(do)
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is done; False if it is not in time."""
        return self._idle.wait(timeout_s)

    def end(self, last: Callable[[], None], timeout_s: float = 0.0) -> None:
        """Have `last` done after what is under way, then end the thread; wait so long for that."""
        self._todo.put(last)
        self._todo.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (do := self._todo.get()) is not None:
            try:
                do()
            except Exception as error:
                _log.warning("%s: %s", self._name, error)
            finally:
                self._idle.set()
