"""What a process or thread does on its own while others work on the same segment: it verifies its own data.

Functions of a segment for `places` to run. Everything random follows from the seed; how the operations of
several processes interleave does not. What is wrong raises here, in the process that saw it.
"""

import os
import random
import threading

from tmem.backends._native import Device, Segment, attach
from tmem.errors import PoolError
from tmem.types import PAGE_SIZE

from . import operations as op
from .model import PoolModel, demand
from .operations import Where
from .pages import KINDS, oid, pages, stamp_of, stamped


def verify_own(segment: Segment, wheres: list[Where], owner: int, seed: int, steps: int) -> int:
    """Do random operations on an object of this owner's in each pool, model beside; return the pages put.

    Only the owner touches the object, which is emptied first. In persistent pools every page is exactly what
    the model says.
    """
    rng = random.Random(f"{owner} {seed}")
    handles = [op.find(segment, where) for where in wheres]
    models = [PoolModel(pool.persistent, pool.exclusive) for pool in handles]
    mine, stored = oid(1000 + owner), 0
    for where in wheres:
        op.flush_object(segment, where, mine)
    for _ in range(steps):
        which = rng.randrange(len(wheres))
        where, model = wheres[which], models[which]
        index = rng.choice((0, 10, 60, 500, 4090, 2**20)) + rng.randrange(20)
        npages = rng.choice((1, 1, 2, 5, 16, 33))
        match rng.randrange(5):
            case 0 | 1:
                data = pages(rng.choice(("mixed", *KINDS)), rng.randrange(200), npages)
                keep = rng.random() < 0.5
                taken = op.put(segment, where, mine, index, b"".join(data), keep)
                model.put(mine, index, data, taken, keep, op.present(segment, where, mine, index, npages))
                stored += taken
            case 2 | 3:
                model.get(mine, index, npages, op.get(segment, where, mine, index, npages))
            case _ if rng.random() < 0.1:
                model.flush_object(mine, op.flush_object(segment, where, mine))
            case _:
                model.flush(mine, index, npages, op.flush(segment, where, mine, index, npages))
    for where, model in zip(wheres, models, strict=True):
        for o, index in sorted(model.pages):
            model.get(o, index, 1, op.get(segment, where, o, index))
    return stored


def contend(segment: Segment, wheres: list[Where], owner: int, seed: int, steps: int) -> int:
    """Put, get and flush what all others put, get and flush too; return the pages got.

    C4 leaves the order open, but a page that is got was put there whole: its stamp names pool and index.
    """
    rng = random.Random(f"{owner} {seed}")
    handles = [op.find(segment, where) for where in wheres]
    shared, buffer, hits = oid(7), bytearray(4 * PAGE_SIZE), 0
    for step in range(steps):
        which = rng.randrange(len(wheres))
        pool, index, npages = handles[which], rng.randrange(60, 68), rng.randrange(1, 5)
        match rng.randrange(4):
            case 0 | 1:
                tags = [which << 56 | (index + i) << 40 | owner << 32 | step for i in range(npages)]
                pool.put(shared, index, b"".join(map(stamped, tags)), keep_old=rng.random() < 0.5)
            case 2:
                filled = pool.get(shared, index, memoryview(buffer)[: npages * PAGE_SIZE])
                for i in range(filled):
                    tag = stamp_of(bytes(buffer[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]))
                    place = tag >> 56, tag >> 40 & 0xFFFF
                    demand(
                        place == (which, index + i), f"a page of {place} came back from {which, index + i}"
                    )
                hits += filled
            case _:
                pool.flush(shared, index, npages)
    return hits


def churn(segment: Segment, wheres: list[Where], owner: int, steps: int) -> int:
    """Put and get pages of all kinds, whatever comes of it; the pages stored."""
    handles, some, buffer, stored = (
        [op.find(segment, where) for where in wheres],
        pages("mixed", owner, 50),
        bytearray(PAGE_SIZE),
        0,
    )
    for step in range(steps):
        pool, index = handles[step % len(handles)], step * 7 % 997
        stored += pool.put(oid(owner), index, some[step % 50])
        pool.get(oid(owner), index * 3 % 997, buffer)
    return stored


def put_block(
    segment: Segment, where: Where, o: bytes, first: int, npages: int, kind: str, at_once: int
) -> int:
    """Put pages of one kind, so many in a call and the same in each; the number stored."""
    pool, data = op.find(segment, where), b"".join(pages(kind, 0, at_once))
    stored = 0
    for index in range(first, first + npages, at_once):
        stored += pool.put(o, index, data)
    return stored


def replace(segment: Segment, where: Where, o: bytes, index: int, versions: list[bytes], times: int) -> None:
    """Put one page after the other to the same handle."""
    pool = op.find(segment, where)
    for i in range(times):
        demand(pool.put(o, index, versions[i % len(versions)]) == 1, "refused")


def evict_and_leave(_: Segment, path: str, wheres: list[Where], owner: int, rounds: int) -> None:
    """Attach, put, evict, close, again and again."""
    for i in range(rounds):
        segment = attach(path)
        for where in wheres:
            op.put(segment, where, oid(owner), 100 * i, b"".join(pages("mixed", i, 100)))
        segment.evict(3 * 65536)
        segment.trim(0)
        segment.close()


