"""How long the kernel may believe what it was told of names and attributes.

Usually a second. Where changes underneath are reported (`watch`) a minute: names always, attributes once they
are as old. Attributes change without a report too: time stamps by stores to mapped memory, the number of
blocks when the file system writes a file out. Both happen to files that were changed lately. That a name is
absent is believed only where changes are reported, since nobody expects to wait for a file that is there.

A `wanted` number of seconds stands for all of these. Threading: plain functions of values.
"""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

USUAL_SECONDS = 1.0
WATCHED_SECONDS = 60.0


class Rule(NamedTuple):
    """All of it in seconds, for what is told below Python (backends/native/reader_entry.h)."""

    device: int
    """The st_dev that it is about."""
    name: float
    """For names of files on `device`."""
    name_elsewhere: float
    young: float
    """For attributes."""
    old: float
    """For those on `device` that were changed longer than `age` ago."""
    age: float
    absent: float
    """For names that directories on `device` lack; 0: not at all."""


class Lifetimes:
    """The rules above; `device` is the st_dev that reports are about, `now_ns` the wall clock."""

    def __init__(self, wanted: float | None, device: int, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._wanted = wanted
        self._device = device
        self._now_ns = now_ns
        self.attributes_told = False
        """Whether the kernel is told of attributes that change underneath."""
        self.names_told = False
        """Whether it is told of names that do."""

    def of_name(self, device: int) -> float:
        """Return the seconds for a name of a file on `device`."""
        if self._wanted is not None:
            return self._wanted
        return WATCHED_SECONDS if self.names_told and device == self._device else USUAL_SECONDS

    def of_absence(self, device: int) -> float:
        """Return the seconds for a name that is not there, in a directory on `device`; 0: not at all."""
        if not self.names_told or device != self._device:
            return 0.0
        return WATCHED_SECONDS if self._wanted is None else self._wanted

    def of_attributes(self, status: os.stat_result) -> float:
        """Return the seconds for the attributes in `status`."""
        young, old = self._of_attributes()
        if young == old or status.st_dev != self._device:
            return young
        return old if status.st_ctime_ns < self._now_ns() - WATCHED_SECONDS * 1e9 else young

    def _of_attributes(self) -> tuple[float, float]:
        """Return the seconds for attributes, and for those on `device` that changed long ago."""
        if self._wanted is not None:
            return self._wanted, self._wanted
        return USUAL_SECONDS, WATCHED_SECONDS if self.attributes_told else USUAL_SECONDS

    def rule(self) -> Rule:
        """Return the rule as it is now."""
        device = self._device
        young, old = self._of_attributes()
        names = self.of_name(device), self.of_name(-1)
        return Rule(device, *names, young, old, WATCHED_SECONDS, self.of_absence(device))
