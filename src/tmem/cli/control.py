"""The commands ``freeze``, ``thaw``, ``off``, ``on`` and ``flush``: what clients may do, and memory back.

They change the segment itself, so they work while no manager runs, and are in force when they return. A
client and the whole segment have a mode each, and the stricter one counts: ``--all`` sets the segment's and
leaves those of clients alone. Not for values of a client (`tmem.cli.settings`) nor for its end
(`tmem.cli.service`). What is done already is no failure; what keeps a command from its aim is.
"""

from typing import TYPE_CHECKING

import click

from tmem.cli.clients import attached, client_or_all, departed_error, find_client, require_one
from tmem.cli.context import size_option
from tmem.errors import PoolError
from tmem.types import format_size

if TYPE_CHECKING:
    from tmem.backends import _native

MODES = ("on", "frozen", "off")
"""The modes, the least strict first."""


@click.command()
@client_or_all("The whole segment.")
@click.pass_context
def freeze(ctx: click.Context, client: str | None, everything: bool) -> None:
    """Refuse new pages of CLIENT, or with --all of everybody.

    Pages that are there can be got and flushed as before. A swap device that is frozen answers writes with
    ENOSPC, and its reads go on.
    """
    _restrict(ctx, client, everything, "frozen")


@click.command()
@client_or_all("The whole segment.")
@click.pass_context
def off(ctx: click.Context, client: str | None, everything: bool) -> None:
    """Freeze CLIENT, or with --all everybody, and drop the ephemeral pages.

    Mounts go on without their precache. Persistent pages stay, and can be got and flushed.
    """
    _restrict(ctx, client, everything, "off")


@click.command()
@client_or_all("The whole segment. Clients that were frozen by name stay frozen.")
@click.option("--force", is_flag=True, help="Take back a client that departed in a handoff.")
@click.pass_context
def thaw(ctx: click.Context, client: str | None, everything: bool, force: bool) -> None:
    """End the freeze of CLIENT, or with --all that of the segment.

    Does nothing to what is off: see 'tmem on'.
    """
    if force and everything:
        raise click.UsageError("--force goes with a client")
    _release(ctx, client, everything, "thaw", force)


@click.command()
@client_or_all("The whole segment. Clients that are off or frozen by name stay so.")
@click.pass_context
def on(ctx: click.Context, client: str | None, everything: bool) -> None:
    """Let CLIENT, or with --all everybody, do everything again, after 'tmem off' or 'tmem freeze'."""
    _release(ctx, client, everything, "on", force=False)


@click.command()
@client_or_all("The ephemeral pages of everybody.")
@click.option("--size", metavar="SIZE", callback=size_option, help="Only so much, such as 512M.")
@click.option("--bytes", "exact", is_flag=True, help="Print what the system got as a plain number of bytes.")
@click.pass_context
def flush(ctx: click.Context, client: str | None, everything: bool, size: int | None, exact: bool) -> None:
    """Evict ephemeral pages of CLIENT, or with --all of everybody, and give the memory to the system.

    Persistent pages stay. The memory that the manager keeps ready for the next puts stays with the segment.
    """
    require_one(client, everything)
    from tmem.backends.manager import Reserve  # not above: it brings trio

    with attached(ctx) as opened:
        most = opened.memory_bytes
        wanted = most if size is None else min(size, most)
        before = opened.statistics()["trimmed_bytes"]
        evicted = (opened if client is None else find_client(opened, client)).evict(wanted)
        # The core itself trims while much is freed.
        now = opened.statistics()
        missing = max(0, wanted - (now["trimmed_bytes"] - before))
        opened.trim(max(Reserve(most).size_bytes, now["reserve_bytes"] - missing))
        returned = opened.statistics()["trimmed_bytes"] - before
    if exact:
        click.echo(str(returned))
    else:
        click.echo(f"{format_size(evicted)} evicted, {format_size(returned)} given back to the system")


def _restrict(ctx: click.Context, name: str | None, everything: bool, mode: str) -> None:
    """Make the mode of a client or the segment at least as strict as `mode`."""
    require_one(name, everything)
    with attached(ctx) as opened:
        target = opened if name is None else find_client(opened, name)
        if MODES.index(target.mode) > MODES.index(mode):
            _note(f"{_called(name)} is {target.mode} already, which is more: nothing changed")
        else:
            target.mode = mode


def _release(ctx: click.Context, name: str | None, everything: bool, verb: str, force: bool) -> None:
    """Bring the mode of a client or the segment back to "on"."""
    require_one(name, everything)
    with attached(ctx) as opened:
        if name is None:
            _check_off(opened, name, verb)
            opened.mode = "on"
            if rest := [f"{one.name} ({one.mode})" for one in opened.clients() if one.mode != "on"]:
                _note(f"these are restricted by name, and stay so: {', '.join(sorted(rest))}")
            return
        client = find_client(opened, name)
        if client.phase == "departed":
            _take_back(client, force)
        _check_off(client, name, verb)
        client.mode = "on"
        if opened.mode != "on":
            undo = {"frozen": "thaw", "off": "on"}[opened.mode]
            _note(f"the segment is {opened.mode}, and so {name} still is: see 'tmem {undo} --all'")


def _check_off(target: "_native.Segment | _native.Client", name: str | None, verb: str) -> None:
    if verb == "thaw" and target.mode == "off":
        raise PoolError(f"{_called(name)} is off, not frozen: use 'tmem on {name or '--all'}'")


def _take_back(client: "_native.Client", force: bool) -> None:
    """End a handoff whose sender has died or lost its answer; PoolError unless the operator insists."""
    if not force:
        raise departed_error(client)
    client.handoff("end")


def _called(name: str | None) -> str:
    return "the segment" if name is None else name


def _note(text: str) -> None:
    click.echo(f"tmem: {text}", err=True)
