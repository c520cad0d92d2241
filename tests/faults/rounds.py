"""Rounds of faults on a `World`: one fault each, at a random moment, then everything must be there.

A fault returns how long what serves the swap device, and what serves the files, was stopped on purpose: that
is taken off the waits. The order of the faults and their moments follow from the seed; what the processes
were doing then does not.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from tmem.backends.processes import Process

from .board import Child, Word, wait
from .world import World, kill, stopped

_PATIENT_DEATHS = 3
"""After so many deaths of its server in short order the manager is started anew: it waits ever longer."""


class Stop(NamedTuple):
    """How long what serves each load was stopped on purpose."""

    swap_s: float = 0.0
    files_s: float = 0.0


@dataclass
class Row:
    """What came of all rounds of one fault. Waits in seconds, beyond what was stopped on purpose."""

    rounds: int = 0
    lost: int = 0
    swap_waits_s: list[float] = field(default_factory=list)
    files_waits_s: list[float] = field(default_factory=list)


Fault = Callable[[World, random.Random], Stop]


def length(rng: random.Random) -> float:
    """Return for how long to stop something: mostly short, at most a second."""
    return float(rng.random() ** 3)


def stop(processes: Iterable[Process], rng: random.Random) -> float:
    """Stop processes, all at once, for a random time; how long that was."""
    begin = time.monotonic()
    with stopped(*processes):
        time.sleep(length(rng))
    return time.monotonic() - begin


def server_killed(world: World, rng: random.Random) -> Stop:
    served = world.swap.board[Word.CONNECTIONS]
    world.kill_server()
    world.swap.wait(lambda: world.swap.board[Word.CONNECTIONS] > served, "the device is served again")
    return Stop()


def server_killed_in_a_fill(world: World, rng: random.Random) -> Stop:
    """The device is emptied and filled from its beginning, and at a random block of that the server dies."""
    board = world.swap.board
    wanted = board[Word.FILLS_WANTED] + 1
    position = rng.randrange(3000)
    board[Word.FILLED] = 0
    board[Word.FILLS_WANTED] = wanted
    world.swap.wait(
        lambda: board[Word.FILLED] >= position or board[Word.FILLS_DONE] >= wanted, "the device is filled"
    )
    server_killed(world, rng)
    world.swap.wait(lambda: board[Word.FILLS_DONE] >= wanted, "the device is full")
    return Stop()


def server_stopped(world: World, rng: random.Random) -> Stop:
    return Stop(swap_s=stop([world.server_process], rng))


def mount_killed(world: World, rng: random.Random) -> Stop:
    world.kill_daemon()
    world.mount()
    return Stop()


def mount_stopped(world: World, rng: random.Random) -> Stop:
    return Stop(files_s=stop([world.daemon_process], rng))


def manager_killed(world: World, rng: random.Random) -> Stop:
    world.kill_manager()
    time.sleep(length(rng) / 4)  # a service manager takes its time, too
    world.start_manager()
    return Stop()


def manager_ended(world: World, rng: random.Random) -> Stop:
    """As for an upgrade: it is told to end, and a new one starts."""
    world.end_manager()
    world.start_manager()
    return Stop()


def manager_stopped(world: World, rng: random.Random) -> Stop:
    stop([world.manager_process], rng)
    return Stop()


def swap_client_killed(world: World, rng: random.Random) -> Stop:
    return _restart(world.swap)


def swap_client_stopped(world: World, rng: random.Random) -> Stop:
    return Stop(swap_s=stop(_process(world.swap), rng))


def file_client_killed(world: World, rng: random.Random) -> Stop:
    return _restart(world.files)


def file_client_stopped(world: World, rng: random.Random) -> Stop:
    return Stop(files_s=stop(_process(world.files), rng))


def several_killed(world: World, rng: random.Random) -> Stop:
    """Two to four of server, daemon, manager and a client die at once."""
    every: list[str] = ["server", "daemon", "manager", rng.choice(("swap", "files"))]
    chosen = set(rng.sample(every, rng.randrange(2, 5)))
    served = world.swap.board[Word.CONNECTIONS]
    if "manager" in chosen:
        world.kill_manager()
    if "server" in chosen:
        world.kill_server()
    if "daemon" in chosen:
        world.kill_daemon()
    for child in (
        child for name, child in zip(("swap", "files"), world.loads, strict=True) if name in chosen
    ):
        child.kill()
    if "manager" in chosen:
        world.start_manager()
    if "daemon" in chosen:
        world.mount()
    for child in world.loads:
        if not child.pid:
            child.start()
    if "server" in chosen:
        world.swap.wait(lambda: world.swap.board[Word.CONNECTIONS] > served, "the device is served again")
    return Stop()


def stopped_then_killed(world: World, rng: random.Random) -> Stop:
    """Server and daemon are stopped together, and one of them, or both, die before they go on."""
    processes = [world.server_process, world.daemon_process]
    served = world.swap.board[Word.CONNECTIONS]
    die = rng.choice((processes[:1], processes[1:], processes))
    begin = time.monotonic()
    with stopped(*processes):
        time.sleep(length(rng) / 2)
        stop_s = time.monotonic() - begin
        for process in die:
            kill(process)
    for process in die:  # as a service manager does before it starts anything anew
        wait(lambda of=process: not of.alive, "it is gone")  # type: ignore[misc]
    if processes[1] in die:
        world.mount()
    if processes[0] in die:
        world.server_deaths += 1
        world.swap.wait(lambda: world.swap.board[Word.CONNECTIONS] > served, "the device is served again")
    return Stop(stop_s, stop_s)


FAULTS: dict[str, Fault] = {
    "server killed": server_killed,
    "server killed in a fill": server_killed_in_a_fill,
    "server stopped": server_stopped,
    "mount killed": mount_killed,
    "mount stopped": mount_stopped,
    "manager killed": manager_killed,
    "manager ended": manager_ended,
    "manager stopped": manager_stopped,
    "swap client killed": swap_client_killed,
    "swap client stopped": swap_client_stopped,
    "file client killed": file_client_killed,
    "file client stopped": file_client_stopped,
    "several killed at once": several_killed,
    "stopped, then killed": stopped_then_killed,
}

UNNOTICED = {name for name in FAULTS if name.startswith(("mount", "manager", "file client"))} | {
    "server stopped"
}
"""What must not even break the connection of the swap device."""


def _process(child: Child) -> list[Process]:
    found = Process.of(child.pid)
    return [found] if found else []


def _restart(child: Child) -> Stop:
    child.kill()
    child.start()
    return Stop()


class Campaign:
    """Many rounds of `faults` on one world; `rows` is what came of them so far."""

    def __init__(self, world: World, seed: str, faults: Mapping[str, Fault]) -> None:
        self._faults = {"manager killed": manager_killed, **faults}
        self.rows = {name: Row() for name in self._faults}
        self._chosen = list(faults)
        self._world = world
        self._rng = random.Random(seed)
        self._names: list[str] = []

    def next(self) -> str:
        """Do one round and return its fault. AssertionError if anything was lost or hangs."""
        world, rng = self._world, self._rng
        if not self._names:  # each fault once, in another order each time
            self._names = rng.sample(self._chosen, len(self._chosen))
        name = "manager killed" if world.server_deaths >= _PATIENT_DEATHS else self._names.pop()
        row = self.rows[name]
        row.rounds += 1
        row.lost += 1  # until it is clear that nothing is
        world.work()
        connections = world.swap.board[Word.CONNECTIONS]
        time.sleep(rng.random() * 0.05)
        stop = self._faults[name](world, rng)
        for child in world.loads:
            child.proceed(20)
        row.swap_waits_s.append(max(world.swap.longest_s - stop.swap_s, 0.0))
        row.files_waits_s.append(max(world.files.longest_s - stop.files_s, 0.0))
        world.rest()
        if name in UNNOTICED:
            assert world.swap.board[Word.CONNECTIONS] == connections, f"{name}: the connection broke"
        row.lost -= 1
        return name


def table(rows: dict[str, Row]) -> str:
    """Return the rows as a table in Markdown, waits in milliseconds."""
    lines = [
        "| fault | rounds | lost | swap: median wait | longest | files: median wait | longest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if row.rounds:
            waits = (
                f"{1000 * value:.0f} ms"
                for found in (row.swap_waits_s, row.files_waits_s)
                for value in ((statistics.median(found), max(found)) if found else (0.0, 0.0))
            )
            lines.append(f"| {name} | {row.rounds} | {row.lost} | {' | '.join(waits)} |")
    return "\n".join(lines)


def save(rows: dict[str, Row], seed: str, path: Path) -> None:
    """Write the rows with every single wait."""
    document = {"seed": seed, "faults": {name: asdict(row) for name, row in rows.items()}}
    path.write_text(json.dumps(document, indent=1) + "\n")
