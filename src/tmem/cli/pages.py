"""Texts that click knows how to make of the commands: completions for shells, and man pages.

Not for writing them anywhere: `install` does. Making them imports every command.
"""

import copy
import tempfile
from importlib.metadata import version
from pathlib import Path

import click
from click.shell_completion import get_completion_class

_SHELLS = {
    "bash": Path("usr/share/bash-completion/completions/tmem"),
    "zsh": Path("usr/share/zsh/vendor-completions/_tmem"),
    "fish": Path("usr/share/fish/vendor_completions.d/tmem.fish"),
}
"""Where each shell looks for completions of what distributions install."""

_MANUAL = Path("usr/share/man/man1")

MARKER = "# Written by 'tmem install', which overwrites it."
"""A line of each completion."""

MANUAL_MARKER = f'.\\" {MARKER[2:]}'
"""The first line of each man page."""


def everything() -> dict[Path, str]:
    """Return all texts by their paths below the root."""
    return {**completions(), **manual()}


def candidates(root: Path) -> list[Path]:
    """Return the files below `root` that may be such texts of ours, of this version or another."""
    return [*(root / path for path in _SHELLS.values()), *sorted((root / _MANUAL).glob("tmem*.1"))]


def completions() -> dict[Path, str]:
    """Return the completion of each shell, by its path below the root."""
    found = {}
    for shell, path in _SHELLS.items():
        kind = get_completion_class(shell)
        assert kind is not None
        first, _, rest = kind(_group(), {}, "tmem", "_TMEM_COMPLETE").source().lstrip().partition("\n")
        # zsh wants its own mark in the first line.
        text = f"{first}\n{MARKER}\n{rest}" if first.startswith("#compdef") else f"{MARKER}\n{first}\n{rest}"
        found[path] = text
    return found


def manual() -> dict[Path, str]:
    """Return the man page of each command, by its path below the root."""
    from click_man.core import write_man_pages

    with tempfile.TemporaryDirectory() as directory:
        # A date would make each installation another one.
        write_man_pages("tmem", _group(), version=version("tmem"), target_dir=directory, date=version("tmem"))
        pages = sorted(Path(directory).iterdir())
        return {
            _MANUAL / page.name: f"{MANUAL_MARKER}\n{_quoted(page.read_text(encoding='utf-8'))}"
            for page in pages
        }


def _quoted(page: str) -> str:
    """Return a page in which a line of text that begins with a quote is none of troff's requests."""
    return "".join(rf"\&{line}" if line.startswith("'") else line for line in page.splitlines(keepends=True))


def _group() -> click.Command:
    """Return the group with all its commands loaded, as those expect it who walk through them."""
    from tmem.cli.main import COMMANDS, cli

    with click.Context(cli) as context:
        loaded = {name: command for name in COMMANDS if (command := cli.get_command(context, name))}
    group = click.Group("tmem", loaded, params=cli.params, help=cli.help)
    return _in_full(group)


def _in_full(command: click.Command) -> click.Command:
    """Return a copy of a command and of those below it whose short help is not cut off.

    A copy, because click keeps in each command what it has found out from the first context that asked.
    """
    command = copy.copy(command)
    command.short_help = command.short_help or command.get_short_help_str(limit=200)
    if isinstance(command, click.Group):
        command.commands = {name: _in_full(inner) for name, inner in command.commands.items()}
    return command
