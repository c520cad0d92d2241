"""``start``, ``stop`` and ``destroy``: the life of a segment and its manager."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends import segment
from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import Process
from tmem.backends.service import request
from tmem.errors import PoolError
from tmem.types import OID_SIZE, PAGE_SIZE

from .conftest import Tmem

if TYPE_CHECKING:
    from tmem.backends import _native


def manager_pid(tmem: Tmem) -> int | None:
    pid = json.loads(tmem("list", "--json").out)["manager_pid"]
    assert pid is None or isinstance(pid, int)
    return pid


def test_start_detached_stop_and_start_again(tmem: Tmem) -> None:
    started = tmem("start", "-d", "--memory", "16M")
    assert started.status == 0, started.err
    assert "(16M) runs, pid" in started.out
    pid = manager_pid(tmem)
    assert pid is not None

    again = tmem("start", "--detach")
    assert (again.status, f"runs already, pid {pid}" in again.out) == (0, True)
    foreground = tmem("start")
    assert foreground.status == 1
    assert f"pid {pid}" in foreground.err

    process = Process.of(pid)
    assert process is not None
    assert tmem("stop").status == 0
    assert not process.alive
    assert manager_pid(tmem) is None  # and the segment is still there
    assert tmem("stop").status == 1

    assert tmem("start", "-d").status == 0
    assert tmem("destroy", "--all").status == 0
    assert tmem("list").status == 1


def test_another_size_is_refused(tmem: Tmem) -> None:
    assert tmem("start", "-d", "--memory", "16M").status == 0
    assert tmem("start", "-d", "--memory", "16M").status == 0
    other = tmem("start", "-d", "--memory", "32M")
    assert other.status == 1
    assert "exists with 16M" in other.err


def test_share_of_cpu_for_cold_pages(tmem: Tmem) -> None:
    """It stays with the segment until another one is given."""

    def share() -> int:
        with closing(segment.attach("default")) as opened:
            return opened.condense_percent

    assert tmem("start", "-d", "--memory", "16M").status == 0
    assert share() == 5
    assert tmem("start", "-d", "--condense", "9").status == 0
    assert share() == 9
    assert tmem("stop").status == 0
    assert tmem("start", "-d").status == 0
    assert share() == 9
    assert tmem("stop").status == 0
    assert tmem("start", "-d", "--condense", "0").status == 0
    assert share() == 0
    assert tmem("start", "-d", "--condense", "101").status == 2


def test_level_of_cold_pages(tmem: Tmem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays with the segment until another one is given; pages of the ones before are there."""
    there: list[bytes] = []
    config = tmp_path / "tmem.toml"
    config.write_text("[start]\ncondense_level = 20\n")

    def level() -> int:
        with closing(segment.attach("default")) as opened:
            pool, buffer = opened.client("one").pools()[0], bytearray(PAGE_SIZE)
            for index, page in enumerate(there):
                assert pool.get(bytes(OID_SIZE), index, buffer) == 1
                assert buffer == page
            return opened.condense_level

    def condense() -> None:
        with closing(segment.attach("default")) as opened:
            for _ in range(10):
                numbers = [(len(there) + 7) * i for i in range(99, 400)]
                there.append(json.dumps([[n, f"name {n}"] for n in numbers]).encode()[:PAGE_SIZE])
                assert opened.client("one").pools()[0].put(bytes(OID_SIZE), len(there) - 1, there[-1]) == 1
            assert opened.condense(0, 10**10, persistent=True, warm=True)[0] == 0
            assert opened.statistics()["condensed_pages"] == len(there)

    assert tmem("start", "-d", "--memory", "16M").status == 0
    with closing(segment.attach("default")) as opened:
        opened.client("one").new_pool(persistent=True)
    assert level() == 3
    condense()
    assert tmem("start", "-d", "--condense-level", "19").status == 0
    assert level() == 19
    condense()
    assert tmem("stop").status == 0
    assert tmem("start", "-d").status == 0
    assert level() == 19
    assert tmem("stop").status == 0
    passed_by = tmem("--config", str(config), "start", "-d")  # the segment is in use
    assert passed_by.status == 0
    refusal = "start.condense_level cannot be 20: write a whole number from 1 to 19"
    assert f"{config}:2: {refusal}" in passed_by.err
    assert level() == 19
    assert tmem("stop").status == 0
    config.write_text("[start]\ncondense_level = 1\n")
    assert tmem("--config", str(config), "start", "-d").status == 0
    assert level() == 1
    condense()
    assert tmem("stop").status == 0
    monkeypatch.setenv("TMEM_START_CONDENSE_LEVEL", "6")
    assert tmem("start", "-d").status == 0
    assert level() == 6


def test_whether_neighbours_are_packed(tmem: Tmem) -> None:
    """It stays with the segment until something else is said."""

    def packs() -> bool:
        with closing(segment.attach("default")) as opened:
            return opened.packing

    assert tmem("start", "-d", "--memory", "16M").status == 0
    assert not packs()
    assert tmem("start", "-d", "--pack").status == 0
    assert packs()
    assert tmem("stop").status == 0
    assert tmem("start", "-d").status == 0
    assert packs()
    assert tmem("start", "-d", "--no-pack").status == 0
    assert not packs()


