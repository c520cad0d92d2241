"""scripts/quickstart does the main job and leaves nothing behind, also when it is interrupted."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "quickstart"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("root", "built", "swapping")]


@pytest.fixture
def built() -> None:
    """Skip unless nothing has to be installed or built, which must not happen in the middle of a test run."""
    check = subprocess.run(["bash", "-c", '. scripts/lib.sh && built ""'], cwd=ROOT, check=False)
    if check.returncode:
        pytest.skip("needs an up-to-date build: scripts/test makes one")


def left() -> list[str]:
    """Return what a run may leave behind."""
    found = [str(path) for path in Path("/var/tmp").glob("tmem-quickstart.*")]
    found += [str(path) for path in Path("/run/tmem").glob("quickstart*")]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob("**/tmem-quickstart")]
    mounts = Path("/proc/self/mountinfo").read_text()
    found += [line for line in mounts.splitlines() if "tmem-quickstart" in line or "quickstart.d" in line]
    return found


def swaps() -> list[str]:
    """Return the swap areas in use."""
    return [line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]]


def test_does_the_main_job(tmp_path: Path) -> None:
    before = swaps()
    result = subprocess.run(
        [SCRIPT], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for sign in ("0 pages wrong", "persistent", "ephemeral", "the bytes are the same", "all went well"):
        assert sign in result.stdout
    assert swaps() == before
    assert left() == []


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_takes_everything_down_when_interrupted(
    tmp_path: Path, eventually: Callable[..., None], end: signal.Signals
) -> None:
    before = swaps()
    output = tmp_path / "output"
    with output.open("w") as file:
        # In a group of its own, so that the signal reaches what a Ctrl-C at its terminal would.
        process = subprocess.Popen(
            [SCRIPT], stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
        )
        with process:
            eventually(lambda: "swaps out and in" in output.read_text() or process.poll() is not None, 60)
            os.killpg(process.pid, end)
            process.wait(60)
    assert process.returncode == 128 + end, output.read_text()
    assert "all gone" not in output.read_text()
    assert swaps() == before
    assert left() == []
