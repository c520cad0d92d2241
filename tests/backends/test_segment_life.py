"""Segments by name: the directories around them, the sizes that are refused, and the errors people see."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tmem.backends import segment, tiering
from tmem.backends.paths import SegmentPaths
from tmem.backends.statistics import ClientStatistics, PoolStatistics, SegmentStatistics
from tmem.errors import SegmentError

MIB = 1 << 20
MOUNT = """
import os
from pathlib import Path
from tmem.backends import segment
print(segment.prepare_runtime_dir(), segment.prepare_runtime_dir())
mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
kind, options = segment.mount_options(Path("/run/tmem"))
print(mounted.count("/run/tmem"), kind, oct(os.stat("/run/tmem").st_mode & 0o7777), "noswap" in options)
"""
CREATE = """
import os, sys
from pathlib import Path
from tmem.backends import segment
from tmem.errors import SegmentError
(Path(sys.argv[1]) / "cgroup.procs").write_text("0")
assert segment.default_memory_bytes() == 64 << 20
try:
    segment.create("default", 65 << 20)
except SegmentError as error:
    print(error)
"""


def test_from_creation_to_the_end(runtime_dir: Path) -> None:
    assert not segment.exists("one")
    made = segment.create("one", 16 * MIB)
    paths = SegmentPaths.of("one")
    assert segment.exists("one")
    assert paths.segment.stat().st_mode & 0o777 == 0o600
    assert paths.state.stat().st_mode & 0o777 == 0o700
    attached = segment.attach("one")
    assert attached.memory_bytes == made.memory_bytes
    with pytest.raises(SegmentError, match="exists already"):
        segment.create("one", 16 * MIB)
    attached.close()
    made.close()
    segment.destroy("one")
    assert list(runtime_dir.iterdir()) == []


def test_spill_files_end_with_it(runtime_dir: Path, tmp_path: Path) -> None:
    made = segment.create("one", 16 * MIB)
    tiering.assign(SegmentPaths.of("one"), made, made.client("web"), str(tmp_path / "spill"), MIB)
    made.close()
    segment.destroy("one")
    assert list(tmp_path.iterdir()) == []
    assert list(runtime_dir.iterdir()) == []


def test_spill_files_end_with_it_although_that_was_cut_off(
    runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who ends it is killed when the segment is gone, and with it what tells whose the file is."""

    def killed(paths: SegmentPaths, nonce: int) -> None:
        raise KeyboardInterrupt

    made = segment.create("one", 16 * MIB)
    tiering.assign(SegmentPaths.of("one"), made, made.client("web"), str(tmp_path / "spill"), MIB)
    made.close()
    with monkeypatch.context() as patch:
        patch.setattr(tiering, "end_all", killed)
        with pytest.raises(KeyboardInterrupt):
            segment.destroy("one")
    assert not segment.exists("one")
    segment.destroy("one")
    assert not (tmp_path / "spill").exists()


def test_nothing_there_says_what_to_do(runtime_dir: Path) -> None:
    with pytest.raises(SegmentError, match="start -d"):
        segment.attach("one")
    with pytest.raises(SegmentError, match="nothing to destroy"):
        segment.destroy("one")


def test_sizes_out_of_range_are_refused(runtime_dir: Path) -> None:
    with pytest.raises(SegmentError, match="at least 8M"):
        segment.create("one", 8 * MIB - 1)
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(SegmentError, match="use at most"):
        segment.create("one", ram)
    assert not segment.exists("one")


@pytest.mark.usefixtures("root")
def test_a_tmpfs_of_our_own_is_mounted_once() -> None:
    """In a mount namespace of the test's own, with an empty /run, so that nobody else sees it."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own")
    script = f"mount -t tmpfs none /run && exec {sys.executable} -c '{MOUNT}'"
    environment = {name: value for name, value in os.environ.items() if name != "TMEM_RUNTIME_DIR"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    out = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    ).stdout.splitlines()
    kernel = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    assert out[0] == "/run/tmem /run/tmem"
    assert out[1] == f"1 tmpfs 0o755 {kernel >= (6, 4)}"


def test_stays_below_the_group_that_pays(runtime_dir: Path, control_group: Callable[..., Path]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CREATE, str(control_group(128 * MIB))],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert "control group" in result.stdout
    assert "use at most 64M" in result.stdout


def test_the_core_counts_what_the_classes_document(runtime_dir: Path) -> None:
    made = segment.create("one", 16 * MIB)
    client = made.client("someone")
    client.new_pool(persistent=True)
    client.new_pool(persistent=False)
    assert SegmentStatistics.from_dict(made.statistics()).memory_bytes == made.memory_bytes
    assert ClientStatistics.from_dict(client.statistics()).pools == 2
    kinds = [PoolStatistics.from_dict(pool.statistics()) for pool in client.pools()]
    assert sorted((kind.persistent, kind.exclusive) for kind in kinds) == [(False, True), (True, False)]
    made.close()
    segment.destroy("one")


def test_other_counters_than_documented_are_an_error() -> None:
    with pytest.raises(SegmentError, match="build it again"):
        ClientStatistics.from_dict({"id": 1, "novelty": 2})
