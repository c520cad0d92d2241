"""The semantics of tmem in plain Python: the oracle that the native store is compared with.

A model is told what was asked and what came of it; it raises `Violation` if that outcome is not allowed, and
remembers the rest. Persistent pools leave one outcome, but for refusals; in ephemeral ones a page may be
missing at any time, and once it was missing it stays so until it is put again. Whether a refusal was
justified the model cannot know: that is the caller's to judge. Not for speed; one thread.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Handle = tuple[bytes, int]
Runs = Sequence[tuple[int, int]]


class Violation(AssertionError):
    """The store did what the semantics forbid."""


def demand(condition: object, message: str) -> None:
    """Raise `Violation` unless `condition` holds."""
    if not condition:
        raise Violation(message)


def indexes(runs: Runs) -> set[int]:
    """Return the indexes that runs of (first index, pages) stand for; they must be in order and apart."""
    end = -1
    for first, npages in runs:
        demand(npages > 0 and first > end, f"runs are not in order, apart and non-empty: {runs}")
        end = first + npages
    return {index for first, npages in runs for index in range(first, first + npages)}


@dataclass
class PoolModel:
    """One pool. `pages` holds all pages of a persistent pool, and those that an ephemeral one may hold."""

    persistent: bool
    exclusive: bool
    pages: dict[Handle, bytes] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    most: int = 0
    """The most pages that there were, or may have been."""
    changed: set[Handle] = field(default_factory=set)
    """Handles that an export of changes may name: whoever exports empties this."""

    def put(
        self, oid: bytes, index: int, data: Sequence[bytes], stored: int, keep_old: bool, present: Runs
    ) -> None:
        """`data` was put, `stored` of its pages were taken; `present` was asked of the same range afterwards.

        D1: a refused page is a miss, or with `keep_old` what it was before, and then the pages behind it too.
        """
        demand(0 <= stored <= len(data), f"{stored} of {len(data)} pages stored")
        refused = stored < len(data)
        if keep_old:
            data = data[: stored + refused]
        now = indexes(present)
        if not self.persistent:  # what is evicted before the call returns was there
            self.most = max(self.most, len(self.pages) + stored)
        for i, page in enumerate(data):
            handle = oid, index + i
            if keep_old and i == stored:
                continue
            if handle[1] not in now:
                self.counts["puts_flushed"] += self._drop(handle)
            else:
                self.counts["puts_replaced"] += handle in self.pages
                self.pages[handle] = page
                self.changed.add(handle)
                self.most = max(self.most, len(self.pages))
        self.counts["puts"] += len(data)
        self.counts["puts_stored"] += stored
        taken = len(now & {index + i for i in range(len(data) - (keep_old and refused))})
        if self.persistent:
            demand(taken == stored, f"{taken} pages are there after a put that stored {stored}")
        demand(taken <= stored, f"{taken} pages are there after a put that stored {stored}")

    def get(self, oid: bytes, index: int, npages: int, got: Sequence[bytes]) -> None:
        """`npages` were asked for and `got` came, up to the first miss (P4, P5, C1-C3, G1)."""
        demand(len(got) <= npages, f"{len(got)} pages came of {npages}")
        for i, page in enumerate(got):
            handle = oid, index + i
            demand(handle in self.pages, f"index {index + i} came back without a put")
            demand(self.pages[handle] == page, f"index {index + i} has other bytes than were put last")
            if self.exclusive:
                self._drop(handle)
        self.counts["gets"] += min(len(got) + 1, npages)
        self.counts["gets_hit"] += len(got)
        self.counts["gets_taken"] += len(got) * self.exclusive
        if len(got) < npages:
            self._missed(oid, {index + len(got)})

    def flush(self, oid: bytes, index: int, npages: int, found: int) -> None:
        """A range was flushed and `found` of its pages existed (F1, F2)."""
        gone = [handle for handle in self.pages if handle[0] == oid and index <= handle[1] < index + npages]
        self.counts["flushes"] += npages
        self._flushed(gone, found)

    def flush_object(self, oid: bytes, found: int) -> None:
        """An object was flushed and `found` of its pages existed."""
        self.counts["object_flushes"] += 1
        self.counts["object_flushes_found"] += found > 0
        self._flushed([handle for handle in self.pages if handle[0] == oid], found)

    def _flushed(self, gone: Sequence[Handle], found: int) -> None:
        for handle in gone:
            self._drop(handle)
        self.counts["flushes_found"] += found
        if self.persistent:
            demand(found == len(gone), f"flushed {found} pages where {len(gone)} were")
        demand(found <= len(gone), f"flushed {found} pages where at most {len(gone)} were")

    def _drop(self, handle: Handle) -> bool:
        """Forget a page; False if there was none."""
        if self.pages.pop(handle, None) is None:
            return False
        self.changed.add(handle)
        return True

    def drop(self) -> None:
        """The client was turned off: nothing of an ephemeral pool is left."""
        if not self.persistent:
            self.pages.clear()

    def present(self, oid: bytes, index: int, npages: int, runs: Runs) -> None:
        """The range was looked at and `runs` were there; what was not stays away (C2)."""
        there = indexes(runs)
        known = {i for o, i in self.pages if o == oid and index <= i < index + npages}
        demand(there <= known, f"there without a put: {sorted(there - known)}")
        self._missed(oid, known - there)

    def _missed(self, oid: bytes, missing: set[int]) -> None:
        """Get-get: after a miss there is none but misses until a put."""
        for index in missing:
            lost = self.pages.pop((oid, index), None) is not None
            demand(not (lost and self.persistent), f"index {index} of a persistent pool is lost")

    def compare(self, statistics: Mapping[str, int]) -> None:
        """The pool's own counters say what happened."""
        s = statistics
        exact = ["puts", "puts_stored", "gets", "gets_hit", "gets_taken", "flushes", "flushes_found"]
        exact += ["object_flushes", "object_flushes_found"]
        if self.persistent:
            exact += ["puts_replaced", "puts_flushed"]
            demand(s["pages"] == len(self.pages), f"{s['pages']} pages, {len(self.pages)} expected")
            demand(s["evictions"] == 0, f"{s['evictions']} persistent pages were evicted")
            demand(s["pages_max"] == self.most, f"at most {s['pages_max']} pages, {self.most} expected")
        wrong = {key: (s[key], self.counts[key]) for key in exact if s[key] != self.counts[key]}
        demand(not wrong, f"counters (counted, expected): {wrong}")
        demand(s["pages"] <= len(self.pages), f"{s['pages']} pages, at most {len(self.pages)} expected")
        demand(s["pages_max"] <= self.most, f"once {s['pages_max']} pages, at most {self.most} expected")
        objects = len({oid for oid, _ in self.pages}) if self.persistent else s["pages"] > 0
        demand(s["objects"] >= objects, f"{s['objects']} objects, at least {objects} have pages")
        demand(s["nodes"] >= objects, f"{s['nodes']} leaves and nodes for {objects} objects with pages")
        check_identities(s)


