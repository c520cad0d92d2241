"""Each statistic that tmem had in Xen is in ``list --json``, or the table in the manual says why not."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.cli.main import run
from tmem.types import OID_SIZE, PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native

MANUAL = Path(__file__).parents[2] / "docs" / "operations.md"
HEADING = "| group | Xen | here | |"

TAGS = {
    "G": "Tt Te Cf Af Pf Ta Lm Et Ea Rt Ra Rx Fp Ec Em Oc Om Nc Nm Pc Pm Fc Fm Sc Sm Ep Gd Zt Gz",
    "C": "CI ww ca co fr Tc Ge Pp Gp Ec Em cp cb cn cm",
    "P": "CI PI PT U0 U1 Pc Pm Oc Om Nc Nm ps pt px pd pr gs gt fs ft os ot",
    "S": "SI SC PI PT U0 U1 Pc Pm Oc Om Nc Nm ps pt px pd pr gs gt fs ft os ot",
    "T": "G P g p F O C c d",
}
"""Everything that tmem-list printed: global, clients, private pools, shared pools, timing."""


def rows() -> Iterator[tuple[list[str], list[str], list[str], str]]:
    """Yield groups, tags, names here and remark of each row of the manual's table."""
    lines = MANUAL.read_text(encoding="utf-8").splitlines()
    for line in lines[lines.index(HEADING) + 2 :]:
        if not line.startswith("|"):
            return
        groups, tags, names, remark = (cell.strip() for cell in line.strip("|").split("|"))
        yield groups.split(", "), tags.split(", "), re.findall(r"`([^`]+)`", names), remark


def values(state: object, name: str) -> list[object]:
    """Every value called `name`, its parts joined by dots; in a list each element has to have it."""
    found = [state]
    for part in name.split("."):
        found = [item for value in found for item in (value if isinstance(value, list) else [value])]
        assert all(isinstance(item, dict) and part in item for item in found), f"no {part} of {name}"
        found = [item[part] for item in found if isinstance(item, dict)]
    return found


def test_every_tag_has_a_row() -> None:
    listed = [(group, tag) for groups, tags, _, _ in rows() for group in groups for tag in tags]
    for group, tags in TAGS.items():
        assert {tag for where, tag in listed if where == group} >= set(tags.split()), group


def test_every_row_has_a_name_or_a_reason() -> None:
    assert [tags for _, tags, names, remark in rows() if not names and len(remark) < 20] == []


def test_every_name_is_in_the_json_form(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    client = segment.client("one")
    for persistent in (True, False):
        client.new_pool(persistent=persistent).put(bytes(OID_SIZE), 0, os.urandom(PAGE_SIZE))
    assert run(["list", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    names = [name for _, _, found, _ in rows() for name in found]
    assert len(names) > 60
    for name in names:
        assert values(state, name), name
