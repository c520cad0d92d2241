"""The daemon's memory is locked, and no more of it than it uses."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tmem.fs import mounts

from .conftest import Mounter, Place


def kilobytes(place: Place, field: str) -> int:
    """Return a value of the daemon's status."""
    text = Path(f"/proc/{place.pid}/status").read_text()
    return int(dict(line.split(":", 1) for line in text.splitlines())[field].split()[0])


@dataclass
class Mapping:
    """A mapping of the daemon, as its smaps have it."""

    permissions: str
    name: str
    size_kb: int = 0
    resident_kb: int = 0
    locked: bool = False


def mappings(place: Place) -> list[Mapping]:
    found: list[Mapping] = []
    for line in Path(f"/proc/{place.pid}/smaps").read_text().splitlines():
        key, *words = line.split(maxsplit=5)
        if not key.endswith(":"):
            found.append(Mapping(words[0], words[4] if len(words) > 4 else ""))
        elif key == "Size:":
            found[-1].size_kb = int(words[0])
        elif key == "Rss:":
            found[-1].resident_kb = int(words[0])
        elif key == "VmFlags:":
            found[-1].locked = "lo" in " ".join(words).split()
    return found


@pytest.fixture
def locked(mounter: Mounter, root: None) -> Place:
    """A mount without a segment, whose daemon may lock its memory and has none of the tests. process."""
    place = mounter()
    place.umount()
    command = [
        sys.executable,
        "-m",
        "tmem",
        "mount",
        "-o",
        "timeout=0,cache=direct",
        str(place.lower),
        str(place.point),
    ]
    subprocess.run(command, check=True, timeout=60)
    daemon = mounts.daemon_of(str(place.point))
    assert daemon is not None
    place = replace(place, pid=daemon.pid)
    if not kilobytes(place, "VmLck"):
        pytest.skip("needs CAP_IPC_LOCK")
    return place


def test_all_that_is_resident_is_locked_also_after_a_restart(locked: Place) -> None:
    for _ in range(2):
        assert kilobytes(locked, "VmLck") > kilobytes(locked, "VmRSS") - 4096  # pages of no mapping of ours
        assert kilobytes(locked, "VmRSS") < 100_000
        locked.restart()


def test_a_segment_that_appears_is_not_filled_by_locking_it(
    locked: Place, runtime_dir: Path, eventually: Callable[..., None]
) -> None:
    from tmem.backends import _native

    path = runtime_dir / "default"
    _native.create(str(path), 256 << 20).close()
    before = path.stat().st_blocks
    (locked.lower / "file").write_bytes(os.urandom(100_000))
    # Looked for once a second, at reads and opens.
    eventually(lambda: (locked.point / "file").read_bytes() and locked.statistics().hit_pages > 0)
    assert (path.stat().st_blocks - before) * 512 < 4 << 20
    assert kilobytes(locked, "VmRSS") < 100_000


def test_what_was_never_used_takes_no_memory_but_files_are_there(locked: Place) -> None:
    stacks = code = 0
    for mapping in mappings(locked):
        if mapping.name.endswith("_native.abi3.so") and "x" in mapping.permissions:
            code += 1
            assert mapping.resident_kb == mapping.size_kb
        if not mapping.name and mapping.size_kb == 512:
            stacks += 1
            assert mapping.locked
            assert mapping.resident_kb < 256
    assert stacks
    assert code


def test_threads_have_small_stacks(locked: Place) -> None:
    (locked.lower / "file").write_bytes(bytes(100_000))
    (locked.point / "file").read_bytes()
    with (locked.point / "file").open("rb+") as file:
        file.write(b"x")
        os.fsync(file.fileno())  # by a worker thread
    assert len(list(Path(f"/proc/{locked.pid}/task").iterdir())) > 1
    maps = Path(f"/proc/{locked.pid}/maps").read_text().splitlines()
    sizes = [int(end, 16) - int(start, 16) for start, end in (line.split()[0].split("-") for line in maps)]
    assert 8 << 20 not in sizes
    assert 512 << 10 in sizes
