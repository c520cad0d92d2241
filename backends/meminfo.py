"""The machine's memory as /proc/meminfo and /proc/vmstat have it. Any thread."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """RAM in all, what could be had without swapping, and swap; bytes."""

    total_bytes: int
    available_bytes: int
    swapped_bytes: int = 0
    """What holds room on all swap devices together."""
    swap_cached_bytes: int = 0
    """The part of it that is in RAM as well, and not available."""

    @property
    def taken_bytes(self) -> int:
        """What cannot be had: programs, the kernel, and what it keeps free for itself."""
        return max(self.total_bytes - self.available_bytes, 0)


def read(proc: Path = Path("/proc")) -> Memory:
    """Read it."""
    numbers = {}
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        numbers[name] = int(value.split()[0]) << 10
    return Memory(
        numbers["MemTotal"],
        numbers.get("MemAvailable", 0),
        numbers.get("SwapTotal", 0) - numbers.get("SwapFree", 0),
        numbers.get("SwapCached", 0),
    )


def swapped_out_pages(proc: Path = Path("/proc")) -> int:
    """Return how many pages the kernel has swapped out since it runs; 0 where it does not say."""
    words = (proc / "vmstat").read_text(encoding="ascii").partition("\npswpout ")[2]
    return int(words.split(maxsplit=1)[0]) if words else 0


def has_swap(proc: Path = Path("/proc")) -> bool:
    """Say whether this machine swaps to anything."""
    return (proc / "swaps").read_text(encoding="ascii").count("\n") > 1
