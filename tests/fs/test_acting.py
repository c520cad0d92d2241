"""Who makes files: threads that act as somebody need a umask of their own."""

import threading
from collections.abc import Iterator

import pytest

from tmem.fs import acting


@pytest.fixture
def untried() -> Iterator[None]:
    acting._threads_can_part.cache_clear()
    yield
    acting._threads_can_part.cache_clear()


@pytest.mark.usefixtures("untried")
def test_a_thread_that_cannot_be_had_now_says_nothing_of_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", none)
        assert not acting.threads_may_act()
    assert acting.threads_may_act()
