"""Streams in memory and by hand for tests of save files: frames of one's own, and the frames of a file."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tmem.backends.savefile import (
    HEAD_BYTES,
    MAX_FRAME_BYTES,
    PREAMBLE_BYTES,
    FrameReader,
    FrameWriter,
    Kind,
    aligned,
    new_buffer,
)
from tmem.backends.saverecords import Header
from tmem.types import PAGE_SIZE


class Stream:
    """A stream under construction."""

    def __init__(self, *clients: str, purpose: str = "save", **header: object) -> None:
        self._out = io.BytesIO()
        self.writer = FrameWriter(self._write)
        names = [{"name": name, "pages": 0, "data_bytes": 0, "memory_bytes": 0} for name in clients]
        document = Header.here(purpose, "elsewhere", (), "0" * 32).document()
        self.document(Kind.HEADER, {**document, "clients": names, **header}, 0)

    def document(self, kind: Kind, content: Mapping[str, object] | None = None, client: int = 1) -> None:
        self.writer.document(kind, client, content or {})

    def data(self, records: bytes, client: int = 1, pool: int = 0) -> None:
        block = new_buffer(aligned(HEAD_BYTES + len(records)))
        block[HEAD_BYTES : HEAD_BYTES + len(records)] = records
        self.writer.data(client, pool, block, len(records))

    def end(self) -> bytes:
        """Write the end of a save file, and return the whole."""
        writer = self.writer
        totals = {"clients": 1, "frames": writer.frames, "data_bytes": writer.data_bytes}
        self.document(Kind.END, totals, 0)
        return self.value

    @property
    def value(self) -> bytes:
        return self._out.getvalue()

    def _write(self, data: memoryview) -> None:
        self._out.write(data)


def client(name: str = "one", **changes: object) -> dict[str, object]:
    """The document of a client with one persistent pool."""
    settings = {"weight": 100, "cap_bytes": 0, "floor_bytes": 0, "compress": "lz4", "mode": "on"}
    return {"name": name, **settings, "authorised": [], "pools": [pool()], **changes}


def pool(**changes: object) -> dict[str, object]:
    """The document of a persistent pool 0."""
    return {"id": 0, "flags": 1 << 24 | 1, "exclusive": False, "uuid": None, **changes}


def raw_record(index: int, data: bytes) -> bytes:
    """A record of a page as it is, in object 0."""
    assert len(data) == PAGE_SIZE
    return bytes(24) + index.to_bytes(4, "little") + PAGE_SIZE.to_bytes(2, "little") + b"\1\0" + data


@dataclass(frozen=True)
class Part:
    """A frame where it stands in a stream."""

    kind: Kind
    start: int
    end: int


def parts(stream: bytes) -> list[Part]:
    """Return the frames of a sound stream."""
    source = io.BytesIO(stream)
    reader = FrameReader(reading(source), "stream")
    buffer = new_buffer(MAX_FRAME_BYTES)
    found, start = [], PREAMBLE_BYTES
    while start < len(stream):
        kind = reader.next(buffer).kind
        found.append(Part(kind, start, source.tell()))
        start = source.tell()
    return found


def reading(source: io.BytesIO) -> Callable[[memoryview], int]:
    """Return what a `FrameReader` reads with."""
    return lambda buffer: source.readinto(buffer)
