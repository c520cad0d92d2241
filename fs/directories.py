"""Listing directories, with the attributes of every entry (readdirplus).

A listing is a snapshot of the names at the time it begins, so entries that come and go meanwhile neither skip
nor repeat others; each entry's attributes are as of when it is reported.
"""

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyfuse3

from tmem.fs.base import Handlers, errors
from tmem.fs.identity import Version, is_settled, version_at, version_of
from tmem.fs.inodes import Inode
from tmem.fs.reading import Reading
from tmem.fs.state import SavedListing

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes, ReaddirToken, RequestContext

    from tmem.backends._native import ListingPage

_DOTS = (b".", b"..")
_DOTS_PLACES = bytes(16 * len(_DOTS))
_FEW = 5
"""Attributes that are asked for one by one cost about so many times as much as in a listing."""
_AT_A_TIME = 64
"""Names that are fetched together; a page of the kernel's usual size has room for some 25."""
_TRIES = 3
"""After so many a listing waits for names itself: what was fetched may be gone again, but not for ever."""
_NO_NODE = 1 << 63  # beyond all node ids in use; the kernel sends it back to be forgotten


@dataclass
class _Listing:
    inode: Inode
    descriptor: int
    names: list[bytes] = field(default_factory=list)
    places: bytes = b""
    """Which files they are as the directory says (`_native.names`), if it is on the root's device."""
    begun: float = 0.0
    short_lived: int = 0
    """Entries whose attributes the kernel believes less long than names, for `shortest` seconds at least."""
    shortest: float = 0.0
    failure: OSError | None = None
    """What ended the listing early."""
    version: Version | None = None
    """Of the directory while it was open, if every later change must show in it."""


