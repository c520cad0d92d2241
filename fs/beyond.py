"""The shared precache of many hosts: a second level behind a shared pool, in a Valkey or Redis.

Hosts that mount one network or cluster file system with the same UUID share what each of them has read. On a
miss of the pool the servers are asked before the lower file is read, and what was read of it goes to them in
the background. They are a help, never a need: a reader waits for them no longer than their timeout, once;
after any trouble they are left alone until a thread of our own has found them well again, and readers never
see an error of theirs.

*What names a page* must mean the same on every host: the UUID, which stands for the file system and is the
administrator's word for it; the file's handle (inode number and generation, over NFS the server's own
handle), without the device number and marks that are this host's own; and the version: mtime, ctime and size.
So a changed file has other names, and nothing is ever removed by us: the servers evict (allkeys-lru). Only
the lower directory's own file system is meant, not what is mounted below it, and none of FUSE
(`identity.has_common_names`).

*When bytes go there*: only bytes that `sharing` let into the pool, so that they are the version's as far as
this host knows; and only of versions that are older than `settled` seconds, because another host's change
could carry the same stamp as the last one, and hosts' clocks differ. That must be more than they do. What
comes from there is checked (its own name, length and checksum) and otherwise is a miss.

A value holds 64 KiB of a file, or what there is up to its end, compressed with zstd. Threading: `get` and
`offer` on any thread; one thread of its own.
"""

import contextlib
import hashlib
import logging
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable

import zstandard

from tmem.backends.tiers.redis_exchange import Command
from tmem.backends.tiers.redis_nodes import Nodes
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TierError
from tmem.fs.identity import Content, stamps_of
from tmem.fs.statistics import BeyondStatistics
from tmem.types import PAGE_SIZE

log = logging.getLogger(__name__)

GROUP_PAGES = 16
_GROUP_BYTES = GROUP_PAGES * PAGE_SIZE
_TAG_GROUPS = 16
"""So many groups that follow each other, 1 MiB, are on one node: as much as a read asks for."""

TIMEOUT_SECONDS = 0.1
"""How long a reader waits, if the URL does not say."""

_WAITING_BYTES = 32 << 20
"""How much may wait to be sent; what comes beyond that is left out."""
_SENT_GROUPS = 32
"""How many values are sent at a time."""
_FIRST_REST_SECONDS, _LAST_REST_SECONDS = 0.5, 30.0

_HEADER = struct.Struct("<4s20sI")
_MAGIC = b"tmB1"


