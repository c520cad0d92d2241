"""Where a segment and its run-time files live.

Root uses ``/run/tmem``, a tmpfs of our own; anybody else ``/dev/shm/tmem-UID``. ``TMEM_RUNTIME_DIR`` replaces
both (tests, containers). The segment called NAME is the file ``NAME`` there (mode 0600), and ``NAME.d``
beside it (mode 0700) holds the manager's control socket, the servers' sockets and small JSON records that let
a restarted manager or a later command find what is running. Not for creating or mounting anything: `segment`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tmem.errors import TmemError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
NAME_BYTES = 63
"""The longest name of a segment or client; a record's name may have a prefix as well."""


def check_name(name: str, what: str = "name", most: int = NAME_BYTES) -> str:
    """Return `name` if it can stand in a path and as an NBD export name; else raise TmemError."""
    if _NAME.fullmatch(name) is None or len(name) > most:
        raise TmemError(
            f"{name!r} is no {what}: use up to {most} letters, digits, '-' and '_', not '-' or '_' first"
        )
    return name


def runtime_dir() -> Path:
    """Return the directory that holds all segments of this user."""
    if configured := os.environ.get("TMEM_RUNTIME_DIR"):
        return Path(configured)
    return Path("/run/tmem") if os.geteuid() == 0 else Path(f"/dev/shm/tmem-{os.geteuid()}")


@dataclass(frozen=True)
class SegmentPaths:
    """The files of the segment called `name` within `directory`."""

    name: str
    directory: Path

    @classmethod
    def of(cls, name: str) -> "SegmentPaths":
        """Return the paths of the segment called `name` in this user's run-time directory."""
        return cls(check_name(name, "segment name"), runtime_dir())

    @property
    def segment(self) -> Path:
        """The segment file itself."""
        return self.directory / self.name

    @property
    def state(self) -> Path:
        """The directory of sockets and records."""
        return self.directory / f"{self.name}.d"

    @property
    def control(self) -> Path:
        """The manager's control socket (SOCK_STREAM, one JSON object a line)."""
        return self.state / "control.sock"

    def record(self, kind: str, name: str) -> Path:
        """The JSON record of a swap device (kind ``swap``) or a mount (kind ``mount``) called `name`."""
        return self.state / f"{kind}-{check_name(name, most=NAME_BYTES + 16)}.json"
