"""What /proc says of the threads of a process, of which one may end at any moment."""

from contextlib import suppress
from pathlib import Path


def of_threads(pid: int, name: str) -> list[str]:
    """Return the content of that file of each thread; not of one that ends meanwhile."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append((task / name).read_text())
    return found
