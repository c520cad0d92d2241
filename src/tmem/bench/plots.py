"""Draws a report: times of requests, throughput over queue depth, bytes of a page, hits over size, and bars.

The only module that imports matplotlib, which is an extra (``tmem[bench]``); no display is needed. Not for
tables (`report`) nor for the page that holds them (`webpage`). One thread.
"""

import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tmem.bench.report import figure as shown
from tmem.bench.results import OURS, Outcome, Series
from tmem.bench.running import PARTS, Report
from tmem.errors import TmemError
from tmem.types import PAGE_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _OTHERS = "#c0392b", ("#2c6fbb", "#7aa6d6", "#4d4d4d", "#9a9a9a", "#2e8b57", "#a67c2d")
_WIDTH, _HEIGHT = 5.2, 3.4
"""Inches of one pair of axes."""
_MOST_IN_A_ROW = 4

MISSING = f"plots need matplotlib: {sys.executable} -m pip install 'tmem[bench]'"


def check_available() -> None:
    """Raise `TmemError` with the command that installs it, unless matplotlib is there."""
    try:
        import matplotlib as matplotlib
    except ImportError:
        raise TmemError(MISSING) from None


def figures(report: Report) -> dict[str, "Figure"]:
    """Return what can be drawn of a report, by names that can stand in a file name."""
    drawn: dict[str, Figure] = {}
    for name, outcome in report.outcomes.items():
        title = PARTS[name].title
        draw = _SPECIAL.get(name, _bars)
        if (figure := draw(title, outcome)) is not None:
            drawn[name] = figure
        if name == "nbd" and (figure := _times(f"{title}: times of requests", outcome)) is not None:
            drawn["nbd-latency"] = figure
    return drawn


def svg(figure: "Figure") -> str:
    """Return a figure as an element that can stand in a page, with no reference to anything outside."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    return text[text.index("<svg") :]  # without the reference to a document type elsewhere


def png(figure: "Figure") -> bytes:
    """Return a figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _axes(title: str, count: int, width: float = _WIDTH) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    rows = -(-count // _MOST_IN_A_ROW)
    columns = -(-count // rows)
    figure = Figure(figsize=(width * columns, _HEIGHT * rows), layout="constrained")
    figure.suptitle(title)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.3)
        one.set_axisbelow(True)
    return figure, axes


def _colours(peers: Sequence[str]) -> dict[str, str]:
    """Give each peer a colour; ours is always the same."""
    found = {OURS: _OURS, f"{OURS}, LZ4": "#e79a8f"}
    others = [peer for peer in dict.fromkeys(peers) if peer not in found]
    return found | {peer: _OTHERS[number % len(_OTHERS)] for number, peer in enumerate(others)}


def _by(series: Sequence[Series], key: Callable[[Series], str]) -> Iterator[tuple[str, list[Series]]]:
    """Group series by a key, in the order of their first."""
    for value in dict.fromkeys(map(key, series)):
        yield value, [one for one in series if key(one) == value]


def _over(axes: "Axes", series: list[Series], label: str) -> None:
    """Draw each peer's medians over x, with the smallest and the largest round."""
    colours = _colours([one.peer for one in series])
    for peer, points in _by(series, lambda one: one.peer):
        points.sort(key=lambda one: one.x)
        x, y = [one.x for one in points], [one.median for one in points]
        spread = [
            [one.median - min(one.values) for one in points],
            [max(one.values) - one.median for one in points],
        ]
        axes.errorbar(x, y, yerr=spread, label=peer, color=colours[peer], marker="o", markersize=4, capsize=2)
    ticks = sorted({one.x for one in series})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _depths(title: str, outcome: Outcome) -> "Figure | None":
    charts = list(_by([one for one in outcome.series if one.chart], lambda one: one.chart))
    if not charts:
        return None
    figure, axes = _axes(f"{title}: throughput over queue depth", len(charts))
    for one, (chart, series) in zip(axes, charts, strict=True):
        _over(one, series, "queue depth")
        one.set_title(chart, fontsize="medium")
        one.set_ylabel(series[0].unit)
    return figure


def _times(title: str, outcome: Outcome) -> "Figure | None":
    """Draw the share of requests that took at most so long."""
    cases = list(_by([one for one in outcome.series if one.percentiles_us()], lambda one: one.case))
    wanted = [(case, series) for case, series in cases if re.search(r"depth (1|32)$", case)]
    if not wanted:
        return None
    figure, axes = _axes(title, len(wanted), _WIDTH * 0.8)
    for one, (case, series) in zip(axes, wanted, strict=True):
        colours = _colours([single.peer for single in series])
        for single in series:
            times = sorted((float(name), value) for name, value in single.percentiles_us().items())
            one.plot(
                [value for _, value in times],
                [share for share, _ in times],
                label=single.peer,
                color=colours[single.peer],
            )
        one.set_xscale("log")
        one.set_title(case, fontsize="medium")
        one.set_xlabel("us")
        one.set_ylabel("% of requests")
        one.legend(fontsize="small")
    return figure


def _density(title: str, outcome: Outcome) -> "Figure | None":
    """Draw the bytes of memory that a page takes, instead of the ratio."""
    cases = list(_by(outcome.series, lambda one: one.case))
    return _grouped(f"{title}: bytes of memory a page", cases, lambda one: PAGE_SIZE / one.median, "bytes")


def _hits(title: str, outcome: Outcome) -> "Figure | None":
    if not outcome.series:
        return None
    figure, (axes,) = _axes(title, 1, _WIDTH * 1.4)
    _over(axes, outcome.series, "room, % of the pages")
    axes.set_ylabel("hits, %")
    return figure


def _bars(title: str, outcome: Outcome) -> "Figure | None":
    """Draw every case, each unit on axes of its own."""
    return _grouped(title, list(_by(outcome.series, lambda one: one.case)), lambda one: one.median)


def _grouped(
    title: str, cases: list[tuple[str, list[Series]]], value: Callable[[Series], float], unit: str = ""
) -> "Figure | None":
    if not cases:
        return None
    figure, axes = _axes(title, len(cases), max(2.6, _WIDTH / len(cases) ** 0.5))
    for one, (case, series) in zip(axes, cases, strict=True):
        colours = _colours([single.peer for single in series])
        heights = [value(single) for single in series]
        bars = one.bar(range(len(series)), heights, color=[colours[single.peer] for single in series])
        one.bar_label(bars, [shown(height) for height in heights], fontsize="x-small")
        one.set_xticks(range(len(series)), [single.peer for single in series], rotation=30, ha="right")
        one.tick_params(axis="x", labelsize="small")
        one.grid(visible=False, axis="x")
        one.set_title(case.replace(", ", "\n"), fontsize="small")
        one.set_ylabel(unit or series[0].unit)
    return figure


_SPECIAL: dict[str, Callable[[str, Outcome], "Figure | None"]] = {
    "nbd": _depths,
    "density": _density,
    "hits": _hits,
}
