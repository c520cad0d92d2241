"""The commands ``swap add``, ``swap remove`` and ``swap serve``, and ``shrink``.

They turn options into an `Export` and print; the work is done in `tmem.nbd`: `lifecycle`, `server`,
`shrink`, `repatriate`. What programs read goes to standard output, the NBD URI as the last line; the guards
of a local device and progress go to standard error.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tmem.backends.paths import SegmentPaths
from tmem.cli.configured import ConfiguredCommand, explicit
from tmem.cli.context import address_option, client_names, segment_name, size_option, tier_option
from tmem.errors import TmemError
from tmem.types import PAGE_SIZE, format_size, parse_host_port

if TYPE_CHECKING:
    from tmem.nbd.guards import Guard

_COLOURS = {"on": "green", "partial": "yellow", "missing": "red", "unknown": "yellow"}


@click.group()
def swap() -> None:
    """Make and remove swap devices."""


@swap.command(cls=ConfiguredCommand, section="swap", per_client=True)
@click.argument("client", shell_complete=client_names)
@click.option("--size", "size_bytes", required=True, callback=size_option, help="Such as 512M or 4G.")
@click.option("--attach", "local", is_flag=True, help="Attach it here as a block device, and swap to it.")
@click.option("--reserve", is_flag=True, help="Promise it room for all of its pages, even uncompressed.")
@click.option("--unix", metavar="PATH", help="Serve on this socket (default: one of its own).")
@click.option("--tcp", metavar="HOST:PORT", callback=address_option, help="Serve on this address.")
@click.option("--tls-psk", metavar="FILE", help="Encrypt TCP with the pre-shared keys in FILE.")
@click.option(
    "--tier",
    metavar="URL",
    callback=tier_option,
    help="Where cold pages go: a file, a directory, servers.",
)
@click.option("--priority", type=click.IntRange(-1, 32767), help="Priority as swap; higher goes first.")
@click.option("--discard/--no-discard", default=True, help="Hear of freed pages (default).")
@click.option("--realtime", is_flag=True, help="Run the server under SCHED_RR.")
@click.option("--force", is_flag=True, help="Attach although the machine may hang under memory pressure.")
@click.pass_context
def add(
    ctx: click.Context,
    client: str,
    size_bytes: int,
    local: bool,
    reserve: bool,
    unix: str | None,
    tcp: str | None,
    tls_psk: str | None,
    tier: str | None,
    priority: int | None,
    discard: bool,
    realtime: bool,
    force: bool,
) -> None:
    """Make a swap device for CLIENT and serve it; print its NBD URI once it answers."""
    # What stands in the configuration gives way, and defaults are about the devices that they can be about.
    if unix is not None and tcp is not None and explicit(ctx, "unix") != explicit(ctx, "tcp"):
        unix, tcp = (unix, None) if explicit(ctx, "unix") else (None, tcp)
    if unix is not None and tcp is not None:
        raise click.UsageError("give either --unix or --tcp")
    if tcp is None and not explicit(ctx, "tls_psk"):
        tls_psk = None
    if not local and not explicit(ctx, "priority"):
        priority = None
    if tls_psk is not None and tcp is None:
        raise click.UsageError("--tls-psk goes with --tcp")
    if tcp is not None and local:
        raise click.UsageError("a device of this machine is for nobody else: leave out --tcp or --attach")
    if not local and (priority is not None or force):
        raise click.UsageError("--priority and --force go with --attach")
    # Imported here so that `tmem --help` stays quick.
    from tmem.backends.paths import check_name
    from tmem.nbd import lifecycle
    from tmem.nbd.export import Export

    paths = SegmentPaths.of(segment_name(ctx))
    check_name(client, "client name")
    socket = str(Path(unix).absolute()) if unix is not None else lifecycle.default_socket(paths, client)
    with _tier(paths, client, tier, size_bytes, local):
        made = lifecycle.add(
            paths,
            Export(
                client,
                size_bytes,
                unix=socket if tcp is None else None,
                tcp=parse_host_port(tcp) if tcp is not None else None,
                tls_psk=str(Path(tls_psk).absolute()) if tls_psk is not None else None,
                tls_user=_first_user(Path(tls_psk)) if tls_psk is not None else None,
                reserve=reserve,
                realtime=realtime,
            ),
            lifecycle.SwapOptions(priority, discard, force) if local else None,
            _show_guards,
        )
    if local and made.attachment is not None:
        click.echo(made.attachment.device)
    click.echo(made.uri)


@contextmanager
def _tier(paths: SegmentPaths, client: str, url: str | None, size_bytes: int, local: bool) -> Iterator[None]:
    """Give the client its tier, if it is to have one; take it away again if what comes then fails."""
    from tmem.backends import clients, segment, tiering
    from tmem.cli.clients import warn_of_tier

    if url is None:
        yield
        return
    with closing(segment.attach(paths.name)) as opened:
        owner = opened.client(client)
        had = tiering.of(paths, owner)
        assigned = False
        try:
            tiering.assign(paths, opened, owner, url, size_bytes)
            assigned = True
            warn_of_tier(paths, opened, client, local=local)
            yield
        except BaseException:
            if had is None:
                if assigned:  # else it may have another one, that somebody else has given it just now
                    tiering.withdraw(paths, opened, owner)
                clients.end_if_unused(owner)
            raise


@swap.command()
@click.argument("client", shell_complete=client_names)
@click.option("--force", is_flag=True, help="Also where RAM may not suffice: then processes may be killed.")
@click.pass_context
def remove(ctx: click.Context, client: str, force: bool) -> None:
    """Stop swapping to CLIENT's device, stop its server and drop its pages."""
    from tmem.nbd import lifecycle

    with _progress(f"swapoff {client}") as progress:
        # What has no room then is of programs that the shutdown is about to end as well.
        force = force or _shutting_down()
        lifecycle.remove(SegmentPaths.of(segment_name(ctx)), client, progress, force)