class Directories(Handlers):
    """Handlers of open directories."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)  # type: ignore[arg-type]  # passed on as they are
        self._listings: dict[int, _Listing] = {}
        self._next_listing = 1

    async def opendir(self, inode: int, ctx: "RequestContext") -> int:
        """Open a directory."""
        with errors():
            return self.open_directory(inode)

    def open_directory(self, inode: int) -> int:
        """Open a directory; return the handle. OSError."""
        node = self.table[inode]
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        descriptor = os.open(b".", flags, dir_fd=self.table.descriptor(node))
        try:
            status = os.fstat(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        number = self._next_listing
        self._next_listing += 1
        # Directories have coarse stamps on some file systems whose files have fine ones (tmpfs).
        version = version_of(status)
        settled = is_settled(version, time.time_ns(), fine_stamps=False)
        self._listings[number] = _Listing(node, descriptor, version=version if settled else None)
        self._let_keep(number, self._listings[number])
        return number

    def _let_keep(self, number: int, listing: _Listing) -> None:
        """Let the kernel keep the listing, and believe the one that it has if that is still right.

        Only for as long as it believes the attributes of most entries, which came with it: it would ask for
        each of them, when a new listing brings all at once for a fifth of the time a name.
        """
        if self.reading is None or listing.version is None:
            return
        version, until = listing.inode.listed
        believe = version == listing.version and time.monotonic() < until
        self.reading.reader.keep_listing(number, believe)

    async def readdir(self, fh: int, start_id: int, token: "ReaddirToken") -> None:
        """Report entries from number `start_id` on, until the reply is full.

        With a native reader `start_id` is the request's number, which the reader knows more of.
        """
        with errors():
            if self.reading is not None:
                self.report_page(fh, start_id, _TRIES)  # a shortcut that was not taken, which is rare
            else:
                self._report(self._listings[fh], start_id, token)

    def report_page(self, fh: int, request: int, fetched: int) -> bool:
        """Have the native reader reply to a request with as many entries as it has room for. OSError.

        At best 12 us of CPU a name, the kernel's work among it (9,000 files in 10 directories, load 4).
        Of what the kernel was told lately, and still believes, it gets the name alone. Names that would have
        to be waited for are left for the next page. If even the first one would, they are fetched, the
        request is asked once more then, and this is False; `fetched` is how often that was done for it.
        """
        listing, reading, may_wait = self._listings[fh], self.reading, fetched >= _TRIES
        assert reading is not None, "it has the request"
        lifetime = self.lifetimes.of_name(listing.inode.key[0])
        page = reading.reader.page(request, lifetime)
        if page.start == 0 and not fetched and self._fetches_content(listing, reading):
            return False
        try:
            return self._fill(page, listing, fh, lifetime, reading, may_wait)
        except BaseException:
            page.take_back()
            raise

    def _fill(
        self,
        page: "ListingPage",
        listing: _Listing,
        fh: int,
        lifetime: float,
        reading: Reading,
        may_wait: bool,
    ) -> bool:
        if page.start == 0:
            reading.reader.ends(fh, 0)
            _begin(listing, lifetime, listing.inode.key[0] == self.table.device)
        looked_up = 0
        while page.next < len(listing.names) and not page.full:
            looked_up += page.look_up(listing.descriptor, listing.names, listing.places, may_wait)
            if page.waits:
                if looked_up:  # is told at once: later it might be wrong
                    break
                names = listing.names[page.next : page.next + _AT_A_TIME]
                if reading.reader.fetch(listing.descriptor, names):
                    return False
                may_wait = True
        listing.short_lived += page.short_lived
        listing.shortest = min(listing.shortest, page.shortest)
        if page.next >= len(listing.names):
            _end(listing, lifetime, page.length > 0)
            if listing.failure is None:  # every listing is asked for what comes after its end
                reading.reader.ends(fh, page.next)
        if page.length:
            reading.reader.list(page)  # nothing may fail from here on
        return True

    def _fetches_content(self, listing: _Listing, reading: Reading) -> bool:
        """Have the kernel fetch what a directory says of itself, if that is probably not at hand.

        It does not tell; but where a name was not, the directories are seldom.
        """
        return self.table.nodes.missed_lately and reading.reader.fetch(listing.descriptor, [])

    def _report(self, listing: _Listing, start: int, token: "ReaddirToken") -> None:
        """Report entries to libfuse, one by one."""
        lifetime = self.lifetimes.of_name(listing.inode.key[0])
        if start == 0:
            _begin(listing, lifetime)
        reported = False
        for number in range(start, len(listing.names)):
            name = listing.names[number]
            if name in _DOTS:
                if not pyfuse3.readdir_reply(token, name, _dot(listing.descriptor, name), number + 1):
                    return
                reported = True
                continue
            try:
                inode, status = self.table.lookup(listing.inode, name)
            except FileNotFoundError:
                continue
            except OSError:  # it has a name all the same
                if not pyfuse3.readdir_reply(token, name, _without_attributes(), number + 1):
                    return
                reported = True
                continue
            entry = self.attributes(inode, status)
            if not pyfuse3.readdir_reply(token, name, entry, number + 1):
                self.table.drop(inode)
                return
            self.table.remember(inode)
            if entry.attr_timeout < lifetime:
                listing.short_lived += 1
                listing.shortest = min(listing.shortest, entry.attr_timeout)
            reported = True
        _end(listing, lifetime, reported)

    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        with errors():
            self.close_directory(fh)

    def close_directory(self, fh: int) -> None:
        """Close a directory. OSError."""
        os.close(self._listings.pop(fh).descriptor)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make a directory's names durable."""
        with errors():
            # Its own: the request may be given up, and the directory closed, before a thread is at it.
            descriptor = os.dup(self._listings[fh].descriptor)
            try:
                await self.in_thread(os.fsync, descriptor)
            finally:
                os.close(descriptor)

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


def _begin(listing: _Listing, lifetime: float, with_places: bool = False) -> None:
    """Take down the names in a directory whose names are believed for `lifetime` seconds."""
    from tmem.backends import _native

    listing.inode.listed = (None, 0.0)
    listing.begun = time.monotonic()
    listing.short_lived, listing.shortest = 0, lifetime
    names, places, failed = _native.names(listing.descriptor)
    # It leaves the first two out; programs see them.
    listing.names = [*_DOTS, *names] if names or not failed else []
    listing.places = _DOTS_PLACES + places if with_places else b""
    listing.failure = OSError(failed, os.strerror(failed)) if failed else None


def _end(listing: _Listing, lifetime: float, reported: bool) -> None:
    """Note what the kernel has of a listing that was reported to its end; `reported`: now, the last part."""
    if listing.failure is not None:
        if not reported:  # after all names that came before it
            raise listing.failure
    elif listing.version is not None:
        unchanged = version_at(listing.descriptor) == listing.version
        many = listing.short_lived * _FEW >= len(listing.names)
        until = listing.begun + (listing.shortest if many else lifetime)
        listing.inode.listed = (listing.version if unchanged else None, until)


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