class Beyond:
    """The servers at `address`, for mounts that name `shared`; `now_ns` is the wall clock."""

    def __init__(
        self,
        address: RedisAddress,
        shared: uuid.UUID,
        settled_seconds: float,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._address = address
        self._shared = shared.bytes
        self._settled_ns = int(settled_seconds * 1e9)
        self._now_ns = now_ns
        self._nodes = Nodes(address)
        self._changed = threading.Condition()
        self._waiting: deque[tuple[bytes, int, bytes]] = deque()
        self._waiting_bytes = 0
        self._ended = False
        self._rest_seconds = _FIRST_REST_SECONDS
        self._counts = dict.fromkeys(
            ("hit_pages", "miss_pages", "sent_pages", "dropped_pages", "wrong_values", "failures"), 0
        )
        self._up = False
        self._thread = threading.Thread(target=self._run, name="tmem-beyond", daemon=True)
        self._thread.start()

    @property
    def up(self) -> bool:
        """Whether the servers are asked right now."""
        return self._up

    def get(self, content: Content, start: int, pages: memoryview) -> int:
        """Fill `pages` from byte `start` on (both whole pages); the bytes filled.

        Whole pages, or up to the end of the file. May take as long as the timeout, and raises nothing.
        """
        end = min(start + len(pages), content.version.size)
        if not self._up or end <= start:
            return 0
        identity = self._identity(content)
        groups = range(start // _GROUP_BYTES, -(-end // _GROUP_BYTES))
        values, trouble = self._nodes.once([_get(identity, group) for group in groups])
        if trouble:
            self._fail(trouble)
        else:
            self._rest_seconds = _FIRST_REST_SECONDS
        done = start
        for group, value in zip(groups, values, strict=True):
            if value is None:
                break
            first = group * _GROUP_BYTES
            length = min(_GROUP_BYTES, content.version.size - first)
            found = _opened(value, identity, group, length)
            if found is None:
                self._count(wrong_values=1)
                break
            stop = min(first + length, end)
            pages[done - start : stop - start] = memoryview(found)[done - first : stop - first]
            done = stop
        hits = -(-(done - start) // PAGE_SIZE)
        self._count(hit_pages=hits, miss_pages=-(-(end - start) // PAGE_SIZE) - hits)
        return done - start

    def offer(self, content: Content, start: int, pages: memoryview) -> None:
        """Send what fills whole groups of `pages`, which are the content from byte `start` on, some time."""
        size = content.version.size
        end = min(start + len(pages), size)
        newest_ns = max(content.version.mtime_ns, content.version.ctime_ns)
        if self._now_ns() - newest_ns < self._settled_ns:
            return
        identity = self._identity(content)
        for first in range(-(-start // _GROUP_BYTES) * _GROUP_BYTES, end, _GROUP_BYTES):
            stop = min(first + _GROUP_BYTES, size)
            if stop > end:
                break
            self._enqueue(identity, first // _GROUP_BYTES, bytes(pages[first - start : stop - start]))

    def statistics(self) -> BeyondStatistics:
        """Return what was counted."""
        with self._changed:
            return BeyondStatistics(up=self._up, **self._counts)

    def close(self) -> None:
        """End the thread, without waiting for what was not sent yet, and close every connection."""
        with self._changed:
            self._ended = True
            self._up = False
            self._changed.notify()
        self._thread.join()
        self._nodes.close()

    def _identity(self, content: Content) -> bytes:
        stamps = stamps_of(content.version)
        return hashlib.blake2b(self._shared + stamps + content.name, digest_size=20).digest()

    def _count(self, **more: int) -> None:
        with self._changed:
            for name, number in more.items():
                self._counts[name] += number

    def _fail(self, trouble: str) -> None:
        """Leave the servers alone until the thread has found them well."""
        with self._changed:
            self._counts["failures"] += 1
            if self._up:
                self._up = False
                log.warning("%s is stepped around: %s", self._address, trouble)
                self._changed.notify()

    def _enqueue(self, identity: bytes, group: int, content: bytes) -> None:
        with self._changed:
            if not self._up or self._waiting_bytes + len(content) > _WAITING_BYTES:
                self._counts["dropped_pages"] += -(-len(content) // PAGE_SIZE)
                return
            self._waiting.append((identity, group, content))
            self._waiting_bytes += len(content)
            self._changed.notify()

    # What follows is the thread's.

    def _run(self) -> None:
        self._recover()
        while not self._ended:
            if not self._up:
                self._rest()
                self._recover()
            elif batch := self._take():
                self._send(batch)

    def _recover(self) -> None:
        """Find out whether the servers are well."""
        try:
            self._nodes.refresh()
            self._nodes.each("PING")
        except TierError as error:
            log.debug("%s", error)
            return
        with self._changed:
            self._up = not self._ended
        log.info("%s is asked", self._address)

    def _rest(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended, self._rest_seconds)
            self._rest_seconds = min(self._rest_seconds * 2, _LAST_REST_SECONDS)

    def _take(self) -> list[tuple[bytes, int, bytes]]:
        """Wait for something to be sent, or for the servers to be left alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._up or self._waiting)
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _SENT_GROUPS))]
            self._waiting_bytes -= sum(len(content) for _, _, content in batch)
            return batch

    def _send(self, batch: list[tuple[bytes, int, bytes]]) -> None:
        compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        commands = []
        for identity, group, content in batch:
            value = _HEADER.pack(_MAGIC, identity, group) + compressor.compress(content)
            name = _key(identity, group)
            commands.append(Command(name, ("SET", name, value)))
        npages = sum(-(-len(content) // PAGE_SIZE) for _, _, content in batch)
        replies, trouble = self._nodes.once(commands)
        if trouble:
            self._fail(trouble)
        if None in replies:
            self._count(dropped_pages=npages)
        else:
            self._rest_seconds = _FIRST_REST_SECONDS
            self._count(sent_pages=npages)


def _key(identity: bytes, group: int) -> bytes:
    return f"tmem:b:{{{identity.hex()}.{group // _TAG_GROUPS:x}}}{group:x}".encode()


def _get(identity: bytes, group: int) -> Command:
    name = _key(identity, group)
    return Command(name, ("GET", name))


def _opened(value: object, identity: bytes, group: int, length: int) -> bytes | None:
    """Return the content of a value if it is what its name says."""
    if not isinstance(value, bytes) or value[: _HEADER.size] != _HEADER.pack(_MAGIC, identity, group):
        return None
    with contextlib.suppress(zstandard.ZstdError):
        frame = value[_HEADER.size :]
        if zstandard.frame_content_size(frame) == length:  # before it allocates what a damaged one says
            return zstandard.ZstdDecompressor().decompress(frame)
    return None
