"""Demotion to and fetch from a Redis cluster of 3 + 3 on loopback, beside redis-benchmark.

Ours stores records, which have to be packed and unpacked, and waits for the replicas of every batch;
redis-benchmark sends one prepared value again and again and waits for nobody. Both have the same number of
values on their way to each node. The servers take most of two CPUs, so who measures competes with them.
"""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import redis
from common import ROOT, judged, medians, paired_ratio, take_turns, workplace
from redis.crc import key_slot

from tmem.backends.tiers import redis_values
from tmem.backends.tiers.contract import TierIdentity
from tmem.backends.tiers.redis_tier import RedisTier
from tmem.backends.tiers.redis_url import RedisAddress

if TYPE_CHECKING:
    from tests.backends.tiers.servers import Cluster

TARGET = 0.5
BATCH_VALUES = 128
DEPTH = BATCH_VALUES // 3
STORED = 16 * BATCH_VALUES // 3
"""How many values there are on each primary to be fetched."""
CONNECTIONS = (3, 50)
"""One to each node, as ours has; and redis-benchmark's default."""


def run(rounds: int, batches: int) -> dict[str, object]:
    """Measure `rounds` rounds of `batches` batches of 128 values."""
    sys.path.insert(0, str(ROOT))
    from tests.backends.tiers.servers import Cluster

    rng = random.Random(1)
    # As long as compressed pages of programs are; the servers do not care what is in them.
    lengths = [min(max(int(rng.gauss(1850, 700)), 200), 4112) for _ in range(4000)]
    records = [rng.randbytes(length) for length in lengths]
    groups = redis_values.group(records)[:BATCH_VALUES]
    records = records[: sum(map(len, groups))]
    size = sum(len(redis_values.pack(group)) for group in groups) // len(groups)
    with workplace() as directory:
        cluster = Cluster(directory)
        try:
            tier = RedisTier(RedisAddress.parse(cluster.url), TierIdentity(1, 1, 1), True)
            tier.retain([])
            peers: dict[str, Callable[[], float]] = {
                "demotion": lambda: demotion(tier, records, batches),
                "fetch": lambda: fetch(tier, records, batches),
            }
            peer = Peer(cluster, size)
            for count in CONNECTIONS:
                peers[f"set c{count}"] = partial(peer.set, batches * BATCH_VALUES, count)
                peers[f"get c{count}"] = partial(peer.get, batches * BATCH_VALUES * 2, count)
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
    middle = medians(results)
    per_value = len(records) / BATCH_VALUES
    print(
        f"  values of {size} bytes with {per_value:.1f} records, {DEPTH} on their way to a node; "
        f"{middle['demotion'] * per_value:,.0f} records/s out, {middle['fetch'] * per_value:,.0f} in"
    )
    return {"value_bytes": size, "records_a_value": per_value, "values_per_s": results, "rows": rows}


def demotion(tier: RedisTier, records: list[bytes], batches: int) -> float:
    """Return the values a second that are stored."""
    tier.retain([])
    start = time.perf_counter()
    for _ in range(batches):
        tier.write(records)
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
    """redis-benchmark beside it, with values of `size` bytes."""

    def __init__(self, cluster: "Cluster", size: int) -> None:
        self._ports = [server.port for server in cluster.primaries()]
        self._size = size
        # One slot of each primary, with values in it: redis-benchmark's own cluster mode asks for names that
        # it picks from all 16,384 slots, of which it has stored few.
        self._tags: dict[int, str] = {}
        n = 0
        while len(self._tags) < len(self._ports):
            self._tags.setdefault(_port_of(cluster, key_slot(f"{n}".encode())), f"{n}")
            n += 1

    def set(self, values: int, connections: int) -> float:
        """Return the values a second that are stored, in cluster mode."""
        return _rate(
            self._start(
                "--cluster",
                "-p",
                str(self._ports[0]),
                "-n",
                str(values),
                "-c",
                str(connections),
                "-d",
                str(self._size),
                "-r",
                "1000",
                "-t",
                "set",
            )
        )

    def get(self, values: int, connections: int) -> float:
        """Return the values a second that come from all primaries, by one process for each."""
        value = random.Random(2).randbytes(self._size)
        for port, tag in self._tags.items():
            with redis.Redis(port=port) as client:
                for n in range(STORED):
                    client.set(f"{{{tag}}}{n:012}", value)
        running = [
            self._start(
                "-p",
                str(port),
                "-n",
                str(values // len(self._tags)),
                "-r",
                str(STORED),
                "-c",
                str(connections // len(self._tags)),
                "get",
                f"{{{tag}}}__rand_int__",
            )
            for port, tag in self._tags.items()
        ]
        rates = [_rate(one) for one in running]
        for port in self._tags:
            with redis.Redis(port=port) as client:
                client.flushall()
        return sum(rates)

    def _start(self, *options: str) -> subprocess.Popen[str]:
        command = ["redis-benchmark", "--csv", "-P", str(DEPTH), *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _rate(running: subprocess.Popen[str]) -> float:
    output, _ = running.communicate()
    if running.returncode:
        raise RuntimeError(f"redis-benchmark failed: {output}")
    return float(output.splitlines()[-1].rsplit('",', 1)[0].rsplit(',"', 1)[0].split('","')[1])


def _port_of(cluster: "Cluster", slot: int) -> int:
    with redis.Redis(port=cluster.servers[0].port) as client:
        for start, end, (_, port, *_), *_ in client.execute_command("CLUSTER SLOTS", NEVER_DECODE=True):
            if start <= slot <= end:
                return int(port)
    raise RuntimeError(f"nobody has slot {slot}")
