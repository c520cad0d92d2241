"""Pages that have left memory for a tier, and looking at them."""

from array import array

from tmem.backends import _native
from tmem.types import OID_SIZE, PAGE_SIZE

from .pages import page
from .tiers.faulty import FaultyTier

OID = bytes(OID_SIZE)
NPAGES = 200


def data(npages: int = NPAGES) -> list[bytes]:
    return [page(("text", "random", "tail")[n % 3], n) for n in range(npages)]


def demote(client: _native.Client, tier: FaultyTier, any: bool = True) -> int:
    """Let everything that is cold (or any page) leave memory."""
    buffer, hand, demoted = bytearray(1 << 20), 0, 0
    while True:
        hand, places, pages = client.collect(hand, buffer, 100, any, client.tier_epoch)
        locations = tier.write([bytes(buffer[at : at + length]) for at, length in places])
        demoted += client.demote(pages, array("Q", locations))
        if not hand:
            return demoted


def got(pool: _native.Pool, first: int, npages: int) -> list[bytes]:
    buffer = bytearray(npages * PAGE_SIZE)
    assert pool.get(OID, first, buffer) == npages
    return [bytes(buffer[at : at + PAGE_SIZE]) for at in range(0, len(buffer), PAGE_SIZE)]
