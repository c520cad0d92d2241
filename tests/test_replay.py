"""scripts/replay: traces become pages, simulated caches do what is published, the store keeps up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tmem.bench.caches import PEERS
from tmem.bench.hits import accesses

FOLDER = Path(__file__).parents[1] / "scripts" / "replay.d"
HEAD = "version,time,op,size,lbn\n"


def replay(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program that scripts/replay starts."""
    return subprocess.run(
        [sys.executable, str(FOLDER / "main.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_store_keeps_up_with_s3fifo_and_exceeds_lru(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "out.json"
    rows = (f"1,{time},28,4096,{page * 8}" for time, page in enumerate(accesses(1)))
    trace.write_text(HEAD + "\n".join(rows) + "\n")
    done = replay(trace, "--sizes", "5,20,40", "--json", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("target") == 3, done.stdout
    for ratios in json.loads(out.read_text())["ratios"].values():
        # Chunks of 15 pages are coarser than pages, and which of two policies suits a small trace is chance.
        assert ratios["store"] >= max(ratios["S3-FIFO"], ratios["S3-FIFO ref."]) - 0.005
        assert ratios["store"] > ratios["LRU"]
        assert ratios["store, LZ4"] > ratios["LRU"]


@pytest.mark.parametrize(
    ("mapping", "accessed_and_different"), [("device", [7, 4]), ("aligned", [4, 3]), ("requests", [3, 2])]
)
def test_requests_become_pages(tmp_path: Path, mapping: str, accessed_and_different: list[int]) -> None:
    """Two requests of a page, one of two, all at sector 7 of a page, as in a partition at sector 63."""
    trace = tmp_path / "trace.csv"
    trace.write_text(HEAD + "1,0,28,4096,7\n1,0,2a,4096,7\n1,0,28,8192,15\n")
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import blocktrace; from pathlib import Path\n"
        f"t = blocktrace.read(Path({str(trace)!r}), {mapping!r}); print(len(t.pages), t.footprint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [int(word) for word in done.stdout.split()] == accessed_and_different


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("time,op,size,lbn\n1,2,3,4\n", "no column 'version'"),
        (HEAD, "no requests"),
        (HEAD + "1,0,28,many,7\n", "line 2: size and lbn must be numbers"),
        (HEAD + "1,0,28,4096,-7\n", "line 2: size and lbn must not be negative"),
        (HEAD + "1,0,28,4096,7\n", "too little to measure"),
    ],
)
def test_says_what_is_wrong_with_a_trace(tmp_path: Path, text: str, says: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    done = replay(trace)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]


# Room for four pages. With a tenth of that, S3-FIFO's small queue has one; main has three.
@pytest.mark.parametrize(
    ("name", "asked", "hits"),
    [
        ("FIFO", [1, 2, 3, 4, 1, 5, 1], 1),
        ("LRU", [1, 2, 3, 4, 1, 5, 1, 2], 2),
        ("SIEVE", [1, 2, 3, 4, 1, 5, 1, 6, 2, 1], 3),
        ("S3-FIFO", [1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 1], 3),
        ("S3-FIFO", [1, 1, 2, 3, 4, 5, 6, 7, 8, 1], 1),
        ("S3-FIFO ref.", [1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 1], 3),
        ("S3-FIFO ref.", [1, 1, 2, 3, 4, 5, 6, 7, 8, 1], 1),
    ],
)
def test_simulated_caches(name: str, asked: list[int], hits: int) -> None:
    assert PEERS[name](asked, 4) == hits


@pytest.mark.parametrize("name", PEERS)
def test_everything_hits_that_fits(name: str) -> None:
    pages = [*range(50)] * 3
    assert PEERS[name](pages, 50) == 100
