"""A lower whose files ``slow`` and ``other`` can be made to hang; programs that wait for them or never do."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .faulty import Faulty

CONTENT = b"".join(number.to_bytes(8, "big") for number in range(8192))
READ = "import os, sys; os.read(os.open(sys.argv[1], os.O_RDONLY), 4096)"
LIST = "import os, sys; os.listdir(sys.argv[1])"
BUSY = (
    "import os, sys; file = os.open(sys.argv[1], os.O_RDONLY); print(flush=True)\n"
    "while True: os.pread(file, 4096, 0); os.stat(sys.argv[1])"
)


@contextlib.contextmanager
def two_files(directory: Path, name_seconds: int = 0) -> Iterator[Faulty]:
    """A lower with two files of `CONTENT`, mounted below `directory`; the kernel may keep names so long."""
    backing = directory / "backing"
    backing.mkdir()
    for name in ("slow", "other"):
        (backing / name).write_bytes(CONTENT)
    lower = Faulty(backing, directory / "lower", name_seconds)
    try:
        yield lower
    finally:
        lower.close()


@contextlib.contextmanager
def program(
    code: str, path: Path | str, descriptors: Sequence[int] = ()
) -> Iterator["subprocess.Popen[bytes]"]:
    """A program that runs `code` with `path`, and has these `descriptors`; killed at the end."""
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, pass_fds=descriptors)
    try:
        yield process
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


@contextlib.contextmanager
def busy(path: Path, count: int = 4) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Programs that read a file and look it up all the time."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            command = [sys.executable, "-c", BUSY, str(path)]
            one = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            stack.callback(one.wait, 20)
            stack.callback(one.kill)
            stack.enter_context(one.stdout)  # type: ignore[arg-type]  # a pipe: never None
            found.append(one)
        for one in found:
            assert one.stdout is not None
            assert one.stdout.readline() == b"\n"
        yield found
