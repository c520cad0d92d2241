"""The commands ``contain`` and ``watermarks``: make this machine fit to swap to itself, or take that back.

They count, ask `tmem.nbd.contain` and `tmem.nbd.watermarks`, and print. What is to be done goes to standard
output, advice to standard error.
"""

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tmem.backends.paths import SegmentPaths, runtime_dir
from tmem.cli.context import segment_name, size_option
from tmem.errors import TmemError
from tmem.types import format_size

if TYPE_CHECKING:
    from tmem.nbd.contain import Machine, Plan


@click.command()
@click.option(
    "--memory",
    metavar="SIZE",
    callback=size_option,
    help="What 'tmem start --memory' will be given, if there is no segment yet. Default: half of the RAM.",
)
@click.option(
    "--room",
    metavar="SIZE",
    callback=size_option,
    help="Left for tmem's processes and the kernel. Default: 144M and a 64th of the RAM.",
)
@click.option(
    "--share",
    "shares",
    metavar="GROUP=PERCENT",
    multiple=True,
    help="What a group gets, such as user.slice=70. Default: what it holds, and an equal part of the rest.",
)
@click.option("--permanent", is_flag=True, help="Under systemd: also after a reboot.")
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
@click.option("--undo", is_flag=True, help="Take everything back.")
@click.option("--force", is_flag=True, help="With --undo: also while this machine swaps to a device.")
@click.pass_context
def contain(
    ctx: click.Context,
    memory: int | None,
    room: int | None,
    shares: tuple[str, ...],
    permanent: bool,
    dry_run: bool,
    undo: bool,
    force: bool,
) -> None:
    """Limit the memory of everything that is not tmem's, so that swapping to tmem cannot hang this machine.

    Do this before 'tmem start'. It may be repeated at any time, and then counts again.
    """
    if undo and (memory is not None or room is not None or shares or permanent):
        raise click.UsageError("--undo goes with --dry-run and --force only")
    if force and not undo:
        raise click.UsageError("--force goes with --undo")
    parsed = _shares(shares)
    if os.geteuid() != 0 and not dry_run:
        raise TmemError("limiting other processes needs root: run this as root, or with --dry-run")
    # Imported here so that `tmem --help` stays quick.
    from tmem.backends import groups
    from tmem.nbd import contain as containing
    from tmem.nbd import family, steps

    if undo:
        _undo(dry_run, force)
        return
    if permanent and not groups.systemd():
        raise TmemError("--permanent needs systemd: run 'tmem contain' at each start of this machine instead")
    own = family.everybody(runtime_dir())
    machine = containing.look(own)
    segments_bytes, remarks = _segments(segment_name(ctx), memory, machine)
    wanted = containing.Wanted(segments_bytes, room, parsed, permanent)
    plan = containing.plan(machine, wanted, groups.load())
    if dry_run:
        for step in plan.steps:
            click.echo(steps.describe(step))
    else:
        from tmem.backends import segment

        segment.prepare_runtime_dir()
        containing.apply(plan)
    _report(machine, plan, wanted.segments_bytes, remarks)


@click.command()
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
@click.option("--undo", is_flag=True, help="Set what was there before.")
def watermarks(dry_run: bool, undo: bool) -> None:
    """Let the kernel keep 5 % of RAM free: what 'tmem start --realtime' needs to be of use.

    Ends with a reboot. To keep it, write the lines that are printed into a file in /etc/sysctl.d.
    """
    from tmem.backends import segment
    from tmem.nbd import watermarks as marks

    if os.geteuid() != 0 and not dry_run:
        raise TmemError("the kernel's settings need root: run this as root, or with --dry-run")
    if undo:
        done = marks.undo() if not dry_run else marks.noted()
        if not done:
            click.echo("nothing to undo", err=True)
    else:
        done = marks.wanted()
        if not dry_run:
            segment.prepare_runtime_dir()
            marks.apply(done)
        if not done:
            click.echo("nothing to do", err=True)
    for name, value in done.items():
        click.echo(f"vm.{name} = {value}")


