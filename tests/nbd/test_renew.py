"""`tmem restart`: other processes of the installed version, while everything is in use."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends import service
from tmem.backends.paths import SegmentPaths
from tmem.nbd import server
from tmem.nbd.export import load

from .conftest import eventually, nbd, needs_root
from .test_lifecycle import managed, read, write

if TYPE_CHECKING:
    from tmem.backends import _native

    Tmem = Callable[..., subprocess.CompletedProcess[str]]

__all__ = ["managed"]


def manager(paths: SegmentPaths) -> tuple[object, object]:
    """The manager's process, and since when it runs."""
    answer = service.request(paths, {"op": "ping"})
    return answer["pid"], answer["since_ns"]


def test_manager_and_server_are_replaced(managed: "Tmem", paths: SegmentPaths) -> None:
    added = managed("swap", "add", "guest1", "--size", "8M")
    uri = added.stdout.splitlines()[-1]
    data = random.Random(2).randbytes(1 << 20)
    write(uri, data, 4096)
    pid, since = manager(paths)
    before = server.running(paths, "guest1")
    done = managed("restart")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "manager of segment 'default': another one",
        "swap-guest1: another server",
    ]
    assert manager(paths)[0] == pid  # whoever watches over it sees no end of it
    assert manager(paths)[1] != since
    after = server.running(paths, "guest1")
    assert after is not None
    assert after != before
    assert read(uri, 1 << 20, 4096) == data
    # The new manager keeps what the old one has started.
    os.kill(after.pid, 9)
    eventually(lambda: server.running(paths, "guest1") not in (None, after), "it is started again")
    assert managed("swap", "remove", "guest1").returncode == 0


def test_a_server_with_clients_is_left_alone(managed: "Tmem", paths: SegmentPaths) -> None:
    assert managed("swap", "add", "guest1", "--size", "8M").returncode == 0
    handle = nbd.NBD()
    handle.connect_uri(load(paths, "guest1").uri)
    before = server.running(paths, "guest1")
    done = managed("restart")
    assert done.returncode == 1
    assert "1 clients are connected to guest1" in done.stderr
    assert "--force" in done.stderr
    assert server.running(paths, "guest1") == before
    handle.pwrite(b"x" * 4096, 0)
    assert managed("restart", "--force").returncode == 0
    assert server.running(paths, "guest1") != before
    with pytest.raises(nbd.Error):
        handle.pread(4096, 0)
    assert read(load(paths, "guest1").uri, 4096, 0) == b"x" * 4096


def test_a_device_behind_nbdfuse_is_left_alone(managed: "Tmem", paths: SegmentPaths) -> None:
    needs_root()
    if Path("/sys/module/nbd").exists():
        pytest.skip("this kernel has the nbd driver")
    added = managed("swap", "add", "guest1", "--size", "8M", "--attach", "--force", "--priority", "3")
    assert added.returncode == 0, added.stderr
    before = server.running(paths, "guest1")
    done = managed("restart")
    assert done.returncode == 1
    assert "guest1 is attached by nbdfuse" in done.stderr
    assert server.running(paths, "guest1") == before


def test_nothing_is_replaced_by_what_cannot_use_the_segment(
    managed: "Tmem", paths: SegmentPaths, tmp_path: Path
) -> None:
    """The new version is imported in a process of its own first; here it is one that breaks."""
    before = manager(paths)
    broken = tmp_path / "tmem"
    broken.mkdir()
    (broken / "__init__.py").write_text("")
    (broken / "__main__.py").write_text("raise SystemExit('tmem: this one is broken')\n")
    script = f"""
import os, sys
from tmem.cli.main import run
os.environ["PYTHONPATH"] = {str(tmp_path)!r}
sys.exit(run(["restart"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing was restarted" in done.stderr
    assert "this one is broken" in done.stderr
    assert manager(paths) == before


def test_without_a_manager(tmem: "Tmem", segment: "_native.Segment") -> None:
    done = tmem("restart")
    assert done.returncode == 1
    assert "start" in done.stderr
    assert json.loads(tmem("list", "--json").stdout)["manager_pid"] is None
