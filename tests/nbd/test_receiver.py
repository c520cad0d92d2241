"""The worker of the nbd driver that reads replies is found by its name, and known to have ended by it."""

from pathlib import Path

from tmem.nbd.receiver import Receiver


def _name(proc: Path, pid: int, name: str) -> None:
    (proc / str(pid)).mkdir(exist_ok=True)
    (proc / str(pid) / "comm").write_text(name + "\n")


def test_a_worker_is_awaited_until_it_has_ended(tmp_path: Path) -> None:
    _name(tmp_path, 1, "init")
    _name(tmp_path, 20, "nbd0-recv")  # the rescuer of the queue: it reads nothing
    _name(tmp_path, 30, "kworker/u4:1-nbd0-recv")
    _name(tmp_path, 31, "kworker/u4:2+nbd0-recv")
    _name(tmp_path, 32, "kworker/u4:3+nbd1-recv")
    (tmp_path / "self").mkdir()
    receiver = Receiver(0, tmp_path)
    receiver.find()
    assert not receiver.ended()
    _name(tmp_path, 31, "kworker/u4:2-nbd0-recv")
    assert receiver.ended()
    # The next connection's worker is another one.
    _name(tmp_path, 30, "kworker/u4:1+nbd0-recv")
    assert receiver.ended(), "nobody is known"
    receiver.find()
    assert not receiver.ended()
    receiver.forget()
    assert receiver.ended()


def test_without_a_worker_nothing_is_awaited(tmp_path: Path) -> None:
    receiver = Receiver(0, tmp_path)
    receiver.find()
    assert receiver.ended()
