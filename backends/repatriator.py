"""Has swapped-out pages brought back where memory is in plenty: looks, asks `repatriating`, runs the command.

The work is done by a process of its own (``tmem shrink --gently``), niced, which looks for itself whether it
disturbs anybody; it ends with what came of it as JSON on its last line. So swapoff never holds up the
manager, and the manager, which locks what it imports, needs nothing of `tmem.nbd`. A manager that ends leaves
a pass to itself, with a word to stop: it must have the device in use again. One that was killed instead may
have left it unused: the next thing is to use it again. Threading: one trio task.
"""

import json
import logging
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tmem.backends import meminfo, pressure, processes
from tmem.backends.paths import SegmentPaths
from tmem.backends.repatriating import Repatriation, Sample
from tmem.errors import TmemError
from tmem.types import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from tmem.backends import _native

LOOK_S = 5.0
"""How often to look, at most; an eighth of the time that must be calm, if that is less."""
_AGAIN_S = 60.0
"""When to try again what could not be completed."""
_EMPTYING = "emptying-*"
"""Marks of devices of which a pass may have left one unused (`tmem.nbd.export`)."""
_TROUBLES = (TmemError, OSError, ValueError, KeyError)

_log = logging.getLogger(__name__)


@dataclass
class RepatriationStatistics:
    """What became of passes."""

    repatriations: int = 0
    """Passes that ran to their end."""
    repatriations_stopped: int = 0
    """Passes that ended before, because somebody needed memory or a device could not be emptied."""
    repatriated_pages: int = 0
    """Pages that pools no longer keep: those that came back, and stale ones."""
    repatriating_ns: int = 0
    """CPU time of all passes, the kernel's for them included."""
    repatriation_idle_ns: int = 0
    """For how long memory must be in plenty before a pass; 0: there are none."""
    repatriation_wait_ns: int = 0
    """The same of the next pass: longer, if the last ones were regretted."""


def sample(kept_bytes: int, stalled: float, proc: Path = Path("/proc")) -> Sample:
    """Look at the machine."""
    memory = meminfo.read(proc)
    return Sample(
        time.monotonic(),
        kept_bytes,
        max(memory.swapped_bytes - memory.swap_cached_bytes, 0),
        memory.available_bytes,
        memory.total_bytes,
        stalled,
        meminfo.swapped_out_pages(proc),
    )


class Repatriator:
    """Runs `command` whenever a pass is due, for as long as `run` runs; `idle_s` is 0 if there are none."""

    def __init__(
        self, paths: SegmentPaths, segment: "_native.Segment", idle_s: int, command: Sequence[str]
    ) -> None:
        self.statistics = RepatriationStatistics(
            repatriation_idle_ns=idle_s * 10**9, repatriation_wait_ns=idle_s * 10**9
        )
        self._paths = paths
        self._output = paths.state / "repatriate.log"
        self._segment = segment
        self._idle_s = idle_s
        self._command = command
        self._stalls = pressure.Stalls([pressure.MACHINE])
        self._completes_s = float("inf")
        """When to use devices again that may have been left unused."""

    async def run(self) -> None:
        """Look and decide until cancelled; nothing without a time."""
        if not self._idle_s:
            return
        rule, complaint = Repatriation(self._idle_s), ""
        self._look_for_left()  # by what was killed with a manager before us
        while self._segment.alive:
            try:
                if time.monotonic() >= self._completes_s:
                    await self._complete()
                if rule.due(self._look()):
                    await self._pass(rule)
                self.statistics.repatriation_wait_ns = int(rule.wait_s * 1e9)
                complaint = ""
            except _TROUBLES as error:
                if complaint != str(error):  # once
                    _log.warning("swapped-out pages are not brought back: %s", error)
                complaint = str(error)
            await trio.sleep(min(LOOK_S, self._idle_s / 8))

    def _look(self) -> Sample:
        kept = self._segment.statistics()["persistent_pages"] * PAGE_SIZE if meminfo.has_swap() else 0
        return sample(kept, self._stalls.share(time.monotonic()))

    async def _pass(self, rule: Repatriation) -> None:
        """Run the command to its end, and note what it says."""
        counts = self.statistics
        code, said = await self._run(self._command)
        if code:
            self._look_for_left()
            rule.ended(self._look(), 0, stopped=True)
            raise _failure("the pass", code, said)
        done = json.loads(said)
        returned, dropped, stopped = done["returned_bytes"], done["dropped_pages"], done["stopped"]
        rule.ended(self._look(), returned, bool(stopped))
        counts.repatriated_pages += dropped
        counts.repatriating_ns += done["cpu_ns"]
        if stopped:
            counts.repatriations_stopped += 1
            _log.info("swapped-out pages stay: %s", stopped)
        elif dropped:
            counts.repatriations += 1
            freed = format_size(dropped * PAGE_SIZE)
            _log.info("%s of swapped-out pages are back, pools keep %s less", format_size(returned), freed)

    def _look_for_left(self) -> None:
        if any(self._paths.state.glob(_EMPTYING)):
            self._completes_s = time.monotonic()

    async def _complete(self) -> None:
        self._completes_s += _AGAIN_S
        code, said = await self._run([*self._command, "--complete"])
        if code:
            raise _failure("completing", code, said)
        self._completes_s = float("inf")
        if json.loads(said)["dropped_pages"]:
            _log.warning("a pass was killed on the way: what it had left unused is in use again")

    async def _run(self, command: Sequence[str]) -> tuple[int | None, str]:
        self._output.unlink(missing_ok=True)
        code = await _end_of(processes.spawn(command, os.environ, self._output))
        return code, processes.last_line(self._output)


def _failure(what: str, code: int | None, said: str) -> TmemError:
    return TmemError(said.partition("tmem: ")[2] or said or f"{what} ended with status {code}")


async def _end_of(pid: int) -> int | None:
    """Wait for a child; return its exit code. Cancelled, it tells the child to stop and does not wait."""
    descriptor = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    except BaseException:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        raise
    finally:
        trio.lowlevel.notify_closing(descriptor)
        os.close(descriptor)
    return processes.reap(pid)
