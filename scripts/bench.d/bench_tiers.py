"""Demotion to and fetch from a Redis cluster of 3 + 3 on loopback, beside redis-benchmark.

Ours stores records, which have to be packed and unpacked, and waits for the replicas of every batch;
redis-benchmark sends one prepared value again and again, under 16384 names, and waits for nobody. Both have
the same number of values on their way to each node. The servers take most of two CPUs, so who measures
competes with them.

As those of redis-benchmark do, values take the place of others: what each round stored is dead in the next.
"new room" is where nothing has died, beside redis-benchmark with a new name for each value (-r).
"""

import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from common import ROOT, judged, medians, paired_ratio, take_turns

from tmem.backends.tiers import redis_values
from tmem.backends.tiers.contract import MAX_BEGUN, TierIdentity, Writing
from tmem.backends.tiers.redis_tier import RedisTier
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.bench.grounds import workplace

TARGET = 0.5
BATCH_VALUES = 120
"""As many as a batch of the manager fills, 2048 pages."""
DEPTH = BATCH_VALUES // 3
CONNECTIONS = (3, 50)
"""One to each node, as ours has; and redis-benchmark's default."""


def run(rounds: int, batches: int) -> dict[str, object]:
    """Measure `rounds` rounds of `batches` batches."""
    sys.path.insert(0, str(ROOT))
    from tests.backends.tiers.servers import Cluster

    rng = random.Random(1)
    # As long as compressed pages of programs are; the servers do not care what is in them.
    lengths = [min(max(int(rng.gauss(1850, 700)), 200), 4112) for _ in range(4000)]
    records = [rng.randbytes(length) for length in lengths]
    stored = redis_values.packed(records)[:BATCH_VALUES]
    records = records[: sum(len(redis_values.lengths(value)) for value in stored)]
    size = sum(map(len, stored)) // len(stored)
    with workplace() as directory:
        cluster = Cluster(directory)
        try:
            tier = RedisTier(RedisAddress.parse(cluster.url), TierIdentity(1, 1, 1), True)
            tier.retain([])
            peers: dict[str, Callable[[], float]] = {
                "demotion": lambda: demotion(tier, records, batches),
                "fetch": lambda: fetch(tier, records, batches),
                "new room": lambda: demotion(tier, records, batches, new=True),
            }
            peer = Peer(cluster.servers[0].port, size)
            for count in CONNECTIONS:
                for test in ("set", "get"):
                    peers[f"{test} c{count}"] = partial(peer.run, test, batches * BATCH_VALUES * 2, count)
            peers["set new"] = partial(peer.run, "set", batches * BATCH_VALUES, CONNECTIONS[0], new=True)
            results = take_turns(peers, rounds)
            tier.close()
        finally:
            cluster.end()
    rows = [
        judged(
            f"{ours}, {count} connections",
            "",
            paired_ratio(results[ours], results[f"{test} c{count}"]),
            f"redis-benchmark {test}",
            TARGET,
        )
        for ours, test in (("demotion", "set"), ("fetch", "get"))
        for count in CONNECTIONS
    ]
    rows += [
        judged("demotion, new room", "", paired_ratio(results["new room"], results[peer]), shown)
        for peer, shown in [
            ("set new", "redis-benchmark set -r"),
            *((f"set c{count}", f"the same, {count} connections") for count in CONNECTIONS),
        ]
    ]
    middle = medians(results)
    per_value = len(records) / BATCH_VALUES
    print(
        f"  values of {size} bytes with {per_value:.1f} records, {DEPTH} on their way to a node; "
        f"{middle['demotion'] * per_value:,.0f} records/s out, {middle['fetch'] * per_value:,.0f} in"
    )
    return {"value_bytes": size, "records_a_value": per_value, "values_per_s": results, "rows": rows}


def demotion(tier: RedisTier, records: list[bytes], batches: int, new: bool = False) -> float:
    """Return the values a second that are stored, in batches that overlap as the manager's do; `new`: not in
    the place of those of the round before."""
    tier.retain([])
    if new:
        for _ in range(2):
            tier.check()  # what is dead and was not needed goes at the second look
    start = time.perf_counter()
    begun: deque[Writing] = deque()
    for _ in range(batches):
        if len(begun) == MAX_BEGUN:
            begun.popleft().end()
        begun.append(tier.begin(records))
    while begun:
        begun.popleft().end()
    return batches * BATCH_VALUES / (time.perf_counter() - start)


def fetch(tier: RedisTier, records: list[bytes], batches: int) -> float:
    """Return the values a second that are read."""
    tier.retain([])
    stored = [tier.write(records) for _ in range(min(batches, 16))]
    start = time.perf_counter()
    for n in range(batches):
        found = tier.read(stored[n % len(stored)])
    seconds = time.perf_counter() - start
    if found != records:
        raise RuntimeError("what was read is not what was written")
    return batches * BATCH_VALUES / seconds


class Peer:
    """redis-benchmark in cluster mode, with values of `size` bytes."""

    def __init__(self, port: int, size: int) -> None:
        self._command = [
            "redis-benchmark",
            "--cluster",
            "--csv",
            "-p",
            str(port),
            "-P",
            str(DEPTH),
            "-d",
            str(size),
        ]
        # It uses a name for each slot, chosen at random: this stores 98 % of them, or it would get nothing.
        self.run("set", 4 * 16384, 50)

    def run(self, test: str, values: int, connections: int, new: bool = False) -> float:
        """Return the values a second of one test, set or get; `new`: each under a name of its own, as ours
        are, so that servers need memory that they have not got yet."""
        options = ["-t", test, "-n", str(values), "-c", str(connections)]
        if new:
            options += ["-r", str(10**9)]
        done = subprocess.run([*self._command, *options], check=True, capture_output=True, text=True)
        return float(done.stdout.splitlines()[-1].split('","')[1])
