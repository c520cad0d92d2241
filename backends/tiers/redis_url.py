"""The URL of a Valkey or Redis tier: where the servers are, how to get in, and what is demanded of them.

    redis://[[USER]:PASSWORD@]HOST[:PORT][/DB][?OPTION=VALUE&...]          one server
    redis+cluster://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT],...[?...]    a cluster; any of its nodes will do
    rediss://, rediss+cluster://                                           the same over TLS

Options: ``replicas=N`` (how many replicas must have a batch before it counts as stored), ``timeout=SECONDS``
(how long one call may take in all), ``user=NAME``, ``password_file=FILE`` (read at every connect; keeps the
password out of command lines), ``tls_ca=FILE``, ``tls_cert=FILE``, ``tls_key=FILE``, ``tls_hostname=no`` (the
certificate's signature is checked, not its name). Not for connecting: `redis_nodes`. Plain values, any
thread.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from tmem.errors import TierError

DEFAULT_PORT = 6379
DEFAULT_TIMEOUT_SECONDS = 20.0
"""Longer than a failover with cluster-node-timeout at its default of 15 s, from failure to election."""

_SCHEMES = {"redis": (False, False), "redis+cluster": (True, False)} | {
    "rediss": (False, True),
    "rediss+cluster": (True, True),
}
_EXAMPLES = "redis://HOST:PORT/0?replicas=1 or redis+cluster://HOST:PORT,HOST:PORT (rediss for TLS)"


@dataclass(frozen=True)
class RedisAddress:
    """What a URL says."""

    cluster: bool
    servers: tuple[tuple[str, int], ...]
    """Host and port of each server that the URL names."""
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: Path | None = None
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_hostname: bool = True
    replicas: int | None = None
    """How many replicas must acknowledge; None: all that the cluster lists for the primary, at least one."""
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS

    @classmethod
    def parse(cls, url: str, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> "RedisAddress":
        """Return what `url` says; `timeout_seconds` unless it says.

        TierError in one line if it is not such a URL; no password shows in it.
        """
        scheme, separator, rest = url.partition("://")
        if scheme not in _SCHEMES or not separator:
            raise TierError(f"{scheme!r} is no tier beyond RAM: use {_EXAMPLES}")
        cluster, tls = _SCHEMES[scheme]
        rest, _, query = rest.partition("?")
        rest, _, database = rest.partition("/")
        login, at, places = rest.rpartition("@")
        if "@" in database or ("@" in query and ":" in rest and not at):
            raise TierError("write /, ? and @ in the password of a tier's URL as %2F, %3F and %40")
        user, colon, password = login.partition(":")
        if at and not colon:
            raise TierError(
                "the tier's URL has a name without password: use USER:PASSWORD@, or user= and password_file="
            )
        if "," in places and not cluster:
            raise TierError(f"several servers are a cluster: use {scheme}+cluster://{places}")
        address = cls(
            cluster,
            tuple(_server(place) for place in places.split(",")),
            database=_database(database, cluster),
            user=unquote(user) or None,
            password=unquote(password) or None,
            tls=tls,
            timeout_seconds=timeout_seconds,
        )
        try:
            options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        except ValueError:
            raise TierError(
                f"what follows '?' in the tier's URL is not NAME=VALUE&...: {_OPTIONS_TEXT}"
            ) from None
        for name, value in options:
            address = address._with(name, value)
        return address._checked()

    def _with(self, name: str, value: str) -> "RedisAddress":
        if name not in _OPTIONS:
            raise TierError(f"{name!r} is no option of a tier's URL: {_OPTIONS_TEXT}")
        parse, wanted = _OPTIONS[name]
        try:
            return replace(self, **{_FIELDS.get(name, name): parse(value)})
        except ValueError:
            raise TierError(f"{name}={value} in the tier's URL: use {name}={wanted}") from None

    def _checked(self) -> "RedisAddress":
        if self.password and self.password_file:
            raise TierError("the tier's URL has a password and password_file=: use one of them")
        if self.user and not (self.password or self.password_file):
            raise TierError("the tier's URL has a user without password: add password_file=FILE")
        if not self.tls and (self.tls_ca or self.tls_cert or self.tls_key or not self.tls_hostname):
            raise TierError("the tier's URL has tls_ options without TLS: begin it with rediss")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise TierError("the tier's URL needs both of tls_cert= and tls_key=, or none")
        return self

    @staticmethod
    def shown(url: str) -> str:
        """Return a URL, whatever it is, with nothing of what may be a password."""
        return re.sub(r"://([^:@/?]*):.*@", r"://\1:...@", url)

    def __str__(self) -> str:
        """Where it is, to be shown to people: without password."""
        scheme = next(name for name, kind in _SCHEMES.items() if kind == (self.cluster, self.tls))
        places = ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.servers
        )
        return f"{scheme}://{places}" + ("" if self.cluster else f"/{self.database}")


_PLACE = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:@/\s]+))(?::([0-9]{1,5}))?")


def _server(place: str) -> tuple[str, int]:
    found = _PLACE.fullmatch(place)
    if found is None or int(found[3] or DEFAULT_PORT) > 65535:
        raise TierError(
            f"{place!r} in the tier's URL is no server: use HOST:PORT, or [ADDRESS]:PORT for IPv6"
        )
    return found[1] or found[2], int(found[3] or DEFAULT_PORT)


def _database(text: str, cluster: bool) -> int:
    if cluster and text not in ("", "0"):
        raise TierError(f"a cluster has no database {text}: leave out what follows the last server")
    if text and not (text.isascii() and text.isdecimal()):
        raise TierError(
            f"{text!r} in the tier's URL is no database: use a number, such as redis://HOST:PORT/0"
        )
    return int(text or 0)


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 100:
        raise ValueError(text)
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 3600:
        raise ValueError(text)
    return value


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():  # a manager runs elsewhere than who types the URL
        raise ValueError(text)
    return path


def _switch(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(text)
    return text == "yes"


def _text(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "replicas": (_count, "NUMBER"),
    "timeout": (_seconds, "SECONDS, from 0.01 to 3600"),
    "user": (_text, "NAME"),
    "password_file": (_file, "/ABSOLUTE/PATH"),
    "tls_ca": (_file, "/ABSOLUTE/PATH"),
    "tls_cert": (_file, "/ABSOLUTE/PATH"),
    "tls_key": (_file, "/ABSOLUTE/PATH"),
    "tls_hostname": (_switch, "yes or no"),
}
_FIELDS = {"timeout": "timeout_seconds"}
_OPTIONS_TEXT = f"use {', '.join(f'{name}=' for name in _OPTIONS)}"
