"""The JSON documents of save files and handoffs: who wrote, clients with settings and pools, totals.

Each is a frozen dataclass that checks itself, so that what a reader hands on is possible: ValueError says
what is not. A pool's `flags` are the word that tmem's guests gave new_pool: bit 0 persistent, bit 1 shared,
bit 2 precompressed (always refused), bits 4 to 7 the page size, bits 24 to 31 the version of the
specification; all others are 0. Pure: no segment is touched here but by `of`, which reads one.
"""

import platform
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import TYPE_CHECKING, Self
from uuid import UUID

from tmem.backends.paths import NAME_BYTES
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native

POOLS_PER_CLIENT = 16
UUIDS_PER_CLIENT = 16

_PERSISTENT, _SHARED, _PRECOMPRESSED = 1, 2, 4
_PAGE_SIZE_CODE = (PAGE_SIZE.bit_length() - 13) << 4
_PAGE_SIZE_MASK = 0xF0
_SPEC_VERSION = 1
_RESERVED = 0x00FFFF08

# What an index takes: about the slots that a page needs, and a node's own.
_SLOT_BYTES, _NODE_BYTES = 16, 256


class _Document:
    """Common construction from a JSON object: exactly the fields, of exactly their types."""

    @classmethod
    def parse(cls, document: Mapping[str, object]) -> Self:
        """Build from a JSON object; ValueError if it lacks something, has more, or cannot be."""
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if odd := names ^ document.keys():
            raise ValueError(f"{cls.__name__} with or without {', '.join(sorted(odd))}")
        return cls(**cls._converted(dict(document)))

    @classmethod
    def _converted(cls, values: dict[str, object]) -> dict[str, object]:
        return values

    def document(self) -> dict[str, object]:
        """Return the JSON object."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def _check(self, name: str, kind: type, least: int = 0, most: int = 2**63 - 1) -> None:
        value = getattr(self, name)
        if type(value) is not kind or (isinstance(value, int) and not least <= value <= most):
            raise ValueError(f"{name} is {value!r}")


@dataclass(frozen=True)
class Summary(_Document):
    """What the header says of a client that follows: about its size, when copying began."""

    name: str
    pages: int
    """In its persistent pools."""
    data_bytes: int
    """Memory of those pages."""
    memory_bytes: int
    """About what they need elsewhere, with their index."""

    def __post_init__(self) -> None:
        _check_client_name(self.name)
        for name in ("pages", "data_bytes", "memory_bytes"):
            self._check(name, int)

    @classmethod
    def of(cls, client: "_native.Client") -> "Summary":
        """Read the summary of `client`. PoolError if it is gone."""
        counts = []
        for pool in client.pools():
            with suppress(PoolError):  # it has just been destroyed
                if pool.persistent:
                    counts.append(pool.statistics())
        pages, data, nodes = (sum(one[name] for one in counts) for name in ("pages", "bytes", "nodes"))
        if twins := sum(one["twin_pages"] for one in counts):  # elsewhere each is a page of its own
            whole = client.statistics()
            data += twins * whole["original_bytes"] // max(whole["original_pages"], 1)
        if any(one["packed_pages"] for one in counts):
            data += client.statistics()["pack_bytes"] * 6 // 5
        return cls(client.name, pages, data, data + pages * _SLOT_BYTES + nodes * _NODE_BYTES)


@dataclass(frozen=True)
class Header(_Document):
    """The first frame of every stream."""

    purpose: str
    """"save", "handoff", or "receive" for the answers to that."""
    tmem: str
    """Version of tmem that wrote it."""
    machine: str
    """Where, for people."""
    segment: str
    time: str
    """UTC, ISO 8601, for people."""
    byteorder: str
    page_size: int
    identity: str
    """Random, so that no two streams share a chain."""
    clients: tuple[Summary, ...]

    def __post_init__(self) -> None:
        for name in ("purpose", "tmem", "machine", "segment", "time", "byteorder", "identity"):
            self._check(name, str)
        self._check("page_size", int)

    @classmethod
    def here(cls, purpose: str, name: str, clients: tuple[Summary, ...], identity: str) -> "Header":
        """Return the header of a stream that this process writes for the segment called `name`."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(
            *(purpose, metadata.version("tmem"), platform.node(), name, now, sys.byteorder, PAGE_SIZE),
            *(identity, clients),
        )

    @classmethod
    def _converted(cls, values: dict[str, object]) -> dict[str, object]:
        return {**values, "clients": tuple(Summary.parse(one) for one in _objects(values["clients"]))}


