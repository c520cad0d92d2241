"""The one table of all keys of the configuration: where each stands, what it takes, and what it is for.

Reading, the example file, the options of commands and the environment variables are all made from it. Not for
reading files: `reading`. A section is a table of TOML; ``NAME`` in it stands for the name of a client.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tmem.errors import TmemError
from tmem.types import CODECS, MOST_WEIGHT, parse_host_port, parse_range, parse_size, parse_time

Value = bool | int | str | list[str]
"""What a key may have, as it stands in the file."""


@dataclass(frozen=True)
class Kind:
    """What a key takes: in words, and the function that returns the value or raises ValueError."""

    words: str
    check: Callable[[object], Value]


@dataclass(frozen=True)
class Key:
    """One key."""

    section: str
    """``start``, ``swap``, ``mount``, ``client.NAME`` or ``client.NAME.swap``."""
    name: str
    """The key; the option is called so, with - for _."""
    kind: Kind
    help: str
    """What it is for, as the example file says it."""
    example: str
    """A value, in TOML."""


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if not isinstance(value, str):
        raise ValueError
    try:
        return parse_size(value)
    except TmemError:
        raise ValueError from None


def _range(value: object) -> int | str:
    if not isinstance(value, str):
        return _size(value)
    try:
        parse_range(value)
    except TmemError:
        raise ValueError from None
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _address(value: object) -> str:
    text = _text(value)
    try:
        parse_host_port(text)
    except TmemError:
        raise ValueError from None
    return text


def _address_or_off(value: object) -> str:
    return "off" if value == "off" else _address(value)


def _time_or_off(value: object) -> str:
    text = _text(value)
    try:
        if text != "off":
            parse_time(text)
    except TmemError:
        raise ValueError from None
    return text


def _texts(value: object) -> list[str]:
    if not isinstance(value, list):
        raise ValueError
    return [_text(one) for one in value]


def _whole(least: int, most: int) -> Kind:
    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError
        return value

    return Kind(f"a whole number from {least} to {most}", check)


def _one_of(choices: tuple[str, ...]) -> Kind:
    def check(value: object) -> str:
        if value not in choices:
            raise ValueError
        return _text(value)

    return Kind("one of " + ", ".join(f'"{choice}"' for choice in choices), check)


SIZE = Kind('a size, such as "512M" or "4G"', _size)
RANGE = Kind('a size or two, such as "4G" or "1G..4G"', _range)
YES = Kind("true or false", _boolean)
PATH = Kind("a path in quotes", _text)
ADDRESS = Kind('an address, such as "127.0.0.1:9753" or "[::1]:9753"', _address)
METRICS = Kind(ADDRESS.words + ', or "off"', _address_or_off)
TIME = Kind('a time, such as "30m" or "1h", or "off"', _time_or_off)
WORD = Kind("a path or URL in quotes", _text)
WORDS = Kind('a list of options in quotes, such as ["ro", "read_ahead=8M"]', _texts)
PRIORITY = _whole(-1, 32767)

KEYS = (
    Key(
        "start",
        "memory",
        RANGE,
        "Bound of the segment, when it is created, or between which sizes it follows the memory that the "
        "machine can spare. Without it: half of the RAM.",
        '"512M..2G"',
    ),
    Key("start", "realtime", YES, "Run the manager, and all that it starts, under SCHED_RR.", "true"),
    Key(
        "start",
        "condense",
        _whole(0, 100),
        "Per cent of one CPU for storing pages smaller that nobody asks for (5 without it; 0: none).",
        "10",
    ),
    Key(
        "start",
        "condense_level",
        _whole(1, 19),
        "Level of zstd for that (3 without it): higher ones make pages smaller and take more CPU time for "
        "each.",
        "9",
    ),
    Key(
        "start",
        "pack",
        YES,
        "Store swapped neighbours that nobody asks for together (no without it).",
        "true",
    ),
    Key(
        "start",
        "tier_cold",
        TIME,
        "Swapped pages that nobody asked for in this time go to the client's tier although there is memory. "
        "Without it only when memory is short.",
        '"1h"',
    ),
    Key(
        "start",
        "repatriate",
        TIME,
        "What this machine has swapped out comes back when memory has been in plenty for this time. Without "
        "it not by itself.",
        '"30m"',
    ),
    Key(
        "start",
        "metrics",
        METRICS,
        "Serve the statistics for Prometheus there. Without it nobody does.",
        '"127.0.0.1:9753"',
    ),
    Key("swap", "reserve", YES, "Promise each device room for all of its pages, even uncompressed.", "true"),
    Key("swap", "priority", PRIORITY, "Priority as swap, of devices of this machine; higher first.", "100"),
    Key("swap", "discard", YES, "Hear of pages that the kernel has freed (the default).", "true"),
    Key("swap", "realtime", YES, "Run the servers under SCHED_RR.", "true"),
    Key(
        "swap", "tls_psk", PATH, "Encrypt TCP with the pre-shared keys in this file.", '"/etc/tmem/keys.psk"'
    ),
    Key(
        "swap",
        "tier",
        WORD,
        "Where cold pages go when memory is short: a directory, for a file of the device's size each.",
        '"/var/lib/tmem/"',
    ),
    Key(
        "mount",
        "options",
        WORDS,
        "Options of every mount (docs/mounts.md); those of its own line come after them.",
        '["noatime", "read_ahead=8M"]',
    ),
    Key(
        "client.NAME",
        "weight",
        _whole(0, MOST_WEIGHT),
        "Its share of the ephemeral memory under contention, in proportion to the others' (100 without it).",
        "200",
    ),
    Key("client.NAME", "cap", SIZE, 'The most that its pages take; "0": no cap.', '"1G"'),
    Key(
        "client.NAME",
        "floor",
        SIZE,
        "What nobody else may take from it. This file never lowers it.",
        '"256M"',
    ),
    Key("client.NAME", "compress", _one_of(CODECS), "How its pages are compressed from then on.", '"auto"'),
    Key("client.NAME", "dedup", YES, "Keep equal pages of its swap device once.", "true"),
    Key("client.NAME.swap", "size", SIZE, "Size of its swap device.", '"4G"'),
    Key("client.NAME.swap", "attach", YES, "Attach it here as a block device, and swap to it.", "false"),
    Key("client.NAME.swap", "reserve", YES, "As in [swap], for this device.", "true"),
    Key("client.NAME.swap", "unix", PATH, "Serve it on this socket.", '"/run/web1.sock"'),
    Key("client.NAME.swap", "tcp", ADDRESS, "Serve it on this address.", '"192.0.2.1:10809"'),
    Key("client.NAME.swap", "tls_psk", PATH, "As in [swap].", '"/etc/tmem/keys.psk"'),
    Key("client.NAME.swap", "tier", WORD, "As in [swap]; or a file.", '"/srv/web1.spill?size=8G"'),
    Key("client.NAME.swap", "priority", PRIORITY, "As in [swap].", "100"),
    Key("client.NAME.swap", "discard", YES, "As in [swap].", "true"),
    Key("client.NAME.swap", "realtime", YES, "As in [swap].", "true"),
)
"""Every key, in the order of the example file."""


def of_section(section: str) -> dict[str, Key]:
    """Return the keys of a section by their names."""
    return {key.name: key for key in KEYS if key.section == section}


def variable(section: str, name: str) -> str:
    """Return the environment variable that stands for a key of `start` or `swap`."""
    return f"TMEM_{section}_{name}".upper()
