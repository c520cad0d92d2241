"""Listing directories, with the attributes of every entry (readdirplus).

A listing is a snapshot of the names at the time it begins, so entries that come and go meanwhile neither skip
nor repeat others; each entry's attributes are as of when it is reported. Open directories are a native table
(backends/native/reader_listings.h), from which the native reader answers by itself; here is what the other
loops need, and what comes through libfuse all the same. Threading: the event loop's thread.
"""

import os
from typing import TYPE_CHECKING

import pyfuse3

from tmem.backends import _native
from tmem.fs.base import Handlers, errors
from tmem.fs.inodes import Inode
from tmem.fs.state import SavedListing

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes, ReaddirToken, RequestContext

_DOTS = (b".", b"..")
_NO_NODE = 1 << 63  # beyond all node ids in use; the kernel sends it back to be forgotten


class Directories(Handlers):
    """Handlers of open directories."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)  # type: ignore[arg-type]  # passed on as they are
        self.listings = _native.Listings(self.table.nodes)

    async def opendir(self, inode: int, ctx: "RequestContext") -> int:
        """Open a directory."""
        with errors():
            return self.listings.open(inode)

    async def readdir(self, fh: int, start_id: int, token: "ReaddirToken") -> None:
        """Report entries from number `start_id` on, until the reply is full.

        With a native reader `start_id` is the request's number, which the reader knows more of.
        """
        with errors():
            if self.reading is not None:
                self.reading.reader.list(start_id, fh)  # for want of memory, which is rare
            else:
                self._report(fh, start_id, token)

    def _report(self, fh: int, start: int, token: "ReaddirToken") -> None:
        """Report entries to libfuse, one by one."""
        reported = False
        number = start
        while names := self._names(fh, number, reported):
            for name in names:
                number += 1
                inode, entry = self._entry(self.listings.descriptor(fh), name)
                if entry is None:
                    continue
                if not pyfuse3.readdir_reply(token, name, entry, number):
                    if inode is not None:
                        self.table.drop(inode)
                    return
                if inode is not None:
                    self.table.remember(inode)
                reported = True

    def _names(self, fh: int, number: int, reported: bool) -> list[bytes]:
        try:
            return self.listings.names(fh, number)
        except OSError:  # what ended it early is told after all names that came before
            if reported:
                return []
            raise

    def _entry(self, directory: int, name: bytes) -> "tuple[Inode | None, EntryAttributes | None]":
        """Return what to report of a name, and its inode, if it has one; None if it is gone."""
        if name in _DOTS:
            return None, _dot(directory, name)
        try:
            inode, status = self.table.lookup_at(directory, name)
        except FileNotFoundError:
            return None, None
        except OSError:  # it has a name all the same
            return None, _without_attributes()
        return inode, self.attributes(inode, status)

    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        with errors():
            self.listings.close(fh)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make a directory's names durable."""
        with errors():
            # Its own: the request may be given up, and the directory closed, before a thread is at it.
            descriptor = os.dup(self.listings.descriptor(fh))
            try:
                await self.in_thread(os.fsync, descriptor)
            finally:
                os.close(descriptor)

    def saved_listings(self, places: dict[Inode, int]) -> tuple[list[SavedListing], int]:
        """Return the open directories, with their inodes as `places`, and the next handle.

        One whose inode the kernel has forgotten is nobody's any more.
        """
        rows, next_listing = self.listings.saved()
        by_node = {inode.nodeid: (inode, place) for inode, place in places.items() if inode.by_id}
        listings = []
        for number, nodeid, generation, descriptor, names in rows:
            inode, place = by_node.get(nodeid, (None, -1))
            if inode is not None and inode.generation == generation:
                listings.append((number, place, descriptor, names))
        return listings, next_listing

    def restore_listings(self, saved: list[SavedListing], next_listing: int, inodes: list[Inode]) -> None:
        """Have the directories open that were saved."""
        self.listings.number_from(next_listing)
        for number, place, descriptor, names in saved:
            if inodes[place].by_id:
                self.listings.restore(number, inodes[place].nodeid, descriptor, names)
            else:
                os.close(descriptor)

    def close_directories(self) -> None:
        """Close what is still open at the end of the mount."""
        self.listings.close_all()


def _dot(directory: int, name: bytes) -> "EntryAttributes":
    """Return number and kind of a directory itself or its parent; the kernel counts no lookup of these."""
    status = os.stat(name, dir_fd=directory)
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = status.st_ino
    entry.st_mode = status.st_mode
    return entry


def _without_attributes() -> "EntryAttributes":
    """Return what says of an entry only that it is there: the kernel takes a mode of 0 for no attributes."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = _NO_NODE
    entry.st_mode = 0
    return entry
