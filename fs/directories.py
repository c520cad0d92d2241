"""Listing directories, with the attributes of every entry (readdirplus).

A listing is a snapshot of the names at the time it begins, so entries that come and go meanwhile neither skip
nor repeat others; each entry's attributes are as of when it is reported.
"""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyfuse3

from tmem.fs.base import Handlers, errors
from tmem.fs.inodes import Inode
from tmem.fs.state import SavedListing

if TYPE_CHECKING:
    from pyfuse3 import ReaddirToken, RequestContext


@dataclass
class _Listing:
    inode: Inode
    descriptor: int
    names: list[bytes] = field(default_factory=list)


class Directories(Handlers):
    """Handlers of open directories."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)  # type: ignore[arg-type]  # passed on as they are
        self._listings: dict[int, _Listing] = {}
        self._next_listing = 1

    async def opendir(self, inode: int, ctx: "RequestContext") -> int:
        """Open a directory."""
        with errors():
            node = self.table[inode]
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            descriptor = os.open(b".", flags, dir_fd=self.table.descriptor(node))
        number = self._next_listing
        self._next_listing += 1
        self._listings[number] = _Listing(node, descriptor)
        return number

    async def readdir(self, fh: int, start_id: int, token: "ReaddirToken") -> None:
        """Report entries from number `start_id` on, until the reply is full."""
        listing = self._listings[fh]
        with errors():
            if start_id == 0:
                listing.names = [os.fsencode(name) for name in os.listdir(listing.descriptor)]  # noqa: PTH208
            for number in range(start_id, len(listing.names)):
                name = listing.names[number]
                try:
                    inode, status = self.table.lookup(listing.inode, name)
                except FileNotFoundError:
                    continue
                if not pyfuse3.readdir_reply(token, name, self.attributes(inode, status), number + 1):
                    self.table.drop(inode)
                    return
                self.table.remember(inode)

    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        os.close(self._listings.pop(fh).descriptor)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make a directory's names durable."""
        with errors():
            await self.in_thread(os.fsync, self._listings[fh].descriptor)

    def used_by_listings(self) -> list[Inode]:
        """Return the inodes of open directories."""
        return [listing.inode for listing in self._listings.values()]

    def saved_listings(self, places: dict[Inode, int]) -> tuple[list[SavedListing], int]:
        """Return the open directories, with their inodes as `places`, and the next handle."""
        listings = [
            (number, places[listing.inode], listing.descriptor, listing.names)
            for number, listing in self._listings.items()
        ]
        return listings, self._next_listing

    def restore_listings(self, saved: list[SavedListing], next_listing: int, inodes: list[Inode]) -> None:
        """Have the directories open that were saved."""
        self._next_listing = next_listing
        for number, place, descriptor, names in saved:
            self._listings[number] = _Listing(inodes[place], descriptor, names)

    def close_directories(self) -> None:
        """Close what is still open at the end of the mount."""
        while self._listings:
            os.close(self._listings.popitem()[1].descriptor)
