"""``tmem mount`` and ``tmem umount``, and the helper behind ``mount -t fuse.tmem``.

Not for the mount itself: `tmem.fs.mount`. The file system is imported when a command runs, so that its help
costs nothing.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

import click

from tmem.backends.paths import SegmentPaths
from tmem.cli.configured import configuration
from tmem.cli.context import segment_name, warn_of_password
from tmem.errors import AttachError

_OPTIONS_HELP = (
    "Mount options, comma-separated: client=NAME, shared=UUID, cache=auto|direct|kernel, "
    "loop=auto|native|fast|plain, io_uring=off|on, timeout=SECONDS, watch=auto|off, "
    "cache_files=PATTERN:..., skip_files=PATTERN:..., least_size=SIZE, most_size=SIZE, read_ahead=SIZE, "
    "step_aside=auto|never, allow_other, ro, noexec and others of mount(8)."
)


@click.command(options_metavar="[OPTIONS]")
@click.argument("places", nargs=-1, type=click.Path(), metavar="LOWER MOUNTPOINT")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help=_OPTIONS_HELP)
@click.option("-f", "--foreground", is_flag=True, help="Serve the mount in the foreground.")
@click.option(
    "--restart",
    is_flag=True,
    help="Have the daemons of the given MOUNTPOINTs go on with the code that is installed now.",
)
@click.option("--all", "everything", is_flag=True, help="With --restart: of all mounts.")
@click.pass_context
def mount(
    ctx: click.Context,
    places: tuple[str, ...],
    options: tuple[str, ...],
    foreground: bool,
    restart: bool,
    everything: bool,
) -> int:
    """Mount LOWER on MOUNTPOINT through the precache; comes back when the mount answers.

    After an upgrade, 'tmem mount --restart MOUNTPOINT...' (or --restart --all) replaces the code of daemons
    while files are open: programs that use them wait for a moment. Where the new code cannot take over, the
    old one goes on.
    """
    if restart:
        if options or foreground or bool(places) == everything:
            raise click.UsageError("--restart takes mount points, or --all, and nothing else")
        return _restart(places)
    if everything or len(places) != 2:
        raise click.UsageError("name two directories: LOWER and MOUNTPOINT")
    from tmem.fs import mount as life
    from tmem.fs import uring
    from tmem.fs.options import MountOptions, Uring

    for word in ",".join(options).split(","):
        if word.startswith("tier="):
            warn_of_password(word)
    lower, mountpoint = places
    paths = SegmentPaths.of(segment_name(ctx))
    configured = configuration(ctx).section(paths.name, "mount").get("options", [])
    assert isinstance(configured, list)
    parsed = MountOptions.parse([*configured, *options], mountpoint)
    if not foreground and parsed.io_uring is Uring.ON and (why := uring.lacking()):
        click.echo(f"tmem: requests do not come over io_uring: {why}", err=True)
    if foreground:
        life.run(lower, mountpoint, parsed, paths)
    else:
        life.daemonise(lower, mountpoint, parsed, paths)
    return 0


def _restart(places: tuple[str, ...]) -> int:
    """Restart the daemons of `places` (none: of all mounts), one after the other; the exit status."""
    from tmem.fs import mounts

    failed = False
    for place in places or dict.fromkeys(
        mount.mountpoint for mount in mounts.mounts() if mount.kind == mounts.KIND
    ):
        try:
            pause_ms = mounts.restart(place).pause_ns / 1e6
            click.echo(f"{place}: restarted, requests waited {pause_ms:.0f} ms")
        except AttachError as error:  # the others are none the worse
            click.echo(f"tmem: {error}", err=True)
            failed = True
    return int(failed)


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
    from tmem.cli.main import enter_group, run

    enter_group()
    arguments = sys.argv[1:]
    options = [word for at in _values(arguments, "-o") for word in at.split(",")]
    if "remount" in options:
        sys.exit("tmem: a mount cannot be remounted: unmount it, then mount it again")
    if any(set(argument) <= set("-sfnv") and "f" in argument for argument in arguments):
        sys.exit(0)  # mount(8) only wants to know whether we are there
    sys.exit(run(helper_arguments(arguments)))


def _values(arguments: Sequence[str], option: str) -> Iterator[str]:
    return (value for at, value in pairwise(arguments) if at == option)
