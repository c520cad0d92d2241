"""Requests that are answered past libfuse, but in Python: looking up, opening and closing of files.

And what pyfuse3 does not know (`extents`). The others are what programs make most of beside reading, and the
way through the socket, libfuse, pyfuse3 and a turn of trio's scheduler costs more than most of them take
(backends/native/reader_shortcut.h). Everything is done by the handlers that pyfuse3 calls; here is only what
it does around them: arguments, errors, replies. Threading: the event loop's thread.
"""

import os
import struct
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import pyfuse3

from tmem.fs.acting import Caller
from tmem.fs.base import FAILURES, Failure, errno_seen
from tmem.fs.opening import KEPT_FLAGS, Begun

if TYPE_CHECKING:
    from tmem.backends._native import Reader
    from tmem.fs.overlay import Overlay

_LOOKUP, _FORGET, _OPEN, _RELEASE, _FALLOCATE, _LSEEK = 1, 2, 14, 18, 43, 46
_MOST_AT_A_TIME = 32
_LONGEST_SECONDS = 0.002
_SECOND_NS = 1_000_000_000
_DIRECT_IO, _KEEP_CACHE, _NONSEEKABLE = 1, 2, 4

# From the kernel's include/uapi/linux/fuse.h, as far as they are looked at.
_FORGET_IN = struct.Struct("=Q")
_OPEN_IN = struct.Struct("=I")
_HANDLE_IN = struct.Struct("=Q")
_OPEN_OUT = struct.Struct("=QIi")
_FALLOCATE_IN = struct.Struct("=QqqI")
_LSEEK_IN = struct.Struct("=QqI")
_LSEEK_OUT = struct.Struct("=Q")

_REFUSALS = (*FAILURES, pyfuse3.FUSEError)

Start = Callable[[Callable[[int, int], Awaitable[None]], int, int], object]
"""Starts a task that calls a function with two numbers."""


