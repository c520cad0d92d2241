"""What the commands share: the segment's name from the group, and sizes as option values.

Not for output. Imported by every command, so it imports nothing heavy itself.
"""

import click

from tmem.errors import TmemError
from tmem.types import SizeRange, parse_range, parse_size


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


def segment_name(ctx: click.Context) -> str:
    """Return the name of the segment that this command line is about."""
    name = ctx.obj["name"]
    assert isinstance(name, str)
    return name
