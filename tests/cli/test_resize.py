"""``start --memory`` with a range, and ``resize``."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.cli.main import run
from tmem.nbd import guards
from tmem.nbd.export import Attachment, Export
from tmem.types import OID_SIZE

from .conftest import Tmem

if TYPE_CHECKING:
    from tmem.backends import _native

MIB = 1 << 20


def memory(tmem: Tmem) -> dict[str, int]:
    found = json.loads(tmem("list", "--json").out)["memory"]
    assert isinstance(found, dict)
    return found


def test_a_range_is_between_what_the_manager_moves_it(tmem: Tmem, eventually: Callable[..., None]) -> None:
    started = tmem("start", "-d", "--memory", "16M..48M")
    assert started.status == 0, started.err
    now = memory(tmem)
    assert now["memory_bytes"] == now["size_most_bytes"] == 48 * MIB
    assert 0 <= 16 * MIB - now["size_least_bytes"] < 65536
    eventually(lambda: memory(tmem)["limit_bytes"] > 20 * MIB)
    assert "(moves from" in tmem("list").out
    assert json.loads(tmem("list", "--json").out)["manager"]["raised"] > 0
    assert "spare_bytes" in tmem("list", "--long").out
    assert tmem("stop").status == 0
    before = memory(tmem)["limit_bytes"]
    assert tmem("start", "-d").status == 0
    assert memory(tmem)["limit_bytes"] >= before  # a new manager goes on with it
    assert tmem("resize", "20M").status == 0
    assert 0 <= 20 * MIB - memory(tmem)["limit_bytes"] < 65536
    assert "of 20M used" in tmem("list").out
    assert tmem("destroy", "--all").status == 0


def test_start_turns_a_segment_that_was_never_resized_into_a_range(tmem: Tmem) -> None:
    """Who made it may have been killed in between; what somebody has set since stays, and that is said."""
    assert tmem("start", "-d", "--memory", "48M").status == 0
    assert tmem("stop").status == 0
    assert tmem("start", "-d", "--memory", "16M..48M").status == 0
    assert memory(tmem)["size_least_bytes"] < 17 * MIB
    assert tmem("stop").status == 0
    assert tmem("resize", "30M..48M").status == 0
    again = tmem("start", "-d", "--memory", "16M..48M")
    assert again.status == 0
    assert "keeps its bound of " in again.err
    assert memory(tmem)["size_least_bytes"] > 29 * MIB
    assert tmem("destroy", "--all").status == 0


def test_resize_gives_memory_back_without_a_manager(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    pool = segment.client("one").new_pool(persistent=False, exclusive=False)
    pool.put(bytes(OID_SIZE), 0, os.urandom(40 * MIB))
    assert run(["resize", "20M"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("limit 20M, ")
    assert "given back" in said
    assert Path(segment.path).stat().st_blocks * 512 <= 20 * MIB
    assert run(["resize", "64M"]) == 0
    assert segment.limits == (segment.memory_bytes, segment.memory_bytes)


def test_what_persistent_pages_need_stays(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    pool = segment.client("one").new_pool(persistent=True)
    stored = pool.put(bytes(OID_SIZE), 0, os.urandom(30 * MIB))
    assert run(["resize", "20M"]) == 1
    assert "need 3" in capsys.readouterr().err
    assert segment.limits[0] > 30 * MIB
    assert pool.present(bytes(OID_SIZE), 0, stored) == [(0, stored)]
    assert run(["resize", "16M..40M"]) == 0
    assert segment.size_range[1] < 41 * MIB


def test_a_range_takes_nothing_from_a_segment_that_is_in_use(segment: "_native.Segment") -> None:
    """Whether there is less to spare is for the manager to see."""
    pool = segment.client("one").new_pool(persistent=False, exclusive=False)
    stored = pool.put(bytes(OID_SIZE), 0, os.urandom(40 * MIB))
    assert run(["resize", "16M..64M"]) == 0
    assert pool.present(bytes(OID_SIZE), 0, stored) == [(0, stored)]
    assert 40 * MIB < segment.limits[0] < 50 * MIB


def test_a_device_that_this_machine_swaps_to_keeps_its_room(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    paths = SegmentPaths.of("default")
    Export("local", 96 * MIB, unix="/s", attachment=Attachment("nbd", "/dev/nbd0")).save(paths)
    assert run(["resize", "20M"]) == 1
    said = capsys.readouterr().err
    assert "use at least 48M" in said
    assert len(said.splitlines()) == 1
    assert segment.limits[0] == 64 * MIB
    assert run(["resize", "48M"]) == 0
    assert run(["resize", "20M", "--force"]) == 0
    room = [guard for guard in guards.report(paths) if guard.name == "local: room"]
    assert [guard.state for guard in room] == [guards.State.MISSING]
    assert run(["resize", "40M"]) == 0  # better than it was


@pytest.mark.parametrize("size", ["65M", "4M", "1M..40M", "20M..1G"])
def test_sizes_that_the_segment_cannot_have(
    segment: "_native.Segment", size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = segment.limits, segment.size_range
    assert run(["resize", size]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (segment.limits, segment.size_range) == before


@pytest.mark.parametrize("size", ["", "x", "1G..", "..1G", "2G..1G", "1G..2G..3G", "-1"])
def test_what_is_no_size(segment: "_native.Segment", size: str) -> None:
    assert run(["resize", "--", size]) == 2
