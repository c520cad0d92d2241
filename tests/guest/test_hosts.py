"""Guests swap to the host's tmem: see scenarios_hosts.py for what is shown."""

import signal
from collections.abc import Callable

import pytest

from tmem.types import OID_SIZE

from . import kernels, scenarios_hosts
from .host import Host
from .machine import Guest
from .scenarios import Figures, Run, last_json

Show = Callable[..., Figures]

pytestmark = pytest.mark.timeout(900)  # on a busy machine, or with TMEM_LONG=1, these take minutes


@pytest.mark.slow
def test_three_guests_swap_over_the_network(show: Show) -> None:
    show(scenarios_hosts.network)


@pytest.mark.slow
def test_a_virtio_disk_survives_its_servers(show: Show) -> None:
    show(scenarios_hosts.virtio)


def test_a_guest_reaches_its_own_pages_only(show: Show, root: None) -> None:
    show(scenarios_hosts.isolation)


@pytest.mark.slow
@pytest.mark.parametrize("run", [scenarios_hosts.network, scenarios_hosts.virtio])
def test_the_same_on_a_newer_kernel(show: Show, run: Run, long: None) -> None:
    show(run, kernel=kernels.SERIES[1])


def test_a_lost_page_would_be_noticed(boot: Callable[..., Guest]) -> None:
    from tmem.backends import _native

    with Host("64M") as host:
        port = host.serve_tcp("one", "96M")
        guest = boot("one", memory_mib=128)
        scenarios_hosts.attach(guest, port, "one")
        scenarios_hosts.swap_on(guest, "/dev/nbd0")
        hog = guest.start(["guest-tool", "hog", "-s", scenarios_hosts.CAPPED_HOG, "-t", "600"])
        hog.wait_for("touch", 300)
        store = _native.attach(str(host.directory / "default"))
        (pool,) = store.client("one", create=False).pools()
        # Behind the guest's back, in the middle of what it has swapped out.
        assert pool.flush(bytes(OID_SIZE), 1000, 200) > 0
        store.close()
        hog.signal(signal.SIGUSR1)
        result = hog.wait(300)
        assert result.rc == 1
        assert last_json(result)["bad_pages"] > 0
