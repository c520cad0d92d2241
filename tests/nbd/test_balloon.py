"""The balloon: its decisions on a group that is simulated, and one real group that swaps to a device."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmem.backends import cgroup
from tmem.errors import TmemError
from tmem.nbd import balloon, swap
from tmem.nbd.balloon import LEAST_RATIO, MOST_RATIO, Look, Pace, Rules, decide
from tmem.types import PAGE_SIZE

from ..groups import used_bytes
from .conftest import eventually

MIB = 1 << 20

looks = st.builds(
    Look,
    used_bytes=st.integers(0, 1 << 40),
    swap_bytes=st.just(1 << 30),
    swap_free_bytes=st.integers(0, 1 << 30),
    stalled=st.floats(0, 1),
)


@given(seen=st.lists(looks, max_size=40), least=st.integers(0, 1 << 40), target=st.floats(0.0001, 1))
def test_whatever_is_seen(seen: list[Look], least: int, target: float) -> None:
    """Never below the least, never the last of swap, never much at once, and nothing while somebody waits."""
    pace = Pace()
    for one in seen:
        pace, amount, why = decide(pace, one, Rules(least, target))
        assert bool(amount) != bool(why)
        assert 0 <= amount <= max(one.used_bytes * MOST_RATIO, PAGE_SIZE)
        assert amount % PAGE_SIZE == 0
        if amount:
            assert one.used_bytes - amount >= least + balloon.BATCH_BYTES
            assert one.swap_free_bytes - amount >= one.swap_bytes // balloon.SWAP_SHARE
        if one.stalled >= target:
            assert amount == 0
            assert pace.ratio == LEAST_RATIO
            assert pace.rest >= 1


class Program:
    """Uses `busy_bytes` all the time and the rest never; what is taken of the former it faults back."""

    def __init__(self, busy_bytes: int, cold_bytes: int, stall_per_byte: float) -> None:
        self.busy_bytes, self.stall_per_byte = busy_bytes, stall_per_byte
        self.used_bytes = busy_bytes + cold_bytes
        self.stalled = 0.0

    def give(self, amount: int) -> None:
        """Lose so much, cold pages first, and have the busy ones back until the next step."""
        self.used_bytes -= amount
        faulted = max(self.busy_bytes - self.used_bytes, 0)
        self.stalled = min(faulted * self.stall_per_byte, 1.0)
        self.used_bytes += faulted


@settings(max_examples=40)
@given(
    busy_mib=st.integers(64, 4096),
    colder=st.floats(0, 4),
    least=st.floats(0, 3),
    cost=st.floats(0.01, 20),
)
def test_a_program_that_faults_back(busy_mib: int, colder: float, least: float, cost: float) -> None:
    """Its cold pages go, down to the least; what it uses is tried so seldom that it waits less than was
    allowed. `cost`: what the smallest step into the busy pages costs, in targets."""
    rules = Rules(int(busy_mib * MIB * least))
    busy = busy_mib * MIB
    program = Program(busy, int(busy * colder), cost * rules.target / (busy * LEAST_RATIO))
    started, pace, lost = program.used_bytes, Pace(), 0.0
    for number in range(1000):
        seen = Look(program.used_bytes, 1 << 40, 1 << 40, program.stalled)
        pace, amount, _ = decide(pace, seen, rules)
        assert amount <= busy * 5 * MOST_RATIO
        program.give(amount)
        lost += program.stalled if number >= 500 else 0.0
    floor = max(busy, rules.least_bytes)
    assert program.used_bytes <= max(floor, min(started, rules.least_bytes)) + balloon.BATCH_BYTES + PAGE_SIZE
    assert program.used_bytes >= min(started, floor)
    assert lost / 500 <= rules.target


def test_a_stall_ends_growth_at_once_and_the_next_costs_more() -> None:
    calm, stalled = Look(1 << 30, 1 << 30, 1 << 30, 0.0), Look(1 << 30, 1 << 30, 1 << 30, 0.5)
    pace, amounts = Pace(), []
    for _ in range(12):
        pace, amount, _ = decide(pace, calm, Rules(0))
        amounts.append(amount)
    assert amounts == sorted(amounts)
    assert amounts[-1] == int((1 << 30) * MOST_RATIO) // PAGE_SIZE * PAGE_SIZE
    rests = []
    for _ in range(4):
        pace, amount, why = decide(pace, stalled, Rules(0))
        assert (amount, why) == (0, "somebody waits for memory")
        rests.append(0)
        while not amount:
            pace, amount, _ = decide(pace, calm, Rules(0))
            rests[-1] += not amount
        assert amount == int((1 << 30) * LEAST_RATIO) // PAGE_SIZE * PAGE_SIZE
    assert rests == [1, 2, 4, 8]


def test_an_old_kernel_has_its_limit_lowered_for_a_moment(tmp_path: Path) -> None:
    """Files in place of the kernel's: the limit comes back, and stays where the kernel can be asked."""
    (tmp_path / "memory.current").write_text(str(10 * MIB))
    (tmp_path / "memory.high").write_text("max\n")
    balloon.reclaim(tmp_path, MIB)
    assert (tmp_path / "memory.high").read_text() == "max"
    (tmp_path / "memory.high").write_text(str(8 * MIB))
    balloon.reclaim(tmp_path, MIB)
    assert (tmp_path / "memory.high").read_text() == str(8 * MIB)
    (tmp_path / "memory.reclaim").touch()
    balloon.reclaim(tmp_path, MIB)
    assert (tmp_path / "memory.reclaim").read_text() == str(MIB)


