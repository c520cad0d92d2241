"""The dashboard is what Grafana reads: by Grafana's own models of it, and by a parser of PromQL.

No Grafana can be run here. Its SDK has the schema of dashboards and panels as classes: what they do not keep,
Grafana would ignore, and a word that is in none of their enumerations it would not know. What the expressions
ask for is in tests/backends/test_exposition.py.
"""

import enum
import json
import typing
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

FILE = Path(__file__).parents[1] / "docs" / "monitoring" / "grafana.json"
UNKNOWN = {".templating.list[1].definition"}
"""What Grafana itself writes beside the query of a variable, and shows in its list; not in the schema."""


def loaded(text: str) -> Dashboard:
    register_default_plugins()
    return Dashboard.from_json(json.loads(text))


def lost(before: object, after: object, path: str = "") -> Iterator[str]:
    """Yield the places of `before` that are not in `after`, or not as they were."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in before.items():
            yield from lost(value, after[name], f"{path}.{name}") if name in after else [f"{path}.{name}"]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif before != after:
        yield path


def values_of(kind: object) -> list[object]:
    """Return the values of an enumeration; none of anything else."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        return []
    members: dict[str, enum.Enum] = {**kind.__members__}
    return [member.value for member in members.values()]


def unknown_words(model: object, path: str = "") -> Iterator[str]:
    """Yield the values that are none of the enumeration which the model of their place names."""
    if isinstance(model, list | dict):
        for key, value in enumerate(model) if isinstance(model, list) else model.items():
            yield from unknown_words(value, f"{path}[{key}]")
    elif type(model).__module__.startswith("grafana_foundation_sdk.") and not isinstance(model, enum.Enum):
        for name, hint in typing.get_type_hints(type(model).__init__).items():
            value = getattr(model, name, None)
            for kind in (hint, *typing.get_args(hint)):
                words = values_of(kind)
                if words and value is not None and value not in words:
                    yield f"{path}.{name}: {value!r} is none of {words}"
            yield from unknown_words(value, f"{path}.{name}")


def test_grafana_keeps_all_of_it() -> None:
    text = FILE.read_text(encoding="utf-8")
    model = loaded(text)
    assert {*lost(json.loads(text), json.loads(JSONEncoder().encode(model)))} == UNKNOWN
    assert [*unknown_words(model)] == []
    assert model.panels is not None
    kinds = {type(getattr(panel, "options", None)).__module__ for panel in model.panels}
    assert kinds == {f"grafana_foundation_sdk.models.{kind}" for kind in ("stat", "timeseries")}


def test_what_it_would_not_keep_is_noticed() -> None:
    spoilt = json.loads(FILE.read_text(encoding="utf-8"))
    panel = next(one for one in spoilt["panels"] if one["type"] == "timeseries")
    panel["fieldConfig"]["defaults"]["custom"]["drawStyle"] = "lines"
    panel["options"]["legends"] = {}
    model = loaded(json.dumps(spoilt))
    assert {*lost(spoilt, json.loads(JSONEncoder().encode(model)))} - UNKNOWN == {
        f".panels[{spoilt['panels'].index(panel)}].options.legends"
    }
    (word,) = unknown_words(model)
    assert "'lines' is none of ['line', 'bars', 'points']" in word


def test_every_expression_is_promql() -> None:
    expressions = [
        target["expr"].replace("$__rate_interval", "5m")
        for panel in json.loads(FILE.read_text(encoding="utf-8"))["panels"]
        for target in panel["targets"]
    ]
    assert len(expressions) > 25
    for expression in expressions:
        promql_parser.parse(expression)
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse(expressions[0][:-1])
