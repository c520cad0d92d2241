"""A machine that swaps to its own userspace neither hangs nor loses a page; see selfrun.py for what a run is.

The short share is two runs on a small machine; TMEM_LONG=1 adds the others, and the one that must hang.
"""

from collections.abc import Callable

import pytest

from . import kernels, scenarios_self
from .scenarios import Figures
from .selfswap import PLANS, Plan

Show = Callable[..., Figures]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_contained_with_discards_it_survives_kills(show: Show) -> None:
    _show(show, PLANS["short-kills"])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_realtime_and_watermarks_do_without_containment(show: Show, long: None) -> None:
    _show(show, PLANS["short-realtime"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_usual_guards_are_not_enough(show: Show, long: None) -> None:
    _show(show, PLANS["usual"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("series", kernels.SERIES)
@pytest.mark.parametrize("name", ["self", "self-no-discard", "only-contain", "kills"])
def test_with_every_guard(show: Show, long: None, name: str, series: str) -> None:
    _show(show, PLANS[name], series)


def _show(show: Show, plan: Plan, series: str = "6.1") -> None:
    show(lambda setting: scenarios_self.show(setting, plan), kernel=series)
