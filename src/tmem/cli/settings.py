"""The commands ``set`` and ``authorise``: the values of a client, and the shared pools that it may use.

They change the segment itself, so they work while no manager runs. Not for modes (`tmem.cli.control`).
"""

import uuid
from typing import TYPE_CHECKING

import click

from tmem.backends import tiering
from tmem.backends.clients import change
from tmem.backends.paths import SegmentPaths, check_name
from tmem.cli.clients import attached, find_client, warn_of_tier
from tmem.cli.context import client_names, segment_name, size_option, tier_option
from tmem.errors import PoolError
from tmem.types import CODECS, MOST_WEIGHT, format_size

if TYPE_CHECKING:
    from tmem.backends import _native

# Sizes of the core have 64 bits, and nobody means more than a tenth of that.
_MOST_BYTES = 1 << 60


@click.command("set")
@click.argument("client", shell_complete=client_names)
@click.option(
    "--weight",
    type=click.IntRange(0, MOST_WEIGHT),
    help="Its share of the ephemeral memory under contention, in proportion to the others' (100 at first).",
)
@click.option("--cap", metavar="SIZE", callback=size_option, help="The most that its pages take; 0: no cap.")
@click.option("--floor", metavar="SIZE", callback=size_option, help="What nobody else may take from it.")
@click.option("--compress", type=click.Choice(CODECS), help="How its pages are compressed from now on.")
@click.option("--dedup/--no-dedup", default=None, help="Keep equal pages once, or not any more.")
@click.option(
    "--tier",
    callback=tier_option,
    metavar="URL",
    help="Where its cold pages go when memory is short: a file or directory; none: back to memory.",
)
@click.option("--tier-size", metavar="SIZE", callback=size_option, help="Size of that file.")
@click.pass_context
def set_command(
    ctx: click.Context,
    client: str,
    weight: int | None,
    cap: int | None,
    floor: int | None,
    compress: str | None,
    dedup: bool | None,
    tier: str | None,
    tier_size: int | None,
) -> None:
    """Set values of CLIENT: all that are given, or if one is refused none."""
    given = {
        "weight": weight,
        "cap_bytes": cap,
        "floor_bytes": floor,
        "compress": compress,
        "dedup": dedup,
    }
    values = {name: value for name, value in given.items() if value is not None}
    if not values and tier is None:
        raise click.UsageError("say what to set: --weight, --cap, --floor, --compress, --dedup or --tier")
    if tier_size is not None and tier in (None, "none"):
        raise click.UsageError("--tier-size goes with --tier")
    for value in values.values():
        if isinstance(value, int) and value > _MOST_BYTES:
            raise click.UsageError(f"{format_size(value)} is more than any segment has: use 0 for no cap")
    with attached(ctx) as opened:
        found = find_client(opened, client)
        if values:
            change(opened, found, values)
        if tier is not None:
            _set_tier(SegmentPaths.of(segment_name(ctx)), opened, found, tier, tier_size)


def _set_tier(
    paths: SegmentPaths, opened: "_native.Segment", client: "_native.Client", url: str, size_bytes: int | None
) -> None:
    if url == "none":
        tiering.withdraw(paths, opened, client)
        return
    has = tiering.of(paths, client) == url
    if size_bytes is None and "size=" not in url and url.startswith(("/", "file:")) and not has:
        raise click.UsageError("say how large the file is to be: --tier-size SIZE, or PATH?size=SIZE")
    tiering.assign(paths, opened, client, url, size_bytes or 0)
    warn_of_tier(paths, opened, client.name, local=False)


@click.command()
@click.argument("client", shell_complete=client_names)
@click.argument("pool", metavar="UUID")
@click.option("--revoke", is_flag=True, help="Withdraw it; the client leaves the pool if it shares it.")
@click.option("--create", is_flag=True, help="Make the client if it is not there yet.")
@click.pass_context
def authorise(ctx: click.Context, client: str, pool: str, revoke: bool, create: bool) -> None:
    """Allow CLIENT to share the ephemeral pool that is called UUID; nobody may without.

    Clients come to be with 'tmem swap add' and 'tmem mount'. To allow one before that, use --create; a
    mount's client is named by its option client=NAME, else after its mount point: mnt-data for /mnt/data.
    """
    if revoke and create:
        raise click.UsageError("give either --revoke or --create")
    key = _uuid_bytes(pool)
    if create:
        check_name(client, "client name")
    with attached(ctx) as opened:
        try:
            found = find_client(opened, client)
        except PoolError as error:
            if not create:
                hint = "" if revoke else f", or make it now with 'tmem authorise {client} {pool} --create'"
                raise PoolError(f"{error}{hint}") from None
            found = opened.client(client)
        if not revoke:
            found.authorise(key)
        elif not found.revoke(key):
            raise PoolError(
                f"{client} was not allowed to share {uuid.UUID(bytes=key)}: "
                f"'tmem --name {segment_name(ctx)} list --long {client}' shows what it may"
            )


def _uuid_bytes(text: str) -> bytes:
    """Return the 16 bytes of a UUID in any spelling that `uuid.UUID` takes; a usage error for no UUID."""
    try:
        key = uuid.UUID(text).bytes
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no UUID: write 32 hexadecimal digits, such as 6c1f0b2e-54a4-4c63-8a5e-0f7e9d1c2b3a",
            param_hint="UUID",
        ) from None
    if key in (bytes(16), b"\xff" * 16):
        raise click.BadParameter("all zeros and all ones stand for no pool", param_hint="UUID")
    return key
