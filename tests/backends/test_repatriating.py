"""When swapped-out pages come back by themselves, played against made-up machines."""

import math
import os
import signal
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tmem.backends import meminfo, processes, repatriator
from tmem.backends.paths import SegmentPaths
from tmem.backends.repatriating import (
    BEGIN_SHARE,
    CALM,
    LEAST_BYTES,
    MOST_WAITS,
    OUT_PAGES,
    OUT_PAGES_PER_S,
    STALLED,
    STOP_SHARE,
    Repatriation,
    Sample,
    objection,
)
from tmem.errors import TmemError

from ..waiting import wait_until

if TYPE_CHECKING:
    from tmem.backends import _native

GIB = 1 << 30
IDLE_S = 60.0

QUIET = Sample(
    now_s=0.0,
    kept_bytes=GIB,
    missing_bytes=GIB // 2,
    available_bytes=8 * GIB,
    total_bytes=16 * GIB,
    stalled=0.0,
    swapped_out_pages=1000,
)

looks = st.builds(
    Sample,
    now_s=st.just(0.0),
    kept_bytes=st.sampled_from([0, LEAST_BYTES - 1, LEAST_BYTES, GIB]),
    missing_bytes=st.integers(0, 4 * GIB),
    available_bytes=st.integers(0, 16 * GIB),
    total_bytes=st.just(16 * GIB),
    stalled=st.sampled_from([0.0, CALM, 2 * CALM, 1.0]),
    swapped_out_pages=st.just(0),
)


@given(st.lists(st.tuples(looks, st.floats(0.1, IDLE_S), st.sampled_from([0.0, 0.0, 0.9, 1.1])), max_size=60))
def test_a_pass_is_due_only_after_memory_was_in_plenty_all_the_time(
    steps: list[tuple[Sample, float, float]],
) -> None:
    rule = Repatriation(IDLE_S)
    now_s, out, calm_s = 0.0, 0, 0.0
    first = True
    for look, passes_s, swapped in steps:
        pages = (
            math.ceil(OUT_PAGES_PER_S * passes_s * swapped)
            if swapped > 1
            else int(OUT_PAGES_PER_S * passes_s * swapped)
        )
        now_s, out = now_s + passes_s, out + pages
        seen = replace(look, now_s=now_s, swapped_out_pages=out)
        plenty = seen.available_bytes >= 2 * seen.missing_bytes + seen.total_bytes // BEGIN_SHARE
        calm = plenty and seen.stalled <= CALM and swapped <= 1 and not first
        calm_s = calm_s + passes_s if calm else 0.0
        first = False
        due = rule.due(seen)
        assert not due or seen.kept_bytes >= LEAST_BYTES
        assert due == (calm_s >= IDLE_S and seen.kept_bytes >= LEAST_BYTES) or abs(calm_s - IDLE_S) < 1e-6
        if due:
            # Who may begin may go on.
            assert objection(seen, seen) == ""


