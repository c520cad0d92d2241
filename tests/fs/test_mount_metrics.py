"""What Prometheus gets of mounts, also while a daemon does not answer, or is dead."""

import json
import os
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.tasks import of_threads
from tests.waiting import wait_until
from tmem.backends import exporter
from tmem.backends.paths import SegmentPaths
from tmem.cli.main import run
from tmem.cli.mountmetrics import MountCollector, label
from tmem.fs import asking, mounts
from tmem.fs.statistics import MountStatistics
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root", "segment")

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
CONTENT = random.Random(3).randbytes(40 * PAGE_SIZE)
STARTING_S = 20.0
"""What a scrape may take beyond its deadline on a busy machine."""


@pytest.fixture
def collector(segment: "_native.Segment") -> MountCollector:
    return MountCollector(SegmentPaths.of("default"))


def scrape(collector: MountCollector) -> str:
    return exporter.text(SegmentPaths.of("default"), collector)


def of(text: str, place: Place) -> dict[str, float]:
    """Return the samples of one mount."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("mount") == label(str(place.point))
    }


def read(place: Place) -> None:
    with (place.point / "file").open("rb", buffering=0) as file:
        for start in range(0, len(CONTENT), PAGE_SIZE):
            assert os.pread(file.fileno(), PAGE_SIZE, start) == CONTENT[start : start + PAGE_SIZE]


def test_hits_and_misses_move(mounter: Mounter, collector: MountCollector) -> None:
    place = mounter("timeout=0,cache=direct,client=files")
    (place.lower / "file").write_bytes(CONTENT)
    before = of(scrape(collector), place)
    read(place)
    missed = of(scrape(collector), place)
    read(place)
    text = scrape(collector)
    hit = of(text, place)
    assert (before["tmem_mount_up"], before["tmem_mount_hit_reads_total"]) == (1, 0)
    assert missed["tmem_mount_miss_reads_total"] > 0
    assert missed["tmem_mount_lower_bytes_total"] >= len(CONTENT)
    assert 0 < missed["tmem_mount_lower_seconds_total"] < 60
    assert hit["tmem_mount_miss_reads_total"] == missed["tmem_mount_miss_reads_total"]
    assert hit["tmem_mount_hit_bytes_total"] - missed["tmem_mount_hit_bytes_total"] == len(CONTENT)
    assert (hit["tmem_mount_stepped_aside"], hit["tmem_mount_pool_active"]) == (0, 1)
    assert f'tmem_mount_up{{client="files",mount="{place.point}"}} 1.0' in text
    keeps_the_rules(text, hit)


def keeps_the_rules(text: str, found: dict[str, float]) -> None:
    """Every statistic is there, as a counter or gauge with a help; so is what dashboard and rules ask for."""
    families = [one for one in text_string_to_metric_families(text) if one.name.startswith("tmem_mount_")]
    kinds = MountStatistics.__annotations__
    assert len(families) == len(MountStatistics.__dataclass_fields__) + 1
    for family in families:
        flag = (
            kinds.get(family.name.removeprefix("tmem_mount_"), bool) is bool and "_seconds" not in family.name
        )
        assert family.type == ("gauge" if flag else "counter"), family.name
        assert len(family.documentation) > 5
        assert not family.name.endswith("_ns")
    panels = json.loads((MONITORING / "grafana.json").read_text())["panels"]
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    asked += [rule["expr"] for rule in group["rules"]]
    names = {name for one in asked for name in re.findall(r"\btmem_mount_[a-z_]+", one)}
    assert len(names) >= 6
    assert names <= {*found}


def test_a_daemon_that_is_stopped_delays_nobody(
    mounter: Mounter, collector: MountCollector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not if who asks it cannot be killed, as when the daemon has taken the request."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    class Unkillable(popen):  # type: ignore[valid-type, misc]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

        def kill(self) -> None:
            """Do nothing."""

    stuck = mounter("timeout=0,client=a", point=tmp_path / "a")
    well = mounter("timeout=0,client=b", point=tmp_path / "b")
    monkeypatch.setattr(subprocess, "Popen", Unkillable)
    os.kill(stuck.pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            begun = time.monotonic()
            text = scrape(collector)
            assert time.monotonic() - begun < asking.DEADLINE_S + STARTING_S
            assert of(text, stuck) == {"tmem_mount_up": 0}
            assert of(text, well)["tmem_mount_up"] == 1
        assert len([one for one in started if one.poll() is None]) == 1
    finally:
        os.kill(stuck.pid, signal.SIGCONT)
    wait_until(lambda: all(one.poll() is not None for one in started))
    wait_until(lambda: of(scrape(collector), stuck)["tmem_mount_up"] == 1)


def test_top_shows_who_answers_and_waits_for_nobody(
    mounter: Mounter, runtime_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = mounter("timeout=0,client=a", point=runtime_dir / "a")  # paths that have room in a line
    well = mounter("timeout=0,cache=direct,client=b", point=runtime_dir / "b")
    (well.lower / "file").write_bytes(CONTENT)
    read(well)
    monkeypatch.setenv("COLUMNS", "120")
    os.kill(stuck.pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        assert run(["top", "--count", "2", "-d", "0.1", "--table", "mounts"]) == 0
        assert time.monotonic() - begun < 2 * (asking.DEADLINE_S + STARTING_S)
    finally:
        os.kill(stuck.pid, signal.SIGCONT)
    out = capsys.readouterr().out
    assert out.count(f"{stuck.point} ") == out.count("no answer") == 2
    quiet = re.compile(rf"{re.escape(str(well.point))} +on +0 +- +0B +0B +0 +0 +b *$", re.MULTILINE)
    assert len(quiet.findall(out)) == 2, out


def test_who_can_be_killed_does_not_wait_on(mounter: Mounter, collector: MountCollector) -> None:
    place = mounter("timeout=0")
    os.kill(place.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: stopped(place.pid))  # or it reads the request, which then cannot be taken back
        assert of(scrape(collector), place) == {"tmem_mount_up": 0}
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        asking_still = [one for one in children if b"user.tmem.statistics" in command(int(one))]
        assert not asking_still
    finally:
        os.kill(place.pid, signal.SIGCONT)


def stopped(pid: int) -> bool:
    return all(text.rpartition(")")[2].split()[0] == "T" for text in of_threads(pid, "stat"))


def command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_a_dead_daemon_and_names_that_are_no_plain_text(
    mounter: Mounter, collector: MountCollector, tmp_path: Path
) -> None:
    place = mounter("timeout=0", point=tmp_path / 'my "mount\\1')
    assert label(os.fsdecode(b"/a\xff")) == "/a\\xff"
    assert of(scrape(collector), place)["tmem_mount_up"] == 1
    place.kill()
    assert of(scrape(collector), place) == {"tmem_mount_up": 0}
    mounts.sweep(str(place.point))
    assert of(scrape(collector), place) == {}
    for index, wrong in enumerate(("", "{}", "[]", '{"client": 1, "mountpoint": []}')):
        SegmentPaths.of("default").record("mount", f"x{index}").write_text(wrong)
    assert of(scrape(collector), place) == {}
