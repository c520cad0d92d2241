"""Where operations run: in this process through one mapping of the segment, or in a worker process.

`Place.do(function, ...)` calls ``function(segment, ...)`` there and returns its result or raises its error;
`start` and `finish` are its two halves, so that several workers run at once. Functions and arguments travel
pickled, so they must be importable: `operations`, `activities`. One place belongs to one thread. This file is
also the worker's main program (``python -m tests.backends.places``).
"""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from tmem.backends import _native

P = ParamSpec("P")
T = TypeVar("T")

_ROOT = Path(__file__).parents[2]


class Place(Protocol):
    """One process's view of a segment."""

    def attach(self, path: Path) -> None:
        """Give up the segment attached before, if any, and attach the one at `path`."""

    def do(
        self, function: Callable[Concatenate[_native.Segment, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call ``function(segment, *args, **kwargs)``."""


class Local:
    """A mapping of the segment in this process."""

    def __init__(self, path: Path | None = None) -> None:
        self._segment: _native.Segment | None = None
        if path:
            self.attach(path)

    def attach(self, path: Path) -> None:
        self.close()
        self._segment = _native.attach(str(path))

    def do(
        self, function: Callable[Concatenate[_native.Segment, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        assert self._segment is not None, "attach first"
        return function(self._segment, *args, **kwargs)

    def close(self) -> None:
        if self._segment is not None:
            self._segment.close()
        self._segment = None


class Worker:
    """A process of its own that attaches the segment and does what it is told. A context manager."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def attach(self, path: Path) -> None:
        self._send(("attach", path))
        self._receive()

    def do(
        self, function: Callable[Concatenate[_native.Segment, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        self.start(function, *args, **kwargs)
        return self.finish(function)

    def start(
        self, function: Callable[Concatenate[_native.Segment, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Begin `function` and return at once."""
        self._send((function, args, kwargs))

    def finish(self, function: Callable[Concatenate[_native.Segment, P], T]) -> T:
        """Wait for the `function` that was started last."""
        result: T = self._receive()
        return result

    def close(self) -> None:
        """End the process: it sees the end of its input, and is killed if it does not heed that."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdout.close()
        try:
            self.process.stdin.close()
            self.process.wait(60)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()

    def _send(self, message: object) -> None:
        assert self.process.stdin is not None
        pickle.dump(message, self.process.stdin)
        self.process.stdin.flush()

    def _receive(self) -> Any:  # whatever the function returned: `finish` gives it its type back
        assert self.process.stdout is not None
        try:
            good, result = pickle.load(self.process.stdout)
        except EOFError:
            raise AssertionError(f"the worker ended with status {self.process.wait(60)}") from None
        if not good:
            raise result
        return result


def _serve() -> None:
    place = Local()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            place.close()
            return
        try:
            if request[0] == "attach":
                place.attach(request[1])
                answer: tuple[bool, object] = (True, None)
            else:
                function, args, kwargs = request
                answer = (True, place.do(function, *args, **kwargs))
        except Exception as error:
            answer = (False, error)
        pickle.dump(answer, replies)
        replies.flush()


if __name__ == "__main__":
    _serve()
