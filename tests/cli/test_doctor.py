"""``doctor`` says what is missing and what mends it, and its status tells."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.cli.main import run

if TYPE_CHECKING:
    from tmem.backends import _native

Findings = dict[tuple[str, str], dict[str, str]]


def examine(capsys: pytest.CaptureFixture[str]) -> tuple[int, Findings]:
    status = run(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["missing"] > 0) == (status == 1)
    return status, {(one["group"], one["name"]): one for one in report["findings"]}


def test_a_sound_segment(segment: "_native.Segment", capsys: pytest.CaptureFixture[str]) -> None:
    _, found = examine(capsys)
    assert found["segment", "default"]["state"] == "ok"
    assert "invariant" in found["segment", "default"]["detail"]
    assert found["segment", "manager"]["state"] == "note"
    assert "start -d" in found["segment", "manager"]["remedy"]
    # Of the directory that is used, not of the usual one, which is no concern of this segment.
    assert found["kernel", "tmpfs noswap"]["state"] == "note"


def test_no_segment_is_no_failure(runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = examine(capsys)
    assert found["segment", "default"]["state"] == "note"


def test_a_damaged_segment_is(runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runtime_dir / "default").write_bytes(b"something else" * 1000)
    status, found = examine(capsys)
    assert status == 1
    assert found["segment", "default"]["state"] == "missing"
    assert "destroy --all" in found["segment", "default"]["remedy"]


def test_programs_that_are_not_there(
    runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, found = examine(capsys)
    assert status == 1
    assert found["program", "nbdkit"]["state"] == "missing"
    assert found["program", "nbdkit"]["remedy"].startswith("apt-get install nbdkit")


def test_a_damaged_record_of_a_device(
    segment: "_native.Segment", runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runtime_dir / "default.d" / "swap-one.json").write_text("{")
    status, found = examine(capsys)
    assert status == 1
    assert "swap-one.json" in found["guard", "records"]["detail"]


def test_people_get_lines(runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(["doctor"])
    out = capsys.readouterr().out
    assert "program" in out
    assert "nbdkit" in out
    assert ("missing" in out.splitlines()[-1]) or status == 1
