"""Gives clients the settings that the configuration has for them, once in the life of each.

A client gets them when it comes to be, or when the manager starts; what somebody sets afterwards stays. A
floor is only raised: that of a reserved device is a promise. Not for reading the configuration. Threading:
called by the manager, by one thread at a time.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from tmem.backends.clients import change
from tmem.errors import PoolError, TmemError

if TYPE_CHECKING:
    from tmem.backends._native import Client, Segment

Wanted = Callable[[str], Mapping[str, int | str]]
"""What a client of that name is to have: attributes of `Client`; empty if nothing is said of it."""

_log = logging.getLogger(__name__)


class Settler:
    """Remembers which clients have been given theirs."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._settled: dict[str, Client] = {}
        self._complaints: dict[str, str] = {}

    def look(self, segment: "Segment") -> None:
        """Give every client that is new what it is to have; what is refused is tried again each time."""
        clients = segment.clients()
        if len(clients) < len(self._settled):
            self._settled = {name: one for name, one in self._settled.items() if one in clients}
        for client in clients:
            with suppress(PoolError):  # it ended meanwhile
                name = client.name
                if self._settled.get(name) == client or client.phase == "departed":
                    continue
                self._settle(segment, name, client)

    def _settle(self, segment: "Segment", name: str, client: "Client") -> None:
        values = dict(self._wanted(name))
        if "floor_bytes" in values:
            values["floor_bytes"] = max(int(values["floor_bytes"]), client.floor_bytes)
        try:
            if values:
                change(segment, client, values)
                _log.info("%s: set by the configuration: %s", name, ", ".join(sorted(values)))
        except TmemError as error:
            if self._complaints.get(name) != str(error):  # once, not every second
                _log.warning("%s: the configuration cannot be followed: %s", name, error)
            self._complaints[name] = str(error)
            return
        self._settled[name] = client
        self._complaints.pop(name, None)
