"""The page stands alone: nothing is loaded from anywhere, whatever names say, and every round is in it."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tmem.bench import plots, webpage
from tmem.bench.parts import Effort
from tmem.bench.results import OURS, Lacking, Outcome, Sample, Series, comparisons
from tmem.bench.running import Report

EVIL = "<script src=http://example.org/x.js></script>"


def series(case: str, peer: str, unit: str, value: float, chart: str = "", x: float = 0) -> Series:
    samples = tuple(
        Sample(value * part, {"1": 10 * part, "50": 20 * part, "99": 90 * part}) for part in (1, 2, 3)
    )
    return Series(case, peer, unit, samples, chart, x)


@pytest.fixture(scope="module")
def report() -> Report:
    """A report with every part, as a whole run makes it."""
    machine: dict[str, object] = {
        "cpu": EVIL,
        "cpus": 2,
        "memory_bytes": 24 << 30,
        "system": "Debian",
        "kernel": "6.18",
        "load_1min": 0.5,
        "versions": {"tmem": "0.1.0"},
    }
    found = {
        "nbd": [
            series(f"{chart}, depth {depth}", peer, "IOPS", 1000, chart, depth)
            for chart in ("4 KiB random reads", "4 KiB random writes")
            for depth in (1, 32)
            for peer in (OURS, "nbdkit memory")
        ],
        "swap": [series("random touches", peer, "touches/s", 5000) for peer in (OURS, "zram lz4", EVIL)],
        "fuse": [series("4 KiB hits, same CPU", peer, "reads/s", 9000) for peer in (OURS, "bindfs")],
        "density": [series("after the pass", peer, ": 1", 3) for peer in (OURS, "zram lz4")],
        "hits": [
            series(f"room for {size} %", peer, "%", 20, "hit ratio", size)
            for size in (5, 20)
            for peer in (OURS, "LRU")
        ],
    }
    outcomes = {}
    for name, made in found.items():
        cases = dict.fromkeys(one.case for one in made)
        rows = [row for case in cases for row in comparisons([one for one in made if one.case == case])]
        outcomes[name] = Outcome(made, rows, [Lacking("mergerfs", EVIL)])
    return Report(machine, "today", Effort(), outcomes, [Lacking("else", EVIL)], complete=True)


class References(HTMLParser):
    """Collects what a browser would load, and the elements."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.elements: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset") and not (value or "").startswith("#"):
                self.loaded.append(f"{tag} {name}={value}")


def test_nothing_is_loaded(report: Report) -> None:
    page = webpage.render(report)
    references = References()
    references.feed(page)
    assert references.loaded == []
    assert references.elements.count("svg") == 6
    assert references.elements.count("script") == 1  # the rounds; what was named <script> is text
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(references.elements)
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


def test_every_round_is_in_it(report: Report) -> None:
    found = re.search(r'<script type="application/json" id="rounds">(.*)</script>', webpage.render(report))
    assert found is not None
    assert json.loads(found[1]) == json.loads(json.dumps(report.document()))


def test_every_plot_is_drawn(report: Report) -> None:
    drawn = plots.figures(report)
    assert set(drawn) == {"nbd", "nbd-latency", "swap", "fuse", "density", "hits"}
    assert plots.png(drawn["hits"]).startswith(b"\x89PNG\r\n\x1a\n")
    depths = drawn["nbd"].axes
    assert [one.get_title() for one in depths] == ["4 KiB random reads", "4 KiB random writes"]
    ours = depths[0].lines[0]
    assert np.asarray(ours.get_xdata()).tolist() == [1, 32]
    assert np.asarray(ours.get_ydata()).tolist() == [2000, 2000]  # medians of the rounds


def test_a_report_without_results_has_no_plots() -> None:
    assert plots.figures(Report({}, "today", Effort(), {"nbd": Outcome(), "hits": Outcome()})) == {}
