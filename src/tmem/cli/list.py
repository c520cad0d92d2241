"""The commands ``list`` and ``freeable``: what is in the segment.

They read the segment itself, so they work while no manager runs. The JSON form is the contract with scripts:
every statistic of the core under its name, units in the names. Not for live views.
"""

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from tmem.backends import segment, service
from tmem.backends.paths import SegmentPaths
from tmem.backends.statistics import ClientStatistics, PoolStatistics, SegmentStatistics
from tmem.cli.context import segment_name
from tmem.errors import PoolError, ServiceError
from tmem.types import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from tmem.backends import _native

# Wide enough that a pipe sees every column in full.
_PIPE_COLUMNS = 200


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Everything that is counted, for programs.")
@click.pass_context
def list_command(ctx: click.Context, as_json: bool) -> None:
    """Show the memory of the segment, its clients and their pools."""
    paths = SegmentPaths.of(segment_name(ctx))
    with closing(segment.attach(paths.name)) as opened:
        state = describe(paths, opened)
    if as_json:
        click.echo(json.dumps(state, indent=2))
    else:
        _show(state)


@click.command()
@click.option("--bytes", "exact", is_flag=True, help="As a plain number of bytes.")
@click.pass_context
def freeable(ctx: click.Context, exact: bool) -> None:
    """Print the memory that is free or held by ephemeral pages, which give way to persistent ones."""
    with closing(segment.attach(segment_name(ctx))) as opened:
        size = opened.freeable_bytes()
    click.echo(str(size) if exact else format_size(size))


def describe(paths: SegmentPaths, opened: "_native.Segment") -> dict[str, object]:
    """Return the state of the segment in the shape of ``list --json``."""
    memory = asdict(SegmentStatistics.from_dict(opened.statistics()))
    memory["freeable_bytes"] = opened.freeable_bytes()
    clients = []
    for client in sorted(opened.clients(), key=lambda client: client.name):
        try:
            clients.append(_client(client))
        except PoolError:
            continue  # it ended while we looked
    return {
        "name": paths.name,
        "path": opened.path,
        "manager_pid": _manager_pid(paths),
        "memory": memory,
        "clients": clients,
    }


def _client(client: "_native.Client") -> dict[str, object]:
    counts = asdict(ClientStatistics.from_dict(client.statistics()))
    del counts["pools"]  # the number; the pools themselves follow
    pools = []
    for pool in client.pools():
        values = asdict(PoolStatistics.from_dict(pool.statistics()))
        kind = "persistent" if values.pop("persistent") else "ephemeral"
        pools.append({"id": values.pop("id"), "type": kind, "shared": False, **values})
    return {"name": client.name, **counts, "pools": pools}


def _manager_pid(paths: SegmentPaths) -> int | None:
    try:
        pid = service.request(paths, {"op": "ping"}, timeout_s=2)["pid"]
    except ServiceError:
        return None
    return pid if isinstance(pid, int) else None


def _show(state: Mapping[str, object]) -> None:
    """Print `state` for a person."""
    from rich.console import Console
    from rich.table import Table

    memory, clients = state["memory"], state["clients"]
    assert isinstance(memory, dict)
    assert isinstance(clients, list)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_COLUMNS)
    pid = state["manager_pid"]
    sizes = {name: format_size(value) for name, value in memory.items() if name.endswith("_bytes")}
    console.print(
        f"segment {state['name']}: {sizes['used_bytes']} of {sizes['memory_bytes']} used "
        f"({sizes['metadata_bytes']} for tables), {sizes['reserve_bytes']} in reserve, "
        f"{sizes['freeable_bytes']} freeable, {'no manager runs' if pid is None else f'manager pid {pid}'}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("CLIENT", "POOL", "TYPE"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "PAGES",
        "DATA",
        "MEMORY",
        "RATIO",
        "PUTS",
        "REFUSED",
        "GETS",
        "HIT%",
        "EVICTED",
        "CORRUPT",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for client in clients:
        for pool in client["pools"]:
            table.add_row(client["name"], *_row(pool))
        if not client["pools"]:
            table.add_row(client["name"], "-")
    console.print(table if clients else "no clients yet: add one with 'tmem swap add' or 'tmem mount'")


def _row(pool: Mapping[str, int | str]) -> list[str]:
    data, memory = int(pool["pages"]) * PAGE_SIZE, int(pool["bytes"])
    gets, hits = int(pool["gets"]), int(pool["gets_hit"])
    return [
        str(pool["id"]),
        str(pool["type"]),
        str(pool["pages"]),
        format_size(data),
        format_size(memory),
        f"{data / memory:.2f}" if memory else "-",
        str(pool["puts"]),
        str(pool["puts_refused"]),
        str(gets),
        f"{100 * hits / gets:.1f}" if gets else "-",
        str(pool["evictions"]),
        str(pool["corrupt_pages"]),
    ]
