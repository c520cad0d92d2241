"""Tell the kernel what it must not believe any longer of what the mount has told it.

Only in ways that take no lock in the kernel, so that nobody ever waits here: an attribute notice without
data, and the *epoch* of the mount's names (kernel 6.16), by which all of them are asked for again when they
are used next. The notices that name one entry (`pyfuse3.invalidate_entry`) or drop cached pages wait until
requests for that directory or file are answered; if the daemon were killed meanwhile, its thread would wait
for ever with the FUSE device open, and so would everybody who uses the mount. Cached pages go all the same:
once a file's attributes are asked for again, by any stat, open or read of a file that is not direct_io, the
kernel drops its pages if size or mtime differ. Threading: the event loop's thread.
"""

import contextlib
import os
import struct

import pyfuse3

_NOTICE = struct.Struct("=IiQ")
_INCREASE_EPOCH = 8
_EPOCH_MINOR = 44
_MINOR_OFFSET = 40 + 4


class Kernel:
    """The kernel's side of a mount; before `connect` it is told nothing."""

    def __init__(self) -> None:
        self._session = -1
        self.drops_names = False
        """Whether `forget_names` works."""

    def connect(self, session: int, request: bytes) -> None:
        """Write to `session`, pyfuse3's end of the device, whose INIT request was `request`."""
        self._session = session
        minor = struct.unpack_from("=I", request, _MINOR_OFFSET)[0] if len(request) > _MINOR_OFFSET else 0
        self.drops_names = minor >= _EPOCH_MINOR

    def forget_attributes(self, nodeid: int) -> None:
        """Have the attributes and access control lists of a node asked for again; also those of a reply to a
        request that began before."""
        if self._session >= 0:
            with contextlib.suppress(OSError):  # it does not know the node, or the mount has ended
                pyfuse3.invalidate_inode(nodeid, attr_only=True)

    def forget_names(self) -> None:
        """Have all names asked for again, those that are absent too."""
        if self._session >= 0 and self.drops_names:
            with contextlib.suppress(OSError):
                os.write(self._session, _NOTICE.pack(_NOTICE.size, _INCREASE_EPOCH, 0))
