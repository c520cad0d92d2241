"""The results as a person reads them in a terminal: a table a part, and what could not be measured.

Made for 80 columns. Pure: from numbers to what rich prints.
"""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tmem.bench.machine import line
from tmem.bench.results import Row
from tmem.bench.running import PARTS, Report


def figure(value: float) -> str:
    """Return a figure with three digits or as many as its whole part has: ``19,482``, ``2.56``."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def verdict(row: Row) -> str:
    """Return what was wanted, and whether it came about."""
    if row.target is None:
        return ""
    sign = ">=" if row.better == "more" else "<="
    return f"{sign} {row.target:g} {'yes' if row.reached else 'NO'}"


def spread(row: Row) -> str:
    """Return the smallest and the largest ratio of a round; nothing where there was one round."""
    return "" if row.least == row.most else f"{figure(row.least)}-{figure(row.most)}"


def table(rows: list[Row]) -> Table:
    """Return the rows as a table: a line for each case, and below it one for each peer."""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("beside", no_wrap=True)
    for heading in ("tmem", "peer", "ratio"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("spread", no_wrap=True)
    made.add_column("wanted", no_wrap=True)
    case = ""
    for row in rows:
        if row.case != case:
            case = row.case
            made.add_row(f"{case} ({row.unit})")
        made.add_row(
            f"  {row.peer}",
            figure(row.ours),
            figure(row.theirs),
            Text(figure(row.ratio), style="bold"),
            spread(row),
            Text(verdict(row), style="" if row.reached is None else "green" if row.reached else "red"),
        )
    return made


def render(report: Report) -> RenderableType:
    """Return the whole report."""
    found: list[RenderableType] = [Text(line(report.machine))]
    for name, outcome in report.outcomes.items():
        found += [Text(""), Text(PARTS[name].title, style="bold"), table(outcome.rows)]
        found += [Text(f"not measured: {one.what}: {one.reason}") for one in outcome.lacking]
    if report.failed:
        found.append(Text(""))
        found += [Text(f"not measured: {one.what}: {one.reason}", style="red") for one in report.failed]
    return Group(*found)
