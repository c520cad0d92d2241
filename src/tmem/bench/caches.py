"""Caches of equal pages, simulated: each function takes the accesses and the room, and counts hits.

FIFO and LRU need no source. SIEVE is that of Zhang et al. (NSDI '24). S3-FIFO is there twice, because the
algorithm as printed (Yang et al., SOSP '23, algorithm 1) and the authors' reference program (libCacheSim)
differ a little: in print the small queue is emptied whenever it has its tenth, in the program whenever the
main queue has not more than its nine. Both: ghosts of as many pages as the main queue holds, frequencies up
to 3, two hits from small to main.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable


def fifo(pages: Iterable[int], room: int) -> int:
    """The oldest page goes."""
    kept: set[int] = set()
    order: deque[int] = deque()
    hits = 0
    for page in pages:
        if page in kept:
            hits += 1
            continue
        if len(kept) >= room:
            kept.remove(order.popleft())
        kept.add(page)
        order.append(page)
    return hits


def lru(pages: Iterable[int], room: int) -> int:
    """The page goes that was not used for longest."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for page in pages:
        if page in kept:
            kept.move_to_end(page)
            hits += 1
            continue
        if len(kept) >= room:
            kept.popitem(last=False)
        kept[page] = None
    return hits


def sieve(pages: Iterable[int], room: int) -> int:
    """A hand moves from old to new, spares visited pages once, and takes the first that was not visited."""
    visited: dict[int, bool] = {}
    newer: dict[int, int | None] = {}
    older: dict[int, int | None] = {}
    oldest: int | None = None
    newest: int | None = None
    hand: int | None = None
    hits = 0
    for page in pages:
        if page in visited:
            visited[page] = True
            hits += 1
            continue
        if len(visited) >= room:
            at = hand if hand is not None else oldest
            assert at is not None
            while visited[at]:
                visited[at] = False
                after = newer[at]
                at = after if after is not None else oldest
                assert at is not None
            hand = newer[at]
            before = older[at]
            if hand is None:
                newest = before
            else:
                older[hand] = before
            if before is None:
                oldest = hand
            else:
                newer[before] = hand
            del visited[at], newer[at], older[at]
        visited[page] = False
        newer[page] = None
        older[page] = newest
        if newest is None:
            oldest = page
        else:
            newer[newest] = page
        newest = page
    return hits


class _S3Fifo:
    """The three queues, oldest first; values are frequencies."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.small_room = max(1, room // 10)
        self.main_room = max(1, room - self.small_room)
        self.small: OrderedDict[int, int] = OrderedDict()
        self.main: OrderedDict[int, int] = OrderedDict()
        self.ghosts: OrderedDict[int, None] = OrderedDict()

    def hit(self, page: int) -> bool:
        """Count the access if the page is there."""
        queue = self.small if page in self.small else self.main
        if page not in queue:
            return False
        if queue[page] < 3:
            queue[page] += 1
        return True

    def full(self) -> bool:
        return len(self.small) + len(self.main) >= self.room

    def insert(self, page: int, was_ghost: bool) -> None:
        (self.main if was_ghost else self.small)[page] = 0

    def forget_ghost(self, page: int) -> bool:
        """Say whether the page was a ghost; it is none from now on."""
        if page not in self.ghosts:
            return False
        del self.ghosts[page]
        return True

    def note_ghost(self, page: int) -> None:
        if len(self.ghosts) >= self.main_room:
            self.ghosts.popitem(last=False)
        self.ghosts[page] = None

    def evict_main(self) -> None:
        """Take the oldest page without hits; the others go to the end with one hit less."""
        while self.main:
            page, frequency = self.main.popitem(last=False)
            if not frequency:
                return
            self.main[page] = frequency - 1

    def promoted(self) -> tuple[int, int] | None:
        """Take the oldest page of the small queue, with its frequency, if it has earned a place in the main
        one. Else it becomes a ghost: None, as when there is none left."""
        if not self.small:
            return None
        page, frequency = self.small.popitem(last=False)
        if frequency <= 1:
            self.note_ghost(page)
            return None
        return page, frequency


def s3fifo(pages: Iterable[int], room: int) -> int:
    """S3-FIFO as printed."""
    cache = _S3Fifo(room)
    hits = 0
    for page in pages:
        if cache.hit(page):
            hits += 1
            continue
        while cache.full():
            if len(cache.small) < cache.small_room and cache.main:
                cache.evict_main()
                continue
            while found := cache.promoted():
                cache.main[found[0]] = 0
                if len(cache.main) > cache.main_room:
                    cache.evict_main()
        cache.insert(page, cache.forget_ghost(page))
    return hits


def s3fifo_reference(pages: Iterable[int], room: int) -> int:
    """S3-FIFO as in the authors' program."""
    cache = _S3Fifo(room)
    hits = 0
    for page in pages:
        if cache.hit(page):
            hits += 1
            continue
        was_ghost = cache.forget_ghost(page)
        while cache.full():
            if len(cache.main) > cache.main_room or not cache.small:
                cache.evict_main()
                continue
            while found := cache.promoted():
                cache.main[found[0]] = found[1]
        cache.insert(page, was_ghost)
    return hits


PEERS: dict[str, Callable[[Iterable[int], int], int]] = {
    "LRU": lru,
    "FIFO": fifo,
    "SIEVE": sieve,
    "S3-FIFO": s3fifo,
    "S3-FIFO ref.": s3fifo_reference,
}
