"""Draws one frame of ``tmem top``: a heading, times of operations, a line for each pool, client or mount.

Made for 80 columns; a wider terminal shows more. Pure: from numbers to what rich prints, so that tests need
no terminal. Letters that are underlined in the headings are the keys that sort by that column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tmem.cli.mountwatch import UNASKED, Looks, mount_rows
from tmem.cli.sampling import Look, Operation, Pressure, clients, operations, rows
from tmem.cli.toptables import CLIENTS, MOUNTS, POOLS, Column, L, amount, duration, short
from tmem.types import PAGE_SIZE

WIDE_COLUMNS = 96
"""From so many on the state has a column of its own."""

TABLES = ("pools", "clients", "mounts")
"""What can be shown; Tab goes from one to the next."""

_STATES = {
    "on": "green",
    "unserved": "dim",
    "frozen": "cyan",
    "off": "yellow",
    "aside": "yellow",
    "no pool": "dim",
}
_OPERATIONS = {
    "put_stored": "put",
    "put_refused": "put, refused",
    "get_hit": "get, hit",
    "get_missed": "get, missed",
    "compress": "compress",
    "decompress": "decompress",
}


@dataclass(frozen=True)
class View:
    """What somebody has chosen to see."""

    table: int = 0
    """Which of `TABLES`."""
    sort: int = 0
    """Which of its columns."""
    reverse: bool = False
    first: int = 0
    """The first line of the table that is shown."""
    paused: bool = False
    help: bool = False

    @property
    def of_mounts(self) -> bool:
        """Whether mounts are shown, which have to be asked."""
        return TABLES[self.table] == "mounts"


@dataclass(frozen=True)
class Frame:
    """All that is drawn."""

    name: str
    clock: str
    """The time of day."""
    interval_s: float
    manager_pid: int | None
    before: Look
    now: Look
    pressure_before: Pressure
    pressure: Pressure
    mounts: Looks = UNASKED
    """What mounts have told, if anybody asked."""
    tiers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the manager has seen of tiers, by client: `TierFigures`."""


def draw(frame: Frame, view: View, width: int, height: int | None, blocks: bool = True) -> RenderableType:
    """Return the frame; `height` None: as long as it is. `blocks`: the terminal knows block characters."""
    head: list[RenderableType] = [
        _title(frame, view, width),
        _memory(frame.now, width, blocks),
        _pages(frame.now),
        _pressure(frame),
        Text(),
        _times(operations(frame.before, frame.now)),
        Text(),
    ]
    # Above are 14 lines, the table's heading and the keys take 3, and to say that there are more takes one.
    room = None if height is None else height - 17
    foot: list[RenderableType] = [] if height is None else [_keys(view)]
    if view.help:
        return Group(*head, _help(), *foot)
    wide = width >= WIDE_COLUMNS
    if TABLES[view.table] == "clients":
        lines = _table(clients(frame.before, frame.now), CLIENTS, CLIENTS, view, width, room)
    elif TABLES[view.table] == "mounts":
        found = mount_rows(frame.mounts)
        nothing = "no mounts: make one with 'tmem mount'" if frame.mounts[1] else "asking the mounts"
        lines = _table(found, MOUNTS, MOUNTS if wide else MOUNTS[:-1], view, width, room, nothing)
    else:
        drawn = POOLS if wide else POOLS[:-1]
        lines = _table(rows(frame.before, frame.now), POOLS, drawn, view, width, room)
    return Group(*head, *lines, *foot)


def sorting_keys(view: View) -> list[str]:
    """Return the keys that sort the table which is shown, in the order of its columns."""
    keys = {
        "pools": [column.key for column in POOLS],
        "clients": [column.key for column in CLIENTS],
        "mounts": [column.key for column in MOUNTS],
    }
    return keys[TABLES[view.table]]


def lines_of(frame: Frame, view: View) -> int:
    """Return how many lines the table has that is shown, those included that have no room."""
    if TABLES[view.table] == "mounts":
        return len(mount_rows(frame.mounts))
    return len(frame.now.times if TABLES[view.table] == "clients" else frame.now.pools)


