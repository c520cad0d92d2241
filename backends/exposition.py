"""The statistics of a segment as Prometheus has them: families of metrics with names, units and labels.

`families` walks the dataclasses of `statistics`, so a statistic that is added there appears here by itself,
with its docstring as its help; `_COUNTERS` says which of them only grow, and what is in neither set is
exported without a type. Names follow Prometheus: ``tmem_`` and the statistic, seconds and bytes as units,
``_total`` for counters; of the segment ``tmem_segment_``, of a client ``tmem_client_``, of its pools nothing
in between, of a mount ``tmem_mount_`` (collected by `tmem.cli.mountmetrics`). A shared pool is exported once,
under its owner, so that sums are right. Not for serving them: `exporter`. It brings prometheus_client, so
only those who export import it.
"""

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from tmem.backends import service
from tmem.backends.paths import SegmentPaths
from tmem.backends.statistics import (
    BUCKETS_NS,
    ClientStatistics,
    PoolStatistics,
    SegmentStatistics,
    Timing,
)
from tmem.backends.tierlooks import TierFigures
from tmem.errors import PoolError, ServiceError

if TYPE_CHECKING:
    from tmem.backends._native import Client, Segment

MANAGER_TIMEOUT_S = 2.0
"""How long a scrape waits for the manager; without an answer it is said to be down."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COUNTERS = _words(
    """
    operations failed_operations ephemeral_puts_new allocation_failures evicted_pages eviction_attempts
    trims trimmed_bytes relocated_pages dead_threads_repaired persistent_puts_stored persistent_gets_hit
    ephemeral_gets_hit busy_ns puts puts_stored puts_refused puts_replaced puts_flushed gets gets_hit
    gets_taken flushes flushes_found object_flushes object_flushes_found evictions corrupt_pages
    pages_dropped reaped populated_bytes compacted_bytes compacting_ns looks given_back_bytes raised
    lowered shrinks squeezed_pages squeezed_bytes condensed_pages condensed_bytes restored_pages
    condensing_ns pages_packed pages_unpacked packing_ns pages_demoted pages_fetched demoted_pages
    unreachable_gets dedup_pages dedup_ns restored_bytes
    squeezing_ns demoted_cold_pages pages_prefetched prefetched_pages prefetching_ns
    hit_reads miss_reads passthrough_reads hit_pages miss_pages hit_bytes lower_bytes lower_ns lower_errors
    put_pages put_ns ahead_pages refused_pages overtaken_pages flushed_pages foreign_changes declined_opens
    backed_opens noticed_changes lost_reports tier_hit_pages tier_miss_pages tier_sent_pages
    tier_dropped_pages tier_wrong_values tier_failures tier_written_records tier_written_bytes
    tier_refused_batches repatriations repatriations_stopped repatriated_pages repatriating_ns
    """
)
_GAUGES = _words(
    """
    memory_bytes limit_bytes persistent_limit_bytes size_least_bytes size_most_bytes hole_bytes
    used_bytes reserve_bytes metadata_bytes persistent_pages ephemeral_pages fill_pages pages_max
    ephemeral_pages_max compressed_bytes objects objects_max nodes nodes_max evictions_per_request_max
    chunks_total chunks_used chunks_used_max chunks_free cap_bytes floor_bytes weight ephemeral_bytes
    compressed_pages raw_pages held authorised_pools pools pages bytes spare_bytes margin_bytes
    stalled_percent urgency tier_pages twin_pages original_pages original_bytes dedup_bytes
    packed_pages packs pack_bytes pages_packed_bytes packed_now_pages packed_now_bytes
    stepped_aside watching tier_up io_uring pool_active tier_age_ns tier_used_bytes tier_capacity_bytes
    tier_free_bytes tier_records condensed_now_pages condensed_now_bytes condensed_now_age_ns
    condenser_bytes repatriation_idle_ns repatriation_wait_ns
    """
)
# What a row is rather than how much of something, and is told by labels.
_IDENTITY = frozenset({"layout_version", "id", "persistent", "exclusive", "shared", "tier_down"})
_NAMES = {"chunks_total": "chunks", "bytes": "stored_bytes"}
"""Names that would break a rule of Prometheus: a gauge does not end in total, and bytes are of something."""

_CLIENT_BOUNDS_NS = (*(1 << bits for bits in range(9, 20)), *(1 << bits for bits in range(20, 32, 2)))
"""Upper bounds of clients' histograms: every power of two from 512 ns to 0.5 ms, then every other one up to
1 s. With as many as the segment's, 64 clients would have 6,900 series."""

