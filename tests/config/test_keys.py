"""The table of keys: every key is documented, takes its example, and has the option of that name."""

import re
import tomllib
from pathlib import Path

import click
import pytest

from tmem.cli.configured import ConfiguredCommand
from tmem.cli.main import cli
from tmem.config import keys, reading
from tmem.config.example import example

PROJECT = Path(__file__).parents[2]


def test_the_example_in_the_documentation_is_that_of_the_table() -> None:
    assert (PROJECT / "docs" / "tmem.toml").read_text() == example(), (
        "python -c 'from tmem.config.example import example; print(example(), end=\"\")' >docs/tmem.toml"
    )


def test_the_example_changes_nothing_until_somebody_edits_it(tmp_path: Path) -> None:
    path = tmp_path / "tmem.toml"
    path.write_text(example())
    assert reading.load(path).tree == {}


def test_every_line_of_the_example_is_accepted_without_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "tmem.toml"
    path.write_text(re.sub(r"^#(?=[\[a-z])", "", example(), flags=re.MULTILINE))
    tree = reading.load(path).tree
    for key in keys.KEYS:
        table: object = tree
        for part in key.section.replace("NAME", "web1").split("."):
            assert isinstance(table, dict)
            table = table[part]
        assert isinstance(table, dict)
        assert table[key.name] == tomllib.loads(f"x = {key.example}")["x"]


@pytest.mark.parametrize(
    ("words", "sections"), [("start", ["start"]), ("swap add", ["swap", "client.NAME.swap"])]
)
def test_every_key_of_a_command_is_an_option_of_it(words: str, sections: list[str]) -> None:
    command: click.Command = cli
    with click.Context(cli) as context:
        for word in words.split():
            assert isinstance(command, click.Group)
            found = command.get_command(context, word)
            assert found is not None
            command = found
    assert isinstance(command, ConfiguredCommand)
    for section in sections:
        for name in keys.of_section(section):
            assert command.option(name) is not None, f"{section}: {name}"
    assert {key.section for key in keys.KEYS} <= {
        "start",
        "swap",
        "client.NAME.swap",
        "mount",
        "client.NAME",
    }
