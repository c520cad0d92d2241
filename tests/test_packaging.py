"""What a user installs: the source distribution has what it takes to build, and the wheel works by itself.

The wheel is built from the unpacked source distribution, without the network; the libraries that it needs are
those of this environment.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src", "backends", "fs", "nbd")


def run(*argv: str | Path, cwd: Path, **variables: str) -> str:
    """Run a program in a directory; its output. What fails is shown."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [*map(str, argv)], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made from a copy of the project as it is here."""
    copy, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("sdist")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part,
                copy / part,
                symlinks=True,
                ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"),
            )
        else:
            shutil.copy(ROOT / part, copy / part)
    program = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    run(sys.executable, "-c", program, cwd=copy)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the unpacked source distribution."""
    directory, out = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("wheel")
    run("tar", "-xf", sdist, cwd=directory)  # Python 3.11.2's tarfile and later ones want other arguments
    (source,) = directory.iterdir()
    program = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    # It is the package that is tried here, not its speed: compiling takes a third of the time so.
    compiler = directory / "cc"
    compiler.write_text('#!/bin/sh\nexec gcc "$@" -O0\n')
    compiler.chmod(0o755)
    run(sys.executable, "-c", program, cwd=source, CC=str(compiler))
    (made,) = out.iterdir()
    return made


def test_the_source_distribution_has_what_it_takes(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "src/tmem/backends/native/tm.h"} <= names
    wanted = {
        f"src/tmem/{path.relative_to(ROOT / 'src' / 'tmem')}"
        for layer in (ROOT / "src" / "tmem").iterdir()
        for path in (layer.resolve().rglob("*") if layer.is_symlink() else [])
        if path.suffix in (".c", ".h", ".py", ".pyi")
        for path in [ROOT / "src" / "tmem" / layer.name / path.relative_to(layer.resolve())]
    }
    assert wanted <= names, wanted - names


def test_the_wheel_is_for_every_python_from_3_11_on(wheel: Path) -> None:
    assert re.fullmatch(r"tmem-[0-9.]+-cp311-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entries = next(name for name in names if name.endswith("entry_points.txt"))
        assert "mount.fuse.tmem" in archive.read(entries).decode()
    assert {"tmem/backends/_native.abi3.so", "tmem/py.typed", "tmem/units/tmem@.service"} <= names
    for path in (ROOT / "src" / "tmem").rglob("*.py"):
        assert f"tmem/{path.relative_to(ROOT / 'src' / 'tmem')}" in names
    for layer in ("backends", "fs", "nbd"):
        for path in (ROOT / layer).rglob("*.py"):
            assert f"tmem/{path.relative_to(ROOT)}" in names
    assert not [name for name in names if name.startswith(("tests", "backends", "fs", "nbd"))]


def test_it_works_in_a_fresh_environment_from_an_empty_directory(
    wheel: Path, tmp_path: Path, runtime_dir: Path
) -> None:
    empty, environment = tmp_path / "empty", tmp_path / "venv"
    empty.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=empty)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=empty)
    # Libraries only: a directory that is named so is not looked through for editable installs, such as ours.
    (site,) = (environment / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    where = run(python, "-c", "import tmem.backends._native as core; print(core.__file__)", cwd=empty)
    assert Path(where.strip()).is_relative_to(environment)
    tmem = environment / "bin" / "tmem"
    assert re.fullmatch(r"tmem, version [0-9.]+\n", run(tmem, "--version", cwd=empty))
    try:
        assert "(16M) runs" in run(tmem, "start", "-d", "--memory", "16M", cwd=empty)
        assert "segment default" in run(tmem, "list", cwd=empty)
        assert "tmem_manager_up 1" in run(tmem, "metrics", "--once", cwd=empty)
        assert "16M" in run(tmem, "top", "--once", "--interval", "0.1", cwd=empty)
        assert "write" in run(tmem, "install", "--root", empty, "--dry-run", cwd=empty)
        run(tmem, "stop", cwd=empty)
    finally:
        run(tmem, "destroy", "--all", cwd=empty)
    assert [*empty.iterdir()] == []
