"""Tables of plain text, and how wide they may be: what commands print that have to answer at once.

rich draws the same, and importing it takes a third of the time of ``tmem list``. Not for live views or
colours: `screen`. Plain functions.
"""

import os
import sys
from collections.abc import Container, Iterator, Mapping, Sequence

import click

_GAP = "  "


def columns_of(pipe_columns: int) -> int:
    """Return the width of the terminal (COLUMNS, or what it says itself), or `pipe_columns` without one."""
    if not sys.stdout.isatty():
        return pipe_columns
    if (told := os.environ.get("COLUMNS", "")).isdecimal() and int(told):
        return int(told)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def widths_of(headings: Sequence[str], lines: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """Return how wide each column is with all of its values in full."""
    return {name: max(len(name), *(len(line.get(name, "")) for line in lines)) for name in headings}


def drawn(
    lines: Sequence[Mapping[str, str]], widths: Mapping[str, int], texts: Container[str]
) -> Iterator[str]:
    """Yield the heading and the lines of a table with the columns `widths`.

    `texts` stand on the left, the others on the right. What is wider than its column ends in an ellipsis.
    """
    for number, line in enumerate(({name: name for name in widths}, *lines)):
        cells = []
        for name, width in widths.items():
            text = line.get(name, "")
            cut = text if len(text) <= width else f"{text[: max(width - 1, 0)]}\u2026"
            cells.append(cut.ljust(width) if name in texts else cut.rjust(width))
        text = _GAP.join(cells).rstrip()
        yield bold(text) if number == 0 else text


def bold(text: str) -> str:
    """Return text in bold where it goes to a terminal that knows it; click takes it out elsewhere."""
    plain = os.environ.get("TERM") in ("dumb", "unknown") or os.environ.get("NO_COLOR")
    return text if plain else click.style(text, bold=True)
