"""A report as one page, which a browser shows without any other file and without a network. Pure."""

import json
from html import escape

from tmem.bench.machine import line
from tmem.bench.plots import figures, svg
from tmem.bench.report import figure, spread, verdict
from tmem.bench.results import Lacking, Row
from tmem.bench.running import PARTS, Report

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 68em; padding: 0 1em; color: #222;
       background: #fff }
table { border-collapse: collapse; margin: .6em 0 1em }
th, td { padding: .1em .8em; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left }
tr.case td { font-weight: 600; padding-top: .7em }
.yes { color: #1b7a3d } .no { color: #b3261e } .lacking { color: #666 }
svg { max-width: 100%; height: auto }
"""


def render(report: Report) -> str:
    """Return the page."""
    drawn = figures(report)
    body = [
        "<h1>tmem bench</h1>",
        f"<p>{escape(line(report.machine))}<br>{escape(report.began)}, load "
        f"{escape(str(report.machine.get('load_after_1min', 'unknown')))} at the end</p>",
        "<p>Peers take turns. A ratio is the median of the rounds' ratios; spread is from the smallest to "
        "the largest; wanted is what the project aims at.</p>",
    ]
    if not report.complete:
        body.append("<p class=no>The run did not come to its end.</p>")
    for name, outcome in report.outcomes.items():
        body.append(f"<h2>{escape(PARTS[name].title)}</h2>")
        body += [svg(plot) for plot_name, plot in drawn.items() if plot_name.partition("-")[0] == name]
        body.append(_table(outcome.rows))
        body += [_lacking(one) for one in outcome.lacking]
    body += [_lacking(one) for one in report.failed]
    data = json.dumps(report.document()).replace("</", "<\\/")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>tmem bench</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f'\n<script type="application/json" id="rounds">{data}</script>\n</body></html>\n'
    )


def _table(rows: list[Row]) -> str:
    heads = "".join(f"<th>{text}</th>" for text in ("beside", "tmem", "peer", "ratio", "spread", "wanted"))
    lines = []
    case = ""
    for row in rows:
        if row.case != case:
            case = row.case
            lines.append(f'<tr class="case"><td colspan="6">{escape(case)} ({escape(row.unit)})</td></tr>')
        kind = "" if row.reached is None else "yes" if row.reached else "no"
        cells = (figure(row.ours), figure(row.theirs), f"<b>{figure(row.ratio)}</b>", spread(row))
        lines.append(
            f"<tr><td>{escape(row.peer)}</td>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f'<td class="{kind}">{escape(verdict(row))}</td></tr>'
        )
    return f"<table><tr>{heads}</tr>\n" + "\n".join(lines) + "\n</table>"


def _lacking(one: Lacking) -> str:
    return f'<p class="lacking">not measured: {escape(one.what)}: {escape(one.reason)}</p>'
