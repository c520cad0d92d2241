"""The same hog on zram, a disk and tmem inside a guest works on all of them; see scenarios_peers.py."""

from collections.abc import Callable

import pytest

from . import scenarios_peers
from .scenarios import Figures


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_way_carries_the_hog(show: Callable[..., Figures], long: None) -> None:
    figures = show(scenarios_peers.swap_peers)
    assert {*figures["of_zram"]} == {
        scenarios_peers.ZRAM,
        scenarios_peers.DISK,
        scenarios_peers.HERE,
        scenarios_peers.HOST,
    }
