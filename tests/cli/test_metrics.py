"""``tmem start --metrics`` and ``tmem metrics``: a process of its own, bounded, gone with the segment."""

import json
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tmem.backends import segment
from tmem.backends.exporter import MOST_CLIENTS

from .conftest import Tmem

Eventually = Callable[..., None]
MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"


@pytest.fixture
def port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
        assert isinstance(number, int)
        return number


@pytest.fixture
def served(tmem: Tmem, port: int) -> Iterator[int]:
    started = tmem("start", "-d", "--memory", "16M", "--metrics", f"127.0.0.1:{port}")
    assert started.status == 0, started.err
    yield port
    tmem("stop")
    tmem("destroy", "--all")


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
        assert isinstance(text, str)
        return text


def value(text: str, name: str) -> float:
    match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert match, name
    return float(match[1])


def exporter(runtime_dir: Path) -> int:
    """The process that serves them; 0 while there is none."""
    process = json.loads((runtime_dir / "default.d" / "service-metrics.json").read_text())["process"]
    return int(process["pid"]) if process else 0


def test_a_scrape_has_the_segment_the_manager_and_its_services(served: int) -> None:
    text = scrape(served)
    assert value(text, "tmem_segment_memory_bytes") == 16 << 20
    assert value(text, "tmem_manager_up") == 1
    assert value(text, "tmem_manager_failing") == 0
    assert value(text, 'tmem_service_up{service="metrics"}') == 1
    assert value(text, 'tmem_service_starts_total{service="metrics"}') >= 1
    assert "tmem_manager_populated_bytes_total" in text
    assert "tmem_manager_condensed_now_pages" not in text  # no round has ended yet
    assert "tmem_get_seconds_bucket" in text


def test_a_scrape_has_tiers(served: int, tmem: Tmem, tmp_path: Path, eventually: Eventually) -> None:
    """All that rules and dashboard ask for; one that goes is down within seconds, for whoever looks."""
    with closing(segment.attach("default")) as opened:
        opened.client("web").new_pool(persistent=True)
        opened.client("plain").new_pool(persistent=True)
    assert "tmem_client_tier_up{" not in scrape(served)
    file = tmp_path / "spill"
    assert tmem("set", "web", "--tier", str(file), "--tier-size", "1M").status == 0

    def told(name: str) -> float | None:
        match = re.search(rf'^tmem_client_tier_{name}{{client="web"}} (\S+)$', scrape(served), re.MULTILINE)
        return match and float(match[1])

    eventually(lambda: told("up") == 1)
    assert (told("capacity_bytes"), told("free_bytes"), told("used_bytes")) == (1044480, 1044480, 0)
    assert (told("records"), told("refused_batches_total"), told("failures_total")) == (0, 0, 0)
    assert (told("written_records_total"), told("written_bytes_total")) == (0, 0)
    assert 0 <= (told("age_seconds") or 0) < 60
    asked = "".join(path.read_text() for path in MONITORING.iterdir())
    for name in {*re.findall(r"tmem_client_tier_(\w+)", asked)}:
        assert told(name) is not None, name
    text = scrape(served)
    assert "tier_down" not in text
    assert 'tmem_client_tier_up{client="plain"}' not in text
    listed = json.loads(tmem("list", "web", "--json").out)["clients"][0]
    assert (listed["tier_up"], listed["tier_down"], listed["tier_free_bytes"]) == (True, "", 1044480)
    assert "(0% of 1020K is full)" in tmem("list", "web").out
    assert " tier " not in tmem("top", "--once", "-d", "0.1").out
    file.rename(tmp_path / "away")
    eventually(lambda: told("up") == 0)
    assert told("failures_total") == 1
    assert f"the tier is down: {file} " in tmem("list", "web").out
    assert "  1 tier down " in tmem("top", "--once", "-d", "0.1").out
    (tmp_path / "away").rename(file)
    eventually(lambda: told("up") == 1)


