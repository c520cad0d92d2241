"""Random sequences of operations from the table, by users in turn, in one directory: the same all the way."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .compare import USERS, Actor, Twins, User
from .kinds import KINDS
from .table import OPERATIONS
from .test_table import KNOWN, WAITING

# `send` is of a file that may be empty by then: the kernel asks nobody, and its access time stays.
EXCLUDED = {operation for _, operation in KNOWN} | {"send"} | ({"set_list_default"} if WAITING else set())
STEPS = st.tuples(
    st.sampled_from([name for name in OPERATIONS if name not in EXCLUDED]), st.sampled_from(USERS)
)
STARTS = st.sampled_from([kind for kind in KINDS if kind not in WAITING])


@settings(
    max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
@given(kind=STARTS, steps=st.lists(STEPS, min_size=3, max_size=20))
def test_sequences(twins: Twins, actors: dict[User, Actor], kind: str, steps: list[tuple[str, User]]) -> None:
    case = twins.stage(KINDS[kind])
    for number, (operation, user) in enumerate(steps, 1):
        # The mount's own view is asked for at the end: listing it touches access times.
        views = ("lower", "mount") if number == len(steps) else ("lower",)
        found = twins.compare(case, lambda root: actors[user].do(operation, root), views)  # noqa: B023
        assert not found, f"step {number}, {operation} by {user.name} on {kind}: {found}"
