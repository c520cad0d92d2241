"""How wide what a command prints may be: as the terminal, or as a pipe wants it.

For commands that draw tables. Not for live views, whose terminal may change its size. It brings rich, so a
command imports it only when it prints.
"""

import shutil

from rich.console import Console


def console(pipe_columns: int) -> Console:
    """Return a console as wide as the terminal (COLUMNS, or what it says itself), or `pipe_columns`."""
    found = Console(highlight=False)
    if not found.is_terminal:
        return Console(highlight=False, width=pipe_columns)
    if found.is_dumb_terminal:  # rich takes every one of these for 80 columns
        size = shutil.get_terminal_size()
        return Console(highlight=False, width=size.columns, height=size.lines)
    return found
