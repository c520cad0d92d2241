"""Another version takes the place of tmem under active swap and an open mount: nothing lost, nobody ended."""

from collections.abc import Callable

import pytest

from . import kernels, scenarios_self
from .scenarios import Figures
from .selfswap import PLANS


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("series", kernels.SERIES)
def test_every_process_is_replaced(show: Callable[..., Figures], long: None, series: str) -> None:
    row = show(lambda setting: scenarios_self.show(setting, PLANS["upgrade"]), kernel=series)
    figures = row["figures"]["upgrade"]
    assert figures["failed_device_reads"] == 0
    assert figures["of_old_code_before"], "they ran the old code until then"
    assert not figures["of_old_code_after"]
    before, after = figures["pids_before"], figures["pids_after"]
    # The manager and the daemon of the mount go on as other programs in the same processes.
    for role in ("server", "standby", "keeper"):
        assert before[role] != after[role], f"another process is the {role}"
    assert before["mount"] == after["mount"]