class Shortcuts:
    """Answers the requests that `reader` puts by for it, with the handlers of `overlay`."""

    def __init__(self, overlay: "Overlay", reader: "Reader") -> None:
        self._overlay = overlay
        self._reader = reader
        self._begun: dict[int, Begun] = {}
        """What the reader's threads open, by the request's number."""

    def answer(self, start_soon: Start) -> int:
        """Answer what lies there, return how many; what has to wait goes on in a task of `start_soon`.

        Not for as long as helpers bring more: there is other work, and `Reader.serve` tells of the rest. Most
        take 50 us, but with a lower that is far away much longer.
        """
        until = time.monotonic() + _LONGEST_SECONDS
        count = 0
        while count < _MOST_AT_A_TIME and (not count or time.monotonic() < until):
            if (request := self._reader.asked()) is None:
                break
            count += 1
            self._answer(start_soon, *request)
        return count

    def _answer(
        self,
        start_soon: Start,
        opcode: int,
        unique: int,
        node: int,
        uid: int,
        gid: int,
        pid: int,
        body: bytes,
        fetched: int,
    ) -> None:
        if opcode == _FORGET:
            self._overlay.take_back(node, *_FORGET_IN.unpack_from(body))
            return
        try:
            if opcode == _LOOKUP:
                self._look_up(unique, node, body, may_wait=fetched > 0)
            elif opcode == _OPEN:
                (flags,) = _OPEN_IN.unpack_from(body)
                if fetched:
                    self._end_open(unique, node, flags, Caller(uid, gid, pid), start_soon)
                else:
                    self._open(unique, node, flags, Caller(uid, gid, pid), start_soon)
            elif opcode == _LSEEK:
                start_soon(partial(self._seek_later, *_LSEEK_IN.unpack_from(body)), unique, node)
            elif opcode == _FALLOCATE:
                number, offset, length, mode = _FALLOCATE_IN.unpack_from(body)
                start_soon(partial(self._allocate_later, number, mode, offset, length), unique, node)
            else:
                assert opcode == _RELEASE, "the reader answers the rest"
                (number,) = _HANDLE_IN.unpack_from(body)
                self._close(unique, number, start_soon)
        except _REFUSALS as failure:
            self._refuse(unique, failure)

    def _look_up(self, unique: int, node: int, name: bytes, may_wait: bool) -> None:
        if self._reader.look_up(unique, node, name, may_wait):
            return
        table = self._overlay.table
        if not self._reader.fetch(table.descriptor(table[node]), [name[:-1]]):
            self._reader.look_up(unique, node, name, True)

    def _open(self, unique: int, node: int, flags: int, caller: Caller, start_soon: Start) -> None:
        if not self._overlay.waits_to_open(node):
            self._opened(unique, self._overlay.open_file(node, flags, caller))
            return
        if flags & os.O_ACCMODE == os.O_RDONLY:  # else it takes more than to open
            begun = self._overlay.begin_open(node)
            descriptor = self._overlay.table.descriptor(begun.inode)
            if self._reader.open_in_thread(descriptor, flags & KEPT_FLAGS):
                self._begun[unique] = begun
                return
        start_soon(partial(self._open_later, flags, caller), unique, node)

    def _end_open(self, unique: int, node: int, flags: int, caller: Caller, start_soon: Start) -> None:
        begun = self._begun.pop(unique)
        opened = self._reader.opened()
        assert opened is not None, "it was asked for that"
        descriptor, fields, (atime_ns, mtime_ns, ctime_ns) = opened
        times = {"st_atime_ns": atime_ns, "st_mtime_ns": mtime_ns, "st_ctime_ns": ctime_ns}
        status = os.stat_result(
            (*fields, atime_ns // _SECOND_NS, mtime_ns // _SECOND_NS, ctime_ns // _SECOND_NS), times
        )
        if self._overlay.has_opened(begun):
            self._opened(unique, self._overlay.end_open(begun, descriptor, status, flags, caller))
        else:
            start_soon(partial(self._end_later, begun, descriptor, status, flags, caller), unique, node)

    async def _end_later(
        self,
        begun: Begun,
        descriptor: int,
        status: os.stat_result,
        flags: int,
        caller: Caller,
        unique: int,
        _: int,
    ) -> None:
        try:
            seen = await self._overlay.look_again(begun, descriptor, status)
            self._opened(unique, self._overlay.end_open(begun, descriptor, seen, flags, caller))
        except _REFUSALS as failure:
            self._refuse(unique, failure)

    async def _open_later(self, flags: int, caller: Caller, unique: int, node: int) -> None:
        try:
            self._opened(unique, await self._overlay.open_elsewhere(node, flags, caller))
        except _REFUSALS as failure:
            self._refuse(unique, failure)

    def _opened(self, unique: int, info: "pyfuse3.FileInfo") -> None:
        said = _DIRECT_IO * info.direct_io | _KEEP_CACHE * info.keep_cache | _NONSEEKABLE * info.nonseekable
        if not self._reader.reply(unique, 0, _OPEN_OUT.pack(info.fh, said, 0)):
            self._overlay.unheard(info.fh)

    def _close(self, unique: int, number: int, start_soon: Start) -> None:
        if self._overlay.is_used(number) or self._overlay.waits_to_close(number):
            start_soon(self._close_later, unique, number)
            return
        self._overlay.close_file(number)
        self._reader.reply(unique, 0)

    async def _close_later(self, unique: int, number: int) -> None:
        try:
            await self._overlay.release(number)
        except _REFUSALS as failure:
            self._refuse(unique, failure)
        else:
            self._reader.reply(unique, 0)

    async def _seek_later(self, number: int, offset: int, whence: int, unique: int, _: int) -> None:
        try:
            found = await self._overlay.seek(number, offset, whence)
        except _REFUSALS as failure:
            self._refuse(unique, failure)
        else:
            self._reader.reply(unique, 0, _LSEEK_OUT.pack(found))

    async def _allocate_later(
        self, number: int, mode: int, offset: int, length: int, unique: int, _: int
    ) -> None:
        try:
            await self._overlay.allocate(number, mode, offset, length)
        except _REFUSALS as failure:
            self._refuse(unique, failure)
        else:
            self._reader.reply(unique, 0)

    def _refuse(self, unique: int, failure: Failure | pyfuse3.FUSEError) -> None:
        """Reply to a request whose handler has failed."""
        error = failure.errno if isinstance(failure, pyfuse3.FUSEError) else errno_seen(failure)
        self._reader.reply(unique, error)
