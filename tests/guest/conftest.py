"""Fixtures for tests on guests: machines that end with the test, and their consoles if it fails."""

import contextlib
import os
import platform
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from . import kernels
from .cache import GuestError
from .machine import Guest, Options
from .scenarios import Figures, Run, Setting

_CONSOLE_LINES = 60
LONG = os.environ.get("TMEM_LONG") == "1"


def _need(kernel: str) -> None:
    """Skip if apt does not have that kernel, as in other releases; Debian 12 must have the first series."""
    try:
        kernels.fetch(kernel)
    except GuestError as error:
        release = platform.freedesktop_os_release()
        if (release.get("ID"), release.get("VERSION_ID"), kernel) == ("debian", "12", kernels.SERIES[0]):
            raise
        pytest.skip(str(error))


@pytest.fixture
def boot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Boot guests: ``boot("one", memory_mib=160)``, with options of `Options`; ``wait=False`` only starts."""
    guests: list[Guest] = []

    def start(name: str = "guest", *, wait: bool = True, **options: object) -> Guest:
        wanted = Options(**options)  # type: ignore[arg-type]
        _need(wanted.kernel)
        guest = Guest(name, wanted, tmp_path / f"{name}.console")
        guests.append(guest)
        guest.launch()
        return guest.wait_booted() if wait else guest

    request.node.stash[_guests] = guests
    yield start
    for guest in guests:
        guest.close()


@pytest.fixture
def long() -> None:
    """Skip what takes too long for CI."""
    if not LONG:
        pytest.skip("takes minutes: set TMEM_LONG=1")


@pytest.fixture
def show(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Figures]]:
    """Run a scenario: ``show(scenarios_hosts.network)``; its figures. TMEM_LONG=1 makes it thorough."""
    with contextlib.ExitStack() as settings:

        def run(scenario: Run, kernel: str = kernels.SERIES[0]) -> Figures:
            _need(kernel)
            setting = settings.enter_context(Setting(tmp_path, kernel, long=LONG))
            request.node.stash[_guests] = setting.guests
            return scenario(setting)

        yield run


_guests: pytest.StashKey[list[Guest]] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of the consoles when a test on guests fails."""
    report = yield
    if report.failed:
        for guest in item.stash.get(_guests, []):
            report.sections.append((f"console of {guest.name}", guest.console_tail(_CONSOLE_LINES)))
    return report
