"""Clients by name, their settings changed together, and when one may end.

That is not while it has pools, nor while somebody has set something for it.
A mount and a swap device bring their client along and take it away again; what an operator has set for it
(weight, cap, authorisations, ...) the next mount of the same name is to find. Any thread.
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.errors import PoolError, TmemError
from tmem.types import format_size, size_within

if TYPE_CHECKING:
    from tmem.backends._native import Client, Segment


def has_settings(client: "Client") -> bool:
    """Say whether anything about the client is not as it is with a new one."""
    return (
        (client.weight, client.cap_bytes, client.floor_bytes, client.compress) != (100, 0, 0, "auto")
        or client.mode != "on"
        or client.dedup
        or bool(client.authorised())
    )


def end_if_unused(client: "Client") -> None:
    """Destroy the client unless it has pools or settings. PoolError if it is gone already."""
    if not client.pools() and not has_settings(client):
        client.destroy()


def clients_by_name(store: "Segment") -> "dict[str, Client]":
    """Return the clients of a segment, without those that end meanwhile."""
    found = {}
    for client in store.clients():
        with suppress(PoolError):
            found[client.name] = client
    return found


def more_to_promise(segment: "Segment", client: "Client") -> str:
    """Say what to change so that more can be promised to `client`, for the end of a refusal."""
    name, most, ceiling = Path(segment.path).name, segment.size_range[1], segment.memory_bytes
    promised = sorted(one.name for one in segment.clients() if one != client and one.floor_bytes)
    ways = []
    if promised:
        others = f", {len(promised) - 1} more" if len(promised) > 1 else ""
        ways.append(f"lower the floor of others ({promised[0]}{others})")
    ways.append(f"make room ('tmem --name {name} list' shows who has it)")
    if most < ceiling:
        ways.append(f"let the segment grow ('tmem --name {name} resize {size_within(ceiling)}')")
    else:
        ways.append("use a segment that was created larger ('start --memory')")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}"


def change(segment: "Segment", client: "Client", values: dict[str, int | str]) -> None:
    """Set the attributes `values` of `client`; if one is refused, put back those before and raise."""
    before = {name: getattr(client, name) for name in values}
    # A floor that grows is what can be refused, so it goes first; one that shrinks goes last, for it might
    # not be had again.
    grows = "floor_bytes" in values and int(values["floor_bytes"]) > before["floor_bytes"]
    order = sorted(values, key=lambda name: (name == "floor_bytes") != grows)
    done: list[str] = []
    try:
        for name in order:
            done.append(name)
            setattr(client, name, values[name])
    except BaseException as error:
        for name in reversed(done):
            setattr(client, name, before[name])
        if isinstance(error, ValueError | OverflowError):  # what the core knows better than the options
            what = name.removesuffix("_bytes")
            raise TmemError(f"{client.name} cannot have this {what}: {error}") from None
        if isinstance(error, PoolError) and done[-1] == "floor_bytes":
            wanted, most = int(values["floor_bytes"]), size_within(client.most_floor_bytes)
            raise PoolError(
                f"{client.name} cannot be promised {format_size(wanted)} now, at most {most}: "
                f"{more_to_promise(segment, client)}"
            ) from None
        raise
