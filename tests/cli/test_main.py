"""The group: what it costs to import, its overview, and how errors come out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tmem.cli.main import COMMANDS, cli, run

LOADED = "import sys, json, tmem.cli.main; print(json.dumps([list(sys.modules), time.process_time()]))"


def test_importing_is_cheap() -> None:
    best = 9.0
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", f"import time; {LOADED}"],
            capture_output=True,
            check=True,
            text=True,
            stdin=subprocess.DEVNULL,
        ).stdout
        modules, seconds = json.loads(out)
        best = min(best, seconds)
    assert not {"rich", "trio", "pyfuse3", "tmem.backends._native"} & set(modules)
    assert best < 0.15


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert name in out
        assert entry.help.split()[0] in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_loaded(name: str) -> None:
    with click.Context(cli) as context:
        command = cli.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(200)


@pytest.mark.parametrize(
    "arguments",
    [["dance"], ["start", "--memory", "much"], ["list", "--xml"], ["destroy"], ["destroy", "one", "--all"]],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(
    arguments: list[str], runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Error:" in captured.err


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["stop"], ["freeable"], ["destroy", "--all"], ["destroy", "one"], ["--name", "a/b", "list"]],
    ids=" ".join,
)
def test_failure_is_one_line_and_status_1(
    arguments: list[str], runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tmem: ")
    assert captured.err.count("\n") == 1


def test_a_reader_that_leaves_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "tmem", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert result.stderr == b""
    assert result.returncode == 1
