"""``tmem mount`` and ``tmem umount``, and the helper behind ``mount -t fuse.tmem``.

Not for the mount itself: `tmem.fs.mount`. The file system is imported when a command runs, so that its help
costs nothing.
"""

import sys
from collections.abc import Sequence

import click

from tmem.backends.paths import SegmentPaths
from tmem.cli.context import segment_name

_OPTIONS_HELP = (
    "Mount options, comma-separated: client=NAME, shared=UUID, cache=auto|direct|kernel, "
    "loop=auto|fast|plain, timeout=SECONDS, allow_other, ro, noexec and others of mount(8)."
)


@click.command()
@click.argument("lower", type=click.Path())
@click.argument("mountpoint", type=click.Path())
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help=_OPTIONS_HELP)
@click.option("-f", "--foreground", is_flag=True, help="Serve the mount in the foreground.")
@click.pass_context
def mount(
    ctx: click.Context, lower: str, mountpoint: str, options: tuple[str, ...], foreground: bool
) -> None:
    """Mount LOWER on MOUNTPOINT through the precache; comes back when the mount answers."""
    from tmem.fs import mount as life
    from tmem.fs.options import MountOptions

    paths = SegmentPaths.of(segment_name(ctx))
    parsed = MountOptions.parse(options, mountpoint)
    if foreground:
        life.run(lower, mountpoint, parsed, paths)
    else:
        life.daemonise(lower, mountpoint, parsed, paths)


@click.command()
@click.argument("mountpoint", type=click.Path())
@click.option("-l", "--lazy", is_flag=True, help="Unmount although files are open; they stay readable.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT, drop its pool and wait for its daemon to end."""
    from tmem.fs import mounts

    mounts.umount(mountpoint, lazily=lazy)


def helper_arguments(arguments: Sequence[str]) -> list[str]:
    """Turn mount(8)'s call of a helper (``LOWER MOUNTPOINT [-sfnv] [-o OPTIONS]``) into a ``tmem mount``
    line.

    The option ``name=SEGMENT`` selects the segment.
    """
    places: list[str] = []
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "-o":
            words += next(rest, "").split(",")
        elif argument in ("-t", "-N"):
            next(rest, None)
        elif not argument.startswith("-"):
            places.append(argument)
    group: list[str] = []
    for word in words:
        if word.startswith("name="):
            group = ["--name", word.removeprefix("name=")]
    options = [word for word in words if word and not word.startswith("name=")]
    return [*group, "mount", *places, *(["-o", ",".join(options)] if options else [])]


def helper() -> None:
    """Be ``/sbin/mount.fuse.tmem``."""
    from tmem.cli.main import run

    sys.exit(run(helper_arguments(sys.argv[1:])))
