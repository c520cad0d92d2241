"""A swap device as it is written down: what is exported, where, and how it is attached to this machine.

The record ``swap-CLIENT.json`` in the segment's state directory is the only state that commands and the
server share: the server reads it when it starts, `attach` notes in it what a later process must take down. It
is replaced as a whole; commands on one client are serialised by `lifecycle`, not here.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from tmem.backends.paths import SegmentPaths, check_name
from tmem.backends.processes import Process
from tmem.errors import TmemError
from tmem.types import MAX_INDEX, PAGE_SIZE, format_size

_KIND = "tmem swap device"
_VERSION = 1
_SUN_PATH_BYTES = 107


@dataclass(frozen=True)
class Attachment:
    """How an export became a block device; what is None has not come about yet.

    `kind` is "nbd" (the kernel's driver) or "nbdfuse" (a FUSE file at `mount_dir` made by `process`, under a
    loop device); `device` is the block device, such as ``/dev/loop0``.
    """

    kind: Literal["nbd", "nbdfuse"]
    device: str | None = None
    mount_dir: str | None = None
    process: Process | None = None


@dataclass(frozen=True)
class SwapUse:
    """How an attached export is used as swap: its priority (None: the kernel's choice) and whether the kernel
    tells of freed pages."""

    priority: int | None = None
    discard: bool = True


@dataclass(frozen=True)
class Export:
    """An NBD export of `size_bytes`, one per client; its name is the client's.

    Exactly one of `unix` (path of the socket) and `tcp` (host, port) is set. `tls_psk` is the file of
    pre-shared keys with which connections over TCP must be encrypted, `tls_user` the key's owner in it.
    `realtime` runs the server under SCHED_RR. `reserve` says that the whole size is set aside. `use` is noted
    once the attached device is in use as swap.
    """

    client: str
    size_bytes: int
    unix: str | None = None
    tcp: tuple[str, int] | None = None
    tls_psk: str | None = None
    tls_user: str | None = None
    reserve: bool = False
    realtime: bool = False
    attachment: Attachment | None = None
    use: SwapUse | None = None

    def __post_init__(self) -> None:
        check_name(self.client, "client name")
        if self.size_bytes % PAGE_SIZE or not 0 < self.size_bytes // PAGE_SIZE <= MAX_INDEX + 1:
            raise TmemError(
                f"a swap device of {self.size_bytes} bytes is not possible: give a multiple of {PAGE_SIZE} "
                f"bytes up to {format_size((MAX_INDEX + 1) * PAGE_SIZE)}"
            )
        if (self.unix is None) == (self.tcp is None):
            raise TmemError("an export listens on one address: give either a unix socket or a TCP address")
        if self.unix is not None and len(os.fsencode(self.unix)) > _SUN_PATH_BYTES:
            raise TmemError(
                f"{self.unix} is too long for a socket: give a path of up to {_SUN_PATH_BYTES} bytes"
            )
        if self.tls_psk is not None and self.tcp is None:
            raise TmemError("TLS is for TCP: leave --tls-psk out, or give --tcp HOST:PORT")

    @property
    def uri(self) -> str:
        """The NBD URI at which clients find the export."""
        if self.tcp is None:
            return f"nbd+unix:///{self.client}?socket={quote(self.unix or '', safe='/')}"
        host, port = self.tcp
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if self.tls_psk is None:
            return f"nbd://{address}/{self.client}"
        user = f"{quote(self.tls_user)}@" if self.tls_user else ""
        return f"nbds://{user}{address}/{self.client}?tls-psk-file={quote(self.tls_psk, safe='/')}"

    def replace_attachment(self, attachment: Attachment | None) -> "Export":
        """Return the export attached as `attachment` says; what is not attached is not in use either."""
        return dataclasses.replace(self, attachment=attachment, use=self.use if attachment else None)

    def save(self, paths: SegmentPaths) -> None:
        """Write the record, readable by its owner only, whole or not at all."""
        record = paths.record("swap", self.client)
        document = {"kind": _KIND, "version": _VERSION, **dataclasses.asdict(self)}
        write_json(record, document)


def emptying(paths: SegmentPaths, client: str) -> Path:
    """Return the mark that is there from before the device's swapoff until it is in use again (`shrink`)."""
    return paths.state / f"emptying-{client}"


def write_json(path: Path, document: dict[str, object]) -> None:
    """Write a record, mode 0600, in place of what was there; a reader sees the old one or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load(paths: SegmentPaths, client: str) -> Export:
    """Read the record of `client`.

    Raises `TmemError` if there is none, or if it is damaged or not ours.
    """
    record = paths.record("swap", client)
    try:
        text = record.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TmemError(
            f"there is no swap device {client}: make it with tmem swap add {client} --size SIZE"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise TmemError(f"{record} cannot be read: {error}") from None
    try:
        return _parse(json.loads(text), client)
    except (ValueError, TypeError, KeyError, AttributeError, TmemError) as error:
        raise TmemError(
            f"{record} is damaged or not of this version ({error}): remove it, then add again"
        ) from None


def exists(paths: SegmentPaths, client: str) -> bool:
    """Return whether a record of `client` exists, sound or not."""
    return paths.record("swap", client).exists()


def load_all(paths: SegmentPaths) -> list[Export]:
    """Read the records of all swap devices of the segment, by name; TmemError as in `load`."""
    names = sorted(
        path.name.removeprefix("swap-").removesuffix(".json") for path in paths.state.glob("swap-*.json")
    )
    return [load(paths, name) for name in names]


def _parse(document: object, client: str) -> Export:
    if not isinstance(document, dict) or document.pop("kind", None) != _KIND:
        raise ValueError("not a record of a swap device")
    if document.pop("version", None) != _VERSION:
        raise ValueError("another version")
    if document["client"] != client:
        raise ValueError("of another client")
    if (tcp := document["tcp"]) is not None:
        host, port = tcp
        document["tcp"] = (host, port)
    if (attachment := document["attachment"]) is not None:
        if (process := attachment["process"]) is not None:
            attachment["process"] = Process(**process)
        document["attachment"] = Attachment(**attachment)
    if (use := document.setdefault("use", None)) is not None:  # of a device added before there was it
        document["use"] = SwapUse(**use)
    for key, types in _TYPES.items():
        if not isinstance(document[key], types) or (int in types and isinstance(document[key], bool)):
            raise ValueError(f"{key} is {document[key]!r}")
    return Export(**document)


_TEXT = (str, type(None))
_TYPES: dict[str, tuple[type, ...]] = {
    "client": (str,),
    "size_bytes": (int,),
    "unix": _TEXT,
    "tcp": (tuple, type(None)),
    "tls_psk": _TEXT,
    "tls_user": _TEXT,
    "reserve": (bool,),
    "realtime": (bool,),
    "attachment": (Attachment, type(None)),
    "use": (SwapUse, type(None)),
}
