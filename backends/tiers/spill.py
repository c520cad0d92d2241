"""The spill file: a client's demoted pages on a local disk, the tier that needs nothing else.

One preallocated file, read and written past the page cache (O_DIRECT): it works beside swap, where a page
cache would need the memory that is being made free. Its first block says whose it is; after that come
records, packed in steps of 64 bytes. A location is where a record begins (34 bits, in 64 bytes: a file of
1 TiB) and how many blocks of 4 KiB it touches (2 bits), so that a reader reads just those. What is free is
derived: a block is in use if a location of the last `retain` or of a write since touches it. Nothing is kept
in step on the disk, and nothing is recovered: the file is of no use without its segment, and says so.

A batch goes to one run of free blocks in one sequential write where there is such a run, else to several. A
block is not written while one record in it lives, which is why what a killed writer had in flight harms
nobody: the kernel finishes it before it gives up the lock, which the next writer takes first.

Servers read natively (`tier.c`), never by `read`, which serves tests and the contract. Threading: as the
contract says. Buffers are made when the file is opened; writing allocates next to nothing.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends import filesystems
from tmem.backends.tiers.contract import MAX_RECORD_BYTES, TierIdentity, TierStatistics, Written
from tmem.errors import TierCorruptError, TierDownError, TierError, TierFullError
from tmem.types import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = PAGE_SIZE
STEP_BYTES = 64
MAX_FILE_BYTES = STEP_BYTES << 34
PIECE_BYTES = 1 << 20
"""How much is written at a time at most: enough for any disk, and small enough to wait in locked memory."""

_HEAD = struct.Struct("<8sIIIIQQ")
_MAGIC = b"tmemspl\n"
_VERSION = 1
_BEGIN = (1 << 34) - 1
_FREE = re.compile(rb"\x00+")


def create(path: Path, identity: TierIdentity, size_bytes: int) -> None:
    """Make the spill file `path` of `size_bytes`, all of it allocated.

    What is there already must be a spill file that nobody uses. Raises `TierError`, and then leaves nothing
    new behind."""
    size_bytes -= size_bytes % BLOCK_BYTES
    if not 16 * BLOCK_BYTES <= size_bytes <= MAX_FILE_BYTES:
        raise TierError(f"a spill file of {format_size(size_bytes)} is not possible: give 64K to 1T")
    if path.exists() or path.is_symlink():
        remove_unused(path)
    with _nameless(path) as descriptor:
        # Else on btrfs each block that is written again takes a new one, and where the disk is full there is
        # none. It has no checksums then, which records have themselves. Other file systems refuse: they do so
        # anyway, or never.
        with contextlib.suppress(OSError):
            filesystems.keep_in_place(descriptor)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
            head = mmap.mmap(-1, BLOCK_BYTES)
            _HEAD.pack_into(
                head, 0, _MAGIC, _VERSION, identity.client, identity.serial, 0, identity.nonce, size_bytes
            )
            os.pwrite(descriptor, head, 0)
            _name(descriptor, path)
        except FileExistsError:
            raise TierDownError(f"{path} has been made by somebody else just now: try again") from None
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise TierFullError(
                f"{path} cannot have {format_size(size_bytes)}: {reason}; give a smaller size or another disk"
            ) from None


def remove_unused(path: Path) -> None:
    """Remove the spill file at the path; `TierError` if a manager has it, or it is something else."""
    with _opened(path, os.O_RDWR) as descriptor:
        if os.fstat(descriptor).st_size:
            _head_of(descriptor, path)  # refuses what is not a spill file
        _lock(descriptor, path)
        if not _stands_at(path, descriptor):
            raise TierDownError(f"{path} is being removed just now: try again")
        path.unlink()


@contextlib.contextmanager
def _nameless(path: Path) -> Iterator[int]:
    """Open a new file that gets the name `path` once it is whole: of who dies before that nothing is left."""
    try:
        descriptor = os.open(path.parent, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
    except OSError:  # the file system cannot, or it says why below
        descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        yield descriptor
    except BaseException:
        if os.fstat(descriptor).st_nlink:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _name(descriptor: int, path: Path) -> None:
    """Give it its name, unless it has got it. FileExistsError."""
    if not os.fstat(descriptor).st_nlink:
        # With src_dir_fd, which an absolute path ignores, Python calls what follows the link.
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)


def identity_of(path: Path) -> TierIdentity:
    """Return whose spill file `path` is; `TierError` if it is none."""
    with _opened(path, os.O_RDONLY) as descriptor:
        return _head_of(descriptor, path)[0]


class SpillFile:
    """One opening of a spill file that exists."""

    def __init__(self, path: Path, identity: TierIdentity, writer: bool) -> None:
        self.path = path
        self._written = self._written_bytes = self._records = self._live_records = 0
        self._read = self._read_bytes = self._failures = self._refused = self._missing = 0
        self._lock = threading.Lock()
        self._descriptor = _open(path, os.O_RDWR if writer else os.O_RDONLY)
        try:
            if writer:
                _lock(self._descriptor, path)
            found, self.size_bytes = _head_of(self._descriptor, path)
            if found != identity:
                raise TierCorruptError(f"{path} is a spill file of somebody else: give another path")
        except TierError:
            self.close()
            raise
        nblocks = self.size_bytes // BLOCK_BYTES if writer else 1
        self._used = bytearray(nblocks)  # one byte a block: 1 if it is in use
        self._used[0] = 1
        self._hint = 1
        self._nused = 0
        self._piece = mmap.mmap(-1, PIECE_BYTES + 2 * BLOCK_BYTES) if writer else None

    def write(self, records: Sequence["Buffer"]) -> list[int]:
        """Store the records, as `Tier.write`."""
        views = [memoryview(record).cast("B") for record in records]
        placed = self._place([len(view) for view in views])
        try:
            for first, positions in placed:
                self._write_run(first, positions, views)
                views = views[len(positions) :]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._refused += 1
                raise TierFullError(
                    f"{self.path} cannot be written ({error.strerror}): make room on its disk"
                ) from None
            self._failures += 1
            raise TierDownError(_failed(self.path, "written", error)) from None
        locations: list[int] = []
        for _first, positions in placed:
            for begin, end in positions:
                block, last = begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
                locations.append((last - block + 1) << 34 | begin // STEP_BYTES)
                self._use(block, last + 1)
                self._written_bytes += end - begin
                self._hint = last + 1
        self._written += len(locations)
        self._live_records += len(locations)
        return locations

    def begin(self, records: Sequence["Buffer"]) -> Written:
        """Store the records; a disk has nothing else to do meanwhile that we would wait for."""
        return Written(self.write(records))

    def _place(self, lengths: list[int]) -> list[tuple[int, list[tuple[int, int]]]]:
        """Find room: (first block, where each of the next records begins and ends) of each run."""
        need = sum(_rounded(length) for length in lengths)
        placed: list[tuple[int, list[tuple[int, int]]]] = []
        done = 0
        for first, end in self._runs(-(-need // BLOCK_BYTES)):
            position, positions = first * BLOCK_BYTES, []
            while done < len(lengths) and position + lengths[done] <= end * BLOCK_BYTES:
                positions.append((position, position + lengths[done]))
                position += _rounded(lengths[done])
                done += 1
            if positions:
                placed.append((first, positions))
            if done == len(lengths):
                return placed
        if lengths:
            self._refused += 1
            raise TierFullError(
                f"{self.path} is full ({format_size(self.size_bytes)}): 'tmem set --tier none' takes it away "
                "where memory has room, then give a larger one"
            )
        return []

    def _runs(self, wanted: int) -> Iterator[tuple[int, int]]:
        """Runs of free blocks: one that takes all if there is one, else all of them from the hint on."""
        if wanted:
            for start in (self._hint, 1):
                if (found := self._used.find(bytes(wanted), start)) >= 0:
                    yield found, found + wanted
                    return
        for start, stop in ((self._hint, len(self._used)), (1, self._hint)):
            for match in _FREE.finditer(self._used, start, stop):
                yield match.span()

    def _write_run(self, first: int, positions: list[tuple[int, int]], views: Sequence[memoryview]) -> None:
        piece, base, end = self._piece, first * BLOCK_BYTES, 0
        assert piece is not None, "opened for reading"
        for (position, end), view in zip(positions, views, strict=False):
            if end - base > PIECE_BYTES:
                whole = (position - base) // BLOCK_BYTES * BLOCK_BYTES
                _write_all(self._descriptor, memoryview(piece)[:whole], base)
                piece[: position - base - whole] = piece[whole : position - base]
                base += whole
            piece[position - base : end - base] = view
        length = -(-(end - base) // BLOCK_BYTES) * BLOCK_BYTES
        _write_all(self._descriptor, memoryview(piece)[:length], base)

    def _use(self, first: int, end: int) -> None:
        for block in range(first, min(end, len(self._used))):
            self._nused += not self._used[block]
            self._used[block] = 1

    def read(self, locations: Sequence[int]) -> list[bytes | None]:
        """Return what is at each location, as `Tier.read`."""
        found = [self._read_one(location) for location in locations]
        with self._lock:
            self._read += len(found)
            self._read_bytes += sum(len(one) for one in found if one is not None)
            self._missing += found.count(None)
        return found

    def _read_one(self, location: int) -> bytes | None:
        begin, nblocks = (location & _BEGIN) * STEP_BYTES, location >> 34
        first = begin // BLOCK_BYTES * BLOCK_BYTES
        if not nblocks or not first or first + nblocks * BLOCK_BYTES > self.size_bytes:
            return None
        with mmap.mmap(-1, nblocks * BLOCK_BYTES) as buffer:
            try:
                got = os.preadv(self._descriptor, [buffer], first)
            except OSError as error:
                self._failures += 1
                raise TierDownError(_failed(self.path, "read", error)) from None
            return buffer[begin - first : begin - first + MAX_RECORD_BYTES] if got == len(buffer) else None

    def retain(self, live: Sequence[int]) -> None:
        """Keep these locations, as `Tier.retain`."""
        used = bytearray(len(self._used))
        used[0] = 1
        most = len(used)
        for location in live:
            block = (location & _BEGIN) // 64
            for touched in range(block, min(block + (location >> 34), most)):
                used[touched] = 1
        self._used = used
        self._nused = used.count(1) - 1
        self._live_records = len(live)

    def check(self) -> None:
        """Read its first block, and look whether servers find it at its path, as `Tier.check`."""
        try:
            if not _stands_at(self.path, self._descriptor):
                raise TierDownError(f"{self.path} is gone, or another file: bring the client's own back")
            _head_of(self._descriptor, self.path)
        except (OSError, TierError) as error:
            self._failures += 1
            words = str(error) if isinstance(error, TierError) else _failed(self.path, "reached", error)
            raise TierDownError(words) from None

    def statistics(self) -> TierStatistics:
        """Return what is known, as `Tier.statistics`."""
        used_bytes, capacity_bytes = self._nused * BLOCK_BYTES, self.size_bytes - BLOCK_BYTES
        return TierStatistics(
            records=self._live_records,
            used_bytes=used_bytes,
            capacity_bytes=capacity_bytes,
            free_bytes=capacity_bytes - used_bytes,
            written_records=self._written,
            written_bytes=self._written_bytes,
            read_records=self._read,
            read_bytes=self._read_bytes,
            failures=self._failures,
            refused=self._refused,
            missing=self._missing,
        )

    def destroy(self) -> None:
        """Remove the file, and close; what stands at the path by now may be another one, which stays.

        Its room is given back at once: servers have it open until they end."""
        with contextlib.suppress(OSError):
            if _stands_at(self.path, self._descriptor):
                self.path.unlink()
        with contextlib.suppress(OSError):
            os.truncate(self._descriptor, 0)
        self.close()

    def close(self) -> None:
        """Let go of the file, and of the writer's lock."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _stands_at(path: Path, descriptor: int) -> bool:
    """Is the open file the one at the path?"""
    ours = os.fstat(descriptor)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _rounded(length: int) -> int:
    return -(-length // STEP_BYTES) * STEP_BYTES


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _failed(path: Path, what: str, error: OSError) -> str:
    return f"{path} cannot be {what} ({error.strerror}): look at its disk, and at the kernel's log ('dmesg')"


def _open(path: Path, flags: int) -> int:
    """Open the file past the page cache."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.EINVAL:
            reason = "its file system has no direct I/O, which a tier needs beside swap; choose another"
        raise TierDownError(f"{path} cannot be opened: {reason}") from None


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = _open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TierDownError(f"{path} is in use by another manager: give another path") from None


def _head_of(descriptor: int, path: Path) -> tuple[TierIdentity, int]:
    """Return whose file it is and its size; `TierCorruptError` if it is no spill file."""
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            got = os.preadv(descriptor, [block], 0)
            magic, version, client, serial, _zero, nonce, size_bytes = _HEAD.unpack_from(block)
    except OSError as error:
        raise TierDownError(_failed(path, "read", error)) from None
    if got != BLOCK_BYTES or magic != _MAGIC or version != _VERSION:
        raise TierCorruptError(f"{path} is not a spill file of tmem: it stays as it is; give another path")
    return TierIdentity(nonce, client, serial), size_bytes
