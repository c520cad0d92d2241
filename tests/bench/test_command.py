"""``tmem bench`` as a person runs it: one short run, what it refuses, and that it leaves nothing behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tmem.cli.main import run
from tmem.nbd import swap

from ..cli.conftest import Tmem
from ..cli.conftest import tmem as tmem  # the fixture
from ..waiting import wait_until

SHORT = ("bench", "--quick", "--rounds", "1", "--seconds", "0.05")


def test_a_short_run(tmem: Tmem, tmp_path: Path) -> None:
    kept, page, plots = tmp_path / "out.json", tmp_path / "out.html", tmp_path / "plots"
    plots.mkdir()
    result = tmem(*SHORT, "--only", "nbd", "--json", str(kept), "--html", str(page), "--png", str(plots))
    assert result.status == 0, result.err
    assert "nbd: three NBD servers" in result.err  # said beforehand
    assert "4 KiB random writes, depth 32 (IOPS)" in result.out
    document = json.loads(kept.read_text())
    assert document["complete"]
    assert document["machine"]["versions"]["fio"]
    part = document["parts"]["nbd"]
    assert part["lacking"] == []
    assert len(part["rows"]) == 2 * 6
    for series in part["series"]:
        (sample,) = series["samples"]
        assert sample["value"] > 0
        assert sample["percentiles_us"]["99"] >= sample["percentiles_us"]["50"] > 0
    assert part["notes"]["pages_to_memory"] > 1.5  # what was written was not of one word
    assert page.read_text().endswith("</html>\n")
    assert {file.name for file in plots.iterdir()} == {"nbd.png", "nbd-latency.png"}
    assert {*tmp_path.iterdir()} == {kept, page, plots}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "everything"],
        ["--rounds", "0"],
        ["--seconds", "-1"],
        ["--json"],
        ["--json", "/"],
        ["--png", "/nowhere"],
        ["more"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("Error:")


@pytest.mark.parametrize(
    ("option", "value", "file"),
    [
        ("--json", "/nowhere/out.json", "/nowhere/out.json"),
        ("--html", "/proc/out.html", "/proc/out.html"),
        ("--png", "/proc", "/proc/nbd.png"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(
    option: str, value: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SHORT, "--only", "nbd", option, value]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"tmem: {file} cannot be written")
    assert errors.count("\n") == 1


def test_a_dry_run_only_says_what_would_be_done(tmem: Tmem, tmp_path: Path) -> None:
    kept = tmp_path / "out.json"
    result = tmem("bench", "--dry-run", "--json", str(kept))
    assert result.status == 0
    assert "in all" in result.err
    assert result.out == ""
    assert not kept.exists()


def test_a_program_that_is_missing_is_named(runtime_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "fio").symlink_to("/usr/bin/fio")  # and no nbdkit
    result = subprocess.run(
        [sys.executable, "-m", "tmem", *SHORT, "--only", "nbd"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr == "tmem: nbdkit is not installed: apt-get install nbdkit nbdkit-plugin-python\n"


def test_plots_without_matplotlib_are_refused_first(runtime_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        f"from tmem.cli.main import run; sys.exit(run({[*SHORT, '--only', 'nbd', '--html', 'out.html']!r}))"
    )
    argv = [sys.executable, "-c", code]
    result = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("tmem: plots need matplotlib: ")
    assert result.stderr.endswith(" -m pip install 'tmem[bench]'\n")
    assert result.stderr.count("\n") == 1


@contextmanager
def begun(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run that would take long."""
    argv = [sys.executable, "-m", "tmem", "bench", "--quick", "--seconds", "300", *arguments]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def places(process: subprocess.Popen[str]) -> set[Path]:
    """Return the directories of a run, from the command lines of what it has started."""
    found = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end meanwhile
            for word in child.cmdline():
                _, mark, rest = word.partition("/dev/shm/tmem-bench.")
                if mark:
                    found.add(Path(mark + rest.partition("/")[0]))
    return found


def runs(process: psutil.Process) -> bool:
    """Say whether a process still runs; a zombie does not."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def interrupt(process: subprocess.Popen[str]) -> None:
    """Interrupt a run, twice as people do, and see that nothing of it is left."""
    children = psutil.Process(process.pid).children(recursive=True)
    made = places(process)
    assert made
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    # Who was started to outlive us is nobody's child then, and init may be slow to bury it.
    assert [one for one in children if runs(one)] == []
    assert [place for place in made if place.exists()] == []


def test_ctrl_c_leaves_nothing_behind(runtime_dir: Path) -> None:
    with begun("--only", "nbd") as process:

        def measuring() -> bool:
            with contextlib.suppress(psutil.Error):
                running = psutil.Process(process.pid).children()
                return bool(places(process)) and any(child.name() == "fio" for child in running)
            return False

        wait_until(measuring, what="fio measures")
        interrupt(process)


def test_ctrl_c_while_it_swaps(root: None, swapping: None, runtime_dir: Path) -> None:
    before = {entry.device for entry in swap.entries()}
    with begun("--only", "swap") as process:

        def swapped() -> bool:
            return any(entry.used_bytes > 1 << 20 for entry in swap.entries() if entry.device not in before)

        wait_until(swapped, what="the program is swapped out")
        interrupt(process)
    assert {entry.device for entry in swap.entries()} == before
