"""What is shown on guests, by name: for the tests, which run the short form, and for scripts/guest.

A scenario gets a `Setting` and returns figures; it raises `Failed` if what it shows is not so. The scenarios
of a subject are in modules scenarios_*.py, which register them with `scenario`.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .host import Host
from .machine import Guest, Options, Result

Figures = dict[str, Any]


class Failed(AssertionError):
    """What a scenario was to show is not so."""


def demand(condition: object, what: str) -> None:
    """Raise `Failed` unless `condition` holds; `what` says what was expected, and what is."""
    if not condition:
        raise Failed(what)


class Setting:
    """Where a scenario runs: it makes guests and hosts, which end with it. A context manager.

    `logs` is the directory for the consoles. `long` asks for a thorough run instead of one for CI.
    """

    def __init__(self, logs: Path, kernel: str = "6.1", *, long: bool = False) -> None:
        self.logs = logs
        self.kernel = kernel
        self.long = long
        self.guests: list[Guest] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._open.close()

    def guest(self, name: str, options: Options | None = None) -> Guest:
        """Start a guest with this setting's kernel; `wait_booted` is the caller's."""
        options = replace(options or Options(), kernel=self.kernel)
        guest = Guest(name, options, self.logs / f"{name}.console")
        self.guests.append(guest)
        self._open.callback(guest.close)
        return guest.launch()

    def host(self, memory: str) -> Host:
        """Make a host with a segment of that size."""
        return self._open.enter_context(Host(memory))


Run = Callable[[Setting], Figures]


@dataclass(frozen=True)
class Scenario:
    """A registered scenario: what it shows, in a line, and the function."""

    name: str
    shows: str
    run: Run


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str) -> Callable[[Run], Run]:
    """Register a scenario; the first line of its docstring says what it shows."""

    def register(run: Run) -> Run:
        SCENARIOS[name] = Scenario(name, (run.__doc__ or "").strip().splitlines()[0], run)
        return run

    return register


def last_json(result: Result) -> Figures:
    """Return the figures that a tool printed as its last line."""
    lines = result.stdout.strip().splitlines()
    demand(lines and lines[-1].startswith("{"), f"figures at the end of {lines[-3:]} {result.stderr}")
    return dict(json.loads(lines[-1]))
