"""What a part of a run is, and how much of everything it takes. Not for running them: `running`. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tmem.bench.results import Lacking, Outcome


@dataclass(frozen=True)
class Effort:
    """How thoroughly to measure: the user's wishes, where None is the part's own choice."""

    quick: bool = False
    rounds: int | None = None
    seconds: float | None = None

    def of(self, rounds: tuple[int, int], seconds: tuple[float, float]) -> "Effort":
        """Return the effort with every choice made; each pair is (whole run, quick run)."""
        return replace(
            self,
            rounds=self.rounds or rounds[self.quick],
            seconds=self.seconds or seconds[self.quick],
        )

    @property
    def amount(self) -> tuple[int, float]:
        """Rounds, and seconds of each measurement, once they are chosen."""
        assert self.rounds is not None
        assert self.seconds is not None
        return self.rounds, self.seconds


@dataclass(frozen=True)
class Plan:
    """What a part will do."""

    memory_bytes: int
    disk_bytes: int
    """In `grounds.DISK`."""
    steps: int
    """How often it will call its `step`."""
    about_s: float
    says: str
    """What it sets up, in words for the user."""
    refused: str | None = None
    """Why it cannot be run here at all; one line that says what to do."""
    lacking: list[Lacking] = field(default_factory=list)
    """Peers that are left out."""


Step = Callable[[str], None]
"""Told before each measurement what comes."""


@dataclass(frozen=True)
class Part:
    """One of the things that are measured."""

    name: str
    title: str
    plan: Callable[[Effort], Plan]
    run: Callable[[Effort, Step], Outcome]