def check_identities(s: Mapping[str, int]) -> None:
    """What must hold between a pool's counters whatever happened, while no operation is under way."""
    demand(s["puts"] == s["puts_stored"] + s["puts_refused"] + s["puts_flushed"], f"puts do not add up: {s}")
    left = s["puts_stored"] - s["puts_replaced"] - s["puts_flushed"] - s["flushes_found"] - s["gets_taken"]
    left -= s["evictions"] + s["pages_dropped"] + lost_corrupt(s)
    demand(s["pages"] == left, f"pages do not add up, {left} should be left: {s}")
    kinds = (
        s["compressed_pages"]
        + s["raw_pages"]
        + s["fill_pages"]
        + s["tier_pages"]
        + s["twin_pages"]
        + s["packed_pages"]
    )
    demand(s["pages"] == kinds, f"kinds do not add up: {s}")
    demand(all(value >= 0 for value in s.values()), f"negative counter: {s}")
    demand(s["gets_hit"] <= s["gets"], f"more hits than gets: {s}")


def lost_corrupt(s: Mapping[str, int]) -> int:
    """Return the pages that a pool dropped because their checksum failed: only ephemeral ones do."""
    return 0 if s["persistent"] else s["corrupt_pages"]


@dataclass
class SharedModel(PoolModel):
    """A shared pool: its sharers, the one that joined first first, and who used each object last."""

    sharers: list[str] = field(default_factory=list)
    owner: str = ""
    users: dict[bytes, str] = field(default_factory=dict)

    def join(self, name: str) -> None:
        self.sharers.append(name)
        self.owner = self.owner or name

    def used(self, oid: bytes, name: str) -> None:
        """K2: after a put it is the owner's, whoever put, after a hit the getter's."""
        self.users[oid] = name

    def leave(self, name: str) -> bool:
        """K2: what the leaver used last goes with it. False: it was the last sharer, and the pool is no more.

        An owner that leaves has no successor yet: any of the sharers may be.
        """
        for handle in [handle for handle in self.pages if self.users.get(handle[0], self.owner) == name]:
            self._drop(handle)
        self.sharers.remove(name)
        if self.owner == name:
            self.owner = ""
        return bool(self.sharers)