def use_until_gone(segment: Segment, where: Where, owner: int) -> str:
    """Say so in an object of its own, then put, get and flush until somebody destroys the pool."""
    buffer, i = bytearray(2 * PAGE_SIZE), 0
    try:
        pool = op.find(segment, where)
        pool.put(oid(10 + owner), 0, stamped(owner))
        while True:
            i += 1
            pool.put(oid(0), i % 100, stamped(i % 100))
            if pool.get(oid(0), i * 7 % 100, buffer):
                demand(stamp_of(bytes(buffer[:PAGE_SIZE])) == i * 7 % 100, "another page")
            if i % 10 == 0:
                pool.flush(oid(0), i * 3 % 100)
            if i % 50 == owner:
                pool.flush_object(oid(0))
    except PoolError:
        return "gone"


def supersede(segment: Segment, where: Where, o: bytes, times: int) -> int:
    """Put new versions of a few pages and get them: the last one, or none if evicted. The pages got."""
    pool, buffer, got = op.find(segment, where), bytearray(PAGE_SIZE), 0
    versions = [0] * 40
    some = [b"", *pages("text", 0, 60), *pages("random", 0, 60)]
    for i in range(times):
        index = i * i % 40
        if i % 3 == 0:
            versions[index] = (i % 120 + 1) if pool.put(o, index, some[i % 120 + 1]) else 0
        elif pool.get(o, index, buffer):
            demand(buffer == some[versions[index]], f"index {index} is not the page that was put last")
            got += 1
        else:
            demand(not pool.persistent or not versions[index], f"index {index} is lost")
            versions[index] = 0
    return got


def squeeze(segment: Segment, times: int) -> None:
    """Fill the memory and empty it, so that pages of others are moved about or evicted."""
    client = segment.client("squeezer")
    pool = client.new_pool(persistent=True)
    for i in range(times):
        pool.put(oid(i % 7), i * 10 % 3000, b"".join(pages("text" if i % 2 else "tail", i % 50, 10)), True)
        if i % 100 == 99:
            for first in range(0, 3000, 3):
                pool.flush(oid(i % 7), first, 2)
            segment.evict(10 * 65536)
            put_block(segment, Where("squeezer", pool.id), oid(9), 0, 2000, "random", 50)
            pool.flush_object(oid(9))
    client.destroy()


def fill_and_drop(segment: Segment, name: str, rounds: int) -> int:
    """Create a pool, fill it, destroy it, again and again: others must not suffer. The pages put."""
    stored = 0
    for i in range(rounds):
        where = op.new_pool(segment, name, persistent=i % 2 == 0)
        stored += op.put(segment, where, oid(i), i * 300, b"".join(pages("mixed", i, 300)))
        op.destroy_pool(segment, where)
        segment.trim(0)
    return stored


def fork_and_verify(segment: Segment, wheres: list[Where], owner: int, seed: int, steps: int) -> int:
    """Fork after the segment was attached and used; parent and child both go on. The child's exit status."""
    verify_own(segment, wheres, owner, seed, steps)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            verify_own(segment, wheres, owner + 1, seed + 1, steps)
            status = 0
        finally:
            os._exit(status)
    verify_own(segment, wheres, owner + 2, seed + 2, steps)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_threads(segment: Segment, wheres: list[Where], owners: list[int], seed: int, steps: int) -> list[int]:
    """Run `verify_own` for each owner and `contend` at once, each in a thread of this process."""
    results: list[int] = []
    errors: list[BaseException] = []

    def run(owner: int) -> None:
        try:
            results.append(verify_own(segment, wheres, owner, seed, steps))
            results.append(contend(segment, wheres, owner, seed, steps))
        except BaseException as error:  # a thread's error would be lost: the caller raises it
            errors.append(error)

    threads = [threading.Thread(target=run, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def write_stripe(
    segment: Segment, where: Where, o: bytes, writer: int, writers: int, stripe_bytes: int, steps: int
) -> None:
    """Write one of several interleaved stripes of a device and read it back, while others write theirs.

    The first `writers` stripes follow each other, then come the second ones; no page belongs to one writer.
    """
    rounds = 3
    device = Device(op.find(segment, where), o, rounds * writers * stripe_bytes)
    rng, buffer = random.Random(writer), bytearray(stripe_bytes)
    mine = [bytes(stripe_bytes)] * rounds
    for step in range(steps):
        which = step % rounds
        start = (which * writers + writer) * stripe_bytes
        if rng.random() < 0.1:
            device.zero(None, stripe_bytes, start, 0)
            mine[which] = bytes(stripe_bytes)
        else:
            mine[which] = (rng.randbytes(40) * (stripe_bytes // 40 + 1))[:stripe_bytes]
            device.pwrite(None, mine[which], start, 0)
        check = rng.randrange(rounds)
        device.pread(None, buffer, (check * writers + writer) * stripe_bytes, 0)
        demand(buffer == mine[check], f"step {step}: stripe {check} of writer {writer} has other bytes")
