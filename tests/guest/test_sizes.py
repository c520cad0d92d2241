"""Machines that give memory back and get it again: scenarios_sizes.py, scenarios_stale.py."""

from collections.abc import Callable

import pytest

from . import scenarios_sizes, scenarios_stale
from .scenarios import Figures

Show = Callable[..., Figures]
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_segment_with_a_range_gives_way(show: Show, long: None) -> None:
    show(scenarios_sizes.range_)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_balloon_gives_the_host_what_is_idle(show: Show, long: None) -> None:
    show(scenarios_sizes.balloon)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_a_pool_keeps_for_guests(show: Show, long: None) -> None:
    """For two minutes; scripts/guest run --long takes an hour."""
    show(lambda setting: scenarios_stale.measure(setting, 120))


@pytest.mark.parametrize(
    ("limits_mib", "wanted"),
    [
        ([100], 0),
        ([100, 104, 97, 103], 0),  # within the band
        ([100, 80, 60, 20], 0),
        ([100, 20, 21, 40, 100], 1),
        ([20, 40, 100, 96, 100], 0),
        ([100, 20, 100, 20, 100], 3),
        ([100, 95, 90, 85, 93, 85, 94], 1),
    ],
)
def test_how_often_a_limit_turns_around(limits_mib: list[int], wanted: int) -> None:
    assert scenarios_sizes.turns([limit * MIB for limit in limits_mib], 8 * MIB) == wanted
