"""The format of save files and of the streams of a handoff: frames in a chain that nothing can leave.

    preamble   magic (8 bytes), version (u32), checksum of these 12 bytes (its low 32 bits), zeros
    frame      length (u32), kind (u8), pool (u8), client (u16), checksum of what follows these 24 bytes
               (u64), chain (u64), then `length` bytes of payload, zeros
    ...        the first frame is the header, the last of a save file the end

All little-endian. The preamble and every frame begin at a multiple of 4096 bytes, which is what the zeros are
for: files are written past the page cache, straight from the blocks that the core fills. Checksums are
`_native.checksum`. The chain is the checksum of the previous frame's chain (of the whole preamble for the
first) and of this frame's other fields, so a frame that is damaged, missing, repeated, out of order or of
another file is noticed before its payload is believed: the header carries a random number. Nothing seeks, so
pipes do. The payload of a DATA frame is records as the core exports them, of every other kind JSON;
`saverecords` has the documents, `copying` and `restoring` what the frames mean.

Not for files and processes: the caller brings what writes and reads. Not thread-safe: one thread a writer,
one a reader.
"""

import enum
import json
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tmem.backends import segment
from tmem.errors import SaveFileError

MAGIC = b"\x89TMEM\r\n\x1a"
"""As PNG's: the first byte is no text, and a transfer as text would show in the line ends."""
VERSION = 1

ALIGNMENT = 4096
"""Of frames in the stream, and of blocks in memory."""
BLOCK_BYTES = 4 << 20
"""What a writer gives a data frame at most."""
MAX_FRAME_BYTES = 8 << 20
"""What a reader accepts."""

_PREAMBLE = struct.Struct("<8sI")
_CHECK = struct.Struct("<I")
_HEAD = struct.Struct("<IBBHQQ")
_CHAINED = struct.Struct("<QIBBHQ")  # the previous chain, and what stands in the frame before its own
PREAMBLE_BYTES = ALIGNMENT
HEAD_BYTES = _HEAD.size
REMEDY = "use another copy, or save again"

Write = Callable[[memoryview], None]
"""Writes all of the buffer, whose length is a multiple of ALIGNMENT."""


ReadInto = Callable[[memoryview], int]
"""Fills the buffer, less only where the stream ends; the bytes read."""


def aligned(length: int) -> int:
    """Return `length` rounded up to ALIGNMENT."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def new_buffer(size_bytes: int) -> memoryview:
    """Return zeroed memory that begins at a multiple of ALIGNMENT."""
    return memoryview(mmap.mmap(-1, size_bytes))


class Kind(enum.IntEnum):
    """What a frame is."""

    HEADER = 1
    """First in either direction: who writes, and which clients follow."""
    CLIENT = 2
    """A client begins: its settings and pools."""
    DATA = 3
    """Records of one of its persistent pools; later ones replace earlier ones."""
    CLIENT_END = 4
    """The client is complete; its settings once more, as they are in the end."""
    CLIENT_DROPPED = 5
    """The client is to be forgotten: it ended, or begins again because its pools changed."""
    END = 6
    """The end of a save file, with totals."""
    SYNC = 16
    """Handoff: answer once everything before is stored."""
    DEPARTING = 17
    """Handoff: the client is frozen and complete; answer when it could be committed."""
    COMMIT = 18
    """Handoff: the client has left its segment; show it, then answer."""
    SYNCED = 32
    """Answer to SYNC."""
    READY = 33
    """Answer to DEPARTING."""
    DONE = 34
    """Answer to COMMIT: the client lives here."""
    ERROR = 35
    """The receiver gives up; with its reason."""


@dataclass(frozen=True)
class Frame:
    """One frame that was read; `payload` is valid until its buffer is used again."""

    kind: Kind
    client: int
    pool: int
    payload: memoryview

    def document(self) -> dict[str, object]:
        """Return the JSON object in the payload; ValueError if there is none."""
        try:
            found = json.loads(bytes(self.payload))
        except RecursionError:
            found = None
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found


class FrameWriter:
    """Writes a preamble, then frames."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._checksum = segment.core().checksum
        self.frames = 0
        """Frames written."""
        self.data_bytes = 0
        """Bytes of records among them."""
        preamble, self._chain = _preamble(self._checksum)
        self._scratch = new_buffer(ALIGNMENT)
        self._scratch[:] = preamble
        write(self._scratch)

    def data(self, client: int, pool: int, block: memoryview, length: int) -> None:
        """Write `length` bytes of records that stand in `block` behind HEAD_BYTES of room."""
        self._frame(Kind.DATA, client, pool, block, length)
        self.data_bytes += length

    def document(self, kind: Kind, client: int, content: Mapping[str, object]) -> None:
        """Write a frame with a JSON object."""
        payload = json.dumps(content, separators=(",", ":")).encode()
        if len(self._scratch) < HEAD_BYTES + len(payload):
            self._scratch = new_buffer(aligned(HEAD_BYTES + len(payload)))
        self._scratch[HEAD_BYTES : HEAD_BYTES + len(payload)] = payload
        self._frame(kind, client, 0, self._scratch, len(payload))

    def _frame(self, kind: Kind, client: int, pool: int, block: memoryview, length: int) -> None:
        end = HEAD_BYTES + length
        whole = block[: aligned(end)]
        whole[end:] = bytes(len(whole) - end)
        fields = (length, kind, pool, client, self._checksum(whole[HEAD_BYTES:]))
        self._chain = self._checksum(_CHAINED.pack(self._chain, *fields))
        _HEAD.pack_into(whole, 0, *fields, self._chain)
        self._write(whole)
        self.frames += 1


