"""The command ``top``: a live view of a segment in a terminal, or frames of it for a script.

It reads the segment itself, so it works while no manager runs, and disturbs nobody. Mounts are asked while
their table is shown. Not for what a frame looks like (`topview`) nor for its numbers (`sampling`,
`mountwatch`). Threading: the main thread; it waits for a key or the next frame, whichever comes first.
"""

import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from tmem.backends import segment, service
from tmem.backends.paths import SegmentPaths
from tmem.cli import mountwatch, sampling
from tmem.cli.context import segment_name
from tmem.errors import ServiceError, TmemError

if TYPE_CHECKING:
    from rich.console import Console

    from tmem.backends._native import Segment
    from tmem.cli.topview import Frame, View

_LEAST_S, _MOST_S = 0.1, 60.0
_LOOK_S = 0.25
"""How often the size of the terminal is looked at."""

_PING_EVERY_S, _PING_TIMEOUT_S = 5.0, 0.5
_PIPE_COLUMNS = 120

_ARROWS = {b"[A": "up", b"[B": "down", b"[C": "right", b"[D": "left"}


@click.command()
@click.option(
    "--interval",
    "-d",
    type=click.FloatRange(_LEAST_S, _MOST_S),
    default=1.0,
    show_default=True,
    help="Seconds from frame to frame.",
)
@click.option("--once", is_flag=True, help="Print one frame, after one interval.")
@click.option("--count", "-n", type=click.IntRange(1), help="Print so many frames.")
@click.option(
    "--table",
    "-t",
    type=click.Choice(["pools", "clients", "mounts"]),
    default="pools",
    show_default=True,
    help="What to begin with.",
)
@click.pass_context
def top(ctx: click.Context, interval: float, once: bool, count: int | None, table: str) -> None:
    """Show live what happens in the segment: pools, rates, hit ratios, times, memory, pressure.

    Keys: q ends it; Tab changes the table: pools, clients with the times of their operations, or mounts; the
    letter that is underlined in a heading sorts by that column, and again the other way round; space pauses;
    + and - change the interval; ? helps. Without a terminal it prints one frame.
    """
    from tmem.cli.screen import console as wide_console
    from tmem.cli.topview import TABLES, View

    if once and count is not None:
        raise click.UsageError("give either --once or --count")
    console = wide_console(shutil.get_terminal_size((_PIPE_COLUMNS, 0)).columns)
    paths = SegmentPaths.of(segment_name(ctx))
    view = View(table=TABLES.index(table))
    with closing(segment.attach(paths.name)) as opened:
        watcher = Watcher(paths, opened, interval)
        if once or count or not (console.is_terminal and sys.stdin.isatty()):
            _print_frames(console, watcher, view, count or 1)
        else:
            _live(console, watcher, view)


