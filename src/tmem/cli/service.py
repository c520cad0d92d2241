"""The commands ``start``, ``stop``, ``resize`` and ``destroy``: the life of a segment and of its manager.

Not for swap devices and mounts, which have modules of their own and end before the segment does. Threading: a
command runs in the main thread of its process.
"""

import json
import logging
import os
import select
import shutil
import sys
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import click

from tmem.backends import guarded, processes, scraping, segment, service
from tmem.backends.compacting import WORTH_HOLES
from tmem.backends.paths import SegmentPaths
from tmem.cli.clients import attached, departed_error, find_client, require_one
from tmem.cli.configured import ConfiguredCommand, configuration, explicit, setting_of
from tmem.cli.context import address_or_off, client_names, range_option, segment_name, time_or_off
from tmem.errors import SegmentError, ServiceError, TmemError
from tmem.types import SizeRange, format_size

if TYPE_CHECKING:
    from tmem.backends import _native

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
_COMPACT_NS = 1_000_000_000
# The core rounds a size to its chunks, so the same size asked for again may differ by this much.
_ROUNDING_BYTES = 4 << 20


@click.command(cls=ConfiguredCommand, section="start", may_go_on=segment.exists)
@click.option(
    "--memory",
    metavar="SIZE[..SIZE]",
    callback=range_option,
    help="Bound of the segment, such as 2G, or between which sizes it follows the memory that the machine "
    "can spare, such as 512M..4G. Default: half of the RAM.",
)
@click.option("-d", "--detach", is_flag=True, help="Return as soon as the manager answers.")
@click.option("--realtime", is_flag=True, help="Run it, and all that it starts, under SCHED_RR.")
@click.option(
    "--condense",
    type=click.IntRange(0, 100),
    metavar="PERCENT",
    help="Share of one CPU for storing pages smaller that nobody asks for (5 at first; 0: none).",
)
@click.option(
    "--condense-level",
    type=click.IntRange(1, 19),
    metavar="LEVEL",
    help="Level of zstd for that, 1 to 19: higher ones make pages smaller and take more CPU time for each (3 "
    "at first).",
)
@click.option(
    "--pack/--no-pack",
    "packing",
    default=None,
    help="Store swapped neighbours that stay cold together, or no more of them (at first).",
)
@click.option(
    "--tier-cold",
    metavar="TIME",
    callback=time_or_off,
    help="Pages that nobody asked for in this time, such as 1h, go to the client's tier although there is "
    "memory; off: only when it is short (at first).",
)
@click.option(
    "--repatriate",
    metavar="TIME",
    callback=time_or_off,
    help="Swapped-out pages of this machine come back when memory has been in plenty for this time, such as "
    "30m; off: not by themselves (default).",
)
@click.option(
    "--metrics",
    metavar="HOST:PORT",
    callback=address_or_off,
    help="Serve the statistics for Prometheus there, such as 127.0.0.1:9753; off: nobody does (default).",
)
@click.option("--launched", is_flag=True, hidden=True, help="What the process sets for itself is set.")
@click.pass_context
def start(
    ctx: click.Context,
    memory: SizeRange | None,
    detach: bool,
    realtime: bool,
    condense: int | None,
    condense_level: int | None,
    packing: bool | None,
    tier_cold: int | None,
    repatriate: int | None,
    metrics: str | None,
    launched: bool,
) -> None:
    """Create the segment if absent, and run the manager service in the foreground."""
    paths = SegmentPaths.of(segment_name(ctx))
    again = _command(ctx, paths)
    if memory is not None and not explicit(ctx, "memory") and segment.exists(paths.name):
        memory = None  # the configuration says how to create one, no more
    if detach:
        _start_detached(paths, memory, realtime, again)
        if metrics is not None:
            _wait_for_metrics(paths, metrics)
        if repatriate is not None:
            _require_repatriation(paths, repatriate)
        with closing(segment.attach(paths.name)) as opened:  # of a manager that runs already, too
            _set_pace(opened, condense, condense_level, packing, tier_cold)
        return
    if not launched:
        # Memory is charged to the group in which it is touched first, and threads inherit the guards.
        guarded.become([*again, "--launched"], realtime)
    with closing(_open_segment(paths, memory)) as opened:
        from tmem.backends import manager

        logging.basicConfig(level=logging.INFO, format="%(asctime)s tmem: %(message)s", stream=sys.stderr)
        _set_pace(opened, condense, condense_level, packing, tier_cold)
        if realtime and not _realtime(os.getpid()):
            logging.warning("SCHED_RR is not permitted: give the manager CAP_SYS_NICE, or LimitRTPRIO=1")
        exporter = None if metrics is None else [*_prefix(ctx, paths), "metrics", metrics]
        homewards = (repatriate or 0, [*_prefix(ctx, paths), "shrink", "--gently", "--json"])
        renewed = manager.run(paths, opened, setting_of(configuration(ctx), paths.name), exporter, homewards)
    if renewed:
        # The same process: whoever watches over it (a service file, a test) sees no end of it.
        # What its memory is it knows by now, and may have been told otherwise by 'tmem resize'.
        os.execv(again[0], [*_command(ctx, paths, memory=False), "--launched"])


