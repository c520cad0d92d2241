"""The commands ``list`` and ``freeable``: what is in the segment.

They read the segment itself, so they work while no manager runs. The JSON form is the contract with scripts:
every statistic of the core under its name, units in the names. ``docs/operations.md`` says which of tmem's
historic statistics each of them is. Not for live views.
"""

import json
import textwrap
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import click

from tmem.backends import segment, service, tiering
from tmem.backends.paths import SegmentPaths
from tmem.backends.statistics import (
    BUCKETS_NS,
    ClientStatistics,
    PoolStatistics,
    SegmentStatistics,
    Timing,
)
from tmem.backends.tierlooks import TierFigures
from tmem.cli.clients import attached, find_client, state_word
from tmem.cli.columns import bold, columns_of, drawn, widths_of
from tmem.cli.context import client_names, segment_name
from tmem.errors import PoolError, ServiceError
from tmem.types import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from tmem.backends import _native

# Wide enough that a pipe sees every column in full.
_PIPE_COLUMNS = 200

_TEXTS = ("CLIENT", "STATE", "POOL", "TYPE")
_NUMBERS = ("PAGES", "DATA", "MEMORY", "RATIO", "PUTS", "REFUSED", "GETS", "HIT%", "EVICTED", "CORRUPT")
_CLIENT_COLUMNS = 20
"""How much of a client's name is worth more than another column."""
_TROUBLES = ("CORRUPT", "REFUSED")
_LEAST_FIRST = ("CORRUPT", "PAGES", "POOL", "GETS", "PUTS", "REFUSED", "EVICTED", "DATA")
"""What a narrow terminal leaves out, in this order."""


@click.command("list")
@click.argument("client", shell_complete=client_names, required=False)
@click.option("--json", "as_json", is_flag=True, help="Everything that is counted, for programs.")
@click.option("-l", "--long", is_flag=True, help="Everything that is counted, for people.")
@click.pass_context
def list_command(ctx: click.Context, client: str | None, as_json: bool, long: bool) -> None:
    """Show the memory of the segment, its clients and their pools, or only CLIENT and its pools."""
    paths = SegmentPaths.of(segment_name(ctx))
    with closing(segment.attach(paths.name)) as opened:
        clients = opened.clients() if client is None else [find_client(opened, client)]
        state = describe(paths, opened, clients)
    if as_json:
        click.echo(json.dumps(state, indent=2))
    else:
        _show(state, long)


@click.command()
@click.option("--bytes", "exact", is_flag=True, help="As a plain number of bytes.")
@click.pass_context
def freeable(ctx: click.Context, exact: bool) -> None:
    """Print the memory that is free or held by ephemeral pages, which give way to persistent ones."""
    with attached(ctx) as opened:
        size = opened.freeable_bytes()
    click.echo(str(size) if exact else format_size(size))


def describe(
    paths: SegmentPaths, opened: "_native.Segment", clients: "list[_native.Client]"
) -> dict[str, object]:
    """Return the state of the segment and of `clients` in the shape of ``list --json``."""
    memory = asdict(SegmentStatistics.from_dict(opened.statistics()))
    memory["freeable_bytes"] = opened.freeable_bytes()
    pid, manager, problems, tiers = _manager(paths)
    unknown = dict.fromkeys(field.name for field in fields(TierFigures))
    described = []
    for client in sorted(clients, key=lambda client: client.name):
        try:
            name = client.name
            told = {"tier_problem": problems.get(name), **unknown, **tiers.get(name, {})}
            described.append({**_client(paths, client), **told})
        except PoolError:
            continue  # it ended while we looked
    return {
        "name": paths.name,
        "path": opened.path,
        "mode": opened.mode,
        "manager_pid": pid,
        "manager": manager,
        "memory": memory,
        "timing_bounds_ns": list(BUCKETS_NS),
        "timing": timings(opened),
        "clients": described,
    }


def timings(of: "_native.Segment | _native.Client") -> dict[str, dict[str, object]]:
    """Return the times of operations by their kinds, in the shape of ``list --json``."""
    return {name: asdict(Timing(*values)) for name, values in of.timing().items()}


