"""What the plugin says when it is started wrongly: one line that names the fault."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.nbd import server
from tmem.nbd.export import Export

Start = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def start(tmp_path: Path) -> "Start":
    def run(*parameters: str) -> "subprocess.CompletedProcess[str]":
        """Run a server that is not expected to come up."""
        socket = str(tmp_path / "socket")
        command = [server.find_nbdkit(), "-f", "-U", socket, "python", str(server.PLUGIN), *parameters]
        environment = server.environment(os.environ)
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=30
        )

    return run


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        (["client=a", "size=4096"], "parameter segment=... is missing"),
        (["segment=/s", "size=4096"], "parameter client=... is missing"),
        (["segment=/s", "client=a"], "parameter size=... is missing"),
        (["segment=/s", "client=a", "size=4097"], "size=4097 is not possible"),
        (["segment=/s", "client=a", "size=0"], "size=0 is not possible"),
        (["segment=/s", "client=a", "size=1M"], "size=1M is not possible"),
        (["segment=/s", "client=a", "size=4096", "colour=red"], "unknown parameter colour"),
        (["segment=/s", "client=a", "size=4096", "model=fast"], "model=fast is unknown"),
        (["segment=/nowhere/s", "client=a", "size=4096"], "/nowhere/s"),
    ],
)
def test_a_bad_start_is_one_line(start: "Start", parameters: list[str], reason: str) -> None:
    result = start(*parameters)
    assert result.returncode != 0
    complaints = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(complaints) == 1, result.stderr
    assert complaints[0].startswith("tmem: ")
    assert reason in complaints[0]


def test_a_foreign_file_is_no_segment(start: "Start", tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"not a segment" * 1000)
    result = start(f"segment={foreign}", "client=a", "size=4096")
    assert result.returncode != 0
    assert result.stderr.startswith("tmem: ")
    assert result.stderr.count("\n") == 1


def test_a_client_without_a_pool(start: "Start", paths: SegmentPaths) -> None:
    result = start(f"segment={paths.segment}", "client=nobody", "size=4096")
    assert result.returncode != 0
    assert result.stderr.startswith("tmem: ")
    assert "nobody" in result.stderr
    assert result.stderr.count("\n") == 1


def test_another_python_is_refused() -> None:
    server.check_python()  # what is installed here fits
    with pytest.raises(Exception, match=r"nbdkit embeds Python 3\.99 but tmem is installed under Python"):
        server.check_python("name=python\npython_version=3.99.1\n")


def test_command_line(tmp_path: Path) -> None:
    paths = SegmentPaths("seg", tmp_path)
    export = Export("g", 1 << 20, tcp=("::1", 10809), tls_psk="/etc/keys.psk")
    arguments = server.arguments(paths, export, threads=7, model="serialize-requests")
    assert arguments[1:] == [
        *("-f", "-t", "7", "-i", "::1", "-p", "10809", "--tls=require", "--tls-psk=/etc/keys.psk"),
        *("python", str(server.PLUGIN), f"segment={tmp_path}/seg", "client=g", "size=1048576"),
        *(f"report={tmp_path}/seg.d/swap-g.server", "model=serialize-requests"),
    ]
