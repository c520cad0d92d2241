"""The commands ``save``, ``restore``, ``handoff`` and ``receive``: clients out of a segment and into one.

They open what the command line names, show progress on standard error where that is a terminal, and print
what came of it. The work is done in `tmem.backends.save` and `tmem.backends.handoff`; a swap device moves
with its client by `tmem.nbd.moving`.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click

from tmem.backends import segment
from tmem.backends.paths import SegmentPaths, check_name
from tmem.cli.context import client_names, segment_name
from tmem.errors import SaveFileError, TmemError
from tmem.types import format_size

_REFRESH_S = 0.1


@click.command()
@click.argument("file")
@click.option("--client", "clients", multiple=True, help="Only this one (may be repeated). Default: all.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.pass_context
def save(ctx: click.Context, file: str, clients: tuple[str, ...], force: bool) -> None:
    """Write clients with their persistent pages to FILE, while they go on working ('-': standard output).

    Each client stands still for the last few milliseconds of its copy. Ephemeral pages are not saved.
    """
    from tmem.backends import interrupts, streams
    from tmem.backends import save as saving

    paths = SegmentPaths.of(segment_name(ctx))
    began = time.monotonic()
    with (
        closing(segment.attach(paths.name)) as store,
        interrupts.as_interrupt(),
        _progress("save") as watch,
    ):
        _lock_memory(paths)
        if file == "-":
            _refuse_terminal(sys.stdout.fileno(), "the pages would go to the terminal: redirect the output")
            done = saving.save(store, paths.name, sys.stdout.fileno(), clients, watch)
        else:
            with saving.target(Path(file), force) as descriptor:
                streams.past_the_cache(descriptor)
                done = saving.save(store, paths.name, descriptor, clients, watch)
    for one in done:
        click.echo(
            f"{one.name}: {one.pages} pages in {one.rounds} rounds, frozen for {one.frozen_s * 1000:.1f} ms",
            err=file == "-",
        )
    if file != "-":
        clients_saved = "1 client" if len(done) == 1 else f"{len(done)} clients"
        click.echo(f"{file}: {clients_saved}, {_rate(Path(file).stat().st_size, began)}")


@click.command()
@click.argument("file")
@click.option("--client", "clients", multiple=True, help="Only this one (may be repeated). Default: all.")
@click.option("--as", "called", metavar="NAME", help="Call the client NAME; only for a single one.")
@click.pass_context
def restore(ctx: click.Context, file: str, clients: tuple[str, ...], called: str | None) -> None:
    """Make the clients that 'tmem save' wrote to FILE ('-': standard input).

    They must not exist. All of them appear at the end, or none. A swap device is served again by 'tmem swap
    add' with its size.
    """
    from tmem.backends import interrupts
    from tmem.backends import save as saving

    if called is not None:
        check_name(called, "client name")
    name = segment_name(ctx)
    began = time.monotonic()
    with (
        _source(file) as (descriptor, source),
        closing(segment.attach(name)) as store,
        interrupts.as_interrupt(),
        _progress("restore") as watch,
    ):
        done = saving.restore(store, name, descriptor, source, clients, called, watch)
    what = ", ".join(done.clients) or "no clients"
    click.echo(f"{what}: {done.records} pages, {_rate(done.data_bytes, began)}")


@click.command()
@click.argument("client", shell_complete=client_names)
@click.option("--to", "target", metavar="NAME", help="Another segment on this machine.")
@click.option("--through", metavar="COMMAND", help="Runs 'tmem receive' elsewhere: 'ssh HOST tmem receive'.")
@click.pass_context
def handoff(ctx: click.Context, client: str, target: str | None, through: str | None) -> None:
    """Hand CLIENT over to another segment while it works; then it lives there, and here no more.

    Requests to its swap device wait for the last few milliseconds; then its server here ends, so clients
    reconnect, to the server there. With --to that is started at once, on the same address.
    """
    from tmem.backends import handoff as handing
    from tmem.backends import interrupts
    from tmem.backends import save as saving
    from tmem.nbd import moving

    paths = SegmentPaths.of(segment_name(ctx))
    if (target is None) == (through is None):
        raise click.UsageError("give either --to or --through")
    if target == paths.name:
        raise click.UsageError(f"{client} is in segment {target} already")
    if target is not None:
        there = SegmentPaths.of(target)
        argv = [sys.executable, "-P", "-m", "tmem", "--name", there.name, "receive"]
    else:
        there = None
        try:
            argv = shlex.split(through or "")
        except ValueError as error:
            raise click.UsageError(f"the command for --through is no command line: {error}") from None
        if not argv:
            raise click.UsageError("the command for --through is empty")
    with closing(segment.attach(paths.name)) as store, moving.device_of(paths, client, there) as device:
        saving.choose(store, paths.name, [client])  # before there is a receiver, which would complain as well
        with (
            interrupts.as_interrupt(),
            _progress("handoff") as watch,
            handing.receiver(argv, own_group=target is not None) as (answers, stream),
        ):
            done = handing.send(store, paths.name, client, answers, stream, watch)
        click.echo(
            f"{client}: {done.pages} pages in {done.rounds} rounds, it stood still for "
            f"{done.frozen_s * 1000:.1f} ms"
        )
        if device is not None:
            moving.leave(paths, device)
            click.echo(moving.arrive(there, device))


@click.command()
@click.pass_context
def receive(ctx: click.Context) -> None:
    """Take a client from 'tmem handoff': run by that, its stream on standard input."""
    from tmem.backends import handoff as handing
    from tmem.backends import interrupts

    name = segment_name(ctx)
    _refuse_terminal(sys.stdin.fileno(), "this is run by 'tmem handoff --through', not by hand")
    # Whatever else writes to standard output must not get into the answers.
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        with interrupts.as_interrupt():
            handing.receive(lambda: segment.attach(name), name, sys.stdin.fileno(), answers)
    except handing.ToldError:
        ctx.exit(1)  # the sender says it, to whoever asked
    finally:
        os.close(answers)


@contextmanager
def _source(file: str) -> Iterator[tuple[int, str]]:
    """Open a save file; yield its descriptor and what to call it."""
    if file == "-":
        _refuse_terminal(sys.stdin.fileno(), "no save file comes from a terminal: redirect the input")
        yield sys.stdin.fileno(), "standard input"
        return
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SaveFileError(
            f"{file} cannot be read ({error.strerror}): give a file that 'tmem save' has written"
        ) from error
    try:
        if Path(file).is_dir():
            raise SaveFileError(f"{file} is a directory: give the save file in it")
        yield descriptor, file
    finally:
        os.close(descriptor)


def _refuse_terminal(descriptor: int, reason: str) -> None:
    if os.isatty(descriptor):
        raise click.UsageError(reason)


def _lock_memory(paths: SegmentPaths) -> None:
    """If this machine swaps to a device of the segment, keep this process out of it: we freeze it."""
    from tmem.backends import locking
    from tmem.nbd import export

    try:
        local = any(found.attachment is not None for found in export.load_all(paths))
    except TmemError:
        local = True  # a damaged record says nothing, and is no reason not to save
    if local:
        locking.lock_process(paths.segment, lock_segment=False)


def _rate(size_bytes: int, began: float) -> str:
    seconds = max(time.monotonic() - began, 1e-6)
    return f"{format_size(size_bytes)} in {seconds:.1f} s ({format_size(int(size_bytes / seconds))}/s)"


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show bytes and rate; nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done_bytes, all_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        shown = 0.0

        def update(done_bytes: int, all_bytes: int) -> None:
            nonlocal shown
            if (now := time.monotonic()) - shown >= _REFRESH_S:
                shown = now
                # Pages that changed on the way are copied more than once.
                bar.update(task, completed=done_bytes, total=max(done_bytes, all_bytes))

        yield update
