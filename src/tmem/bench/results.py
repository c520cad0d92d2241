"""What measurements come to: series of rounds, and the comparisons made of them. Pure.

Shared machines move single figures by a third, so peers take turns and are compared round by round: the ratio
is the median of the rounds' ratios, and its spread is given with it. Any thread.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

OURS = "tmem"

Better = Literal["more", "less"]


@dataclass(frozen=True)
class Sample:
    """One round of one peer: the figure, and what was seen besides."""

    value: float
    percentiles_us: dict[str, float] = field(default_factory=dict)
    """Times of single requests: percentile ("99.9") to microseconds."""
    extra: dict[str, float] = field(default_factory=dict)
    """Other figures of the round, units in their names."""


@dataclass(frozen=True)
class Series:
    """All rounds of one peer in one case."""

    case: str
    peer: str
    unit: str
    samples: tuple[Sample, ...]
    chart: str = ""
    """Series of one chart are drawn together over `x`; empty: over nothing."""
    x: float = 0.0

    @property
    def values(self) -> list[float]:
        """The figure of each round."""
        return [sample.value for sample in self.samples]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.values)

    def percentiles_us(self) -> dict[str, float]:
        """Return the median over the rounds of each percentile that all of them have."""
        known = [sample.percentiles_us for sample in self.samples]
        shared = [name for name in known[0] if all(name in one for one in known)] if known else []
        return {name: statistics.median(one[name] for one in known) for name in shared}


@dataclass(frozen=True)
class Row:
    """A line of the table: ours relative to one peer in one case."""

    case: str
    peer: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    least: float
    most: float
    """The smallest and the largest ratio of a round."""
    better: Better = "more"
    target: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.better == "more" else self.ratio <= self.target

    @property
    def ahead(self) -> bool:
        """Whether we are at least as good as the peer."""
        return self.ratio >= 1 if self.better == "more" else self.ratio <= 1


@dataclass(frozen=True)
class Lacking:
    """What could not be measured, and what to do about it."""

    what: str
    reason: str


@dataclass
class Outcome:
    """All that a part of a run has found."""

    series: list[Series] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    lacking: list[Lacking] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    """Facts about the part: what was measured on, in numbers or words."""

    def document(self) -> dict[str, object]:
        """Return it for JSON, with every round."""
        return {
            "rows": [{**asdict(row), "reached": row.reached} for row in self.rows],
            "series": [asdict(series) for series in self.series],
            "lacking": [asdict(one) for one in self.lacking],
            "notes": self.notes,
        }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the ratios round by round; both halves of a pair saw the same minute. A peer at 0 has none."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True) if other]


def compare(ours: Series, theirs: Series, better: Better = "more", target: float | None = None) -> Row | None:
    """Return how `ours` did relative to `theirs`, round by round; None where no ratio exists."""
    found = ratios(ours.values, theirs.values)
    if not found:
        return None
    return Row(
        ours.case,
        theirs.peer,
        ours.unit,
        ours.median,
        theirs.median,
        statistics.median(found),
        min(found),
        max(found),
        better,
        target,
    )


def comparisons(
    series: Sequence[Series], better: Better = "more", targets: dict[str, float] | None = None
) -> list[Row]:
    """Compare our series of one case with that of each peer; `targets` by peer."""
    ours = next((one for one in series if one.peer == OURS), None)
    if ours is None:
        return []
    made = [compare(ours, one, better, (targets or {}).get(one.peer)) for one in series if one.peer != OURS]
    return [row for row in made if row is not None]
