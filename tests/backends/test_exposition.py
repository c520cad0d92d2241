"""What Prometheus gets: every statistic, under names that keep its rules, also of statistics yet to come."""

import json
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tmem.backends import _native, exposition
from tmem.backends.exposition import SegmentCollector
from tmem.backends.paths import SegmentPaths
from tmem.backends.statistics import (
    BUCKETS_NS,
    ClientStatistics,
    PoolStatistics,
    SegmentStatistics,
    Timing,
)
from tmem.types import OID_SIZE, PAGE_SIZE

from .pages import page

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def scraped(segment: _native.Segment) -> str:
    registry = CollectorRegistry()
    registry.register(SegmentCollector(SegmentPaths.of("default"), segment))
    return generate_latest(registry).decode()


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), "a sample twice"
            found[sample.name][labels] = sample.value
    return found


@pytest.fixture
def busy(segment: _native.Segment) -> _native.Segment:
    """Two clients, one with a pool of each kind, both in a shared one; all kinds of operations."""
    key = uuid.UUID("6c1f0b2e-54a4-4c63-8a5e-0f7e9d1c2b3a")
    web = segment.client("web1")
    persistent, ephemeral = web.new_pool(persistent=True), web.new_pool(persistent=False, exclusive=False)
    for index in range(256):
        persistent.put(bytes(OID_SIZE), index, page("text", index))
        ephemeral.put(bytes(OID_SIZE), index, page("random", index))
        persistent.get(bytes(OID_SIZE), index, bytearray(PAGE_SIZE))
        ephemeral.get(bytes(OID_SIZE), 2 * index, bytearray(PAGE_SIZE))
        ephemeral.flush(bytes(OID_SIZE), 1000 + index)
        ephemeral.flush_object(b"x" * OID_SIZE)
    for name in ("web1", "web2"):
        segment.client(name).authorise(key.bytes)
        segment.client(name).new_pool(persistent=False, uuid=key.bytes).put(
            bytes(OID_SIZE), 0, page("text", 1)
        )
    return segment


def test_every_statistic_is_there_with_its_number(busy: _native.Segment) -> None:
    found = samples(scraped(busy))
    for kind, prefix, rows in (
        (SegmentStatistics, "tmem_segment_", [((), busy.statistics())]),
        (ClientStatistics, "tmem_client_", [((("client", "web2"),), busy.client("web2").statistics())]),
        (
            PoolStatistics,
            "tmem_",
            [
                (
                    (("client", "web1"), ("pool", "0"), ("type", "persistent")),
                    busy.client("web1").pool(0).statistics(),
                )
            ],
        ),
    ):
        for field in fields(kind):
            if field.name in ("layout_version", "id", "persistent", "exclusive", "shared"):
                continue
            name = {"chunks_total": "chunks", "bytes": "stored_bytes"}.get(field.name, field.name)
            name = prefix + re.sub("_ns$", "_seconds", name)
            name = name if name in found else f"{name}_total"
            for labels, statistics in rows:
                number = statistics[field.name]
                assert found[name][labels] == pytest.approx(
                    number / 1e9 if field.name.endswith("_ns") else number
                ), name


def test_a_shared_pool_is_counted_once(busy: _native.Segment) -> None:
    found = samples(scraped(busy))
    shared = [dict(labels) for labels in found["tmem_pages"] if ("type", "shared") in labels]
    assert [(one["client"]) for one in shared] == ["web1"]
    statistics = busy.statistics()
    assert sum(found["tmem_pages"].values()) == statistics["persistent_pages"] + statistics["ephemeral_pages"]


def test_histograms_are_those_of_the_core(busy: _native.Segment) -> None:
    found = samples(scraped(busy))
    for name, values in busy.timing().items():
        timing = Timing(*values)
        operation, _, result = name.partition("_")
        labels: tuple[tuple[str, str], ...] = (("result", result),) if operation in ("put", "get") else ()
        metric = f"tmem_{operation if labels else name}_seconds"
        assert found[f"{metric}_count"][labels] == timing.samples
        assert found[f"{metric}_sum"][labels] == pytest.approx(timing.total_ns / 1e9)
        bounds = {
            dict(key)["le"]: value for key, value in found[f"{metric}_bucket"].items() if {*labels} <= {*key}
        }
        assert len(bounds) == len(timing.buckets)
        assert bounds["+Inf"] == timing.samples
        assert [*bounds.values()] == sorted(bounds.values())
        assert bounds["1.28e-07"] == timing.buckets[0]


