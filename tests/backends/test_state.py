"""The semantics in one process: random operations on a real segment compared with the model, step by step."""

from pathlib import Path

import pytest
from hypothesis.stateful import run_state_machine_as_test

from .control import ControlMachine
from .machine import StoreMachine, bounded
from .tiered import TieredMachine


@pytest.mark.parametrize(("memory_mib", "examples"), [(8, 12), (16, 5)])
def test_14_random_puts_gets_and_flushes(
    directory: Path, memory_mib: int, examples: int, effort: int
) -> None:
    class Machine(StoreMachine):
        memory_bytes = memory_mib << 20
        parent = directory

    run_state_machine_as_test(Machine, settings=bounded(examples * effort, 60))


@pytest.mark.parametrize(("memory_mib", "examples"), [(8, 20), (16, 8)])
def test_14_random_operations_of_every_kind(
    directory: Path, memory_mib: int, examples: int, effort: int
) -> None:
    class Machine(ControlMachine):
        memory_bytes = memory_mib << 20
        parent = directory

    run_state_machine_as_test(Machine, settings=bounded(examples * effort, 60))


@pytest.mark.parametrize(("memory_mib", "examples"), [(8, 10), (16, 4)])
def test_random_operations_with_pages_in_tiers(
    directory: Path, memory_mib: int, examples: int, effort: int
) -> None:
    class Machine(TieredMachine):
        memory_bytes = memory_mib << 20
        parent = directory

    run_state_machine_as_test(Machine, settings=bounded(examples * effort, 60))
