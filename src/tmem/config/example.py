"""Writes the commented example of a configuration from the table of keys.

``tmem install`` puts it in place, and ``docs/tmem.toml`` is it. Every key is commented out, so that the file
changes nothing until somebody edits it.
"""

from itertools import groupby

from tmem.config.keys import KEYS, variable

_HEAD = """\
# Configuration of tmem. Lines that begin with #name = or #[table] are the keys there are, with examples;
# what is left out has its default.
# Files /etc/tmem.d/*.toml are read after this one, in the order of their names, and change it key by key.
# A command's options and the environment variables given here count more than all files.
# A key that does not exist or a value that makes no sense is refused, with file and line: 'tmem doctor'.
"""

_SECTIONS = {
    "start": "What 'tmem start' does; in force when the manager starts: 'tmem restart --manager'.",
    "swap": "Defaults of 'tmem swap add'.",
    "mount": "Defaults of 'tmem mount' and mount -t fuse.tmem.",
    "client.NAME": (
        "Settings of a client, of which there may be any number. They are in force when the client comes\n"
        "# to be or the manager starts; 'tmem set' changes them until then."
    ),
    "client.NAME.swap": "The swap device of that client, for 'tmem swap add NAME' without further options.",
}

_TAIL = """\

# All of this is about the segment "default". Another one (tmem --name fast) has tables of its own, and
# nothing from above:
#[segment.fast.start]
#memory = "512M"
#[segment.fast.client.web2]
#weight = 50
"""


def example() -> str:
    """Return the text of the example."""
    parts = [_HEAD]
    for section, keys in groupby(KEYS, key=lambda key: key.section):
        parts.append(f"\n# {_SECTIONS[section]}\n#[{section.replace('NAME', 'web1')}]\n")
        for key in keys:
            named = f" ({variable(section, key.name)})" if section in ("start", "swap") else ""
            parts.append(f"# {key.help}{named}\n#{key.name} = {key.example}\n")
    return "".join([*parts, _TAIL])
