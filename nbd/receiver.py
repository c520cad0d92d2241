"""Has the kernel thread that read the replies of a dead connection ended?

The nbd driver has a worker for each connection, which knows only the number of the connection and takes the
socket that is there at the moment (Linux 6.1, `recv_work`). When a failed *send* reports the death, that
worker may still be on its way out of the old socket. If the device is given another one then, the old worker
reads from it, too: two readers share one stream of replies, and a page may be completed with bytes of
another (three times "Wrong magic" in 60 kills); or it declares the new connection dead.

A worker tells in its name what it works on: ``kworker/u4:2+nbd0-recv``, with a minus sign when it has ended.
Only looks. One thread; to look again costs one read a worker.
"""

import contextlib
import os
from pathlib import Path


class Receiver:
    """The workers that read the replies of device `index`, as far as they have been found."""

    def __init__(self, index: int, proc: Path = Path("/proc")) -> None:
        self._mark = f"+nbd{index}-recv".encode()
        self._proc = proc
        self._names: list[int] = []

    def find(self) -> None:
        """Look for the workers, unless some are known; reads the name of every process."""
        if self._names:
            return
        for process in self._proc.glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                name = os.open(process / "comm", os.O_RDONLY | os.O_CLOEXEC)
                if self._works(name):
                    self._names.append(name)
                else:
                    os.close(name)

    def ended(self) -> bool:
        """Say whether none of the workers that were found is at work any more; then they are forgotten."""
        if any(self._works(name) for name in self._names):
            return False
        self.forget()
        return True

    def forget(self) -> None:
        """Forget the workers that were found."""
        while self._names:
            os.close(self._names.pop())

    def _works(self, name: int) -> bool:
        try:
            return os.pread(name, 80, 0).rstrip().endswith(self._mark)
        except OSError:
            return False