def _client(paths: SegmentPaths, client: "_native.Client") -> dict[str, object]:
    counts = asdict(ClientStatistics.from_dict(client.statistics()))
    del counts["pools"], counts["authorised_pools"]  # numbers of what follows in full
    return {
        "name": client.name,
        "mode": client.mode,
        "phase": client.phase,
        "compress": client.compress,
        "dedup": client.dedup,
        "tier": None if (url := tiering.of(paths, client)) is None else tiering.shown(url),
        **counts,
        "authorised": [str(uuid.UUID(bytes=key)) for key in client.authorised()],
        "timing": timings(client),
        "pools": [_pool(pool) for pool in client.pools()],
    }


def _pool(pool: "_native.Pool") -> dict[str, object]:
    counts = asdict(PoolStatistics.from_dict(pool.statistics()))
    kind = "persistent" if counts.pop("persistent") else "ephemeral"
    return {
        "id": counts.pop("id"),
        "type": kind,
        "shared": counts.pop("shared"),
        "uuid": None if pool.uuid is None else str(uuid.UUID(bytes=pool.uuid)),
        "owner": pool.owner.name,
        "sharers": sorted(client.name for client in pool.sharers),
        **counts,
    }


def _manager(
    paths: SegmentPaths,
) -> tuple[int | None, dict[str, int], dict[str, str], dict[str, dict[str, object]]]:
    """Return the manager's process, what it has done (`manager.ManagerStatistics`, `ResizeStatistics`),
    why pages of clients stay in memory that have a tier, and `TierFigures` of those tiers."""
    try:
        pid, answer = service.ping(paths, timeout_s=2)
    except ServiceError:
        return None, {}, {}, {}
    found = [answer.get(name) for name in ("statistics", "tier_problems", "tiers")]
    statistics, problems, tiers = (one if isinstance(one, dict) else {} for one in found)
    return pid, statistics, problems, tiers


def _show(state: Mapping[str, object], long: bool) -> None:
    """Print `state` for a person."""
    memory, clients = state["memory"], state["clients"]
    assert isinstance(memory, dict)
    assert isinstance(clients, list)
    width = columns_of(_PIPE_COLUMNS)
    pid = state["manager_pid"]
    sizes = {name: format_size(value) for name, value in memory.items() if name.endswith("_bytes")}
    mode = "" if state["mode"] == "on" else f"{state['mode']}, "
    moves = ""
    if memory["size_least_bytes"] != memory["size_most_bytes"]:
        moves = f" (moves from {sizes['size_least_bytes']} to {sizes['size_most_bytes']})"
    first = (
        f"segment {state['name']}: {mode}{sizes['used_bytes']} of {sizes['limit_bytes']} used{moves} "
        f"({sizes['metadata_bytes']} for tables), {sizes['reserve_bytes']} in reserve, "
        f"{sizes['freeable_bytes']} freeable, {'no manager runs' if pid is None else f'manager pid {pid}'}"
    )
    click.echo(textwrap.fill(first, width, break_long_words=False, break_on_hyphens=False))
    if not clients:
        click.echo("no clients yet: add one with 'tmem swap add' or 'tmem mount'")
    else:
        for line in _table(clients, str(state["mode"]), width):
            click.echo(line)
    for client in clients:
        if client["tier"] is not None:
            pages, unreachable = client["tier_pages"], client["unreachable_gets"]
            trouble = f", {unreachable} gets could not reach it" if unreachable else ""
            if problem := client["tier_problem"]:
                trouble += f"; pages stay in memory: {problem}"
            elif down := client["tier_down"]:
                trouble += f"; the tier is down: {down}"
            there = f"{format_size(pages * PAGE_SIZE)} of pages in {client['tier']}{_fullness(client)}"
            click.echo(f"{client['name']} has {there}{trouble}")
    if long:
        _show_counts(state)


def _fullness(client: Mapping[str, Any]) -> str:
    """Return how full a client's tier is, as far as that is known."""
    free, capacity = client["tier_free_bytes"], client["tier_capacity_bytes"]
    if free is None or not capacity:
        return ""
    return f" ({100 * (capacity - free) / capacity:.0f}% of {format_size(capacity)} is full)"