_Labels = tuple[str, ...]
_Row = tuple[_Labels, Mapping[str, int | None]]


class SegmentCollector(Collector):
    """What prometheus_client asks for metrics. For the thread that attached the segment."""

    def __init__(self, paths: SegmentPaths, segment: "Segment") -> None:
        self._paths, self._segment = paths, segment

    def collect(self) -> Iterator[Metric]:
        """Return everything that is counted now."""
        yield from families(self._paths, self._segment)
        yield from _manager(self._paths)


def families(paths: SegmentPaths, segment: "Segment") -> Iterator[Metric]:
    """Return what the segment itself counts."""
    about = {"segment": paths.name, "mode": segment.mode, "version": version("tmem")}
    yield InfoMetricFamily("tmem_segment", "The segment, and what its clients may do at most.", about)
    freeable = "Memory that is free or held by ephemeral pages."
    yield GaugeMetricFamily("tmem_segment_freeable_bytes", freeable, segment.freeable_bytes())
    yield from rows_of("tmem_segment_", described(SegmentStatistics), [], [((), segment.statistics())])
    clients, pools = [], []
    times: list[tuple[str, Mapping[str, Timing]]] = []
    about_clients = InfoMetricFamily("tmem_client", "What a client may do, and its codec.", labels=["client"])
    for client in sorted(segment.clients(), key=lambda one: one.name):
        with suppress(PoolError):  # it ended while we looked
            name, statistics = client.name, client.statistics()
            about = {"mode": client.mode, "phase": client.phase, "compress": client.compress}
            times.append((name, {kind: Timing(*values) for kind, values in client.timing().items()}))
            pools += list(_pools(client))
            clients.append(((name,), statistics))
            about_clients.add_metric([name], about)
    yield about_clients
    yield from rows_of("tmem_client_", described(ClientStatistics), ["client"], clients)
    yield from rows_of("tmem_", described(PoolStatistics), ["client", "pool", "type"], pools)
    yield from _timings({name: Timing(*values) for name, values in segment.timing().items()})
    yield from _client_timings(times)


def _pools(client: "Client") -> Iterator[_Row]:
    for pool in client.pools():
        statistics = pool.statistics()
        if statistics["shared"] and pool.owner != client:
            continue
        kind = "persistent" if statistics["persistent"] else "shared" if statistics["shared"] else "ephemeral"
        yield (client.name, str(pool.id), kind), statistics


def rows_of(
    prefix: str, statistics: Mapping[str, str], labels: list[str], rows: Iterable[_Row]
) -> Iterator[Metric]:
    """Return a family for each of the `statistics` (names and helps), with a sample for each row with it."""
    rows = list(rows)
    for name, words in statistics.items():
        if name in _IDENTITY:
            continue
        family = _family(prefix, name, words, labels)
        for values, numbers in rows:
            if (number := numbers.get(name)) is not None:
                family.add_metric(values, _scaled(name, number))
        yield family


_Family = CounterMetricFamily | GaugeMetricFamily | UnknownMetricFamily


def _family(prefix: str, name: str, words: str, labels: list[str]) -> _Family:
    full = prefix + _NAMES.get(name, name)
    if full.endswith("_ns"):
        full = f"{full.removesuffix('_ns')}_seconds"
    if name in _COUNTERS:
        return CounterMetricFamily(full, words, labels=labels)
    if name in _GAUGES:
        return GaugeMetricFamily(full, words, labels=labels)
    return UnknownMetricFamily(full.removesuffix("_total"), words, labels=labels)


def _scaled(name: str, number: float) -> float:
    return number / 1e9 if name.endswith("_ns") else number


