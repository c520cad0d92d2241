"""Processes are killed and stopped under a load that verifies every byte; ``scripts/faults`` does more."""

from .rounds import FAULTS, Campaign, table
from .world import World

ROUNDS = 2 * len(FAULTS)
LONGEST_S = 30.0
"""What no wait may exceed, however slow the machine: a start of the server takes a fraction of a second."""


def test_nothing_is_lost_and_nothing_hangs(world: World, seed: str) -> None:
    campaign = Campaign(world, seed, FAULTS)
    for _ in range(ROUNDS):
        campaign.next()
    print(table(campaign.rows))
    for name, row in campaign.rows.items():
        assert row.rounds, name
        assert max(row.swap_waits_s + row.files_waits_s) < LONGEST_S, name
    for child in world.loads:
        child.end()
