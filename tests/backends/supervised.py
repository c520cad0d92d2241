"""A supervisor that runs for as long as a test has something to do with it."""

from collections.abc import Awaitable, Callable

import trio

from tmem.backends.paths import SegmentPaths
from tmem.backends.supervisor import Supervisor


def supervised(paths: SegmentPaths, body: Callable[[Supervisor], Awaitable[None]]) -> None:
    """Run `body` with a supervisor that adopts what is there, and ends when the body does."""

    async def run() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                supervisor = Supervisor(paths, nursery)
                supervisor.adopt()
                await body(supervisor)
                nursery.cancel_scope.cancel()

    trio.run(run)