def _table(clients: list[Mapping[str, object]], segment_mode: str, width: int) -> Iterator[str]:
    """One line a pool, and one for a client without pools; the columns that matter most have room first."""
    lines: list[dict[str, str]] = []
    for client in clients:
        pools = client["pools"]
        assert isinstance(pools, list)
        state = state_word(
            str(client["phase"]), (segment_mode, str(client["mode"])), held=bool(client["held"])
        )
        first = {"CLIENT": str(client["name"]), "STATE": state}
        lines += [first | _row(pool) for pool in pools] or [{**first, "POOL": "-"}]
    return drawn(lines, _fitting(lines, width), _TEXTS)


def _fitting(lines: list[dict[str, str]], width: int) -> dict[str, int]:
    """Return the columns for which there is room, with their widths; what tells of trouble stays.

    A client's name has what the others leave.
    """
    widths = widths_of([*_TEXTS, *_NUMBERS], lines)
    whole = widths["CLIENT"]

    def others() -> int:
        return sum(widths.values()) - widths["CLIENT"] + 2 * (len(widths) - 1)

    for least in _LEAST_FIRST:
        if min(whole, _CLIENT_COLUMNS) + others() <= width:
            break
        if least not in _TROUBLES or all(line.get(least, "0") == "0" for line in lines):
            del widths[least]
    widths["CLIENT"] = max(min(whole, width - others()), len("CLIENT"))
    return widths


def _row(pool: Mapping[str, int | str]) -> dict[str, str]:
    data, memory = int(pool["pages"]) * PAGE_SIZE, int(pool["bytes"])
    gets, hits = int(pool["gets"]), int(pool["gets_hit"])
    return {
        "POOL": str(pool["id"]),
        "TYPE": "shared" if pool["shared"] else str(pool["type"]),
        "PAGES": str(pool["pages"]),
        "DATA": format_size(data),
        "MEMORY": format_size(memory),
        "RATIO": f"{data / memory:.2f}" if memory else "-",
        "PUTS": str(pool["puts"]),
        "REFUSED": str(pool["puts_refused"]),
        "GETS": str(gets),
        "HIT%": f"{100 * hits / gets:.1f}" if gets else "-",
        "EVICTED": str(pool["evictions"]),
        "CORRUPT": str(pool["corrupt_pages"]),
    }


def _show_counts(state: Mapping[str, object]) -> None:
    """Print every value under the name that it has in the JSON form."""
    memory, timing, clients = state["memory"], state["timing"], state["clients"]
    assert isinstance(memory, dict)
    assert isinstance(timing, dict)
    assert isinstance(clients, list)
    _show_values("memory", memory)
    manager = state["manager"]
    assert isinstance(manager, dict)
    if manager:
        _show_values("manager", manager)
    click.echo()
    _show_timing(timing)
    for client in clients:
        _show_values(f"client {client['name']}", client)
        _show_timing(client["timing"])
        for pool in client["pools"]:
            _show_values(f"client {client['name']}, pool {pool['id']}", pool)


def _show_timing(timing: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each kind of operation."""
    plain = [field.name for field in fields(Timing) if field.name != "buckets"]
    lines = []
    for name, values in timing.items():
        one = Timing(**values)
        line = {"timing": name, **{heading: str(values[heading]) for heading in plain}}
        line["mean_ns"] = str(one.total_ns // max(one.samples, 1))
        for heading, share in (("p50_ns", 0.5), ("p99_ns", 0.99)):
            value = one.quantile_ns(share)
            line[heading] = "-" if value is None else f"{value:.0f}"
        lines.append(line)
    for text in drawn(lines, widths_of([*lines[0]], lines), ("timing",)):
        click.echo(text)


def _show_values(title: str, values: Mapping[str, object]) -> None:
    click.echo(f"\n{bold(title)}")
    lines = list(_lines(values))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        click.echo(f"  {name:<{width}}  {text}")


def _lines(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if name in ("pools", "timing"):
            continue  # these get parts of their own
        if isinstance(value, bool):
            yield name, "yes" if value else "no"
        elif isinstance(value, int) and name.endswith("_bytes"):
            yield name, f"{value} ({format_size(value)})" if value >= 1024 else str(value)
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value)) or "-"
        else:
            yield name, "-" if value is None else str(value)