def test_when_pages_are_cold(tmem: Tmem) -> None:
    """It stays with the segment until another time is given."""

    def cold_s() -> int:
        with closing(segment.attach("default")) as opened:
            return opened.tier_cold_s

    assert tmem("start", "-d", "--memory", "16M", "--tier-cold", "90m").status == 0
    assert cold_s() == 5400
    assert tmem("start", "-d").status == 0
    assert cold_s() == 5400
    assert tmem("start", "-d", "--tier-cold", "off").status == 0
    assert cold_s() == 0
    refused = tmem("start", "-d", "--tier-cold", "5")
    assert refused.status == 2
    assert "such as 30m or 1h" in refused.err


def test_sizes_and_damage_are_errors_of_start(tmem: Tmem, runtime_dir: Path) -> None:
    assert "at least 8M" in tmem("start", "-d", "--memory", "1M").err
    assert "use at most" in tmem("start", "-d", "--memory", "1000T").err
    (runtime_dir / "default").write_bytes(b"something else" * 1000)
    damaged = tmem("start", "-d")
    assert damaged.status == 1
    assert damaged.err.startswith("tmem: ")
    assert damaged.err.count("\n") == 1


def test_foreground_ends_orderly_on_ctrl_c(runtime_dir: Path, eventually: Callable[..., None]) -> None:
    paths = SegmentPaths.of("default")
    argv = [sys.executable, "-m", "tmem", "start", "--memory", "16M"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: paths.control.exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "runs, pid" in err
    assert "stopped" in err


def test_destroy_refuses_while_in_use(tmem: Tmem, segment: "_native.Segment") -> None:
    paths = SegmentPaths.of("default")
    segment.client("one").new_pool(persistent=True)
    segment.client("two").new_pool(persistent=True)
    paths.record("swap", "one").write_text("{}")
    for arguments in (["--all"], ["one"]):
        refused = tmem("destroy", *arguments)
        assert refused.status == 1
        assert "swap remove one" in refused.err
    assert tmem("destroy", "two").status == 0
    assert [client.name for client in segment.clients()] == ["one"]
    assert "no client 'two'" in tmem("destroy", "two").err
    paths.record("swap", "one").unlink()

    me = Process.of(os.getpid())
    assert me is not None
    mount = {"client": "one", "mountpoint": "/mnt/one", "pid": me.pid, "start_ticks": me.start_ticks}
    paths.record("mount", "one").write_text(json.dumps(mount))
    assert "tmem umount /mnt/one" in tmem("destroy", "--all").err
    # A daemon that was killed leaves its record, which holds nobody up.
    paths.record("mount", "one").write_text(json.dumps(mount | {"start_ticks": me.start_ticks - 1}))
    assert tmem("destroy", "--all").status == 0
    assert not segment.alive


def test_destroy_really_destroys(tmem: Tmem, segment: "_native.Segment") -> None:
    """In Xen it did nothing but thaw."""
    doomed, other = segment.client("doomed"), segment.client("other")
    pools = [doomed.new_pool(persistent=kind) for kind in (True, False)]
    kept = other.new_pool(persistent=True)
    for pool in (*pools, kept):
        assert pool.put(bytes(OID_SIZE), 0, os.urandom(256 * PAGE_SIZE)) == 256
    used = segment.statistics()["used_bytes"]
    assert tmem("destroy", "doomed").status == 0
    assert [client.name for client in segment.clients()] == ["other"]
    assert not any(pool.alive for pool in pools)
    for pool in pools:
        with pytest.raises(PoolError):
            pool.get(bytes(OID_SIZE), 0, bytearray(PAGE_SIZE))
    after = segment.statistics()
    assert after["used_bytes"] < used - 2 * 256 * PAGE_SIZE
    assert (after["persistent_pages"], after["ephemeral_pages"]) == (256, 0)
    # A client of that name is a new one.
    assert segment.client("doomed").pools() == []
    assert segment.check() == []


SERVE = """
import sys
from tmem.backends import segment
client = segment.attach("default").client(sys.argv[1])
client.hold()
print("held", flush=True)
sys.stdin.read()
"""


def test_destroy_refuses_what_a_process_serves(tmem: Tmem, segment: "_native.Segment") -> None:
    argv = [sys.executable, "-c", SERVE, "one"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"held\n"
        for arguments in (["one"], ["--all"], ["one", "--force"]):
            refused = tmem("destroy", *arguments)
            assert refused.status == 1
            assert "a running process serves 'one'" in refused.err
            assert refused.err.count("\n") == 1
        server.kill()
        server.wait()
    assert tmem("destroy", "one").status == 0
    assert tmem("destroy", "--all").status == 0
    assert not segment.alive


def test_destroy_all_ends_a_damaged_segment(tmem: Tmem, runtime_dir: Path) -> None:
    (runtime_dir / "default").write_bytes(b"something else" * 1000)
    assert tmem("destroy", "--all").status == 0
    assert not segment.exists("default")


def test_services_of_a_stopped_manager_go_on(tmem: Tmem, runtime_dir: Path) -> None:
    assert tmem("start", "-d", "--memory", "16M").status == 0
    paths = SegmentPaths.of("default")
    pid = request(paths, {"op": "supervise", "name": "one", "argv": ["sleep", "300"]})["pid"]
    assert isinstance(pid, int)
    server = Process.of(pid)
    assert server is not None
    assert tmem("stop").status == 0
    assert server.alive
    assert tmem("start", "-d").status == 0
    request(paths, {"op": "unsupervise", "name": "one", "timeout_s": 30})
    assert not server.alive
