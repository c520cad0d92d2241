"""What ``doctor`` says of the servers that a mount shares with other hosts."""

from typing import TYPE_CHECKING

import pytest

from tmem import doctor
from tmem.backends.paths import SegmentPaths
from tmem.fs.statistics import BeyondStatistics, Counters

from .conftest import Mounter

if TYPE_CHECKING:
    from tmem.backends import _native

UUID = "0123456789abcdef0123456789abcdef"


def test_servers_that_do_not_answer(segment: "_native.Segment", mounter: Mounter) -> None:
    segment.client("web").authorise(bytes.fromhex(UUID))
    place = mounter(f"client=web,shared={UUID},tier=redis://:secret@127.0.0.1:1")
    (found,) = [one for one in doctor.examine(SegmentPaths.of("default")) if one.group == "tier"]
    assert (found.name, found.state) == (str(place.point), doctor.MISSING)
    assert "127.0.0.1:1" in found.detail
    assert "secret" not in found.detail
    assert found.remedy


@pytest.mark.parametrize(
    ("tier", "state"),
    [
        (BeyondStatistics(up=True), doctor.OK),
        (BeyondStatistics(up=True, sent_pages=5, dropped_pages=2), doctor.OK),
        (BeyondStatistics(up=True, sent_pages=5, dropped_pages=16), doctor.NOTE),
        (BeyondStatistics(sent_pages=5), doctor.MISSING),
        (None, doctor.NOTE),
    ],
)
def test_what_is_said(tier: BeyondStatistics | None, state: str) -> None:
    counted = None if tier is None else Counters().snapshot(True, False, tier=tier)
    said = doctor.tier_of_mount(counted)
    assert said[0] == state
    assert bool(said[2]) == (state != doctor.OK)