class Watcher:
    """Takes looks at a segment and makes frames of them."""

    def __init__(
        self,
        paths: SegmentPaths,
        opened: "Segment",
        interval_s: float,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.interval_s = interval_s
        self._paths, self._opened, self._clock_ns = paths, opened, clock_ns
        self._pinged_ns = 0
        self._ping()
        self._before = self._now = sampling.take(opened, clock_ns)
        self._pressure_before = self._pressure = sampling.pressure()
        self._mounts: mountwatch.MountWatcher | None = None

    def look(self) -> None:
        """Take another look; `TmemError` once the segment is gone."""
        if not self._opened.alive:
            raise TmemError(f"segment {self._paths.name!r} was destroyed")
        self._before, self._pressure_before = self._now, self._pressure
        self._now, self._pressure = sampling.take(self._opened, self._clock_ns), sampling.pressure()
        if self._now.at_ns - self._pinged_ns > _PING_EVERY_S * 1e9:
            self._ping()

    def ask_mounts(self) -> mountwatch.MountWatcher:
        """Have the mounts asked, which does not wait for them."""
        if self._mounts is None:
            self._mounts = mountwatch.MountWatcher(mountwatch.asked_by(self._paths))
        self._mounts.begin()
        return self._mounts

    @property
    def mounts(self) -> mountwatch.Looks:
        """What the mounts have told by now."""
        return mountwatch.UNASKED if self._mounts is None else self._mounts.looks

    def frame(self) -> "Frame":
        """Return what is to be drawn."""
        from tmem.cli.topview import Frame

        return Frame(
            self._paths.name,
            time.strftime("%H:%M:%S"),
            self.interval_s,
            self._pid,
            self._before,
            self._now,
            self._pressure_before,
            self._pressure,
            self.mounts,
            self._tiers,
        )

    def _ping(self) -> None:
        self._pinged_ns = self._clock_ns()
        self._pid: int | None = None
        self._tiers: dict[str, dict[str, Any]] = {}
        try:
            self._pid, answer = service.ping(self._paths, _PING_TIMEOUT_S)
        except ServiceError:
            return
        if isinstance(tiers := answer.get("tiers"), dict):
            self._tiers = tiers


def _print_frames(console: "Console", watcher: Watcher, view: "View", count: int) -> None:
    from tmem.cli.topview import draw

    blocks = not console.options.ascii_only
    if view.of_mounts:
        watcher.ask_mounts().wait()  # from which the first frame counts
    for number in range(count):
        time.sleep(watcher.interval_s)
        if view.of_mounts:
            watcher.ask_mounts().wait()
        watcher.look()
        if number:
            console.print()
        console.print(draw(watcher.frame(), view, console.width, None, blocks))


def _live(console: "Console", watcher: Watcher, view: "View") -> None:
    """Draw until somebody presses q."""
    from rich.live import Live

    from tmem.cli.topview import draw

    blocks = not console.options.ascii_only
    with _keys() as read_keys, Live(console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic() + min(watcher.interval_s, 0.5)  # a first frame soon
        size, mounts = None, watcher.mounts
        if view.of_mounts:
            watcher.ask_mounts()
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + watcher.interval_s
                if not view.paused:
                    watcher.look()
                    if view.of_mounts:
                        watcher.ask_mounts()
                size = None
            if size != console.size or mounts is not watcher.mounts:
                size, mounts = console.size, watcher.mounts
                live.update(draw(watcher.frame(), view, size.width, size.height, blocks), refresh=True)
            for key in read_keys(min(max(due - time.monotonic(), 0), _LOOK_S)):
                if key in ("q", "\x03", "\x04"):
                    return
                before = watcher.interval_s
                view = _pressed(key, view, watcher)
                due += watcher.interval_s - before
                size = None  # draw at once


def _pressed(key: str, view: "View", watcher: Watcher) -> "View":
    """Return the view after a key was pressed."""
    from tmem.cli.topview import TABLES, lines_of, sorting_keys

    if view.help:
        return replace(view, help=False)
    if key == "?":
        return replace(view, help=True)
    if key == " ":
        return replace(view, paused=not view.paused)
    if key == "\t":
        view = replace(view, table=(view.table + 1) % len(TABLES), sort=0, reverse=False, first=0)
        if view.of_mounts:
            watcher.ask_mounts()
        return view
    if key in ("+", "=", "-"):
        factor = 0.5 if key == "-" else 2
        watcher.interval_s = min(max(watcher.interval_s * factor, _LEAST_S), _MOST_S)
        return view
    if key in ("up", "down"):
        last = max(lines_of(watcher.frame(), view) - 1, 0)
        return replace(view, first=min(max(view.first + (1 if key == "down" else -1), 0), last))
    if key in ("left", "right"):
        step = 1 if key == "right" else -1
        return replace(view, sort=(view.sort + step) % len(sorting_keys(view)), reverse=False, first=0)
    keys = sorting_keys(view)
    if key in keys:
        number = keys.index(key)
        return replace(view, sort=number, reverse=number == view.sort and not view.reverse, first=0)
    return view


@contextmanager
def _keys() -> Iterator[Callable[[float], list[str]]]:
    """Have keys come one by one and unseen; yields a function that waits for some, so many seconds."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)

    def read(timeout_s: float) -> list[str]:
        if not select.select([terminal], [], [], timeout_s)[0]:
            return []
        received = os.read(terminal, 64)
        if not received:
            return ["q"]  # the terminal is gone
        keys: list[str] = []
        while received:
            if received[:1] == b"\x1b":
                keys.append(_ARROWS.get(received[1:3], "escape"))
                received = received[3:]
            else:
                keys.append(chr(received[0]))
                received = received[1:]
        return keys

    try:
        yield read
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
