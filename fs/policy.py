"""What a mount was told about its caching: a value without behaviour, which travels over a restart."""

from dataclasses import dataclass

from tmem.fs.rules import EVERYTHING, Rules

AHEAD_BYTES = 8 << 20
"""How far a stream is read ahead of its reader, unless told otherwise."""


@dataclass(frozen=True)
class Policy:
    """Which files are cached (`rules`), what is read before it is asked for, when caching stops."""

    rules: Rules = EVERYTHING
    ahead_bytes: int = AHEAD_BYTES
    """The most that is read ahead of a sequential reader (`readahead`); 0: nothing."""
    steps_aside: bool = True
    """Whether new opens pass by the pool while it does not pay (`worth`)."""

    def saved(self) -> "SavedPolicy":
        """Return all of it for `restored`."""
        rules = self.rules
        return (
            rules.cache_files,
            rules.skip_files,
            rules.least_bytes,
            rules.most_bytes,
            self.ahead_bytes,
            self.steps_aside,
        )

    @classmethod
    def restored(cls, saved: "SavedPolicy") -> "Policy":
        """Return the policy that was `saved`."""
        return cls(Rules(*saved[:4]), *saved[4:])


DEFAULT = Policy()

SavedPolicy = tuple[tuple[str, ...], tuple[str, ...], int, int | None, int, bool]
"""The fields of `Rules`, then the others of `Policy`."""
