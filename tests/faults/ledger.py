"""What a load knows of its blocks: for each one which version was acknowledged and which was sent last.

A version is a word: twice its number, plus one if it is zeros. The words lie in shared memory, so that what a
killed load knew is there for the next one: a block whose two words differ may hold either version.
"""

import mmap
import random

from tmem.types import PAGE_SIZE

_NOISE_BYTES = 1600
_NOISE = random.Random(4).randbytes(1 << 16)


def content(block: int, word: int) -> bytes:
    """Return what version `word` of a block is: zeros, one word repeated, or two fifths noise."""
    if word == 0 or word & 1:
        return bytes(PAGE_SIZE)
    head = (block << 32 | word).to_bytes(8, "little")
    if word % 16 == 0:
        return head * (PAGE_SIZE // 8)
    start = (block * 7919 + word * 104_729) % (len(_NOISE) - _NOISE_BYTES)
    return head + _NOISE[start : start + _NOISE_BYTES].ljust(PAGE_SIZE - 8, b"\0")


class Ledger:
    """The versions of `blocks` blocks, for all processes forked from the one that made it."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._memory = mmap.mmap(-1, 8 * blocks)
        words = memoryview(self._memory).cast("I")
        self._issued, self._acknowledged = words[:blocks], words[blocks:]

    def issue(self, first: int, count: int, zeros: bool = False) -> bytes:
        """Note that new versions of blocks are about to be sent; what they are."""
        for block in range(first, first + count):
            self._issued[block] = (self._issued[block] >> 1) + 1 << 1 | zeros
        return self.sent(first, count)

    def sent(self, first: int, count: int) -> bytes:
        """Return what was sent last."""
        return b"".join(content(block, self._issued[block]) for block in range(first, first + count))

    def acknowledge(self, first: int, count: int) -> None:
        """Note that what was sent last has been acknowledged."""
        self._acknowledged[first : first + count] = self._issued[first : first + count]

    def refuse(self, first: int, count: int) -> None:
        """Note that what was sent last has had no effect."""
        self._issued[first : first + count] = self._acknowledged[first : first + count]

    def doubtful(self) -> list[int]:
        """Return the blocks of which an answer is missing."""
        return [block for block in range(self.blocks) if self._issued[block] != self._acknowledged[block]]

    def verify(self, first: int, data: bytes | bytearray | memoryview) -> None:
        """Compare blocks from `first` on with what was acknowledged; AssertionError if they differ."""
        for number in range(len(data) // PAGE_SIZE):
            found = data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
            block = first + number
            wanted = self._acknowledged[block]
            if found != content(block, wanted):
                raise AssertionError(f"block {block} holds {say(found)} instead of version {wanted}")

    def settle(self, first: int, data: bytes | bytearray | memoryview) -> None:
        """Accept of each block either version, and note which; AssertionError if it is anything else."""
        for number in range(len(data) // PAGE_SIZE):
            found = data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
            block = first + number
            old, new = self._acknowledged[block], self._issued[block]
            if found == content(block, new):
                self._acknowledged[block] = new
            elif found == content(block, old):
                self._issued[block] = old
            else:
                raise AssertionError(f"block {block} holds {say(found)}, neither version {old} nor {new}")


def say(data: bytes | bytearray | memoryview) -> str:
    """Return which block and version a page says that it is."""
    word = int.from_bytes(data[:8], "little")
    return f"version {word & 0xFFFFFFFF} of block {word >> 32}" if any(data) else "zeros"


def runs(blocks: list[int], most: int) -> list[tuple[int, int]]:
    """Return `blocks`, which are in order, as runs (first, count) of at most `most`."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and block == sum(found[-1]) and found[-1][1] < most:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((block, 1))
    return found
