"""A client whose every state is known: numbered writes and trims of a device, in a fixed order.

`work` does operations 1, 2, ... of a turn until told that it is enough; `verify` proves that what is in a
segment is the state after some operation, whichever. `work` runs in a worker process.
"""

import random
from pathlib import Path

from tmem.backends import _native
from tmem.types import PAGE_SIZE

PAGES = 1500
_STEP = 1009  # shares no factor with PAGES, so operation n concerns page n * _STEP % PAGES
_NOISE = random.Random(4).randbytes(PAGE_SIZE)
_TEXT = (b"all work and no play " * 200)[:PAGE_SIZE]


def content(turn: int, number: int) -> bytes | None:
    """Return what operation `number` of a turn writes; None if it trims."""
    head = (turn << 24 | number).to_bytes(8, "little")
    kind = number % 7
    if kind == 0:
        return None
    if kind < 3:
        return head * (PAGE_SIZE // 8)  # lives in its slot
    return head + (_NOISE if kind < 5 else _TEXT)[8:]


def place(number: int) -> int:
    """Return the page that operation `number` is about."""
    return number * _STEP % PAGES


def work(segment: _native.Segment, turn: int, begun: Path, enough: Path) -> int:
    """Do the operations of a turn on the client ``one``; how many were done.

    Makes the file `begun` after the first and ends when there is a file `enough`: a fixed number of them may
    be done before a save has come to its first page.
    """
    pool = segment.client("one", create=False).pools()[0]
    device = _native.Device(pool, bytes(24), PAGES * PAGE_SIZE)
    device.trim(None, PAGES * PAGE_SIZE, 0, 0)
    number = 0
    while not enough.exists():
        number += 1
        data, offset = content(turn, number), place(number) * PAGE_SIZE
        if data is None:
            device.trim(None, PAGE_SIZE, offset, 0)
        else:
            device.pwrite(None, data, offset, 0)
        if number == 1:
            begun.touch()
    return number


def verify(segment: _native.Segment, turn: int) -> int:
    """Check that the device is as some operation of the turn left it; which one, 0 for none of the turn."""
    pool = segment.client("one", create=False).pools()[0]
    device = _native.Device(pool, bytes(24), PAGES * PAGE_SIZE)
    found = []
    for at in range(PAGES):
        buffer = bytearray(PAGE_SIZE)
        device.pread(None, buffer, at * PAGE_SIZE, 0)
        found.append(bytes(buffer))
    last = max((int.from_bytes(data[:8], "little") for data in found), default=0)
    if last >> 24 != turn:
        return 0
    number = last & 0xFFFFFF
    # A trim leaves no number, so the moment may lie behind one as well.
    states = [number] + ([number + 1] if content(turn, number + 1) is None else [])
    right = [moment for moment in states if found == state(turn, moment)]
    assert right, differences(found, turn, number)
    return right[-1]


def state(turn: int, moment: int) -> list[bytes]:
    """Return the pages after operation `moment`."""
    pages: list[bytes] = [bytes(PAGE_SIZE)] * PAGES
    for number in range(max(1, moment - PAGES + 1), moment + 1):
        pages[place(number)] = content(turn, number) or bytes(PAGE_SIZE)
    return pages


def differences(found: list[bytes], turn: int, moment: int) -> str:
    """Say what is wrong with a state that should be that after operation `moment`."""
    wrong = [
        f"page {at}: {data[:8].hex()} instead of {wanted[:8].hex()}"
        for at, (data, wanted) in enumerate(zip(found, state(turn, moment), strict=True))
        if data != wanted
    ]
    return f"{len(wrong)} pages are not as operation {moment} left them: {'; '.join(wrong[:10])}"
