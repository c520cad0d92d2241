"""Where the configuration is. Every command asks, so nothing is imported and nothing read here."""

import os
from pathlib import Path

DEFAULT_PATH = Path("/etc/tmem.toml")
VARIABLE = "TMEM_CONFIG"
"""The environment variable that names another file; its drop-ins lie in FILE with .d in place of .toml."""


def chosen_file(option: str | None = None) -> Path | None:
    """Return the file that an option or the environment names, as an absolute path; None: the usual one."""
    named = option or os.environ.get(VARIABLE)
    return Path(named).absolute() if named else None