def test_clients_have_histograms_of_what_they_did(busy: _native.Segment) -> None:
    found = samples(scraped(busy))
    for name, values in busy.client("web1").timing().items():
        timing = Timing(*values)
        operation, _, result = name.partition("_")
        metric, labels = f"tmem_client_{operation}_seconds", (("client", "web1"), ("result", result))
        if not timing.samples:
            assert labels not in found[f"{metric}_count"]
            continue
        assert found[f"{metric}_count"][labels] == timing.samples
        assert found[f"{metric}_sum"][labels] == pytest.approx(timing.total_ns / 1e9)
        bounds = [
            (float(dict(key)["le"]), value)
            for key, value in found[f"{metric}_bucket"].items()
            if {*labels} <= {*key}
        ]
        assert len(bounds) == 18
        for bound, value in bounds:
            shorter = [
                number
                for number, ns in zip(timing.buckets[:-1], BUCKETS_NS, strict=True)
                if ns <= bound * 1e9
            ]
            assert value == (sum(shorter) if bound < 2 else timing.samples)
    assert not [labels for labels in found["tmem_client_put_seconds_count"] if ("client", "web2") in labels]


def families(text: str) -> Iterator[tuple[str, str]]:
    for family in text_string_to_metric_families(text):
        yield family.name, family.documentation


def test_names_and_types_keep_the_rules(busy: _native.Segment) -> None:
    text = scraped(busy)
    for name, words in families(text):
        assert re.fullmatch("tmem(_[a-z]+)+", name), name
        assert len(words) > 5, f"{name} has no help"
    for name in samples(text):
        assert not name.endswith(("_ns", "_kib", "_mb")), name
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "metrics"], input=text, text=True, check=True)


def test_a_statistic_that_is_new_appears_by_itself() -> None:
    words = {"pages": "Pages.", "miracles": "How many there were.", "wonder_ns": "How long they took."}
    found = {
        family.name: family
        for family in exposition.rows_of(
            "tmem_", words, ["client"], [(("a",), {"pages": 1, "miracles": 2, "wonder_ns": 3})]
        )
    }
    assert {name: family.type for name, family in found.items()} == {
        "tmem_pages": "gauge",
        "tmem_miracles": "unknown",
        "tmem_wonder_seconds": "unknown",
    }
    assert found["tmem_wonder_seconds"].samples[0].value == pytest.approx(3e-9)
    assert found["tmem_miracles"].documentation == "How many there were."


# -- the dashboard and the rules

_OF_THE_MANAGER = {
    "tmem_manager_up",
    "tmem_manager_failing",
    "tmem_service_up",
    "tmem_service_starts_total",
}
"""These come from a manager; tests/cli/test_metrics.py sees them."""
_OF_TIERS = "tmem_client_tier_"
"""So do these; tests/cli/test_metrics.py sees all of them."""
_OF_MOUNTS = "tmem_mount_"
"""These come from mounts; tests/fs/test_mount_metrics.py sees them."""


def expressions() -> Iterator[str]:
    for panel in json.loads((MONITORING / "grafana.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_what_dashboard_and_rules_ask_for_exists(busy: _native.Segment, expression: str) -> None:
    found = samples(scraped(busy))
    names = re.findall(r"\btmem_[a-z_]+", expression)
    assert names
    for name in names:
        assert name in found or name in _OF_THE_MANAGER or name.startswith((_OF_MOUNTS, _OF_TIERS)), name
    for name, selector in re.findall(r"\b(tmem_[a-z_]+)\{([^}]*)\}", expression):
        for label, value in re.findall(r'(\w+)="([^"]*)"', selector):
            present = {dict(labels).get(label) for labels in found.get(name, {})}
            assert value in present or (label, value) == ("phase", "departed"), f"{name}{{{label}}}"


def test_rules_say_what_is_wrong_and_what_to_do() -> None:
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {*rule["annotations"]} == {"summary", "description"}
    names = [rule["alert"] for rule in group["rules"]]
    assert len(names) == len({*names})
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "rules", str(MONITORING / "alerts.yml")], check=True)


def test_the_dashboard_has_no_panel_over_another() -> None:
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
