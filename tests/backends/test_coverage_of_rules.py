"""No rule of the specification is without a test that has its name.

The names of all test functions of the project are collected, without running anything, and each rule (P1 to
K5), each conformance test and each historic defect of docs/semantics.md must be among them: as
``test_p1_...``, ``test_1_...`` and ``test_10_1_...``. Two conformance tests have other names elsewhere.
"""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
RULES = [f"{letter}{number}" for letter, most in zip("PDGFCK", (6, 6, 6, 5, 4, 5), strict=True)
         for number in range(1, most + 1)]  # fmt: skip
CONFORMANCE, DEFECTS = range(1, 17), range(1, 17)
ELSEWHERE = {16: ("nbd/test_swap.py", "test_a_hog_swaps")}


def functions(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in nodes if isinstance(node, kinds) and node.name.startswith("test_")]


@pytest.fixture(scope="module")
def names() -> set[str]:
    return {name for path in TESTS.rglob("test_*.py") for name in functions(path)}


def some_match(names: set[str], pattern: str) -> bool:
    return any(re.match(pattern, name) for name in names)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_has_a_test(names: set[str], rule: str) -> None:
    assert some_match(names, rf"test_{rule.lower()}_[a-z]")


@pytest.mark.parametrize("number", CONFORMANCE)
def test_each_conformance_test_is_there(names: set[str], number: int) -> None:
    if number in ELSEWHERE:
        path, name = ELSEWHERE[number]
        assert name in functions(TESTS / path)
    else:
        assert some_match(names, rf"test_{number}_[a-z]")


@pytest.mark.parametrize("number", DEFECTS)
def test_each_historic_defect_has_a_test(names: set[str], number: int) -> None:
    assert some_match(names, rf"test_10_{number}_[a-z]")


@pytest.mark.parametrize("front_end", ["fs", "nbd"])
def test_what_front_ends_owe_is_tested_with_real_ones(front_end: str) -> None:
    assert some_match(set(functions(TESTS / front_end / "test_rules.py")), r"test_k4_[a-z]")


def test_what_is_not_there_would_be_missed(names: set[str]) -> None:
    assert not some_match(names, r"test_p7_[a-z]")
    assert not some_match(names, r"test_10_17_[a-z]")