@settings(max_examples=20)
@given(st.integers(15, 40), st.floats(0.26, 1.0), st.booleans())
def test_it_does_not_take_turns_with_the_kernel(look_s: int, regret: float, stopped: bool) -> None:
    """A machine that swaps out again what came back, or has each pass stop: passes become rare."""
    rule = Repatriation(IDLE_S)
    hours = 12
    now_s, out, passes = 0.0, 0, 0
    while now_s < hours * 3600:
        now_s += look_s
        if rule.due(replace(QUIET, now_s=now_s, swapped_out_pages=out)):
            passes += 1
            seen = replace(QUIET, now_s=now_s, swapped_out_pages=out)
            rule.ended(seen, 0 if stopped else GIB, stopped)
            out += int(GIB // 4096 * regret)
            now_s += look_s
            rule.due(replace(QUIET, now_s=now_s, swapped_out_pages=out))
    most = log2(MOST_WAITS) + 1 + hours * 3600 / (IDLE_S * MOST_WAITS)
    assert 3 <= passes <= most
    assert rule.wait_s == IDLE_S * MOST_WAITS


def test_it_forgets_what_it_did_wrong() -> None:
    rule = Repatriation(IDLE_S)
    rule.due(QUIET)
    for _ in range(4):
        rule.ended(QUIET, 0, stopped=True)
    assert rule.wait_s == 16 * IDLE_S
    now_s, passes = 0.0, 0
    while rule.wait_s > IDLE_S:
        now_s += 1
        assert now_s <= 46 * IDLE_S
        seen = replace(QUIET, now_s=now_s)
        if rule.due(seen):
            passes += 1
            rule.ended(seen, GIB, stopped=False)
    assert passes == 5


def test_a_few_pages_that_go_out_again_are_no_regret() -> None:
    rule = Repatriation(IDLE_S)
    rule.due(QUIET)
    rule.ended(QUIET, GIB, stopped=False)
    few = QUIET.swapped_out_pages + GIB // 4096 // 4 - 1
    rule.due(replace(QUIET, now_s=1.0, swapped_out_pages=few + OUT_PAGES_PER_S))
    assert rule.wait_s == IDLE_S
    rule.due(replace(QUIET, now_s=1.0, swapped_out_pages=few + OUT_PAGES_PER_S + 1))
    assert rule.wait_s == 2 * IDLE_S


def test_a_trickle_of_swap_disturbs_nothing() -> None:
    """A group at its limit swaps a few pages for ever."""
    rule = Repatriation(IDLE_S)
    passes = 0
    for now_s in range(0, int(IDLE_S * 20), 5):
        seen = replace(QUIET, now_s=float(now_s), swapped_out_pages=now_s * OUT_PAGES_PER_S)
        if rule.due(seen):
            passes += 1
            rule.ended(seen, 64 << 20, stopped=False)
    assert passes >= 18
    assert rule.wait_s == IDLE_S


def test_what_stops_a_pass() -> None:
    enough = QUIET.missing_bytes + QUIET.total_bytes // STOP_SHARE
    assert objection(replace(QUIET, available_bytes=enough, stalled=STALLED), QUIET) == ""
    assert "too little memory" in objection(replace(QUIET, available_bytes=enough - 1), QUIET)
    assert "waits" in objection(replace(QUIET, stalled=2 * STALLED), QUIET)
    out = QUIET.swapped_out_pages + OUT_PAGES + 10 * OUT_PAGES_PER_S
    assert objection(replace(QUIET, now_s=10.0, swapped_out_pages=out), QUIET) == ""
    assert "swaps out" in objection(replace(QUIET, now_s=10.0, swapped_out_pages=out + 1), QUIET)


def test_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 1\npswpin 7\npswpout 42\nx_pswpout 9\n")
    (tmp_path / "swaps").write_text("Filename Type Size Used Priority\n")
    (tmp_path / "meminfo").write_text(
        "MemTotal: 4000 kB\nMemAvailable: 3000 kB\nSwapTotal: 900 kB\nSwapFree: 200 kB\nSwapCached: 100 kB\n"
    )
    assert meminfo.swapped_out_pages(tmp_path) == 42
    assert not meminfo.has_swap(tmp_path)
    seen = repatriator.sample(5, 0.25, tmp_path)
    assert (seen.kept_bytes, seen.missing_bytes, seen.available_bytes) == (5, 600 << 10, 3000 << 10)
    assert (seen.total_bytes, seen.stalled, seen.swapped_out_pages) == (4000 << 10, 0.25, 42)
    (tmp_path / "swaps").write_text("Filename Type Size Used Priority\n/dev/nbd0 partition 900 700 -2\n")
    (tmp_path / "vmstat").write_text("nr_free_pages 1\n")  # a kernel without swap
    assert meminfo.has_swap(tmp_path)
    assert meminfo.swapped_out_pages(tmp_path) == 0


def test_a_manager_that_ends_tells_the_pass_to_stop_and_does_not_wait(tmp_path: Path) -> None:
    ended = processes.spawn(["sh", "-c", "exit 3"], os.environ, tmp_path / "log")
    assert trio.run(repatriator._end_of, ended) == 3
    # It notes the signal and takes its time, as one in a swapoff does.
    script = "trap 'echo told' TERM; echo ready; while :; do sleep 0.05; done"
    pid = processes.spawn(["sh", "-c", script], os.environ, tmp_path / "slow")
    try:

        async def cancel() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(repatriator._end_of, pid)
                with trio.fail_after(30):
                    while processes.last_line(tmp_path / "slow") != "ready":
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

        trio.run(cancel)
        assert processes.start_ticks(pid) is not None
        wait_until(lambda: processes.last_line(tmp_path / "slow") == "told", what="it was told")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_what_was_killed_on_the_way_is_completed_first(segment: "_native.Segment", runtime_dir: Path) -> None:
    """The next thing after a pass, or a manager together with it, was killed amid an emptying."""
    paths = SegmentPaths("default", runtime_dir)
    mark, called = paths.state / "emptying-local", paths.state / "called"
    mark.touch()
    command = ["sh", "-c", f'echo "$*" >> {called}; rm -f {mark}; echo \'{{"dropped_pages": 7}}\'', "shrink"]
    made = repatriator.Repatriator(paths, segment, 3600, command)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.run)
            with trio.fail_after(30):
                while mark.exists():
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(run)
    assert called.read_text() == "--complete\n"

    killed = ["sh", "-c", f"touch {mark}; kill -KILL $$"]
    made = repatriator.Repatriator(paths, segment, 3600, killed)
    with pytest.raises(TmemError, match="status -9"):
        trio.run(made._pass, Repatriation(3600))
    assert made._completes_s < math.inf
