"""The command ``bench``: measures this machine, peers side by side, and shows and keeps what came out.

Not for measuring (`tmem.bench`). Everything that can be refused is refused before the first measurement.
Threading: the main thread; rich draws the progress from one of its own.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tmem.backends import interrupts
from tmem.errors import TmemError
from tmem.types import format_size

if TYPE_CHECKING:
    from tmem.bench.parts import Plan
    from tmem.bench.running import Report

_PARTS = ("nbd", "swap", "fuse", "density", "hits")
_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
_PIPE_COLUMNS = 100


@click.command()
@click.option("--quick", is_flag=True, help="Fewer and shorter rounds: a first impression.")
@click.option(
    "--only",
    "parts",
    type=click.Choice(_PARTS),
    multiple=True,
    help="Measure this part; may be repeated. All of them by default.",
)
@click.option("--rounds", type=click.IntRange(1, 100), help="Rounds of each measurement.")
@click.option("--seconds", type=click.FloatRange(0.05, 600), help="Seconds of each measurement.")
@click.option("--json", "json_file", type=_FILE, metavar="FILE", help="Keep every round there.")
@click.option("--html", "html_file", type=_FILE, metavar="FILE", help="Write tables and plots as one page.")
@click.option("--png", "png_directory", type=_DIRECTORY, metavar="DIR", help="Write each plot as a file.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def bench(
    quick: bool,
    parts: tuple[str, ...],
    rounds: int | None,
    seconds: float | None,
    json_file: Path | None,
    html_file: Path | None,
    png_directory: Path | None,
    dry_run: bool,
) -> None:
    """Measure this machine: NBD, swap, files and memory efficiency, beside what one would use instead.

    Peers take turns in one run; those that are not installed are named with the command that installs them.
    The segment, devices and files are made for it and gone afterwards, also after Ctrl-C; other segments are
    left alone. Ratios are medians of the rounds' ratios, beside the smallest and the largest; "wanted" is
    what the project aims at. Without root, what needs none is measured. Figures of a busy machine are noisy:
    the load is noted.
    """
    from tmem.bench import running
    from tmem.bench.parts import Effort

    for file in (json_file, html_file, png_directory and png_directory / "nbd.png"):
        if file is not None:
            check_writable(file)
    if html_file is not None or png_directory is not None:
        from tmem.bench.plots import check_available

        check_available()
    effort = Effort(quick, rounds, seconds)
    planned = running.plans(parts or _PARTS, effort)
    report = running.begin(planned, effort)
    _announce(planned)
    if dry_run:
        return
    steps = sum(plan.steps for plan in planned.values() if plan.refused is None)

    def keep(report: "Report") -> None:
        if json_file is not None:
            write_whole(json_file, f"{json.dumps(report.document(), indent=1)}\n".encode())

    with interrupts.once(), _progress(steps) as step:
        running.run(report, planned, step, keep)
    _print(report)
    _draw(report, html_file, png_directory)
    if any(one.what not in planned or planned[one.what].refused is None for one in report.failed):
        raise TmemError("a part could not be measured to the end: see above")


def check_writable(file: Path) -> None:
    """Raise `TmemError` unless `file` can be written, whole, in place of what is there."""
    if file.is_dir():
        raise TmemError(f"{file} is a directory: give the name of a file")
    try:
        descriptor, name = tempfile.mkstemp(prefix=".tmem-bench.", dir=file.absolute().parent)
    except OSError as error:
        raise TmemError(f"{file} cannot be written ({error.strerror}): give another file") from None
    os.close(descriptor)
    Path(name).unlink()


def write_whole(file: Path, content: bytes) -> None:
    """Write `file`, or leave what was there as it was."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _draw(report: "Report", html_file: Path | None, png_directory: Path | None) -> None:
    """Write the plots that were asked for."""
    if html_file is not None:
        from tmem.bench.webpage import render

        write_whole(html_file, render(report).encode())
    if png_directory is not None:
        from tmem.bench.plots import figures, png

        for name, figure in figures(report).items():
            write_whole(png_directory / f"{name}.png", png(figure))


def _announce(planned: dict[str, "Plan"]) -> None:
    """Say what will be done, and what it takes."""
    possible = {name: plan for name, plan in planned.items() if plan.refused is None}
    for name, plan in possible.items():
        disk = f", {format_size(plan.disk_bytes)} on disk" if plan.disk_bytes else ""
        click.echo(
            f"{name}: {plan.says}; up to {format_size(plan.memory_bytes)} of memory{disk}; "
            f"about {_duration(plan.about_s)}",
            err=True,
        )
    for name, plan in planned.items():
        if plan.refused is not None:
            click.echo(f"{name}: not possible here: {plan.refused}", err=True)
    click.echo(f"about {_duration(sum(plan.about_s for plan in possible.values()))} in all", err=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Show what is measured and how far it is; nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)
        done = -1

        def step(what: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=what)

        yield step


def _print(report: "Report") -> None:
    from tmem.bench.report import render
    from tmem.cli.screen import console

    console(shutil.get_terminal_size((_PIPE_COLUMNS, 0)).columns).print(render(report))