@dataclass(frozen=True)
class PoolRecord(_Document):
    """A pool as it is to be created again."""

    id: int
    flags: int
    exclusive: bool
    uuid: str | None
    """32 hexadecimal digits, of a shared one."""

    def __post_init__(self) -> None:
        self._check("id", int, most=POOLS_PER_CLIENT - 1)
        self._check("flags", int, most=2**32 - 1)
        self._check("exclusive", bool)
        _check_flags(self.flags)
        if self.persistent and self.shared:
            raise ValueError(f"pool {self.id} is persistent and shared, which no pool can be")
        if self.shared != (self.uuid is not None):
            raise ValueError(f"pool {self.id} is shared without a UUID, or has one although it is private")
        if self.uuid is not None:
            _check_uuid(self.uuid)
            if self.exclusive:
                raise ValueError(f"pool {self.id} is shared and exclusive, which no pool can be")

    @property
    def persistent(self) -> bool:
        """Its pages are in the file; others begin empty."""
        return bool(self.flags & _PERSISTENT)

    @property
    def shared(self) -> bool:
        """It is joined by its UUID."""
        return bool(self.flags & _SHARED)

    @classmethod
    def of(cls, pool: "_native.Pool") -> "PoolRecord":
        """Read the record of `pool`."""
        flags = (_SPEC_VERSION << 24) | _PAGE_SIZE_CODE
        flags |= (_PERSISTENT if pool.persistent else 0) | (_SHARED if pool.uuid is not None else 0)
        return cls(pool.id, flags, pool.exclusive, None if pool.uuid is None else pool.uuid.hex())


@dataclass(frozen=True)
class ClientRecord(_Document):
    """A client as it is to be created again."""

    name: str
    weight: int
    cap_bytes: int
    floor_bytes: int
    compress: str
    dedup: bool
    mode: str
    authorised: tuple[str, ...]
    """UUIDs of shared pools, 32 hexadecimal digits each."""
    pools: tuple[PoolRecord, ...]

    def __post_init__(self) -> None:
        _check_client_name(self.name)
        self._check("weight", int, most=65535)
        self._check("cap_bytes", int)
        self._check("floor_bytes", int)
        self._check("dedup", bool)
        if self.compress not in ("auto", "lz4", "none") or self.mode not in ("on", "frozen", "off"):
            raise ValueError(f"compression {self.compress!r}, mode {self.mode!r}")
        if len(set(self.authorised)) != len(self.authorised) or len(self.authorised) > UUIDS_PER_CLIENT:
            raise ValueError(f"{len(self.authorised)} UUIDs authorised, or one of them twice")
        for uuid in self.authorised:
            _check_uuid(uuid)
        if len({pool.id for pool in self.pools}) != len(self.pools):
            raise ValueError("two pools of one number")
        if odd := {pool.uuid for pool in self.pools if pool.shared} - set(self.authorised):
            raise ValueError(f"a shared pool {odd.pop()} that the client is not authorised for")

    @classmethod
    def of(cls, client: "_native.Client") -> "ClientRecord":
        """Read the record of `client`. PoolError if it is gone."""
        pools = tuple(PoolRecord.of(pool) for pool in client.pools())
        # A pool that is there now was authorised, whatever is revoked between the two looks.
        uuids = {uuid.hex() for uuid in client.authorised()} | {pool.uuid for pool in pools if pool.uuid}
        return cls(
            *(client.name, client.weight, client.cap_bytes, client.floor_bytes, client.compress),
            *(client.dedup, client.mode, tuple(sorted(uuids)), pools),
        )

    @classmethod
    def parse(cls, document: Mapping[str, object]) -> Self:
        """Build from a JSON object, or from one that was written before there was dedup."""
        return super().parse({"dedup": False, **document})

    @classmethod
    def _converted(cls, values: dict[str, object]) -> dict[str, object]:
        authorised = values["authorised"]
        if not isinstance(authorised, list):
            raise ValueError("authorised is no list")
        pools = tuple(PoolRecord.parse(one) for one in _objects(values["pools"]))
        return {**values, "authorised": tuple(authorised), "pools": pools}


@dataclass(frozen=True)
class Totals(_Document):
    """What the end of a save file says; a chain without gaps proves it already, this is for people too."""

    clients: int
    frames: int
    """Before the end itself."""
    data_bytes: int

    def __post_init__(self) -> None:
        for name in ("clients", "frames", "data_bytes"):
            self._check(name, int)


def _check_flags(flags: int) -> None:
    """Refuse what new_pool refuses."""
    if flags >> 24 != _SPEC_VERSION:
        raise ValueError(f"a pool of version {flags >> 24} of the specification, not {_SPEC_VERSION}")
    if flags & _PAGE_SIZE_MASK != _PAGE_SIZE_CODE:
        raise ValueError(f"a pool with pages of {PAGE_SIZE << ((flags & _PAGE_SIZE_MASK) >> 4)} bytes")
    if flags & _PRECOMPRESSED:
        raise ValueError("a pool of precompressed pages")
    if flags & _RESERVED:
        raise ValueError(f"a pool with reserved flags ({flags & _RESERVED:#x})")


def _check_client_name(name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) <= NAME_BYTES or "\0" in name:
        raise ValueError(f"a client called {name!r}")


def _check_uuid(text: object) -> None:
    try:
        value = UUID(hex=text) if isinstance(text, str) and len(text) == 32 else None
    except ValueError:
        value = None
    if value is None or value.int in (0, 2**128 - 1):
        raise ValueError(f"a UUID {text!r}")


def _objects(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError("no list of objects")
    return value


def summaries(clients: Iterable["_native.Client"]) -> tuple[Summary, ...]:
    """Return the summaries of `clients`, without those that have ended meanwhile."""
    found = []
    for client in clients:
        with suppress(PoolError):
            found.append(Summary.of(client))
    return tuple(found)
