"""What the benchmarks share: rounds that alternate, ratios, the lines that are printed.

Places, processes and control groups are those of `tmem.bench`. Every figure is the median of rounds in which
the peers take turns, because the machines are shared; what is printed are ratios within such a run.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tmem.bench.rounds import in_turn

ROOT = Path(__file__).resolve().parents[2]


def medians(rounds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each peer's rounds."""
    return {name: statistics.median(values) for name, values in rounds.items()}


def paired_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Return the median of the ratios round by round: both halves of a pair saw the same minute."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def take_turns(peers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure each peer `rounds` times, `in_turn`."""
    results: dict[str, list[float]] = {name: [] for name in peers}
    for name in in_turn(list(peers), rounds):
        results[name].append(peers[name]())
    return results


def judged(
    case: str, placement: str, ratio: float, peer: str, target: float | None = None
) -> dict[str, object]:
    """Print one line of a table and return it: how fast we were relative to `peer`, and what was wanted."""
    row: dict[str, object] = {"case": case, "placement": placement, "peer": peer, "ratio": ratio}
    verdict = ""
    if target is not None:
        row |= {"target": target, "reached": ratio >= target}
        verdict = f"target {target:.2g} {'reached' if ratio >= target else 'MISSED'}"
    print(f"  {case:38} {placement:9} {ratio:7.2f} of {peer:18} {verdict}".rstrip(), flush=True)
    return row
