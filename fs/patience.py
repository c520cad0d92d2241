"""How long a lower that is elsewhere takes: whether the event loop's thread may wait for it.

A thread costs more than the answer of a lower that has it at hand, and for another that thread must not wait.
The first answer that takes longer ends that it is quick, until many quick ones have followed, much as with
names (backends/native/reader_look.h). Threading: the event loop's thread.
"""

_QUICK_SECONDS = 100e-6
_UNKNOWN_SECONDS = 1.0
"""Before the first: some seventy quick ones must come."""
_FADING = 8


class Patience:
    """What one kind of question to the lower usually takes."""

    def __init__(self) -> None:
        self._usual_seconds = _UNKNOWN_SECONDS

    def note(self, seconds: float) -> None:
        """Note that an answer took so long."""
        usual = self._usual_seconds
        self._usual_seconds = max(seconds, usual - (usual - seconds) / _FADING)

    @property
    def is_quick(self) -> bool:
        """Whether who must not wait for long may all the same."""
        return self._usual_seconds < _QUICK_SECONDS
