"""Runs the parts that were asked for: checks, plans, measures one after the other, keeps what came out.

Nothing is set up before everything that can be known was checked. A part that fails is reported and the
others go on; interrupted, what is under way is taken down first. One thread, the main one.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from tmem.bench import density, fuse, hits, nbd, room, swap
from tmem.bench.machine import machine
from tmem.bench.parts import Effort, Part, Plan, Step
from tmem.bench.results import Lacking, Outcome
from tmem.bench.rounds import FAILURES, reason
from tmem.errors import TmemError

PARTS: dict[str, Part] = {
    part.name: part for part in (nbd.PART, swap.PART, fuse.PART, density.PART, hits.PART)
}

KIND, VERSION = "tmem bench", 1


@dataclass
class Report:
    """A run: everything that is printed, drawn and kept."""

    machine: dict[str, object]
    began: str
    effort: Effort
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failed: list[Lacking] = field(default_factory=list)
    """Parts that could not be measured, or not to the end."""
    complete: bool = False

    def document(self) -> dict[str, object]:
        """Return it for JSON, with every round."""
        parts = {name: {"title": PARTS[name].title, **one.document()} for name, one in self.outcomes.items()}
        return {
            "kind": KIND,
            "version": VERSION,
            "complete": self.complete,
            "began": self.began,
            "machine": self.machine,
            "effort": asdict(self.effort),
            "parts": parts,
            "failed": [asdict(one) for one in self.failed],
        }


def plans(names: Sequence[str], effort: Effort) -> dict[str, Plan]:
    """Return what each part will do; those that cannot be run say so in `refused`."""
    return {name: PARTS[name].plan(effort) for name in names}


def begin(planned: dict[str, Plan], effort: Effort) -> Report:
    """Check that there is room for what is possible, and return an empty report.

    `TmemError` if there is not, or if nothing is possible at all.
    """
    possible = [plan for plan in planned.values() if plan.refused is None]
    if not possible:
        raise TmemError(next(plan.refused for plan in planned.values() if plan.refused is not None))
    room.check(possible)
    failed = [Lacking(name, plan.refused) for name, plan in planned.items() if plan.refused is not None]
    return Report(machine(), time.strftime("%Y-%m-%d %H:%M:%S %z"), effort, failed=failed)


def run(
    report: Report, planned: dict[str, Plan], step: Step, keep: Callable[[Report], None] = lambda report: None
) -> None:
    """Measure all that is possible into `report`; `keep` is called after each part."""
    for name, plan in planned.items():
        if plan.refused is not None:
            continue
        try:
            outcome = PARTS[name].run(report.effort, step)
        except FAILURES as error:
            report.failed.append(Lacking(name, reason(error)))
        else:
            outcome.lacking[:0] = plan.lacking
            report.outcomes[name] = outcome
        keep(report)
    report.complete = True
    report.machine["load_after_1min"] = round(os.getloadavg()[0], 2)
    keep(report)
