"""Tasks whose failure is told at once.

A trio nursery ends the other tasks first, and waits for them: for ever if a handler waits for a lower that
does not answer. So whoever must know before that is told here. Threading: the event loop's thread.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import trio

Work = Callable[..., Awaitable[object]]
Failed = Callable[[BaseException], None]
"""Is told what a task has failed with, once for each task that does."""


@contextlib.contextmanager
def telling(failed: Failed) -> Iterator[None]:
    """Tell of what this block raises, but not that it was cancelled."""
    try:
        yield
    except BaseException as error:
        if not _was_cancelled(error):
            failed(error)
        raise


def _was_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_was_cancelled(one) for one in error.exceptions)
    return isinstance(error, trio.Cancelled)


class Telling:
    """A nursery's `start_soon`, for tasks that tell `failed`."""

    def __init__(self, nursery: trio.Nursery, failed: Failed) -> None:
        self._nursery = nursery
        self._failed = failed

    def start_soon(self, work: Work, *arguments: Any, name: object = None) -> None:
        """Start a task in the nursery."""
        self._nursery.start_soon(self._run, work, arguments, name=name or work)

    async def _run(self, work: Work, arguments: tuple[Any, ...]) -> None:
        with telling(self._failed):
            await work(*arguments)
