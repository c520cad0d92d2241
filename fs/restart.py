"""Replace the code of a mount's daemon while files are open: the side of the code that goes.

On SIGUSR1 (`tmem mount --restart`):

1. *Try it out.* The new code runs as a child. It reads a copy of the state, rebuilds everything from it,
   attaches the segment and has its libfuse answer the kernel's INIT request. If any of that fails, or the
   answer differs from the one that the kernel was given, nothing has happened and the reason is told.
2. *Stop.* No more requests are read; they wait in the kernel. Those in hand are answered. If that takes
   longer than ten seconds (a dead disk), reading goes on and the reason is told.
3. *Become it.* The state goes into a memory file, every descriptor that it names is kept open, and the
   process execs the new code (`takeover`). The process id, the device, and the lock on the client stay, so
   neither the kernel nor the manager sees a change; programs see a pause. If exec fails, the old code goes
   on.

Signals that arrive in the third step are not lost: they stay pending for the new code. What can still lose
the mount is new code that fails after exec although it had passed step 1; it then unmounts, as after any
failure. Threading: the event loop's thread, which is the main thread.
"""

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import trio

from tmem.backends.processes import start_ticks
from tmem.fs import state
from tmem.fs.device import Device
from tmem.fs.overlay import Overlay
from tmem.fs.plan import Plan
from tmem.fs.state import SavedDevice, SavedRestarts, State
from tmem.fs.statistics import RestartStatus

log = logging.getLogger(__name__)

SIGNAL = signal.SIGUSR1
SIGNALS = frozenset({SIGNAL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""What the daemon reacts to. They are blocked from before exec until the new code handles them."""

CHECK_SECONDS = 30.0


class Restarter:
    """Replaces the daemon of one mount; keeps `overlay.restarts` up to date.

    `saved` is what the code before this has handed over.
    """

    def __init__(self, plan: Plan, overlay: Overlay, saved: SavedRestarts | None = None) -> None:
        self._plan = plan
        self._overlay = overlay
        self._device: Device | None = None
        self._stopped_ns = saved["stopped_ns"] if saved else 0
        overlay.restarts = RestartStatus(
            os.getpid(),
            start_ticks(os.getpid()) or 0,
            count=saved["count"] if saved else 0,
            attempts=saved["attempts"] if saved else 0,
        )

    def serving(self, device: Device) -> None:
        """Note that requests are being read from now on."""
        self._device = device
        if self._stopped_ns and self._overlay.restarts.count:
            self._tell(pause_ns=time.monotonic_ns() - self._stopped_ns)
            log.info("restarted; requests waited %.0f ms", self._overlay.restarts.pause_ns / 1e6)
        self._stopped_ns = 0

    def begin(self) -> None:
        """Note that a restart was asked for."""
        self._tell(attempts=self._overlay.restarts.attempts + 1, under_way=True, failure="")

    async def check(self) -> bool:
        """Try the new code out in a child process; False, with the reason told, if it cannot take over."""
        try:
            with trio.fail_after(CHECK_SECONDS):
                reason = await self._try_out()
        except trio.TooSlowError:
            reason = f"it did not answer within {CHECK_SECONDS:.0f} s"
        except OSError as error:
            reason = f"{self._plan.successor.code[0]}: {error.strerror}"
        if reason:
            self.failed(f"the new code cannot take over: {reason}")
        return not reason

    def stopped(self) -> None:
        """Note that requests wait from now on."""
        self._stopped_ns = time.monotonic_ns()

    def become(self) -> None:
        """Be the new code, with no request in hand; comes back, the reason told, only if exec fails."""
        with _keep_signals() as forward:
            restarts = self._overlay.restarts
            saved = self._state(restarts.count + 1)
            kept = [state.dump(saved), *state.descriptors(saved)]
            try:
                for descriptor in kept:
                    os.set_inheritable(descriptor, True)
                forward()
                os.execv(self._plan.successor.code[0], self._command(kept[0]))
            except OSError as error:
                self.failed(f"cannot run {self._plan.successor.code[0]}: {error.strerror}")
            finally:  # only reached if exec failed
                for descriptor in kept:
                    os.set_inheritable(descriptor, False)
                os.close(kept[0])

    def failed(self, reason: str) -> None:
        """Note that the old code goes on, and why."""
        log.warning("not restarted: %s", reason)
        self._stopped_ns = 0
        self._tell(under_way=False, failure=reason)

    def _state(self, count: int) -> State:
        assert self._device is not None
        return State(
            plan=self._plan.saved(),
            device=SavedDevice(
                descriptor=self._device.fuse, request=self._device.request, reply=self._device.reply
            ),
            overlay=self._overlay.saved(),
            restarts=SavedRestarts(
                count=count, attempts=self._overlay.restarts.attempts, stopped_ns=self._stopped_ns
            ),
        )

    def _command(self, descriptor: int, *options: str) -> list[str]:
        return [*self._plan.successor.code, *options, str(descriptor), self._plan.mountpoint]

    async def _try_out(self) -> str:
        """Return why the new code cannot take over, or an empty string."""
        descriptor = state.dump(self._state(self._overlay.restarts.count))
        try:
            result = await trio.run_process(
                self._command(descriptor, "--check"),
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                pass_fds=(descriptor, self._overlay.table.root),
                deliver_cancel=_kill,
            )
        finally:
            os.close(descriptor)
        if not result.returncode:
            return ""
        lines = result.stderr.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return last or f"it ended with status {result.returncode}"

    def _tell(self, **changes: int | bool | str) -> None:
        self._overlay.restarts = replace(self._overlay.restarts, **changes)  # type: ignore[arg-type]


async def _kill(process: trio.Process) -> None:
    """End new code that is being tried out.

    It has nothing to lose. SIGTERM, which trio would send first, and wait for 5 s, does not reach it as long
    as it blocks what this process does; and a daemon that was told to end is given up after ten.
    """
    process.kill()


@contextlib.contextmanager
def _keep_signals() -> Iterator[Callable[[], None]]:
    """Keep signals that arrive for whoever comes next: the new code, or the handlers of before.

    Yields a function that makes those pending which other threads have taken until now.
    """
    taken: list[int] = []

    def forward() -> None:
        while taken:
            os.kill(os.getpid(), taken.pop())

    before = {number: signal.signal(number, lambda which, _: taken.append(which)) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield forward
    finally:
        forward()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