@swap.command()
@click.argument("client", shell_complete=client_names)
@click.pass_context
def serve(ctx: click.Context, client: str) -> None:
    """Serve CLIENT's device in the foreground, for service files; it must have been added."""
    from tmem.nbd import export, server

    paths = SegmentPaths.of(segment_name(ctx))
    server.serve(paths, export.load(paths, client))


@click.command()
@click.argument("client", shell_complete=client_names, required=False)
@click.option("--to", "to_bytes", metavar="SIZE", callback=size_option, help="Only if it has more pages.")
@click.option("--force", is_flag=True, help="Also where RAM may not suffice: then processes may be killed.")
@click.option(
    "--gently",
    is_flag=True,
    help="In small steps while memory is in plenty; without CLIENT every device.",
)
@click.option("--json", "as_json", is_flag=True, hidden=True, help="Say so for the manager, with --gently.")
@click.option(
    "--complete", is_flag=True, hidden=True, help="With --gently: only what was killed on the way before."
)
@click.pass_context
def shrink(
    ctx: click.Context,
    client: str | None,
    to_bytes: int | None,
    force: bool,
    gently: bool,
    as_json: bool,
    complete: bool,
) -> None:
    """Bring the pages of CLIENT, a swap device of this machine, back into RAM, and go on with it empty.

    The kernel keeps pages on a device for as long as nobody touches them, and those that were freed linger
    until it says so. This is a swapoff, which drops the latter too, and a swapon. SIZE counts the pages as
    they are without compression: DATA in 'tmem list'.

    With --gently the pages are first read in a few at a time, which the kernel can undo at once, and all of
    it stops as soon as somebody needs memory: 'tmem start --repatriate TIME' has the manager do so.
    """
    from tmem.nbd import shrink as shrinking

    if gently:
        if force or to_bytes is not None:
            raise click.UsageError("--gently goes without --force and --to")
        _shrink_gently(ctx, client, as_json, complete)
        return
    if client is None:
        raise click.UsageError("name a CLIENT, or say --gently for every device of this machine")
    with _progress(f"swapoff {client}") as progress:
        done = shrinking.shrink(SegmentPaths.of(segment_name(ctx)), client, to_bytes, force, progress)
    if done.pages == done.pages_before and to_bytes is not None:
        click.echo(f"nothing to do: {client} has {format_size(done.pages * PAGE_SIZE)} of pages")
        return
    before, now = (format_size(pages * PAGE_SIZE) for pages in (done.pages_before, done.pages))
    click.echo(
        f"{format_size(done.returned_bytes)} came back into RAM; {client} has {now} of pages, not {before}"
    )


def _shrink_gently(ctx: click.Context, client: str | None, as_json: bool, complete: bool) -> None:
    from tmem.nbd import repatriate

    with suppress(PermissionError):
        # Of a manager under SCHED_RR a process inherits that, and swapoff with it.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.nice(19)
    done = repatriate.repatriate(SegmentPaths.of(segment_name(ctx)), client, only_complete=complete)
    if as_json:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu_s = sum(one.ru_utime + one.ru_stime for one in used)
        click.echo(json.dumps(asdict(done) | {"cpu_ns": int(cpu_s * 1e9)}))
        return
    dropped = format_size(done.dropped_pages * PAGE_SIZE)
    click.echo(f"{format_size(done.returned_bytes)} came back into RAM; the pool has {dropped} of pages less")
    if done.stopped:
        raise TmemError(f"stopped: {done.stopped}")


def _shutting_down() -> bool:
    """Say whether systemd is shutting this machine down."""
    if not Path("/run/systemd/system").is_dir():
        return False
    state = subprocess.run(
        ["systemctl", "is-system-running"], capture_output=True, text=True, check=False
    ).stdout
    return state.strip() == "stopping"


def _show_guards(guards: "Sequence[Guard]") -> None:
    width = max(len(guard.name) for guard in guards)
    for guard in guards:
        state = click.style(f"{guard.state:<7}", fg=_COLOURS[guard.state])
        click.echo(f"{state}  {guard.name:<{width}}  {guard.why}", err=True)
        if guard.remedy:
            click.echo(f"{'':<7}  {'':<{width}}  -> {guard.remedy}", err=True)


def _first_user(path: Path) -> str:
    """Return the first user in a file of pre-shared keys (lines ``user:key``): the URI names one."""
    try:
        line = path.read_text(encoding="utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError):
        raise TmemError(
            f"the file of pre-shared keys {path} cannot be read: make one with psktool (gnutls-bin)"
        ) from None
    user, colon, key = line.partition(":")
    if not (user and colon and key):
        raise TmemError(f"{path} does not begin with a line USER:KEY: make one with psktool (gnutls-bin)")
    return user


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int], None]]:
    """Show how much is left to bring back; nothing where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None, visible=False)
        most = 0

        def update(left_bytes: int) -> None:
            nonlocal most
            most = max(most, left_bytes)
            bar.update(task, total=most, completed=most - left_bytes, visible=most > 0)

        yield update
