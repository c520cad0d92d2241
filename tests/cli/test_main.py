"""The group: what it costs to import, its overview, and how errors come out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from tmem.cli.main import COMMANDS, cli, run

if TYPE_CHECKING:
    from tmem.backends import _native

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
    assert not {"rich", "trio", "pyfuse3", "matplotlib", "tmem.bench", "tmem.backends._native"} & set(modules)
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
    [
        ["dance"],
        ["start", "--memory", "much"],
        ["list", "--xml"],
        ["list", "one", "two"],
        ["destroy"],
        ["destroy", "one", "--all"],
        ["destroy", "--all", "--force"],
        ["freeze"],
        ["off", "one", "--all"],
        ["thaw", "--all", "--force"],
        ["flush"],
        ["flush", "--all", "--size", "some"],
        ["set"],
        ["set", "one"],
        ["set", "one", "--weight", "65536"],
        ["set", "one", "--weight", "-1"],
        ["set", "one", "--cap", "-1"],
        ["set", "one", "--floor", "9999999T"],
        ["set", "one", "--compress", "zstd"],
        ["authorise", "one"],
        ["authorise", "one", "6c1f0b2e-54a4-4c63-8a5e"],
        ["authorise", "one", "00000000-0000-0000-0000-000000000000"],
        ["authorise", "one", "ff" * 16],
        ["authorise", "one", "12" * 16, "--revoke", "--create"],
        ["shrink"],
        ["shrink", "one", "--to", "little"],
    ],
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
    [
        ["list"],
        ["stop"],
        ["freeable"],
        ["destroy", "--all"],
        ["destroy", "one"],
        ["--name", "a/b", "list"],
        ["freeze", "--all"],
        ["thaw", "one"],
        ["off", "--all"],
        ["on", "--all"],
        ["flush", "--all"],
        ["set", "one", "--weight", "1"],
        ["authorise", "one", "12" * 16, "--create"],
        ["shrink", "one"],
    ],
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "nobody"],
        ["freeze", "nobody"],
        ["thaw", "nobody", "--force"],
        ["off", "nobody"],
        ["on", "nobody"],
        ["flush", "nobody", "--size", "1M"],
        ["set", "nobody", "--cap", "1M"],
        ["authorise", "nobody", "12" * 16, "--revoke"],
        ["destroy", "nobody", "--force"],
        ["shrink", "nobody"],
    ],
    ids=" ".join,
)
def test_an_unknown_client_is_never_made(
    arguments: list[str], segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tmem: ")
    assert "nobody" in captured.err
    assert captured.err.count("\n") == 1
    assert segment.clients() == []


def test_a_reader_that_leaves_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "tmem", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert result.stderr == b""
    assert result.returncode == 1
