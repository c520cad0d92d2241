"""Rounds in which the peers take turns, because no two minutes of a machine are alike.

Not for numbers (`results`) nor for what is measured. One thread.
"""

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence

from tmem.bench.results import OURS, Lacking, Sample
from tmem.errors import TmemError

Measure = Callable[[], Sample]

FAILURES = (TmemError, OSError, RuntimeError, ValueError, subprocess.SubprocessError)
"""What a peer may fail with; anything else is a mistake of ours."""


def in_turn(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield each name `rounds` times, in turn, with the order turned round every time."""
    for number in range(rounds):
        yield from names if number % 2 == 0 else reversed(names)


def take_turns(
    peers: Mapping[str, Measure],
    rounds: int,
    step: Callable[[str], None] = lambda name: None,
    lacking: list[Lacking] | None = None,
) -> dict[str, list[Sample]]:
    """Measure each peer `rounds` times, `in_turn`, calling `step` before each.

    A peer that fails is left out, its rounds so far too, and noted in `lacking`; a failure of ours is raised.
    """
    taken: dict[str, list[Sample]] = {name: [] for name in peers}
    for name in in_turn(list(peers), rounds):
        step(name)
        if name not in taken:
            continue
        try:
            taken[name].append(peers[name]())
        except FAILURES as error:
            if name == OURS:
                raise
            del taken[name]
            if lacking is not None:
                lacking.append(Lacking(name, reason(error)))
    return taken


def named(step: Callable[[str], None], case: str) -> Callable[[str], None]:
    """Return a `step` that is told a peer and tells the case as well."""
    return lambda peer: step(f"{case}: {peer}")


def reason(error: BaseException) -> str:
    """Return an error as one line."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
