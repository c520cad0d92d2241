"""Whether a Redis may keep what must not be lost: it never evicts, and the replicas are there.

Asked before a writer writes for the first time and again every half minute, of every node: a replica with
another policy would become a primary with it. `INFO` is enough, which managed services allow as well.
Threading: one thread.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from tmem.backends.tiers.redis_exchange import facts
from tmem.backends.tiers.redis_nodes import Nodes
from tmem.errors import TierDownError

CHECK_SECONDS = 30.0


@dataclass(frozen=True)
class Memory:
    """The memory of all primaries."""

    used_bytes: int
    maximum_bytes: int | None
    """The sum of maxmemory; None if one of them has no limit."""

    @property
    def free_bytes(self) -> int | None:
        """What is left up to `maximum_bytes`."""
        return None if self.maximum_bytes is None else max(self.maximum_bytes - self.used_bytes, 0)


class Fitness:
    """Watches the servers behind `nodes`; `clock` is a monotonic clock in seconds."""

    def __init__(self, nodes: Nodes, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes = nodes
        self._clock = clock
        self._next = float("-inf")
        self.memory: Memory | None = None
        """As of the last look."""

    def check(self) -> None:
        """Look if it is time to. TierDownError and what to do if they are not fit, then at each call."""
        if self._clock() < self._next:
            return
        self.look()

    def look(self) -> None:
        """Ask all servers now. TierDownError as `check`."""
        self._next = float("-inf")
        nodes = self._nodes
        nodes.refresh()  # a primary may be a replica by now, without anything having failed
        primaries = nodes.primaries()
        used, maximum = 0, 0
        limited = True
        for name in nodes.all():
            try:
                memory = facts(nodes.ask(name, "INFO", "memory"))
            except TierDownError:
                if name in primaries:
                    raise
                continue  # a replica that does not answer: WAIT tells whether that matters
            policy = memory.get("maxmemory_policy", "noeviction")
            limit = int(memory.get("maxmemory", "0"))
            if policy != "noeviction":
                host, _, port = name.rpartition(":")
                raise TierDownError(
                    f"{name} evicts pages when its memory is full (maxmemory-policy {policy}): run "
                    f"'redis-cli -h {host} -p {port} config set maxmemory-policy noeviction', and set it in "
                    "its configuration file"
                )
            if name in primaries:
                used += int(memory.get("used_memory", "0"))
                maximum += limit
                limited = limited and limit > 0
        self.memory = Memory(used, maximum if limited else None)
        self._check_replicas(primaries)
        self._next = self._clock() + CHECK_SECONDS

    def _check_replicas(self, primaries: list[str]) -> None:
        nodes = self._nodes
        for name in primaries:
            replication = facts(nodes.ask(name, "INFO", "replication"))
            if replication.get("role") == "slave":
                primary = f"{replication.get('master_host')}:{replication.get('master_port')}"
                raise TierDownError(
                    f"{name} is a replica of {primary}: name the primary in the tier's URL, if it stays so"
                )
            there = int(replication.get("connected_slaves", "0"))
            demanded = nodes.demanded_of(name)
            if there < demanded:
                advice = (
                    "attach replicas, or say ?replicas=0 in the tier's URL if its pages may be lost with it"
                    if there == 0
                    else f"attach replicas, or say ?replicas={there}"
                )
                raise TierDownError(
                    f"{name} has {there} of the {demanded} replicas that must have each page: {advice}"
                )
