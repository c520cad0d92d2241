"""The commands ``start``, ``stop`` and ``destroy``: the life of a segment and of its manager.

Not for swap devices and mounts, which have modules of their own and end before the segment does. Threading: a
command runs in the main thread of its process.
"""

import json
import logging
import os
import select
import sys
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import click

from tmem.backends import processes, segment, service
from tmem.backends.paths import SegmentPaths
from tmem.cli.clients import departed_error, find_client, require_one
from tmem.cli.context import segment_name, size_option
from tmem.errors import SegmentError, ServiceError, TmemError
from tmem.types import format_size

if TYPE_CHECKING:
    from tmem.backends import _native

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
# The core rounds a size to its chunks, so the same size asked for again may differ by this much.
_ROUNDING_BYTES = 4 << 20


@click.command()
@click.option(
    "--memory",
    metavar="SIZE",
    callback=size_option,
    help="Bound of the segment, such as 2G. Default: half of the RAM.",
)
@click.option("-d", "--detach", is_flag=True, help="Return as soon as the manager answers.")
@click.pass_context
def start(ctx: click.Context, memory: int | None, detach: bool) -> None:
    """Create the segment if absent, and run the manager service in the foreground."""
    paths = SegmentPaths.of(segment_name(ctx))
    opened = _open_segment(paths, memory)
    with closing(opened):
        size = format_size(opened.memory_bytes)
        if not detach:
            from tmem.backends import manager

            logging.basicConfig(level=logging.INFO, format="%(asctime)s tmem: %(message)s", stream=sys.stderr)
            manager.run(paths, opened)
            return
    pid, fresh = _start_detached(paths)
    state = "runs" if fresh else "runs already"
    click.echo(f"manager of segment {paths.name!r} ({size}) {state}, pid {pid}")


@click.command()
@click.pass_context
def stop(ctx: click.Context) -> None:
    """Stop the manager. Pages and servers stay; nobody restarts a server until a manager runs again."""
    _stop_manager(SegmentPaths.of(segment_name(ctx)))


@click.command()
@click.argument("client", required=False)
@click.option("--all", "everything", is_flag=True, help="The whole segment, and the manager with it.")
@click.option("--force", is_flag=True, help="End a client that departed in a handoff.")
@click.pass_context
def destroy(ctx: click.Context, client: str | None, everything: bool, force: bool) -> None:
    """End CLIENT, or with --all the whole segment, and every page of it.

    Swap devices and mounts have to be taken away first.
    """
    require_one(client, everything)
    if force and everything:
        raise click.UsageError("--force goes with a client")
    paths = SegmentPaths.of(segment_name(ctx))
    if client is not None:
        _destroy_client(paths, client, force)
        return
    _refuse_if_used(paths)
    with suppress(SegmentError), closing(segment.attach(paths.name)) as opened:  # damaged: nobody can use it
        for one in opened.clients():
            _refuse_if_held(opened, one)
    with suppress(ServiceError):  # no manager runs
        service.request(paths, {"op": "ping"})
        _stop_manager(paths)
    segment.destroy(paths.name)


def _open_segment(paths: SegmentPaths, memory: int | None) -> "_native.Segment":
    """Attach the segment, or create it if it is absent."""
    if not segment.exists(paths.name):
        return segment.create(paths.name, segment.default_memory_bytes() if memory is None else memory)
    opened = segment.attach(paths.name)
    if memory is not None and abs(opened.memory_bytes - memory) > _ROUNDING_BYTES:
        size = format_size(opened.memory_bytes)
        opened.close()
        raise TmemError(
            f"segment {paths.name!r} exists with {size}: leave out --memory, "
            f"or end it first with 'tmem --name {paths.name} destroy --all'"
        )
    segment.prepare_state_dir(paths)
    return opened


def _start_detached(paths: SegmentPaths) -> tuple[int, bool]:
    """Start the manager in a session of its own unless one runs; return its pid and whether it is new."""
    with suppress(ServiceError):
        return _ping(paths), False
    output = paths.state / "manager.log"
    argv = [sys.executable, "-P", "-m", "tmem", "--name", paths.name, "start"]
    child = processes.spawn(argv, os.environ, output)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(ServiceError):
            return _ping(paths), True
        if processes.reap(child) is not None:
            break
        time.sleep(0.02)
    raise ServiceError(
        processes.last_line(output).partition("tmem: ")[2] or f"the manager failed: see {output}"
    )


def _ping(paths: SegmentPaths) -> int:
    pid = service.request(paths, {"op": "ping"})["pid"]
    assert isinstance(pid, int)
    return pid


def _stop_manager(paths: SegmentPaths) -> None:
    """Stop the manager and wait until it has ended."""
    running = processes.Process.of(_ping(paths))
    descriptor = running.open_pidfd() if running else None
    if descriptor is None:
        return
    try:
        service.request(paths, {"op": "stop"})
        if not select.select([descriptor], [], [], STOP_TIMEOUT_S)[0]:
            raise ServiceError(f"the manager has not ended within {STOP_TIMEOUT_S:.0f} s: try again")
    finally:
        os.close(descriptor)


def _destroy_client(paths: SegmentPaths, name: str, force: bool) -> None:
    with closing(segment.attach(paths.name)) as opened:
        client = find_client(opened, name)
        if client.phase == "departed":
            # Its servers wait for exactly this, to tell their clients that the pages live elsewhere.
            if not force:
                raise departed_error(client)
        else:
            _refuse_if_used(paths, name)
            _refuse_if_held(opened, client)
        client.destroy()


def _refuse_if_held(opened: "_native.Segment", client: "_native.Client") -> None:
    """Raise `ServiceError` while a living process serves the client, though nothing is noted of it."""
    if client.held:
        opened.reap()  # it may be dead, and no manager there to notice
    if client.held:
        raise ServiceError(
            f"a running process serves {client.name!r}: end it first ('fuser -v {opened.path}' lists who has "
            "the segment open)"
        )


def _refuse_if_used(paths: SegmentPaths, client: str | None = None) -> None:
    """Raise `ServiceError` while a swap device or a mount is there, of `client` or of anybody."""
    prefix = f"tmem --name {paths.name}"
    for record in sorted(paths.state.glob(f"swap-{client or '*'}.json")):
        used_by = record.stem.removeprefix("swap-")
        # Also without a server: its pages may be all that is left of what a kernel has swapped out.
        raise ServiceError(
            f"{used_by!r} is a swap device: take it away with '{prefix} swap remove {used_by}' first"
        )
    for record in sorted(paths.state.glob(f"mount-{client or '*'}.json")):
        try:
            mount = json.loads(record.read_text())
            daemon = processes.Process(mount["pid"], mount["start_ticks"])
            mountpoint = mount["mountpoint"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # gone, or left half-written by a daemon that died
        if daemon.alive:
            raise ServiceError(f"{mountpoint} is mounted: unmount it with 'tmem umount {mountpoint}' first")
