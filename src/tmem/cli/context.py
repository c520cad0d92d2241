"""What the commands share: the segment's name from the group, and sizes as option values.

Not for output. Imported by every command, so it imports nothing heavy itself.
"""

from contextlib import closing

import click

from tmem.errors import TmemError
from tmem.types import SizeRange, parse_host_port, parse_range, parse_size, parse_time


def size_option(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Turn the value of an option such as ``--memory 512M`` into bytes (a click callback)."""
    try:
        return None if value is None else parse_size(value)
    except TmemError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def range_option(ctx: click.Context, param: click.Parameter, value: str | None) -> SizeRange | None:
    """Turn the value of an option such as ``--memory 1G..4G`` into bytes (a click callback)."""
    try:
        return None if value is None else parse_range(value)
    except TmemError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def address_option(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check the value of an option such as ``--tcp HOST:PORT`` (a click callback)."""
    try:
        if value is not None:
            parse_host_port(value)
    except TmemError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    return value


def address_or_off(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check the value of an option such as ``--metrics HOST:PORT``; ``off`` is none (a click callback)."""
    return address_option(ctx, param, None if value == "off" else value)


def time_or_off(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Turn the value of an option such as ``--tier-cold 1h`` into seconds; ``off``: 0 (a click callback)."""
    try:
        return None if value is None else 0 if value == "off" else parse_time(value)
    except TmemError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def warn_of_password(url: str) -> str:
    """Tell who writes a password on a command line that everybody can read it there; return `url`."""
    from tmem.backends.tiers.redis_url import RedisAddress

    if RedisAddress.shown(url) != url:
        click.echo(
            "tmem: everybody can read this password in 'ps': change it, and give the URL "
            "password_file=/PATH instead",
            err=True,
        )
    return url


def tier_option(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Look at the value of ``--tier`` (a click callback)."""
    return None if value is None else warn_of_password(value)


def client_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the clients that a shell may complete a word to; none where there is no segment."""
    from tmem.backends import segment
    from tmem.backends.clients import clients_by_name

    try:
        opened = segment.attach(str(ctx.find_root().params["name"]))
    except TmemError:
        return []
    with closing(opened):
        return sorted(name for name in clients_by_name(opened) if name.startswith(incomplete))


def segment_name(ctx: click.Context) -> str:
    """Return the name of the segment that this command line is about."""
    name = ctx.obj["name"]
    assert isinstance(name, str)
    return name