def ordered(found: Sequence[L], columns: Sequence[Column[L]], view: View) -> list[L]:
    """Return the rows as `view` sorts them: names from A, numbers from the largest; or reversed."""
    column = columns[view.sort]
    return sorted(found, key=column.value, reverse=column.numeric != view.reverse)


def _title(frame: Frame, view: View, width: int) -> Text:
    manager = "no manager" if frame.manager_pid is None else f"manager {frame.manager_pid}"
    left = Text.assemble(("tmem ", "bold"), (frame.name, "bold cyan"))
    if frame.now.mode != "on":
        left.append(f"  {frame.now.mode}", style="bold yellow")
    if view.paused:
        left.append("  paused", style="bold yellow")
    left.append(_tiers(frame.tiers))
    right = f"{manager}   every {frame.interval_s:g} s   {frame.clock}"
    left.append(" " * max(width - len(left) - len(right), 1))
    left.append(right, style="red" if frame.manager_pid is None else "dim")
    return left


def _tiers(tiers: Mapping[str, Mapping[str, Any]]) -> Text:
    """Return how many tiers are down, or else nearly full, if some are; `tmem list` says which."""
    down = full = 0
    for one in tiers.values():
        free, capacity = one.get("tier_free_bytes"), one.get("tier_capacity_bytes")
        if not one.get("tier_up"):
            down += 1
        elif free is not None and capacity and free < capacity / 10:
            full += 1
    if down:
        return Text(f"  {down} tier{'s' if down > 1 else ''} down", style="bold red")
    return Text(f"  {full} tier{'s' if full > 1 else ''} nearly full" if full else "", style="bold yellow")


def _memory(now: Look, width: int, blocks: bool) -> Text:
    """The bar: what persistent and ephemeral pages, tables and free memory take of the whole."""
    memory = now.memory
    persistent = ephemeral = 0
    for look in now.pools.values():
        if look.counts is None or not look.paid:
            continue
        if look.counts.persistent:
            persistent += look.counts.bytes
        else:
            ephemeral += look.counts.bytes
    tables = memory.metadata_bytes
    other = max(memory.used_bytes - persistent - ephemeral - tables, 0)
    parts = [
        (persistent, "blue", "persistent"),
        (ephemeral, "green", "ephemeral"),
        (tables, "magenta", "tables"),
        (other, "bright_black", "holes"),
    ]
    cells = max(min(width, 120) - 2, 10)
    bar = Text("[")
    used = 0
    for size, style, _ in parts:
        count = round((used + size) / memory.memory_bytes * cells) - round(used / memory.memory_bytes * cells)
        bar.append(("\u2588" if blocks else "#") * count, style=style)
        used += size
    bar.append(("\u00b7" if blocks else ".") * (cells - (len(bar) - 1)), style="dim")
    bar.append("]\n")
    for size, style, word in parts:
        bar.append("\u25a0 " if blocks else "# ", style=style)
        bar.append(f"{word} {amount(size)}  ")
    bar.append(f"of {amount(memory.memory_bytes)}", style="bold")
    if memory.limit_bytes < memory.memory_bytes:
        bar.append(f", now at most {amount(memory.limit_bytes)}", style="bold")
    return bar


def _pages(now: Look) -> Text:
    memory = now.memory
    total = memory.persistent_pages + memory.ephemeral_pages
    stored = sum(look.counts.bytes for look in now.pools.values() if look.counts and look.paid)
    ratio = (
        f"compressed {(total - memory.tier_pages) * PAGE_SIZE / stored:.2f} : 1"
        if stored
        else "none compressed"
    )
    return Text(
        f"pages {memory.persistent_pages:,} persistent, {memory.ephemeral_pages:,} ephemeral"
        f" ({amount(total * PAGE_SIZE)}), {ratio}, {amount(now.freeable_bytes)} left"
        + (f", {memory.tier_pages:,} in tiers" if memory.tier_pages else "")
    )


