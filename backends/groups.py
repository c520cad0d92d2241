"""The control groups of a contained machine: which one is ours, and how a process of ours gets into it.

``tmem contain`` (`tmem.nbd.contain`) leaves a record in the run-time directory: what it made, and how things
were before. The group for our own processes, which is never swapped out, is named there; without a record it
is the group ``tmem`` below the root of the memory controller, if somebody made one. Memory is charged to the
group in which a process first touches it and does not move with the process, so `enter` comes before anything
large, and an exec after it. Under systemd there is no such group: units say in which slice they run. Not for
making groups. Plain functions; a process with one thread calls `enter`.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tmem.backends import cgroup
from tmem.backends.paths import runtime_dir

OWN, REST = "tmem", "rest"
"""Names of the two groups: for our processes, and for all others that were in none."""

PERMANENT_RECORD = Path("/var/lib/tmem/contain.json")
"""The record of limits that outlive a reboot."""

_SYSTEMD = Path("/run/systemd/system")


@dataclass(frozen=True)
class Record:
    """What ``tmem contain`` did, for whoever starts a process of ours and for ``--undo``."""

    root: str
    """The directory below which the groups lie."""
    own_group: str | None = None
    """The directory of our group; None under systemd."""
    limits: dict[str, int] = field(default_factory=dict)
    """The limits that were set, in bytes, by the names of the groups directly below the root."""
    before: dict[str, int | None] = field(default_factory=dict)
    """The limits of the same groups before the first time; None: no limit."""
    enabled: bool = False
    """Whether the memory controller had to be enabled below the root."""
    permanent: bool = False
    """Whether systemd keeps the limits over a reboot."""

    def save(self, directory: Path | None = None, permanent: Path = PERMANENT_RECORD) -> None:
        """Write the record, whole or not at all. Raises `OSError`."""
        path = permanent if self.permanent else record_path(directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)
        if self.permanent:
            record_path(directory).unlink(missing_ok=True)  # of an earlier time, that was for this boot only


def record_path(directory: Path | None = None) -> Path:
    """Return the record of limits that end with a reboot; no segment can have its name."""
    return (directory or runtime_dir()) / ".contain.json"


def load(directory: Path | None = None, permanent: Path = PERMANENT_RECORD) -> Record | None:
    """Return the record, None if nothing is contained or nobody can read it."""
    for path in (record_path(directory), permanent):
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Record(**json.loads(path.read_text(encoding="utf-8")))
    return None


def forget(directory: Path | None = None, permanent: Path = PERMANENT_RECORD) -> None:
    """Remove the records."""
    for path in (record_path(directory), permanent):
        path.unlink(missing_ok=True)


def systemd(directory: Path = _SYSTEMD) -> bool:
    """Return whether systemd runs this machine, and with it the control groups."""
    return directory.is_dir()


def own_group(proc: Path = Path("/proc")) -> Path | None:
    """Return the directory of the group for our processes, None if there is none."""
    record = load()
    if record is not None and record.own_group is not None:
        found = Path(record.own_group)
    elif systemd() or (root := cgroup.mount_point(proc)) is None:
        return None
    else:
        found = root / OWN
    return found if found.is_dir() else None


def enter() -> Path | None:
    """Move this process into our group and return it; None if there is none, or if this user may not."""
    group = own_group()
    if group is None or cgroup.group_of(os.getpid()) == group:
        return group
    try:
        (group / "cgroup.procs").write_text("0", encoding="ascii")
    except OSError:
        return None
    return group
