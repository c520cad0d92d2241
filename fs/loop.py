"""How the daemon waits for requests: pyfuse3's own way, or one that costs half as much.

pyfuse3 waits through trio, which costs about 16 of the 27 us of a small read that hits. The fast loop polls
the FUSE device and trio's epoll descriptor together, as long as no handler waits for a worker thread, and
lets trio run at least every 32nd request. It works with one idle reader: a handler that is going to wait (for
a worker thread) has another one started by `waiting`, and a surplus one ends by pyfuse3's own rule. trio
stays in charge: results of worker threads and signals arrive through its epoll descriptor. This reads
internals of trio and pyfuse3; `install` tries them out, and where they look different the plain loop runs.
Threading: the event loop's thread.
"""

import contextlib
import select
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import pyfuse3
import trio

_TRIO_EVERY = 32  # requests; so that deadlines are seen under full load. A power of two.
_LONGEST_WAIT_SECONDS = 1.0
_MAX_TASKS = 99
_NEVER = -(1 << 31)


class _FastLock:
    """pyfuse3's read lock without trio's checkpoint, which costs a turn of the scheduler per request."""

    def __init__(self) -> None:
        self._locked = False
        self._waiting: deque[trio.Event] = deque()

    async def __aenter__(self) -> None:
        while self._locked:
            event = trio.Event()
            self._waiting.append(event)
            await event.wait()
        self._locked = True

    async def __aexit__(self, *_: object) -> None:
        self._locked = False
        if self._waiting:
            self._waiting.popleft().set()


class Readers:
    """Runs the tasks that read requests. With the plain loop `waiting` does nothing."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None
        self._idle = 0
        self._starting = False
        self._waiting = 0
        self._count = 0
        self._runner: Any = None  # trio's, without a public name
        self._poll = select.poll()

    def install(self) -> bool:
        """Make the fast loop possible, before `pyfuse3.init`; False if pyfuse3 differs from what it needs."""
        if not hasattr(pyfuse3, "_session_loop") or getattr(pyfuse3, "trio", None) is not trio:
            return False
        lowlevel = types.SimpleNamespace(
            wait_readable=self._wait_readable,
            notify_closing=trio.lowlevel.notify_closing,
            current_task=trio.lowlevel.current_task,
            current_trio_token=trio.lowlevel.current_trio_token,
        )
        # The module's own global, which its compiled code looks up by name, as pyfuse3.asyncio relies on too.
        pyfuse3.trio = types.SimpleNamespace(  # type: ignore[attr-defined]
            lowlevel=lowlevel,
            Lock=_FastLock,
            ClosedResourceError=trio.ClosedResourceError,
            open_nursery=trio.open_nursery,
        )
        return True

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Bracket a handler's wait for a worker thread; another task reads requests meanwhile."""
        self._waiting += 1
        if self._nursery is not None and not self._idle and not self._starting:
            self._starting = True
            self._start(self._nursery)
        try:
            yield
        finally:
            self._waiting -= 1

    async def serve(self, fast: bool, session: int) -> None:
        """Serve requests on the descriptor `session` until unmounted or `pyfuse3.terminate` is called."""
        if not (fast and self._find_trio(session)):
            await pyfuse3.main(1, _MAX_TASKS)
            return
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._start(nursery)

    def _start(self, nursery: trio.Nursery) -> None:
        # No idle readers are kept, and none is started by pyfuse3 itself: its count of tasks sinks with each
        # one of ours that ends, so the bound must be below anything that it can reach.
        nursery.start_soon(pyfuse3._session_loop, nursery, 0, _NEVER)  # type: ignore[attr-defined]

    def _find_trio(self, session: int) -> bool:
        try:
            core: Any = trio._core
            runner = core._run.GLOBAL_RUN_CONTEXT.runner
            epoll = runner.io_manager._epoll.fileno()
            len(runner.runq)
            runner.deadlines.next_deadline() - runner.clock.current_time()
        except AttributeError:
            return False
        self._poll.register(epoll, select.POLLIN)
        self._poll.register(session, select.POLLIN)
        self._runner = runner
        return True

    async def _wait_readable(self, descriptor: int) -> None:
        self._starting = False
        self._idle += 1
        try:
            runner = self._runner
            self._count += 1
            # A handler whose worker thread is done may be due in this very turn of the scheduler, which
            # cannot be seen from here: so while one waits, wait as trio does.
            if runner is not None and not self._waiting and self._count % _TRIO_EVERY and not runner.runq:
                seconds = runner.deadlines.next_deadline() - runner.clock.current_time()
                for ready, _ in self._poll.poll(min(max(seconds, 0), _LONGEST_WAIT_SECONDS) * 1000):
                    if ready == descriptor:
                        return
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            self._idle -= 1