def _set_pace(
    opened: "_native.Segment",
    condense: int | None,
    level: int | None,
    packing: bool | None,
    tier_cold_s: int | None,
) -> None:
    """Say how much the manager does with pages that nobody asks for; None: as before."""
    if condense is not None:
        opened.condense_percent = condense
    if level is not None:
        opened.condense_level = level
    if packing is not None:
        opened.packing = packing
    if tier_cold_s is not None:
        opened.tier_cold_s = tier_cold_s


def _require_repatriation(paths: SegmentPaths, idle_s: int) -> None:
    """Raise `ServiceError` if the manager, which may have run already, was told another time."""
    statistics = service.ping(paths)[1]["statistics"]
    assert isinstance(statistics, dict)
    if statistics["repatriation_idle_ns"] != idle_s * 10**9:
        raise ServiceError(
            f"the manager runs with another --repatriate: 'tmem --name {paths.name} stop', "
            "then start it again"
        )


@click.command()
@click.pass_context
def stop(ctx: click.Context) -> None:
    """Stop the manager. Pages and servers stay; nobody restarts a server until a manager runs again."""
    _stop_manager(SegmentPaths.of(segment_name(ctx)))


@click.command()
@click.argument("client", shell_complete=client_names, required=False)
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
        service.ping(paths)
        _stop_manager(paths)
    segment.destroy(paths.name)


@click.command()
@click.argument("size", metavar="SIZE[..SIZE]", callback=range_option)
@click.option("--force", is_flag=True, help="Also if it cannot hold what this machine may swap to it.")
@click.pass_context
def resize(ctx: click.Context, size: SizeRange, force: bool) -> None:
    """Give the segment another bound, at most the one that it was created with.

    Of two sizes, the manager keeps it between them, as large as the machine can spare. Memory that is too
    much goes back to the system now: ephemeral pages are evicted, persistent ones stay.
    """
    with attached(ctx) as opened:
        if not force and size.most_bytes < opened.size_range[1]:
            from tmem.nbd import guards  # the manager, which locks what it imports, needs nothing of it

            guards.require_bound(SegmentPaths.of(segment_name(ctx)), size.most_bytes)
        limit = segment.resize(opened, size)
        returned = opened.shrink(0)
        if opened.occupied[0] > limit and opened.compact(WORTH_HOLES, _COMPACT_NS):
            returned += opened.shrink(0)
        used, _, _ = opened.occupied
    more = f", {format_size(returned)} given back to the system" if returned else ""
    click.echo(f"limit {format_size(limit)}{more}")
    if size.least_bytes == size.most_bytes and limit > size.most_bytes:
        raise TmemError(
            f"persistent pages and floors need {format_size(limit)}: the manager lowers the limit as they go "
            f"({format_size(used)} in use)"
        )


def _open_segment(paths: SegmentPaths, memory: SizeRange | None) -> "_native.Segment":
    """Attach the segment, or create it if it is absent."""
    if not segment.exists(paths.name):
        if memory is None:
            return segment.create(paths.name, segment.default_memory_bytes())
        made = segment.create(paths.name, memory.most_bytes)
        if memory.least_bytes < memory.most_bytes:
            segment.resize(made, memory)
        return made
    opened = segment.attach(paths.name)
    if memory is not None and abs(opened.memory_bytes - memory.most_bytes) > _ROUNDING_BYTES:
        size = format_size(opened.memory_bytes)
        opened.close()
        raise TmemError(
            f"segment {paths.name!r} exists with {size}: leave out --memory, change its bound below that "
            f"with 'tmem --name {paths.name} resize', or end it first with "
            f"'tmem --name {paths.name} destroy --all'"
        )
    if memory is not None and memory.least_bytes < memory.most_bytes:
        ceiling = opened.memory_bytes
        if opened.size_range == (ceiling, ceiling):  # never resized, or who made it died before that
            segment.resize(opened, SizeRange(memory.least_bytes, min(memory.most_bytes, ceiling)))
    segment.prepare_state_dir(paths)
    return opened


def _start_detached(paths: SegmentPaths, memory: SizeRange | None, realtime: bool, argv: list[str]) -> None:
    """Start the manager in a session of its own unless one runs, and say so."""
    if segment.exists(paths.name):
        with closing(_open_segment(paths, memory)) as opened:  # what is wrong with it is said here
            _say_other_range(paths, memory, opened.size_range)
    try:
        pid, state = service.ping(paths)[0], "runs already"
    except ServiceError:
        pid, state = _launch(paths, argv), "runs"
    if realtime and not _realtime(pid):
        raise ServiceError(
            f"the manager (pid {pid}) {state}, but not under SCHED_RR: 'tmem --name {paths.name} stop', "
            "then start it with CAP_SYS_NICE, or LimitRTPRIO=1"
        )
    with closing(segment.attach(paths.name)) as opened:
        size = format_size(opened.memory_bytes)
    click.echo(f"manager of segment {paths.name!r} ({size}) {state}, pid {pid}")