def _timings(timings: Mapping[str, Timing]) -> Iterator[Metric]:
    """Return a histogram for each kind of operation; puts and gets have one together, by what came of it."""
    histograms: dict[str, HistogramMetricFamily] = {}
    for name, timing in timings.items():
        operation, _, result = name.partition("_")
        apart = operation not in ("put", "get")
        family = histograms.setdefault(
            name if apart else operation,
            HistogramMetricFamily(
                f"tmem_{name if apart else operation}_seconds",
                "How long it takes a page (flush_object: an object), of every 64th operation of a thread.",
                labels=[] if apart else ["result"],
            ),
        )
        family.add_metric([] if apart else [result], _buckets(timing, BUCKETS_NS), timing.total_ns / 1e9)
    yield from histograms.values()


def _client_timings(times: Iterable[tuple[str, Mapping[str, Timing]]]) -> Iterator[Metric]:
    """Return a histogram of puts and one of gets with a part for each client and what came of it.

    What a client never did has no part, so that there are few series.
    """
    families = {
        operation: HistogramMetricFamily(
            f"tmem_client_{operation}_seconds",
            f"How long a {operation} of a page takes for this client, of every 64th operation of a thread.",
            labels=["client", "result"],
        )
        for operation in ("put", "get")
    }
    for client, timings in times:
        for name, timing in timings.items():
            operation, _, result = name.partition("_")
            if timing.samples:
                buckets = _buckets(timing, _CLIENT_BOUNDS_NS)
                families[operation].add_metric([client, result], buckets, timing.total_ns / 1e9)
    yield from families.values()


def _buckets(timing: Timing, bounds_ns: tuple[int, ...]) -> list[tuple[str, float]]:
    """Return the counts up to each of `bounds_ns`, which are among `BUCKETS_NS`, and up to any time."""
    upto = dict(zip(BUCKETS_NS, accumulate(timing.buckets), strict=False))
    return [
        *((str(bound / 1e9), float(upto[bound])) for bound in bounds_ns),
        ("+Inf", float(sum(timing.buckets))),
    ]


def _manager(paths: SegmentPaths) -> Iterator[Metric]:
    """Return what the manager says of itself and of the services that it keeps running."""
    try:
        ping = service.request(paths, {"op": "ping"}, MANAGER_TIMEOUT_S)
        services = service.request(paths, {"op": "services"}, MANAGER_TIMEOUT_S)["services"]
    except ServiceError:
        yield GaugeMetricFamily("tmem_manager_up", "Whether the manager answers.", 0)
        return
    yield GaugeMetricFamily("tmem_manager_up", "Whether the manager answers.", 1)
    failing = "Whether the last round of housekeeping failed."
    yield GaugeMetricFamily("tmem_manager_failing", failing, bool(ping.get("complaint")))
    statistics = ping["statistics"]
    assert isinstance(statistics, dict)
    for name, value in statistics.items():
        family = _family("tmem_manager_", name, "Done by the manager since it started.", [])
        family.add_metric([], _scaled(name, value))
        yield family
    tiers = ping.get("tiers")  # an earlier version has none
    rows = [((name,), figures) for name, figures in tiers.items()] if isinstance(tiers, dict) else []
    yield from rows_of("tmem_client_", described(TierFigures), ["client"], rows)
    up = GaugeMetricFamily("tmem_service_up", "Whether a service runs.", labels=["service"])
    starts = CounterMetricFamily(
        "tmem_service_starts", "How often the manager started a service.", labels=["service"]
    )
    assert isinstance(services, list)
    for one in services:
        up.add_metric([one["name"]], one["pid"] is not None)
        starts.add_metric([one["name"]], one["starts"])
    yield from (up, starts)


@cache
def described(kind: type) -> dict[str, str]:
    """Return the fields of a dataclass with what is written under each of them, on one line."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    words = {}
    for node, below in zip(definition.body, [*definition.body[1:], definition], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said = below.value if isinstance(below, ast.Expr) else None
            text = said.value if isinstance(said, ast.Constant) else ""
            words[node.target.id] = " ".join(str(text).split())
    return {field.name: words.get(field.name) or field.name for field in fields(kind)}
