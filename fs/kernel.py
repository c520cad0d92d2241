"""Tell the kernel what it must not believe any longer of what the mount has told it.

Straight to the device, past pyfuse3, and only in ways that take no lock in the kernel, so that nobody ever
waits here: an attribute notice without data, and the *epoch* of the mount's names (kernel 6.16), by which
all of them are asked for again when they are used next. The notices that name one entry
(`pyfuse3.invalidate_entry`) or drop cached pages wait until requests for that directory or file are answered;
if the daemon were killed meanwhile, its thread would wait for ever with the FUSE device open, and so would
everybody who uses the mount. Cached pages go all the same: once a file's attributes are asked for again, by
any stat, open or read of a file that is not direct_io, the kernel drops its pages if size or mtime differ.
Threading: the event loop's thread.
"""

import contextlib
import os
import struct
from collections.abc import Callable

_NOTICE = struct.Struct("=IiQ")
_NODE_NOTICE = struct.Struct("=IiQQqq")
_INVALIDATE_INODE = 2
_ATTRIBUTES_ALONE = -1
_INCREASE_EPOCH = 8
_EPOCH_MINOR = 44
_MINOR_OFFSET = 40 + 4


class Kernel:
    """The kernel's side of a mount; before `connect` it is told nothing.

    `doubt` is called whenever all names are to be asked for again.
    """

    def __init__(self, doubt: Callable[[], None] = lambda: None) -> None:
        self._device = -1
        self._doubt = doubt
        self.drops_names = False
        """Whether `forget_names` works."""

    def connect(self, device: int, request: bytes) -> None:
        """Write to `device`, a descriptor of /dev/fuse, whose INIT request was `request`."""
        self._device = device
        minor = struct.unpack_from("=I", request, _MINOR_OFFSET)[0] if len(request) > _MINOR_OFFSET else 0
        self.drops_names = minor >= _EPOCH_MINOR

    def forget_attributes(self, nodeid: int) -> None:
        """Have the attributes and access control lists of a node asked for again; also those of a reply to a
        request that began before."""
        if self._device >= 0:
            with contextlib.suppress(OSError):  # it does not know the node, or the mount has ended
                notice = (_NODE_NOTICE.size, _INVALIDATE_INODE, 0, nodeid, _ATTRIBUTES_ALONE, 0)
                os.write(self._device, _NODE_NOTICE.pack(*notice))

    def forget_names(self) -> None:
        """Have all names asked for again, those that are absent too."""
        self._doubt()
        if self._device >= 0 and self.drops_names:
            with contextlib.suppress(OSError):
                os.write(self._device, _NOTICE.pack(_NOTICE.size, _INCREASE_EPOCH, 0))
