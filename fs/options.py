"""The options of a mount, as written after ``-o``.

Options that mount(8) and fstab know and that mean nothing here (``user``, ``nofail``, ``_netdev``, ``x-...``)
are accepted and ignored, so that ``mount -t fuse.tmem`` works. As in mount(8), double quotes around a value
keep its commas. Not for mounting: `mount`.
"""

import enum
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tmem.backends.paths import check_name
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TmemError
from tmem.fs import syscalls
from tmem.fs.policy import DEFAULT, Policy
from tmem.types import parse_size


class Cache(enum.StrEnum):
    """Whether the kernel keeps a second copy of what is read."""

    AUTO = "auto"
    DIRECT = "direct"
    KERNEL = "kernel"


class Loop(enum.StrEnum):
    """How requests are waited for; see `loop`."""

    AUTO = "auto"
    """The native reader where pyfuse3 is as it needs it, else the best of the others."""
    NATIVE = "native"
    FAST = "fast"
    PLAIN = "plain"


class Aside(enum.StrEnum):
    """Whether a mount may step aside; see `worth`."""

    AUTO = "auto"
    NEVER = "never"


class Passthrough(enum.StrEnum):
    """Whether the kernel reads and writes by itself what is not cached, where it can; see `backing`."""

    AUTO = "auto"
    OFF = "off"


class Uring(enum.StrEnum):
    """Whether requests come over io_uring, where that can be had; see `uring`."""

    OFF = "off"
    ON = "on"


class Watching(enum.StrEnum):
    """Whether changes underneath are watched for, where the kernel reports them; see `watch`."""

    AUTO = "auto"
    OFF = "off"


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
    timeout_seconds: float | None = None
    """How long the kernel may believe names and attributes; None: see `lifetimes`."""
    watch: Watching = Watching.AUTO
    passthrough: Passthrough = Passthrough.AUTO
    policy: Policy = DEFAULT
    """What is cached."""
    flags: int = syscalls.MS_NOSUID | syscalls.MS_NODEV
    """MS_ flags of mount(2)."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    tier: str | None = field(default=None, repr=False)
    """The URL of the servers that all hosts with this `shared` ask before the lower (`beyond`)."""
    settled_seconds: float = 60.0
    """How old a version of a file must be before its pages go to other hosts."""
    io_uring: Uring = Uring.OFF
    """Settled with the kernel when it is mounted: a restart knows nothing of it."""

    @classmethod
    def parse(cls, texts: tuple[str, ...] | list[str], mountpoint: str) -> "MountOptions":
        """Return the options in the comma-separated `texts`. TmemError for one that is unknown."""
        options = cls(default_client(mountpoint))
        for word in _words(",".join(texts)):
            options = options._with(word)
        if options.io_uring is Uring.ON and options.loop not in (Loop.AUTO, Loop.NATIVE):
            raise TmemError("io_uring=on needs the native reader: use loop=native")
        if options.tier is not None and options.shared is None:
            raise TmemError("tier= needs shared=UUID, the same on every host that mounts this file system")
        return options

    def _with(self, word: str) -> "MountOptions":
        name, equals, value = word.partition("=")
        try:
            if name == "client" and equals:
                return replace(self, client=check_name(value, "client name"))
            if name == "shared" and equals:
                return replace(self, shared=_uuid(value))
            if name == "tier" and equals:
                RedisAddress.parse(value)
                return replace(self, tier=value)
            if name == "settled" and equals:
                return replace(self, settled_seconds=_seconds(value))
            if name == "cache" and equals:
                return replace(self, cache=Cache(value))
            if name == "loop" and equals:
                return replace(self, loop=Loop(value))
            if name == "timeout" and equals:
                return replace(self, timeout_seconds=_seconds(value))
            if name == "watch" and equals:
                return replace(self, watch=Watching(value))
            if name == "passthrough" and equals:
                return replace(self, passthrough=Passthrough(value))
            if name == "io_uring" and equals:
                return replace(self, io_uring=Uring(value))
            if name in _POLICY and equals:
                return replace(self, policy=_POLICY[name](self.policy, value))
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
            f"{word!r} is no mount option: use client=NAME, shared=UUID, tier=URL, settled=SECONDS, "
            "cache=auto|direct|kernel, loop=auto|native|fast|plain, io_uring=off|on, timeout=SECONDS, "
            "watch=auto|off, "
            "cache_files=PATTERN:..., skip_files=PATTERN:..., least_size=SIZE, most_size=SIZE, "
            "passthrough=auto|off, read_ahead=SIZE, step_aside=auto|never, allow_other, "
            "default_permissions, ro, noexec, noatime, sync, dev or suid"
        )


_CHOICES = {
    "cache": "use cache=auto, cache=direct or cache=kernel",
    "loop": "use loop=auto, loop=native, loop=fast or loop=plain",
    "shared": "use shared=UUID, neither all zeros nor all ones",
    "watch": "use watch=auto or watch=off",
    "passthrough": "use passthrough=auto or passthrough=off",
    "io_uring": "use io_uring=off or io_uring=on",
    "timeout": "use timeout=SECONDS with a number from 0 on",
    "settled": "use settled=SECONDS with a number from 0 on, more than the clocks of hosts differ",
    "cache_files": "use cache_files=PATTERN, or several with ':' between them, such as *.db:data/*",
    "skip_files": "use skip_files=PATTERN, or several with ':' between them, such as *.log:tmp/*",
    "least_size": "use least_size=SIZE, such as 4K",
    "most_size": "use most_size=SIZE, such as 1G",
    "read_ahead": "use read_ahead=SIZE, such as 8M, or read_ahead=0",
    "step_aside": "use step_aside=auto or step_aside=never",
}


def _words(text: str) -> list[str]:
    """Return the options in `text`, without the double quotes; a comma within these does not separate."""
    if text.count('"') % 2:
        raise TmemError(f"{text!r} has a double quote too many: use them in pairs around what has commas")
    parts = re.findall(r'(?:"[^"]*"|[^,"])+', text)
    return [word for part in parts if (word := part.replace('"', "").strip())]


def _patterns(text: str) -> tuple[str, ...]:
    patterns = tuple(pattern for pattern in text.split(":") if pattern)
    if not patterns:
        raise ValueError(text)
    return patterns


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except TmemError as error:
        raise ValueError(text) from error


def _with_rules(policy: Policy, **changes: Any) -> Policy:
    return replace(policy, rules=replace(policy.rules, **changes))


_POLICY: dict[str, Callable[[Policy, str], Policy]] = {
    "cache_files": lambda policy, text: _with_rules(
        policy, cache_files=policy.rules.cache_files + _patterns(text)
    ),
    "skip_files": lambda policy, text: _with_rules(
        policy, skip_files=policy.rules.skip_files + _patterns(text)
    ),
    "least_size": lambda policy, text: _with_rules(policy, least_bytes=_size(text)),
    "most_size": lambda policy, text: _with_rules(policy, most_bytes=_size(text)),
    "read_ahead": lambda policy, text: replace(policy, ahead_bytes=_size(text)),
    "step_aside": lambda policy, text: replace(policy, steps_aside=Aside(text) is Aside.AUTO),
}
"""Options that change the policy."""


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
