"""What the tutorial tells people to type can be typed: commands and options exist, values are accepted."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from tmem.cli.main import cli
from tmem.config import reading
from tmem.fs.options import MountOptions

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
LINES = [line.strip() for line in TUTORIAL.read_text().splitlines() if line.startswith("    ")]
COMMANDS = [line for line in LINES if line.startswith("tmem ")]


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_a_command_line_is_accepted(line: str, runtime_dir: Path) -> None:
    words = shlex.split(line)[1:]
    with cli.make_context("tmem", [*words]) as context:
        click.Command.invoke(cli, context)  # the group's own part
        if words[0] == "--name":
            del words[:2]
        command: click.Command = cli
        while isinstance(command, click.Group):
            name = words.pop(0)
            found = command.get_command(context, name)
            assert found is not None, name
            command = found
        with command.make_context(name, words, parent=context) as made:
            if name == "mount":
                options, (_, mountpoint) = made.params["options"], made.params["places"]
                MountOptions.parse(options, mountpoint)


def test_it_has_the_ways_of_three_users() -> None:
    assert len(COMMANDS) > 25
    assert len(re.findall("^## ", TUTORIAL.read_text(), re.MULTILINE)) == 3


def test_its_configuration_is_accepted(tmp_path: Path) -> None:
    start = LINES.index("[start]")
    end = next(number for number in range(start, len(LINES)) if LINES[number].startswith("systemctl"))
    path = tmp_path / "tmem.toml"
    path.write_text("\n".join(LINES[start:end]))
    assert reading.load(path).tree == tomllib.loads(path.read_text())
    assert reading.load(path).section("default", "client", "local", "swap")["size"] == "4G"
