"""Draws one frame of ``tmem top``: a heading, times of operations, a line for each pool.

Made for 80 columns; a wider terminal shows more. Pure: from numbers to what rich prints, so that tests need
no terminal. Letters that are underlined in the headings are the keys that sort by that column.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tmem.cli.sampling import Look, Operation, Pressure, Row, operations, rows
from tmem.types import PAGE_SIZE

WIDE_COLUMNS = 96
"""From so many on the state has a column of its own."""

_Key = Callable[[Row], float | str]


@dataclass(frozen=True)
class Column:
    """A column of the table of pools, and the key that sorts by it."""

    key: str
    heading: str
    value: _Key
    """What it sorts by; numbers sort the largest first."""
    text: Callable[[Row], str]
    numeric: bool = True


def short(number: float | None) -> str:
    """Return a rate in at most four characters: ``0``, ``7.5``, ``123``, ``1.2k``, ``34M``."""
    if number is None:
        return "-"
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            whole = number >= 99.5 or number == int(number)
            return f"{number:.0f}{unit}" if whole else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.0f}T"


def amount(size_bytes: float) -> str:
    """Return a size in at most five characters: ``0``, ``512B``, ``9.8K``, ``64M``, ``1.5G``."""
    for unit in ("B", "K", "M", "G"):
        if size_bytes < 999.5:
            plain = size_bytes >= 9.95 or size_bytes == int(size_bytes)
            return f"{size_bytes:.0f}{unit}" if plain else f"{size_bytes:.1f}{unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f}T"


def duration(ns: float | None) -> str:
    """Return a time in at most five characters: ``850ns``, ``6.2us``, ``1.5s``; ``-`` for None."""
    if ns is None:
        return "-"
    for unit in ("ns", "us", "ms"):
        if ns < 999.5:
            return f"{ns:.0f}{unit}" if ns >= 9.95 or unit == "ns" else f"{ns:.1f}{unit}"
        ns /= 1000
    return f"{ns:.0f}s" if ns >= 9.95 else f"{ns:.1f}s"


COLUMNS = (
    Column("c", "CLIENT", lambda row: row.client, lambda row: row.client, numeric=False),
    Column("t", "TYPE", lambda row: row.kind, lambda row: row.kind, numeric=False),
    Column("d", "DATA", lambda row: row.data_bytes, lambda row: amount(row.data_bytes)),
    Column("m", "MEMORY", lambda row: row.memory_bytes, lambda row: amount(row.memory_bytes)),
    Column("r", "RATIO", lambda row: row.ratio or 0, lambda row: f"{row.ratio:.2f}" if row.ratio else "-"),
    Column("p", "PUT/s", lambda row: row.puts_per_s or 0, lambda row: short(row.puts_per_s)),
    Column("g", "GET/s", lambda row: row.gets_per_s or 0, lambda row: short(row.gets_per_s)),
    Column(
        "h",
        "HIT%",
        lambda row: -1 if row.hit_share is None else row.hit_share,
        lambda row: "-" if row.hit_share is None else f"{100 * row.hit_share:.1f}",
    ),
    Column("e", "EVICT/s", lambda row: row.evictions_per_s or 0, lambda row: short(row.evictions_per_s)),
    Column("f", "REFUSED/s", lambda row: row.refused_per_s or 0, lambda row: short(row.refused_per_s)),
)
"""The last one has no room in 80 columns; a pool that is refused is red there instead."""

_STATES = {"on": "green", "unserved": "dim", "frozen": "cyan", "off": "yellow"}
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

    sort: int = 0
    """Which of `COLUMNS`."""
    reverse: bool = False
    first: int = 0
    """The first line of the table that is shown."""
    paused: bool = False
    help: bool = False


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


def draw(frame: Frame, view: View, width: int, height: int | None, blocks: bool = True) -> RenderableType:
    """Return the frame; `height` None: as long as it is. `blocks`: the terminal knows block characters."""
    found = rows(frame.before, frame.now)
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
    if room is not None and len(found) > room:
        room = max(room - 1, 1)
    foot: list[RenderableType] = [] if height is None else [_keys(view)]
    if view.help:
        return Group(*head, _help(), *foot)
    return Group(*head, *_table(found, view, width, room), *foot)


def ordered(found: Sequence[Row], view: View) -> list[Row]:
    """Return the rows as `view` sorts them: names from A, numbers from the largest; or reversed."""
    column = COLUMNS[view.sort]
    return sorted(found, key=column.value, reverse=column.numeric != view.reverse)


def _title(frame: Frame, view: View, width: int) -> Text:
    manager = "no manager" if frame.manager_pid is None else f"manager {frame.manager_pid}"
    left = Text.assemble(("tmem ", "bold"), (frame.name, "bold cyan"))
    if frame.now.mode != "on":
        left.append(f"  {frame.now.mode}", style="bold yellow")
    if view.paused:
        left.append("  paused", style="bold yellow")
    right = f"{manager}   every {frame.interval_s:g} s   {frame.clock}"
    left.append(" " * max(width - len(left) - len(right), 1))
    left.append(right, style="red" if frame.manager_pid is None else "dim")
    return left


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


def _table(found: list[Row], view: View, width: int, room: int | None) -> list[RenderableType]:
    wide = width >= WIDE_COLUMNS
    columns = COLUMNS if wide else COLUMNS[:-1]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0), width=min(width, 120))
    for number, column in enumerate(columns):
        table.add_column(
            _heading(column, number == view.sort, view.reverse),
            justify="right" if column.numeric else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if number == 0 else None,
        )
        if number == 0 and wide:
            table.add_column("STATE", no_wrap=True)
    lines = ordered(found, view)
    shown = lines if room is None else lines[view.first : view.first + room]
    for row in shown:
        cells: list[RenderableType] = [column.text(row) for column in columns]
        state = Text(row.state, style=_STATES.get(row.state, "bold red"))
        if wide:
            cells.insert(1, state)
        elif row.state != "on":
            cells[0] = Text.assemble(row.client, " ", state)
        table.add_row(*cells, style="red" if row.refused_per_s else "")
    below: list[RenderableType] = [table]
    if not lines:
        below.append(Text("no clients yet: add one with 'tmem swap add' or 'tmem mount'", style="dim"))
    elif len(shown) < len(lines):
        last = view.first + len(shown)
        below.append(Text(f"{view.first + 1} to {last} of {len(lines)}", style="dim"))
    return below


def _heading(column: Column, chosen: bool, reverse: bool) -> Text:
    at = column.heading.lower().index(column.key)
    text = Text(column.heading, style="bold reverse" if chosen else "bold")
    text.stylize("underline", at, at + 1)
    return text


def _keys(view: View) -> Text:
    line = Text("\n")
    for key, word in (
        ("q", "quit"),
        ("letter", "sort by it"),
        ("space", "go on" if view.paused else "pause"),
        ("+ -", "interval"),
        ("?", "help"),
    ):
        line.append(f" {key} ", style="reverse")
        line.append(f" {word}  ")
    return line


def _help() -> Text:
    return Text(
        "The letter that is underlined in a heading sorts by that column; again, the other way round.\n"
        "Left and right go from column to column, up and down through the pools.\n"
        "Times are those of every 64th operation; a quantile is right within a factor of two.\n"
        "Pressure: some and all of what runs waits for it, in the last ten seconds (PSI).\n"
        "DATA is without compression. Of a shared pool every sharer has a line.\n"
        "Any key goes back."
    )