@pytest.mark.parametrize("name", [None, "no-such-group", "/etc"])
def test_what_is_no_group_to_ask(name: str | None) -> None:
    if cgroup.version() is None:
        pytest.skip("no memory controller")
    with pytest.raises(TmemError, match="name a group below"):
        balloon.find(name)


PROGRAM = """
import hashlib, random, sys
pages = bytearray(random.Random(7).randbytes(28 << 20))
print(hashlib.sha256(pages).hexdigest(), flush=True)
sys.stdin.readline()
print(hashlib.sha256(pages).hexdigest(), flush=True)
"""


@pytest.fixture
def program(control_group: Callable[..., Path]) -> Iterator[tuple[Path, "subprocess.Popen[str]", str]]:
    """A program in a group of its own that has 28 MiB and waits for a line; and their sum."""
    group = control_group(96 * MIB)
    enter = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    argv = [sys.executable, "-c", enter + PROGRAM]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield group, process, process.stdout.readline()
        finally:
            process.kill()


def test_cold_pages_go_to_the_device(
    device: str, program: tuple[Path, "subprocess.Popen[str]", str], runtime_dir: Path
) -> None:
    """As they do while nobody needs the memory; the limit is as before, and every page comes back."""
    swap.on(device, priority=32767)
    group, process, before = program
    limit, started = cgroup.limit_of(group), used_bytes(group)
    # With v1 the kernel counts who waits on the whole machine, other tests included.
    words = [group.name, "--interval", "0.02", "--least", "20M", "--stalled", "100"]
    argv = [sys.executable, "-m", "tmem", "balloon", *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        try:
            eventually(lambda: used_bytes(group) < started - 6 * MIB, "the group gives up memory")
            command.send_signal(signal.SIGTERM)
            said, warned = command.communicate(timeout=60)
        finally:
            command.kill()
    assert command.returncode == 0, warned
    assert "reclaiming" in said
    assert warned.endswith("ended; every limit is as it was\n")
    assert cgroup.limit_of(group) == limit
    entry = swap.entry(device)
    assert entry is not None
    assert entry.used_bytes > 4 * MIB
    assert used_bytes(group) >= 20 * MIB
    assert process.communicate("\n")[0] == before
