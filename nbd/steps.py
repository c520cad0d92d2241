"""The single steps by which control groups are changed, as data: to print, to do, to test.

Each may be done again without harm. Not for deciding (`contain`). One at a time.
"""

import errno
import functools
import os
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import cgroup
from tmem.errors import TmemError

_SWEEPS = 20
"""So often processes that were forked during a move are looked for."""


@dataclass(frozen=True)
class Make:
    """Make the group with this directory."""

    group: Path


@dataclass(frozen=True)
class Remove:
    """Remove the group with this directory, and those below it."""

    group: Path


@dataclass(frozen=True)
class Enable:
    """Let the groups below this one (v2) have the memory controller, or not; `early`: if that goes yet."""

    group: Path
    wanted: bool
    early: bool = False


@dataclass(frozen=True)
class Write:
    """Write `text` into `file`."""

    file: Path
    text: str


@dataclass(frozen=True)
class Move:
    """Move user processes of group `source`, with `recursive` also of those below it, into `target`.

    All of them; or `only` these; or all `besides` these.
    """

    source: Path
    target: Path
    only: frozenset[int] | None = None
    besides: frozenset[int] = frozenset()
    recursive: bool = False

    def processes(self, proc: Path = Path("/proc")) -> set[int]:
        """Return whom it would move now."""
        found = set(cgroup.user_processes(self.source, self.recursive, proc))
        if self.recursive and self.target != self.source:
            found -= set(cgroup.user_processes(self.target, False, proc))
        return (found if self.only is None else found & self.only) - self.besides


@dataclass(frozen=True)
class Run:
    """Run a command."""

    argv: tuple[str, ...]


Step = Make | Remove | Enable | Write | Move | Run


def describe(step: Step, proc: Path = Path("/proc")) -> str:
    """Return the step as a line for a person."""
    match step:
        case Make(group):
            return f"make the group {group}"
        case Remove(group):
            return f"remove the group {group}"
        case Enable(group, wanted):
            return f"write {'+' if wanted else '-'}memory into {group}/cgroup.subtree_control"
        case Write(file, text):
            return f"write {text} into {file}"
        case Move():
            return f"move {len(step.processes(proc))} processes from {step.source} into {step.target}"
        case Run(argv):
            return f"run {' '.join(argv)}"


def do(step: Step) -> bool:
    """Do one step and return whether it changed anything, as far as that can be told. Raises `TmemError`."""
    match step:
        case Make(group):
            return _change(group, lambda: group.mkdir(exist_ok=True))
        case Remove(group):
            return _change(group, lambda: _remove(group))
        case Enable():
            return _enable(step)
        case Write(file, text):
            return _change(file, lambda: _write(file, text))
        case Move():
            return _move(step)
        case Run(argv):
            return _run(argv)


def _change(path: Path, action: Callable[[], object]) -> bool:
    try:
        action()
    except ProcessLookupError:
        return False  # it has ended meanwhile
    except OSError as error:
        raise TmemError(_reason(path, error)) from None
    return True


def _reason(path: Path, error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return f"{path} cannot be changed: it is in use, or what is in it does not fit; end something"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} cannot be changed ({error.strerror}): run this as root, and not in a container"
    if error.errno == errno.ENOENT and path.name.startswith("memory."):
        return f"there is no {path}: this kernel lacks a part of the memory controller (swapaccount=0?)"
    return f"{path} cannot be changed: {error.strerror}"


def _write(file: Path, text: str) -> None:
    # Not write_text, which would create what is not there.
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)


def _remove(group: Path) -> None:
    for child in sorted(path for path in group.iterdir() if path.is_dir()):
        _remove(child)
    group.rmdir()


def _enable(step: Enable) -> bool:
    file = step.group / "cgroup.subtree_control"
    try:
        if ("memory" in file.read_text(encoding="ascii").split()) == step.wanted:
            return False
        _write(file, "+memory" if step.wanted else "-memory")
    except OSError as error:
        if step.early and error.errno == errno.EBUSY:
            return False
        raise TmemError(_reason(file, error)) from None
    return True


def _move(step: Move) -> bool:
    """Move until nobody is left: a process that is moved may have forked a moment before."""
    moved = False
    file = step.target / "cgroup.procs"
    for _ in range(_SWEEPS):
        left = step.processes()
        if not left:
            return moved
        for pid in left:
            moved |= _change(file, functools.partial(_write, file, str(pid)))
    raise TmemError(f"processes appear in {step.source} faster than they can be moved: try again")


def _run(argv: Collection[str]) -> bool:
    command = list(argv)
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TmemError(f"'{' '.join(command)}' failed: {error}") from None
    if result.returncode:
        said = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise TmemError(f"'{' '.join(command)}' failed: {said}")
    return True
