"""`tmem set --tier` and what `tmem list` says of it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends.paths import SegmentPaths

from .conftest import Tmem

if TYPE_CHECKING:
    from tmem.backends import _native


def test_a_tier_is_given_and_taken_away(segment: "_native.Segment", tmem: Tmem, tmp_path: Path) -> None:
    client = segment.client("web")
    client.new_pool(persistent=True)
    SegmentPaths.of("default").state.mkdir(exist_ok=True)
    file = tmp_path / "tmem-default-web.spill"
    assert tmem("set", "web", "--tier", str(tmp_path), "--tier-size", "1M").err == ""
    assert file.stat().st_size == 1 << 20
    assert client.tiered
    (listed,) = json.loads(tmem("list", "--json").out)["clients"]
    assert listed["tier"] == f"file:{file}"
    assert (listed["tier_pages"], listed["tier_problem"]) == (0, None)
    assert f"web has 0B of pages in file:{file}" in tmem("list").out
    assert tmem("set", "web", "--tier", str(tmp_path), "--tier-size", "1M").status == 0
    client.tiered = False  # as a command that was killed leaves it, of which the list says what to do
    assert tmem("set", "web", "--tier", f"file:{file}").status == 0
    assert client.tiered
    other = tmem("set", "web", "--tier", f"{tmp_path}/other?size=1M")
    assert other.status == 1
    assert "take that away first, with --tier none" in other.err
    assert tmem("set", "web", "--tier", "none").status == 0
    assert not file.exists()
    assert not client.tiered
    assert tmem("set", "web", "--tier", "none").status == 0


def test_what_is_wrong_is_said_in_one_line(segment: "_native.Segment", tmem: Tmem, tmp_path: Path) -> None:
    segment.client("web")
    SegmentPaths.of("default").state.mkdir(exist_ok=True)
    diary = tmp_path / "diary"
    diary.write_text("dear diary")
    for url, status, words in (
        (str(tmp_path / "x"), 2, "say how large the file is to be"),
        (f"{tmp_path}/no/x?size=1M", 1, "make it first"),
        (f"{diary}?size=1M", 1, "is not a spill file of tmem: it stays as it is"),
        (f"{tmp_path}/x?size=1Q", 1, "is not a size"),
        (f"{tmp_path}/x?size=4K", 1, "give 64K to 1T"),
        ("mailto:somebody", 1, "is no tier"),
    ):
        refused = tmem("set", "web", "--tier", url)
        assert refused.status == status, url
        assert words in refused.err, refused.err
        assert "Traceback" not in refused.err
    assert diary.read_text() == "dear diary"
    assert not segment.client("web").tiered
