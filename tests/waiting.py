"""Waiting for what must happen, without a fixed sleep."""

import time
from collections.abc import Callable

DEADLINE_S = 40.0
"""How long anything that must happen may take, on a machine that is busy with other things."""


def wait_until(condition: Callable[[], object], timeout_s: float = DEADLINE_S, what: str = "") -> None:
    """Poll until `condition` is true; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what or condition}")
        time.sleep(0.005)
