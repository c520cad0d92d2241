"""The command behind scripts/guest: list scenarios, run them by name, or boot a guest to look around in."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from . import kernels
from .cache import GuestError
from .machine import Guest, Options
from .scenarios import SCENARIOS, Figures, Scenario, Setting

for _module in sorted(Path(__file__).parent.glob("scenarios_*.py")):
    importlib.import_module(f"{__package__}.{_module.stem}")

_kernel = click.option(
    "--kernel", type=click.Choice(kernels.SERIES), default=kernels.SERIES[0], show_default=True
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run tmem's scenarios on guests with real kernels."""
    for number in _ENDING:
        signal.signal(number, _end)


_ENDING = (signal.SIGTERM, signal.SIGHUP)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C: guests, hosts and their segments are taken down on the way out, once."""
    for one in (*_ENDING, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    raise SystemExit(128 + number)


@main.command("list")
def list_() -> None:
    """List the scenarios."""
    for scenario in SCENARIOS.values():
        click.echo(f"{scenario.name:12} {scenario.shows}")


@main.command()
@click.argument("names", nargs=-1, required=True, type=click.Choice([*SCENARIOS, "all"]), metavar="NAME...")
@click.option("--rounds", type=click.IntRange(1), default=1, help="Run each so often.")
@click.option("--long", is_flag=True, help="The thorough form of each instead of that for CI.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Append figures, a line a run.")
@click.option("--logs", type=click.Path(path_type=Path), help="Keep the consoles in this directory.")
@_kernel
def run(
    names: tuple[str, ...], rounds: int, long: bool, json_file: Path | None, logs: Path | None, kernel: str
) -> None:
    """Run scenarios; exit status 1 if what one of them shows is not so."""
    wanted = list(SCENARIOS) if "all" in names else list(dict.fromkeys(names))
    failures = 0
    for number in range(1, rounds + 1):
        for name in wanted:
            record = _run_once(SCENARIOS[name], kernel, number, long, logs)
            failures += record["result"] != "ok"
            if json_file is not None:
                with json_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    sys.exit(1 if failures else 0)


def _run_once(scenario: Scenario, kernel: str, number: int, long: bool, logs: Path | None) -> Figures:
    """Run a scenario and say how it went; the consoles of a failed run are kept."""
    directory = Path(tempfile.mkdtemp(prefix=f"{scenario.name}-{kernel}-{number}-", dir=_made(logs)))
    record: Figures = {"scenario": scenario.name, "kernel": kernel, "round": number, "long": long}
    began = time.monotonic()
    try:
        with Setting(directory, kernel, long=long) as setting:
            record |= {"result": "ok", "figures": scenario.run(setting)}
    except (AssertionError, GuestError, subprocess.SubprocessError) as error:
        record |= {"result": str(error)}
    except BaseException:  # somebody ends this
        if logs is None:
            shutil.rmtree(directory)
        raise
    record["took_s"] = round(time.monotonic() - began, 1)
    click.echo(f"{scenario.name} on {kernel}, round {number}: {record['result']} ({record['took_s']} s)")
    if record["result"] == "ok":
        click.echo(json.dumps(record["figures"]))
        if logs is None:
            shutil.rmtree(directory)
            return record
    click.echo(f"consoles: {directory}")
    return record


def _made(logs: Path | None) -> Path | None:
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    return logs


@main.command()
@click.option("--memory", "memory_mib", default=512, show_default=True, help="MiB of RAM.")
@click.option("--cpus", default=2, show_default=True)
@_kernel
def shell(memory_mib: int, cpus: int, kernel: str) -> None:
    """Boot a guest and read commands for its shell; the end of input ends it.

    Each line is a command of its own: cd and variables do not carry over. Ctrl-C kills the command.
    """
    with Guest("shell", Options(kernel=kernel, memory_mib=memory_mib, cpus=cpus)) as guest:
        guest.boot()
        click.echo(f"booted in {guest.boot_s or 0:.1f} s; its console is in {guest.log}")
        while True:
            try:
                line = input("guest# ")
            except (EOFError, KeyboardInterrupt):
                click.echo()
                return
            with suppress(GuestError):
                _follow(guest, line)


def _follow(guest: Guest, line: str) -> None:
    """Run a line and show what it writes while it runs."""
    command = guest.start(f"{{ {line}\n}} 2>&1")
    shown = 0
    while True:
        running = command.running
        text = command.stdout
        click.echo(text[shown:], nl=False)
        shown = len(text)
        if not running:
            return
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            command.signal(9)


if __name__ == "__main__":
    main()
