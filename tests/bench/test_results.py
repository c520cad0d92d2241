"""Ratios are made round by round, a peer that fails ends nothing, and the table says who lost."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from tmem.bench import report, running
from tmem.bench.parts import Effort
from tmem.bench.results import Lacking, Outcome, Row, Sample, Series, compare, comparisons
from tmem.bench.rounds import in_turn, take_turns
from tmem.errors import TmemError


def series(peer: str, *values: float, percentiles: tuple[dict[str, float], ...] = ()) -> Series:
    times = percentiles or ({},) * len(values)
    samples = tuple(Sample(value, one) for value, one in zip(values, times, strict=True))
    return Series("reads", peer, "IOPS", samples)


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The machine was twice as fast in the second round: medians of each would give 200 / 150.
    row = compare(series("tmem", 100, 200, 300), series("peer", 100, 200, 150))
    assert row is not None
    assert (row.ratio, row.least, row.most) == (1.0, 1.0, 2.0)
    assert (row.ours, row.theirs) == (200, 150)


def test_rounds_are_paired() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare(series("tmem", 1, 2), series("peer", 1))


def test_a_peer_that_did_nothing_has_no_ratio() -> None:
    assert compare(series("tmem", 5, 5), series("peer", 0, 0)) is None


def test_less_may_be_better() -> None:
    (row,) = comparisons([series("tmem", 40), series("peer", 100)], "less", {"peer": 0.5})
    assert row.reached
    assert row.ahead
    (row,) = comparisons([series("tmem", 60), series("peer", 100)], "less", {"peer": 0.5})
    assert row.reached is False
    assert row.ahead
    (row,) = comparisons([series("tmem", 60), series("peer", 100)], targets={"peer": 0.5})
    assert row.reached
    assert not row.ahead


def test_percentiles_are_medians_of_those_that_all_rounds_have() -> None:
    one = series("tmem", 1, 2, 3, percentiles=({"50": 10, "99": 90}, {"50": 30, "99": 10}, {"50": 20}))
    assert one.percentiles_us() == {"50": 20}


def test_the_order_is_turned_round_every_time() -> None:
    assert list(in_turn(["a", "b"], 3)) == ["a", "b", "b", "a", "a", "b"]


def failing(values: list[float]) -> Callable[[], Sample]:
    """Return a measurement that gives `values` in turn, and fails when there are no more."""
    left = list(values)

    def measure() -> Sample:
        if not left:
            raise TmemError("a first line\nit is broken: mend it")
        return Sample(left.pop(0))

    return measure


def test_a_peer_that_fails_is_named_and_left_out() -> None:
    lacking: list[Lacking] = []
    steps: list[str] = []
    peers = {"tmem": failing([1, 2, 3]), "good": failing([4, 5, 6]), "bad": failing([7])}
    taken = take_turns(peers, 3, steps.append, lacking)
    assert [sample.value for sample in taken["good"]] == [4, 5, 6]
    assert set(taken) == {"tmem", "good"}
    assert lacking == [Lacking("bad", "it is broken: mend it")]
    assert len(steps) == 9  # as announced, whoever fails


def test_our_own_failure_is_raised() -> None:
    with pytest.raises(TmemError, match="mend it"):
        take_turns({"tmem": failing([]), "good": failing([1])}, 1)


def shown(made: running.Report) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(report.render(made))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_says_who_lost_and_what_is_lacking() -> None:
    rows = [
        Row("reads", "zram lz4", "IOPS", 19482.2, 20582.2, 0.9465, 0.91, 1.02, "more", 1.0),
        Row("reads", "swap file", "IOPS", 19482.2, 100.0, 194.8, 180.0, 200.0),
    ]
    lacking = [Lacking("bindfs", "not installed: apt-get install bindfs")]
    machine: dict[str, object] = {
        "cpu": "A CPU",
        "cpus": 2,
        "memory_bytes": 24 << 30,
        "system": "Debian",
        "kernel": "6.18",
        "load_1min": 0.5,
        "versions": {"tmem": "0.1.0"},
    }
    made = running.Report(machine, "today", Effort(), {"nbd": Outcome(rows=rows, lacking=lacking)})
    made.failed.append(Lacking("swap", "needs root"))
    text = shown(made)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "  zram lz4   19,482 20,582  0.95 0.91-1.02 >= 1 NO" in lines
    assert "not measured: bindfs: not installed: apt-get install bindfs" in lines
    assert "not measured: swap: needs root" in lines


def test_the_document_has_every_round() -> None:
    one = series("tmem", 1, 2, percentiles=({"50": 10}, {"50": 30}))
    made = running.Report({}, "today", Effort(True), {"nbd": Outcome([one], comparisons([one]))})
    parts = made.document()["parts"]
    assert isinstance(parts, dict)
    samples = parts["nbd"]["series"][0]["samples"]
    assert [sample["value"] for sample in samples] == [1, 2]
    assert samples[1]["percentiles_us"] == {"50": 30}