def _say_other_range(paths: SegmentPaths, wanted: SizeRange | None, found: tuple[int, int]) -> None:
    """Tell who asks for sizes that a segment which exists does not have that it keeps its own."""
    asked = wanted and (wanted.least_bytes, wanted.most_bytes)
    if asked and any(abs(a - b) > _ROUNDING_BYTES for a, b in zip(asked, found, strict=True)):
        sizes = "..".join(format_size(size) for size in dict.fromkeys(found))
        click.echo(
            f"segment {paths.name!r} keeps its bound of {sizes}: "
            f"'tmem --name {paths.name} resize' changes it",
            err=True,
        )


def _launch(paths: SegmentPaths, argv: list[str]) -> int:
    """Start the manager, which makes the segment if need be, and return its pid once it answers."""
    segment.prepare_runtime_dir()
    segment.prepare_state_dir(paths)
    output = paths.state / "manager.log"
    child = processes.spawn(argv, os.environ, output)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(ServiceError):
            return service.ping(paths)[0]
        if processes.reap(child) is not None:
            break
        time.sleep(0.02)
    said = processes.last_line(output).partition("tmem: ")[2]
    if not segment.exists(paths.name):
        shutil.rmtree(paths.state, ignore_errors=True)
        # Its log went with the directory, or could not be written: the disk may be full.
        raise ServiceError(
            said
            or "the manager ended before it had made the segment, and could not say why (is there room in "
            f"{paths.directory}?): 'tmem --name {paths.name} start' shows it"
        )
    raise ServiceError(said or f"the manager failed: see {output}")


def _command(ctx: click.Context, paths: SegmentPaths, memory: bool = True) -> list[str]:
    """Return the command that runs the manager in the foreground: it reads the configuration itself."""
    given = ctx.params
    return [
        *_prefix(ctx, paths),
        "start",
        *(["--memory", str(given["memory"])] if memory and explicit(ctx, "memory") else []),
        *(["--realtime"] if given["realtime"] and explicit(ctx, "realtime") else []),
        *(["--condense", str(given["condense"])] if explicit(ctx, "condense") else []),
        *(["--condense-level", str(given["condense_level"])] if explicit(ctx, "condense_level") else []),
        *(["--pack" if given["packing"] else "--no-pack"] if explicit(ctx, "packing") else []),
        *(
            ["--tier-cold", f"{given['tier_cold']}s" if given["tier_cold"] else "off"]
            if explicit(ctx, "tier_cold")
            else []
        ),
        *(
            ["--repatriate", f"{given['repatriate']}s" if given["repatriate"] else "off"]
            if explicit(ctx, "repatriate")
            else []
        ),
        *(["--metrics", given["metrics"] or "off"] if explicit(ctx, "metrics") else []),
    ]


def _prefix(ctx: click.Context, paths: SegmentPaths) -> list[str]:
    """Return the beginning of a command of ours on the same segment and configuration."""
    config = ctx.find_root().obj.get("config")
    return [
        *(sys.executable, "-P", "-m", "tmem", "--name", paths.name),
        *(["--config", str(config)] if config else []),
    ]


def _wait_for_metrics(paths: SegmentPaths, address: str) -> None:
    """Return when metrics are served; `ServiceError` with what their process says if they are not."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    first: int | None = None
    while time.monotonic() < deadline:
        services = service.request(paths, {"op": "services"})["services"]
        assert isinstance(services, list)
        if not (found := [one for one in services if one["name"] == scraping.NAME]):
            raise ServiceError(
                f"the manager runs without metrics: 'tmem --name {paths.name} stop', then start it again"
            )
        starts = found[0]["starts"]
        first = starts if first is None else first
        # On a busy machine it may be met starting again each time, though it dies all the while.
        dies = found[0]["state"] == "waiting" or starts >= first + 2
        if dies and (said := scraping.last_words(paths)):
            raise ServiceError(f"the manager runs, but {said}")
        if scraping.answers(paths, address):
            return
        time.sleep(0.02)
    raise ServiceError(f"the manager runs, but nobody serves metrics on {address}: see 'tmem doctor'")


def _realtime(pid: int) -> bool:
    return os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK in (os.SCHED_RR, os.SCHED_FIFO)


def _stop_manager(paths: SegmentPaths) -> None:
    """Stop the manager and wait until it has ended."""
    running = processes.Process.of(service.ping(paths)[0])
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
