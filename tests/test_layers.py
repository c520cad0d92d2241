"""Imports point one way: errors, types <- backends <- nbd, fs, config <- doctor, bench <- cli."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "tmem"
BASE = {"errors", "types"}
ALLOWED = {
    "errors": set[str](),
    "types": {"errors"},
    "backends": BASE | {"backends"},
    "config": BASE | {"backends", "config"},
    "nbd": BASE | {"backends", "nbd"},
    "fs": BASE | {"backends", "fs"},
    "doctor": BASE | {"backends", "nbd", "fs", "config"},
    "bench": BASE | {"backends", "nbd", "fs", "bench"},
    "cli": BASE | {"backends", "bench", "config", "nbd", "fs", "doctor", "cli"},
    "__init__": set[str](),
    "__main__": {"cli"},
}


def sources() -> list[Path]:
    # rglob follows no links below its start, and three of the packages are links
    return sorted(
        path
        for entry in ROOT.iterdir()
        for path in (entry.rglob("*.py") if entry.is_dir() else [entry])
        if path.suffix == ".py"
    )


def imported(source: Path) -> Iterator[str]:
    """Yield the first name below ``tmem`` of everything that `source` imports, at any depth."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative imports hide the layer"
            if node.module == "tmem":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("tmem."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tmem."))


def test_every_layer_is_there() -> None:
    layers = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in sources()}
    assert layers == set(ALLOWED)


@pytest.mark.parametrize("source", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(source: Path) -> None:
    layer = source.relative_to(ROOT).parts[0].removesuffix(".py")
    assert set(imported(source)) <= ALLOWED[layer]


def test_the_packages_cannot_hide_others() -> None:
    """A top-level nbd/__init__.py would hide libnbd's module of that name."""
    for package in ("backends", "fs", "nbd"):
        assert (ROOT / package).is_symlink()
        assert not (ROOT / package / "__init__.py").exists()