class FrameReader:
    """Reads what a `FrameWriter` wrote; in messages it is `name`, and `remedy` is what to do about it.

    Every method raises `SaveFileError` for a stream that is not sound, and OSError as reading does.
    """

    def __init__(self, read: ReadInto, name: str, remedy: str = REMEDY) -> None:
        self._read = read
        self._name = name
        self._remedy = remedy
        self._checksum = segment.core().checksum
        self._chain: int | None = None
        self._at = 0
        self.frames = 0
        """Frames read."""
        self.data_bytes = 0
        """Bytes of records among them."""

    def next(self, buffer: memoryview) -> Frame:
        """Read the next frame; its payload stands in `buffer`, which has MAX_FRAME_BYTES."""
        if self._chain is None:
            self._chain = self._read_preamble(buffer)
        at = self._at
        self._fill(buffer[:ALIGNMENT])
        length, number, pool, client, payload_sum, chain = _HEAD.unpack_from(buffer)
        if chain != self._checksum(_CHAINED.pack(self._chain, length, number, pool, client, payload_sum)):
            raise self._damaged(at, "a frame does not follow the one before it")
        self._chain = chain
        try:
            kind = Kind(number)
        except ValueError:
            raise SaveFileError(
                f"{self._name} has a part of kind {number} that this version of tmem does not know: "
                "use the version that wrote it"
            ) from None
        whole = aligned(HEAD_BYTES + length)
        if whole > MAX_FRAME_BYTES:
            raise self._damaged(at, f"a frame of {length} bytes")
        self._fill(buffer[ALIGNMENT:whole])
        if self._checksum(buffer[HEAD_BYTES:whole]) != payload_sum:
            raise self._damaged(at, "a checksum does not fit")
        self.frames += 1
        if kind is Kind.DATA:
            self.data_bytes += length
        return Frame(kind, client, pool, buffer[HEAD_BYTES : HEAD_BYTES + length])

    def expect_end(self) -> None:
        """Check that nothing follows."""
        if self._read(memoryview(bytearray(1))):
            raise SaveFileError(
                f"{self._name} goes on behind its end, at byte {self._at}: several saves in one file cannot "
                "be restored; give them one at a time"
            )

    def _read_preamble(self, buffer: memoryview) -> int:
        wanted, chain = _preamble(self._checksum)
        got = self._read(buffer[:PREAMBLE_BYTES])
        found = bytes(buffer[:got])
        if not got:
            raise SaveFileError(f"{self._name} is empty: {self._remedy}")
        if found == wanted[:got]:
            self._at = got
            if got < PREAMBLE_BYTES:
                raise self._ends()
            return chain
        if found[: len(MAGIC)] != MAGIC[:got]:
            raise SaveFileError(
                f"{self._name} was not written by tmem (it begins with {found[:16]!r}): {self._remedy}"
            )
        if got < PREAMBLE_BYTES:
            self._at = got
            raise self._ends()
        (check,) = _CHECK.unpack_from(found, _PREAMBLE.size)
        if check != self._checksum(found[: _PREAMBLE.size]) & 0xFFFFFFFF:
            raise self._damaged(0, "its first bytes")
        _, version = _PREAMBLE.unpack_from(found)
        if version == VERSION:
            raise self._damaged(0, "its first bytes")
        raise SaveFileError(
            f"{self._name} has version {version} of the format, this tmem reads version {VERSION}: "
            "use the version of tmem that wrote it"
        )

    def _fill(self, buffer: memoryview) -> None:
        got = self._read(buffer)
        self._at += got
        if got < len(buffer):
            raise self._ends()

    def _ends(self) -> SaveFileError:
        return SaveFileError(f"{self._name} ends early, at byte {self._at}: {self._remedy}")

    def _damaged(self, at: int, what: str) -> SaveFileError:
        return SaveFileError(f"{self._name} is damaged at byte {at} ({what}): {self._remedy}")


def _preamble(checksum: Callable[[bytes], int]) -> tuple[bytes, int]:
    """Return the preamble and the chain that begins with it."""
    fields = _PREAMBLE.pack(MAGIC, VERSION)
    whole = (fields + _CHECK.pack(checksum(fields) & 0xFFFFFFFF)).ljust(PREAMBLE_BYTES, b"\0")
    return whole, checksum(whole)
