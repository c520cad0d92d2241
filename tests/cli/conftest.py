"""Runs the command line as people do: as a process of its own."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Result:
    """How a command line ended."""

    status: int
    out: str
    err: str


Tmem = Callable[..., Result]


@pytest.fixture
def tmem(runtime_dir: Path) -> Tmem:
    """Run ``tmem ARGUMENTS`` in the test's run-time directory."""

    def run(*arguments: str) -> Result:
        # Files, not pipes: a manager that is left behind must not keep us waiting for the end of a pipe.
        with (runtime_dir / ".out").open("w+") as out, (runtime_dir / ".err").open("w+") as err:
            argv = [sys.executable, "-m", "tmem", *arguments]
            status = subprocess.run(
                argv, stdout=out, stderr=err, stdin=subprocess.DEVNULL, timeout=60, check=False
            ).returncode
            out.seek(0)
            err.seek(0)
            return Result(status, out.read(), err.read())

    return run
