"""The exceptions of tmem: one small tree, and one table from exception to errno.

A message says in one line what is wrong and what to do; the command line prints it as it is. Not for
programming errors, which stay ordinary Python exceptions.
"""

import errno


class TmemError(Exception):
    """Base of everything that tmem raises for a person to read."""


class ConfigError(TmemError):
    """The configuration has a key that does not exist, a value that makes no sense, or cannot be read."""


class SegmentError(TmemError):
    """A segment file is missing, foreign, damaged, of another version, or cannot be created."""


class CorruptPageError(TmemError):
    """A page of a persistent pool failed its checksum. Its bytes are lost; wrong bytes are never returned."""


class PoolError(TmemError):
    """A client or pool does not exist (any more), or a table of them is full."""


class NoSpaceError(TmemError):
    """A put that must not fail was refused: no memory is left within the client's cap."""


class AttachError(TmemError):
    """A swap device or a mount could not be set up or taken down."""


class ServiceError(TmemError):
    """The manager service cannot be reached, or refused a request."""


class SaveFileError(TmemError):
    """A save file is missing, foreign, damaged or cut short, does not fit here, or cannot be written."""


class HandoffError(TmemError):
    """A handoff did not come about, or nobody can tell; the message says where the client is."""


class TierError(TmemError):
    """A tier beyond RAM refused, failed, or does not answer."""


class TierFullError(TierError):
    """A tier has no room for a batch. Nothing of the batch is stored there; its pages stay in RAM."""


class TierDownError(TierError):
    """A tier does not answer, or its disk or connection failed. What it holds may come back: try again."""


class TierCorruptError(TierError):
    """A tier is not this client's, or is damaged as a whole: nothing in it may be believed."""


ERRNO: dict[type[TmemError], int] = {
    ConfigError: errno.EINVAL,
    SegmentError: errno.ENODEV,
    CorruptPageError: errno.EIO,
    PoolError: errno.ENODEV,
    NoSpaceError: errno.ENOSPC,
    AttachError: errno.EIO,
    ServiceError: errno.EIO,
    SaveFileError: errno.EIO,
    HandoffError: errno.EIO,
    TierError: errno.EIO,
    TierFullError: errno.ENOSPC,
}
"""What a program on the other side of NBD or FUSE sees of each exception."""


def errno_of(error: TmemError) -> int:
    """Return the errno that `error` is shown as; EIO for a class that has no entry of its own."""
    return next((ERRNO[cls] for cls in type(error).__mro__ if cls in ERRNO), errno.EIO)
