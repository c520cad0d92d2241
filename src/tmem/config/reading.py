"""Finds, reads and checks the files of the configuration; what is wrong is told with file and line.

Each file is checked by itself, then they are put together, the later ones over the earlier ones. A file that
is wrong is refused as a whole: `ConfigError` with one line that says what to do. tomllib knows no lines, so
the line of a key is looked for only when there is something to say of it. Not for what a key means: `keys`.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tmem.backends.paths import check_name
from tmem.config.keys import KEYS, Key, of_section
from tmem.config.place import DEFAULT_PATH, VARIABLE
from tmem.errors import ConfigError, TmemError

OWN_SEGMENT = "default"
"""The segment that the tables at the top of the file are about; others have theirs in [segment.NAME...]."""

_Table = dict[str, object]
_Path = tuple[str, ...]
_AT_LINE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


@dataclass(frozen=True)
class Config:
    """What all files together say."""

    tree: Mapping[str, object] = field(default_factory=dict)
    """Tables as TOML has them; every key is known and every value makes sense."""
    sources: tuple[Path, ...] = ()
    """The files that were read, in order."""

    def section(self, segment: str, *path: str) -> dict[str, object]:
        """Return the values of one table, such as ``section("default", "client", "web1", "swap")``."""
        place = path if segment == OWN_SEGMENT else ("segment", segment, *path)
        table = _at(self.tree, place)
        return {name: value for name, value in table.items() if not isinstance(value, dict)} if table else {}

    def client(self, segment: str, name: str) -> dict[str, int | str]:
        """Return the settings of a client under the names of its attributes; sizes in bytes."""
        keys = of_section("client.NAME")
        settings: dict[str, int | str] = {}
        for key, value in self.section(segment, "client", name).items():
            checked = keys[key].kind.check(value)
            assert isinstance(checked, int | str)
            settings[{"cap": "cap_bytes", "floor": "floor_bytes"}.get(key, key)] = checked
        return settings


def files(chosen: Path | None = None) -> list[Path]:
    """Return the files that are there, in the order in which they count.

    `chosen` is in place of ``/etc/tmem.toml``. It must be there then; `ConfigError` if it is not.
    """
    first = DEFAULT_PATH if chosen is None else chosen
    try:
        there = first.exists()
        dropins = sorted(first.with_suffix(".d").glob("*.toml"))
    except OSError as error:
        raise ConfigError(f"{first} cannot be read ({error.strerror}): run this as its user") from None
    if chosen is not None and not there:
        raise ConfigError(
            f"there is no configuration {chosen}: make it, or leave out --config and {VARIABLE}"
        )
    return [*([first] if there else []), *dropins]


def load(chosen: Path | None = None) -> Config:
    """Read and check all files. `ConfigError` for the first thing that is wrong."""
    sources = files(chosen)
    tree: _Table = {}
    for source in sources:
        _merge(tree, read(source))
    return Config(tree, tuple(sources))


def read(path: Path) -> _Table:
    """Read and check one file."""
    import tomllib  # here: most commands read nothing

    try:
        text = path.read_bytes().decode()
        tree: _Table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; name a file that this user may read"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8: write it anew as plain text") from None
    except tomllib.TOMLDecodeError as error:
        found = _AT_LINE.search(str(error))
        line = found[1] if found and found[1] else str(max(len(text.splitlines()), 1))
        raise ConfigError(f"{path}:{line}: no TOML: {_AT_LINE.sub('', str(error))}") from None
    try:
        _check_table(tree, _SCHEMA, ())
    except _WrongError as wrong:
        raise ConfigError(f"{path}:{line_of(text, wrong.path)}: {wrong}") from None
    return tree


def line_of(text: str, path: _Path) -> int:
    """Return the line (from 1) on which the statement begins that brings the key `path` into `text`.

    A text that is cut between two statements is TOML, one that is cut inside a statement is not, and comments
    and blank lines leave it TOML. So the first cut that has the key is the end of its statement, and the
    last good cut before that is the end of the statement, comment or blank line before. Quadratic, for an
    error message.
    """
    import tomllib

    lines = text.splitlines(keepends=True)
    good = 0
    for end in range(1, len(lines) + 1):
        try:
            tree = tomllib.loads("".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        if _has(tree, path):
            return good + 1
        good = end
    return max(len(lines), 1)


class _WrongError(Exception):
    """What is wrong with the key at `path`."""

    def __init__(self, path: _Path, text: str) -> None:
        super().__init__(text)
        self.path = path


class _Schema(dict[str, "_Schema | Key"]):
    """What may stand in a table; under "*" what any name stands for."""


def _schema() -> _Schema:
    top = _Schema()
    for key in KEYS:
        table = top
        for part in key.section.split("."):
            inner = table.setdefault("*" if part == "NAME" else part, _Schema())
            assert isinstance(inner, _Schema)
            table = inner
        table[key.name] = key
    return _Schema({**top, "segment": _Schema({"*": _Schema(top)})})


_SCHEMA = _schema()


def _check_table(table: Mapping[str, object], schema: _Schema, at: _Path) -> None:
    for name, value in table.items():
        path = (*at, name)
        any_name = name == "*" or name not in schema
        known = schema.get("*" if any_name else name)
        if known is None:
            raise _WrongError(path, _unknown(name, schema, at))
        if any_name:
            try:
                check_name(name, f"{at[-1]} name")
            except TmemError as error:
                raise _WrongError(path, str(error)) from None
        if isinstance(known, Key):
            _check_value(known, value, path)
        elif isinstance(value, dict):
            _check_table(value, known, path)
        else:
            raise _WrongError(
                path, f"{'.'.join(path)} is a table: write [{'.'.join(path)}] and its keys below"
            )


def _check_value(key: Key, value: object, path: _Path) -> None:
    try:
        key.kind.check(value)
    except ValueError:
        shown = "a table" if isinstance(value, dict) else repr(value)
        raise _WrongError(path, f"{'.'.join(path)} cannot be {shown}: write {key.kind.words}") from None


def _unknown(name: str, schema: _Schema, at: _Path) -> str:
    where = f"[{'.'.join(at)}]" if at else "the file"
    close = difflib.get_close_matches(name.replace("-", "_"), schema, 1)
    names = ", ".join(schema)
    hint = f"did you mean {close[0]!r}?" if close else f"it may have {names}"
    return f"there is no {name!r} in {where}: {hint}"


def _merge(tree: _Table, later: Mapping[str, object]) -> None:
    for name, value in later.items():
        present = tree.get(name)
        if isinstance(value, dict) and isinstance(present, dict):
            _merge(present, value)
        else:
            tree[name] = value


def _at(tree: Mapping[str, object], path: _Path) -> Mapping[str, object] | None:
    table: object = tree
    for name in path:
        table = table.get(name) if isinstance(table, Mapping) else None
    return table if isinstance(table, Mapping) else None


def _has(tree: Mapping[str, object], path: _Path) -> bool:
    table = _at(tree, path[:-1])
    return table is not None and path[-1] in table
