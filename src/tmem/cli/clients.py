"""Which client a command is about: the segment, the argument CLIENT, the option --all, and the look-up.

Not for changing anything. Imported by the commands that work on clients of a segment; a mapping is closed
when its command ends.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from tmem.backends import segment
from tmem.backends.clients import clients_by_name
from tmem.backends.paths import SegmentPaths
from tmem.cli.context import client_names, segment_name
from tmem.errors import PoolError

if TYPE_CHECKING:
    from tmem.backends import _native

_Command = TypeVar("_Command", bound=Callable[..., object])


@contextmanager
def attached(ctx: click.Context) -> Iterator["_native.Segment"]:
    """Attach the segment of this command line. Raises `SegmentError` as `segment.attach` does."""
    with closing(segment.attach(segment_name(ctx))) as opened:
        yield opened


def find_client(opened: "_native.Segment", name: str) -> "_native.Client":
    """Return the client called `name`; PoolError if there is none. Never creates one."""
    if (found := clients_by_name(opened).get(name)) is not None:
        return found
    raise PoolError(f"segment {Path(opened.path).name!r} has no client {name!r}: see 'tmem list'")


def departed_error(client: "_native.Client") -> PoolError:
    """Return what to say of a client whose handoff got no answer: only the operator can know who has it."""
    return PoolError(
        f"{client.name} has departed in a handoff, and must not live twice: if the other segment lists it, "
        f"end it here with 'tmem destroy {client.name} --force'; if not, take it back with "
        f"'tmem thaw {client.name} --force'"
    )


def state_of(client: "_native.Client", segment_mode: str) -> str:
    """Say in a word what a client may do, and else whether anybody serves it."""
    return state_word(client.phase, (segment_mode, client.mode), held=client.held)


def state_word(phase: str, modes: tuple[str, str], *, held: bool) -> str:
    """Return the word for a client's phase, the modes of segment and client, and whether it is served."""
    if phase != "none":
        return phase
    return next((mode for mode in ("off", "frozen") if mode in modes), "on" if held else "unserved")


def client_or_all(all_help: str) -> Callable[[_Command], _Command]:
    """Give a command the parameters `client` (a name or None) and `everything`; `require_one` checks them."""

    def decorate(command: _Command) -> _Command:
        command = click.option("--all", "everything", is_flag=True, help=all_help)(command)
        return click.argument("client", shell_complete=client_names, required=False)(command)

    return decorate


def require_one(client: str | None, everything: bool) -> None:
    """Raise the usage error unless exactly one of a client and ``--all`` was given."""
    if everything == (client is not None):
        raise click.UsageError("say which client, or --all")


def warn_of_tier(paths: SegmentPaths, opened: "_native.Segment", client: str, *, local: bool) -> None:
    """Say on standard error what speaks against the tier that the client has got, as 'tmem doctor' does.

    `local`: this machine is about to swap to the client's device."""
    from tmem.backends import tierchecks
    from tmem.nbd import guards

    swapped_to = [client] if local else guards.swapped_to(paths)
    for one in tierchecks.examine(paths, opened, swapped_to, only=client):
        if not one.well:
            click.echo(f"tmem: the tier of {client}: {one.detail}; {one.remedy}", err=True)