def _pressure(frame: Frame) -> Text:
    """What waits on this machine, and how much it swaps."""
    now, before = frame.pressure, frame.pressure_before
    line = Text("pressure")
    for name in ("memory", "io", "cpu"):
        if name in now.some:
            worst = max(now.some[name], now.full.get(name, 0))
            style = "red" if worst >= 20 else "yellow" if worst >= 5 else "default"
            line.append(f"  {name} ")
            line.append(f"{now.some[name]:.0f}%", style=style)
            if name != "cpu":
                line.append(f"/{now.full.get(name, 0):.0f}%", style=style)
    if not now.some:
        line.append("  unknown", style="dim")
    seconds = (frame.now.at_ns - frame.before.at_ns) / 1e9
    if seconds > 0:
        swapped_in = (now.swapped_in - before.swapped_in) / seconds
        swapped_out = (now.swapped_out - before.swapped_out) / seconds
        line.append(f"   this machine swaps in {short(swapped_in)}/s, out {short(swapped_out)}/s")
    return line


def _times(found: dict[str, Operation]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("a page", width=14, no_wrap=True)
    for heading in ("per s", "p50", "p99", "p99.9"):
        table.add_column(heading, justify="right", width=8, no_wrap=True)
    for name, word in _OPERATIONS.items():
        one = found[name]
        rate = "" if name.endswith("compress") else short(one.per_s)
        refused = name == "put_refused" and bool(one.per_s)
        table.add_row(word, rate, *map(duration, one.quantiles_ns), style="red" if refused else "")
    return table


def _table(
    found: Sequence[L],
    columns: Sequence[Column[L]],
    drawn: Sequence[Column[L]],
    view: View,
    width: int,
    room: int | None,
    nothing: str = "no clients yet: add one with 'tmem swap add' or 'tmem mount'",
) -> list[RenderableType]:
    """Return the table and what is to be said below it; `drawn` are the `columns` that have room."""
    wide = width >= WIDE_COLUMNS
    if room is not None and len(found) > room:
        room = max(room - 1, 1)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0), width=min(width, 120))
    for number, column in enumerate(drawn):
        table.add_column(
            _heading(column, number == view.sort, view.reverse),
            justify="right" if column.numeric else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if number == 0 else None,
        )
        if number == 0 and wide:
            table.add_column("STATE", no_wrap=True)
    lines = ordered(found, columns, view)
    shown = lines if room is None else lines[view.first : view.first + room]
    for row in shown:
        cells: list[RenderableType] = [Text(column.text(row)) for column in drawn]  # a path may have brackets
        state = Text(row.state, style=_STATES.get(row.state, "bold red"))
        if wide:
            cells.insert(1, state)
        elif row.state != "on":
            cells[0] = Text.assemble(row.name, " ", state)
        table.add_row(*cells, style="red" if row.trouble else "")
    below: list[RenderableType] = [table]
    if not lines:
        below.append(Text(nothing, style="dim"))
    elif len(shown) < len(lines):
        last = view.first + len(shown)
        below.append(Text(f"{view.first + 1} to {last} of {len(lines)}", style="dim"))
    return below


def _heading(column: Column[L], chosen: bool, reverse: bool) -> Text:
    at = column.heading.lower().index(column.key)
    text = Text(column.heading, style="bold reverse" if chosen else "bold")
    text.stylize("underline", at, at + 1)
    return text


def _keys(view: View) -> Text:
    line = Text("\n")
    for key, word in (
        ("q", "quit"),
        ("tab", TABLES[(view.table + 1) % len(TABLES)]),
        ("letter", "sort"),
        ("space", "go on" if view.paused else "pause"),
        ("+ -", "interval"),
        ("?", "help"),
    ):
        line.append(f" {key} ", style="reverse")
        line.append(f" {word}  ")
    return line


def _help() -> Text:
    return Text(  # more than seven lines have no room in a terminal of 24
        "An underlined letter sorts by that column; again, the other way round. Left and\n"
        "right go from column to column, up and down through the lines; Tab to the next\n"
        "table. PUT50: half of the puts took no longer; times are of every 64th operation,\n"
        "within a factor of two. DATA is without compression; every sharer of a pool has a\n"
        "line. POOL/s and LOWER/s are bytes, MISS/s pages, ERRORS reads of the lower that\n"
        "failed. Pressure: some and all wait for it, in the last ten seconds (PSI).\n"
        "Any key goes back."
    )
