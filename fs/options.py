"""The options of a mount, as written after ``-o``.

Options that mount(8) and fstab know and that mean nothing here (``user``, ``nofail``, ``_netdev``, ``x-...``)
are accepted and ignored, so that ``mount -t fuse.tmem`` works. Not for mounting: `mount`.
"""

import enum
import hashlib
import os
import re
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

from tmem.backends.paths import check_name
from tmem.errors import TmemError
from tmem.fs import syscalls


class Cache(enum.StrEnum):
    """Whether the kernel keeps a second copy of what is read."""

    AUTO = "auto"
    DIRECT = "direct"
    KERNEL = "kernel"


class Loop(enum.StrEnum):
    """How requests are waited for; see `loop`."""

    AUTO = "auto"
    FAST = "fast"
    PLAIN = "plain"


_FLAGS = {
    "ro": syscalls.MS_RDONLY,
    "noexec": syscalls.MS_NOEXEC,
    "noatime": syscalls.MS_NOATIME,
    "sync": syscalls.MS_SYNCHRONOUS,
}
_IGNORED = re.compile(
    r"rw|exec|atime|relatime|async|nodev|nosuid|defaults|auto|noauto|user|users|nouser|owner|group|nofail|_netdev"
    r"|(x-|comment=).*"
)
_DANGEROUS = {"dev": syscalls.MS_NODEV, "suid": syscalls.MS_NOSUID}


@dataclass(frozen=True)
class MountOptions:
    """What a mount was asked to be."""

    client: str
    """The mount's client in the segment."""
    shared: uuid.UUID | None = None
    """The shared pool to use instead of one of the mount's own."""
    cache: Cache = Cache.AUTO
    loop: Loop = Loop.AUTO
    allow_other: bool = False
    timeout_seconds: float = 1.0
    """How long the kernel may believe names and attributes: so late do changes underneath show."""
    flags: int = syscalls.MS_NOSUID | syscalls.MS_NODEV
    """MS_ flags of mount(2)."""
    ignored: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def parse(cls, texts: tuple[str, ...] | list[str], mountpoint: str) -> "MountOptions":
        """Return the options in the comma-separated `texts`. TmemError for one that is unknown."""
        options = cls(default_client(mountpoint))
        for word in ",".join(texts).split(","):
            if word.strip():
                options = options._with(word.strip())
        return options

    def _with(self, word: str) -> "MountOptions":
        name, equals, value = word.partition("=")
        try:
            if name == "client" and equals:
                return replace(self, client=check_name(value, "client name"))
            if name == "shared" and equals:
                return replace(self, shared=_uuid(value))
            if name == "cache" and equals:
                return replace(self, cache=Cache(value))
            if name == "loop" and equals:
                return replace(self, loop=Loop(value))
            if name == "timeout" and equals:
                return replace(self, timeout_seconds=_seconds(value))
        except ValueError:
            raise TmemError(f"{word!r} is no valid option: {_CHOICES[name]}") from None
        if word == "allow_other":
            return replace(self, allow_other=True)
        if word == "default_permissions":
            return self  # always on: the kernel checks permissions, as on any other file system
        if word in _FLAGS:
            return replace(self, flags=self.flags | _FLAGS[word])
        if word in _DANGEROUS:
            return replace(self, flags=self.flags & ~_DANGEROUS[word])
        if _IGNORED.fullmatch(word):
            return replace(self, ignored=(*self.ignored, word))
        raise TmemError(
            f"{word!r} is no mount option: use client=NAME, shared=UUID, cache=auto|direct|kernel, "
            "loop=auto|fast|plain, timeout=SECONDS, allow_other, default_permissions, ro, noexec, noatime, "
            "sync, dev or suid"
        )


_CHOICES = {
    "cache": "use cache=auto, cache=direct or cache=kernel",
    "loop": "use loop=auto, loop=fast or loop=plain",
    "shared": "use shared=UUID, neither all zeros nor all ones",
    "timeout": "use timeout=SECONDS with a number from 0 on",
}


def default_client(mountpoint: str) -> str:
    """Return the client name of a mount that was given none: ``/mnt/data`` gives ``mnt-data``."""
    path = str(Path(mountpoint).absolute())
    name = re.sub(r"[^A-Za-z0-9_]+", "-", path).strip("-_") or "root"
    if len(name) > 63:  # long ones stay distinct
        digest = hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()
        name = f"{name[:46].rstrip('-_')}-{digest}"
    return check_name(name, "client name")


def _uuid(text: str) -> uuid.UUID:
    value = uuid.UUID(text)
    if value.int in (0, (1 << 128) - 1):  # these say that a pool is not shared
        raise ValueError(text)
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise ValueError(text)
    return value
