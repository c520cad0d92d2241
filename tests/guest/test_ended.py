"""scripts/guest that is told to end: what it has set up goes with it. No guest is booted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.waiting import DEADLINE_S

SCENARIO = """
import threading
from tests.guest import scenarios

@scenarios.scenario("waiting")
def waiting(setting):
    "Has a host with a device, and waits."
    host = setting.host("16M")
    host.serve("guest1", "16M")
    print(host.directory, flush=True)
    threading.Event().wait()

from tests.guest.main import main  # it knows the scenarios that there are by now
main(["run", "waiting"])
"""


def started_with(directory: Path) -> list[psutil.Process]:
    return [
        one
        for one in psutil.process_iter(["environ"])
        if (one.info["environ"] or {}).get("TMEM_RUNTIME_DIR") == str(directory)
    ]


def test_who_is_told_to_end_takes_everything_down(tmp_path: Path) -> None:
    """Told twice, as by an impatient supervisor: once is enough, and twice does not cut it short."""
    with subprocess.Popen(
        [sys.executable, "-c", SCENARIO],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            assert running.stdout is not None
            directory = Path(running.stdout.readline().strip())
            assert directory.parent == Path("/dev/shm")
            assert (directory / "default").exists()
            assert len(started_with(directory)) >= 2  # the manager and a server
            running.send_signal(signal.SIGTERM)
            running.send_signal(signal.SIGHUP)
            assert running.wait(2 * DEADLINE_S) in (128 + signal.SIGTERM, 128 + signal.SIGHUP)
        finally:
            running.kill()
    assert not directory.exists()
    assert started_with(directory) == []
    assert [*tmp_path.iterdir()] == []  # consoles