def _undo(dry_run: bool, force: bool) -> None:
    from tmem.backends import groups
    from tmem.nbd import contain as containing
    from tmem.nbd import export, family, steps

    record = groups.load()
    if record is None:
        click.echo("nothing to undo", err=True)
        return
    for paths in family.segments(runtime_dir()) if not force else []:
        local = [device.client for device in export.load_all(paths) if device.attachment is not None]
        if local:
            raise TmemError(
                f"this machine swaps to {local[0]}, and could hang then: take it away first with "
                f"'tmem --name {paths.name} swap remove {local[0]}', or insist with --force"
            )
    for step in containing.undo_steps(record):
        click.echo(steps.describe(step))
    if not dry_run:
        containing.undo()


def _shares(texts: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        name, separator, percent = text.rpartition("=")
        try:
            share = float(percent.removesuffix("%"))
        except ValueError:
            separator = ""
        if not separator or not name or not 0 < share <= 100 or name in found:
            raise click.UsageError(f"{text!r} is no share: write GROUP=PERCENT, such as user.slice=70")
        found[name] = share
    if sum(found.values()) > 100:
        raise click.UsageError("the shares come to more than 100 percent")
    return found


def _segments(name: str, memory: int | None, machine: "Machine") -> tuple[int, list[str]]:
    """Return what all segments may come to, the one to be made included, and what is to be said of that.

    That is their ceilings, whatever their limits are now: the limits of groups stay where they are when a
    segment grows, and one that this machine swaps to does so at the worst moment. Nor does a lower bound
    hold for certain: 'tmem resize' raises it again, and persistent pages and floors hold it up.
    """
    directory = runtime_dir()
    sizes, remarks = {}, []
    for path in directory.iterdir() if directory.is_dir() else []:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and (directory / f"{path.name}.d").is_dir():
            sizes[path.name] = status.st_size
            limit = _limit_bytes(path)
            if limit < status.st_size:
                remarks.append(
                    f"segment {path.name!r} counts with its ceiling, {format_size(status.st_size)}, though "
                    f"it may take no more than {format_size(limit)} now: limits of groups do not follow when "
                    "it grows; if it need not, make it anew with a smaller --memory"
                )
    if SegmentPaths.of(name).name not in sizes:
        sizes[name] = machine.ram_bytes // 2 if memory is None else memory
    elif memory is not None and memory > sizes[name]:
        raise TmemError(
            f"segment {name!r} exists with {format_size(sizes[name])}: leave out --memory, or end it first "
            f"with 'tmem --name {name} destroy --all'"
        )
    elif memory is not None and memory < sizes[name]:
        remarks.append(
            f"--memory {format_size(memory)} changes nothing: segment {name!r} exists with "
            f"{format_size(sizes[name])}"
        )
    return sum(sizes.values()), remarks


def _limit_bytes(file: Path) -> int:
    """Return what the segment may take now."""
    from tmem.backends import segment

    try:
        with contextlib.closing(segment.core().attach(str(file))) as opened:
            return int(opened.limits[0])
    except (TmemError, OSError):  # damaged: it counts with its size all the same
        return file.stat().st_size


def _report(machine: "Machine", plan: "Plan", segments_bytes: int, remarks: Sequence[str]) -> None:
    for name, limit in sorted(plan.limits.items()):
        click.echo(f"{name} is limited to {format_size(limit)}")
    click.echo(
        f"that leaves {format_size(segments_bytes)} for segments and "
        f"{format_size(machine.ram_bytes - plan.budget_bytes - segments_bytes)} for the kernel and for tmem"
    )
    advice = list(remarks)
    if machine.misplaced:
        advice.append(
            "what runs of tmem keeps its memory charged where it was: take its devices and mounts away, "
            "'tmem destroy --all', 'tmem start -d', and add them again"
        )
    if machine.systemd and machine.loose:
        advice.append(f"{machine.loose} processes are in no slice and cannot be limited: restart them")
    if machine.version == 1:
        advice.append(
            "cgroup v1 lets the kernel swap tmem out when no page cache is left: better boot with cgroup v2"
        )
    for line in advice:
        click.echo(line, err=True)
