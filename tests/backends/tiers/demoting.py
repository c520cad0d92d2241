"""A manager's side of a tier: batches that overlap, written by a thread."""

import contextlib
import threading
from collections import deque

from tmem.backends.tiers.contract import MAX_BEGUN, Writing
from tmem.backends.tiers.redis_tier import RedisTier
from tmem.errors import TierDownError

from ...waiting import wait_until
from .contract import record


class Demotion:
    """Writes batches that overlap in a thread, as a manager does, and remembers what was acknowledged."""

    def __init__(self, tier: RedisTier) -> None:
        self._tier = tier
        self.stored: dict[int, bytes] = {}
        self.batches = 0
        self.refused = 0
        self.error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        begun: deque[tuple[Writing, list[bytes]]] = deque()
        number = 0
        try:
            while not self._ended.is_set():
                number += 1
                batch = [record(number * 100 + n, 1700 + n) for n in range(100)]
                with contextlib.suppress(TierDownError):
                    begun.append((self._tier.begin(batch), batch))
                    if len(begun) < MAX_BEGUN:
                        continue
                    writing, batch = begun.popleft()
                    self.stored.update(zip(writing.end(), batch, strict=True))
                    self.batches += 1
                    continue
                self.refused += 1
        except BaseException as error:
            self.error = error
        finally:
            for writing, _batch in begun:
                writing.drop()

    def until(self, batches: int) -> None:
        wait_until(lambda: self.batches >= batches or self.error, what=f"{batches} batches")

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        if self.error is not None:
            raise self.error