@pytest.mark.usefixtures("root")
def test_a_scrape_has_mounts_and_a_stopped_one_keeps_no_exporter(
    served: int, tmem: Tmem, tmp_path: Path, runtime_dir: Path, eventually: Eventually
) -> None:
    lower, point = tmp_path / "lower", tmp_path / "point"
    lower.mkdir()
    point.mkdir()
    assert tmem("mount", str(lower), str(point), "-o", "client=files").status == 0
    up = f'tmem_mount_up{{client="files",mount="{point}"}}'
    daemon = json.loads((runtime_dir / "default.d" / "mount-files.json").read_text())["pid"]
    try:
        assert value(scrape(served), up) == 1
        assert value(tmem("metrics", "--once").out, up) == 1
        os.kill(daemon, signal.SIGSTOP)
        text = scrape(served)
        assert (value(text, up), value(text, "tmem_manager_up")) == (0, 1)
        pid = exporter(runtime_dir)
        assert tmem("stop").status == 0
        assert tmem("start", "-d").status == 0  # without metrics
        eventually(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        os.kill(daemon, signal.SIGCONT)
        assert tmem("umount", str(point)).status == 0


def test_it_is_nothing_that_swap_depends_on(served: int, runtime_dir: Path) -> None:
    process = Path(f"/proc/{exporter(runtime_dir)}")
    assert (process / "oom_score_adj").read_text().strip() == "0"
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    assert status["VmLck"].split() == ["0", "kB"]
    assert os.sched_getscheduler(int(process.name)) & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER


def test_killed_it_comes_again(served: int, runtime_dir: Path, eventually: Eventually) -> None:
    first = exporter(runtime_dir)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: exporter(runtime_dir) not in (0, first))

    def answers() -> bool:
        try:
            return "tmem_manager_up 1" in scrape(served)
        except OSError:
            return False

    eventually(answers)


def cut_off(connection: socket.socket) -> bool:
    """Wait until the other side ends the connection."""
    connection.settimeout(40)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_clients_that_hang_disturb_neither_manager_nor_others(
    served: int, tmem: Tmem, eventually: Eventually
) -> None:
    hanging = [socket.create_connection(("127.0.0.1", served)) for _ in range(MOST_CLIENTS + 4)]
    try:
        for one in hanging:
            one.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        assert json.loads(tmem("list", "--json").out)["manager_pid"] is not None
        # Those beyond the bound are dropped at once, the others at their deadline; then there is room again.
        assert all(cut_off(one) for one in hanging)
    finally:
        for one in hanging:
            one.close()

    def answers() -> bool:
        try:
            return "tmem_manager_up 1" in scrape(served)
        except OSError:
            return False

    eventually(answers)


def test_without_a_manager_it_says_so_and_it_ends_with_the_segment(
    served: int, tmem: Tmem, runtime_dir: Path, eventually: Eventually
) -> None:
    pid = exporter(runtime_dir)
    assert tmem("stop").status == 0
    text = scrape(served)
    assert value(text, "tmem_manager_up") == 0
    assert value(text, "tmem_segment_memory_bytes") == 16 << 20
    assert "tmem_service_up" not in text
    # A manager that comes without metrics ends it.
    assert tmem("start", "-d").status == 0
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert tmem("stop").status == 0
    assert tmem("start", "-d", "--metrics", f"127.0.0.1:{served}").status == 0
    pid = exporter(runtime_dir)
    assert tmem("destroy", "--all").status == 0
    eventually(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())


def test_a_port_that_is_taken_is_said_and_the_manager_runs(tmem: Tmem, port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        started = tmem("start", "-d", "--memory", "16M", "--metrics", f"127.0.0.1:{port}")
        assert started.status == 1
        assert started.err.count("\n") == 1
        assert f"metrics cannot be served on 127.0.0.1:{port}: Address already in use" in started.err
        assert json.loads(tmem("list", "--json").out)["manager_pid"] is not None
        findings = json.loads(tmem("doctor", "--json").out)["findings"]
        (found,) = [one for one in findings if one["name"] == "metrics"]
        assert (found["state"], "in use" in found["detail"]) == ("missing", True)
        assert "--metrics" in found["remedy"]
    assert tmem("destroy", "--all").status == 0


def test_once_prints_it(tmem: Tmem, port: int) -> None:
    assert tmem("metrics", "--once").status == 1
    assert tmem("start", "-d", "--memory", "16M").status == 0
    printed = tmem("metrics", "--once")
    assert (printed.status, value(printed.out, "tmem_manager_up")) == (0, 1)
    assert tmem("destroy", "--all").status == 0
    for wrong in ([], ["nowhere"], ["127.0.0.1:1", "--once"], ["127.0.0.1:70000"]):
        assert tmem("metrics", *wrong).status == 2
