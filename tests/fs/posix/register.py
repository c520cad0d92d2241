"""Where operations are registered, and what they share."""

import functools
import os
from collections.abc import Callable

from .compare import Operation, clocked

OPERATIONS: dict[str, Operation] = {}


def operation(do: Operation) -> Operation:
    """Register an operation under its function's name."""
    OPERATIONS[do.__name__] = do
    return do


def variants(**choices: object) -> Callable[[Callable[[str, object], object]], None]:
    """Register one operation for each choice, which is its second argument."""

    def register(do: Callable[[str, object], object]) -> None:
        for name, choice in choices.items():
            OPERATIONS[f"{do.__name__}_{name}"] = functools.partial(_chosen, do, choice)

    return register


def module_of(do: Operation) -> str:
    """Return the name of the module that registered an operation."""
    if isinstance(do, functools.partial):
        do = do.args[0]
    return do.__module__


def _chosen(do: Callable[[str, object], object], choice: object, directory: str) -> object:
    return do(directory, choice)


def opened(directory: str, flags: int, mode: int = 0o666) -> int:
    return os.open(f"{directory}/x", flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)


def told(status: os.stat_result) -> object:
    """What stat says of an object, as far as it is the same in both places."""
    fields = (status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_size, status.st_rdev)
    return (*fields, clocked(status.st_atime_ns), clocked(status.st_mtime_ns))