MODES = ("on", "frozen", "off")


@dataclass
class ClientModel:
    """One client: its settings, what it may share, and its pools by id, shared ones among them."""

    cap_bytes: int = 0
    floor_bytes: int = 0
    weight: int = 100
    compress: str = "auto"
    mode: str = "on"
    phase: str = "none"
    authorised: set[bytes] = field(default_factory=set)
    pools: dict[int, PoolModel] = field(default_factory=dict)


@dataclass
class SegmentModel:
    """All clients by name, and all shared pools by UUID."""

    mode: str = "on"
    clients: dict[str, ClientModel] = field(default_factory=dict)
    shared: dict[bytes, SharedModel] = field(default_factory=dict)

    def mode_of(self, name: str) -> str:
        """Return what the client may do: the stricter of its own mode and the segment's."""
        return max(self.mode, self.clients[name].mode, key=MODES.index)

    def may_put(self, name: str) -> bool:
        return self.mode_of(name) == "on" and self.clients[name].phase in ("none", "copying")

    def payer(self, name: str, pool: int) -> str:
        """Return who is charged for the pages of a client's pool."""
        model = self.clients[name].pools[pool]
        return model.owner if isinstance(model, SharedModel) else name

    def each(self) -> Iterator[tuple[str, int, PoolModel]]:
        """Yield payer, id there and model of every pool, shared ones once."""
        for name, client in self.clients.items():
            for number, pool in client.pools.items():
                if self.payer(name, number) == name:
                    yield name, number, pool

    def set_mode(self, name: str | None, mode: str) -> None:
        """Restrict a client, or without a name all of them. Off: the ephemeral pages are dropped.

        Those of a shared pool stay for the others.
        """
        if name is None:
            self.mode = mode
        else:
            self.clients[name].mode = mode
        if mode == "off":
            for owner, _, pool in self.each():
                if name is None or (name == owner and not isinstance(pool, SharedModel)):
                    pool.drop()

    def leave(self, name: str, pool: int) -> None:
        """A client gives up a pool: a private one is destroyed, a shared one is left."""
        model = self.clients[name].pools.pop(pool)
        if isinstance(model, SharedModel) and not model.leave(name):
            self.shared = {uuid: other for uuid, other in self.shared.items() if other is not model}

    def destroy(self, name: str) -> None:
        """Destroy a client (K3)."""
        for number in list(self.clients[name].pools):
            self.leave(name, number)
        del self.clients[name]
