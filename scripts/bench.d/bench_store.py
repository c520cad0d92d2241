"""Store calls beside the bare codec, on anonymous pages of real programs: CPU time, scale, a neighbour."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT

from tmem.bench.grounds import workplace
from tmem.bench.pages import collect

PUT_TARGET_NS = 1000
GET_TARGET_NS = 600
SCALE_TARGET = 1.5
NEIGHBOUR_TARGET = 1.2


def build(directory: Path, name: str = "store") -> Path:
    """Compile the measuring program with the core's own sources and the package's options."""
    native = ROOT / "backends" / "native"
    sources = sorted(str(path) for path in native.glob("*.c") if not path.name.startswith("py_"))
    program = directory / name
    subprocess.run(
        [
            *("gcc", "-std=c11", "-D_GNU_SOURCE", "-O2", f"-I{native}", *sources),
            *(str(Path(__file__).with_name(f"{name}.c")), "-o", str(program), "-llz4", "-lzstd", "-lpthread"),
        ],
        check=True,
    )
    return program


def _measure(argv: list[str]) -> dict[str, float]:
    figures: dict[str, float] = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    return figures


def _two(argv: list[str]) -> list[dict[str, float]]:
    """Run two processes at once on the same segment."""
    both = [subprocess.Popen([*argv, "join"], stdout=subprocess.PIPE) for _ in range(2)]
    figures = []
    for process in both:
        out, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"the store program ended with {process.returncode}")
        figures.append(json.loads(out))
    return figures


def run(many: int, operations: int) -> dict[str, object]:
    """Measure with 100,000 and `many` pages, and with two processes; ns by call, and the ratios."""

    def verdict(value: float, target: float) -> str:
        return f"target {target:g} {'reached' if value <= target else 'MISSED'}"

    with workplace() as directory, tempfile.TemporaryDirectory() as disk:
        pages = Path(disk) / "pages"
        found = collect(pages, all_kinds=False)
        program = build(Path(disk))
        print(f"  {found.npages} pages of {len(found.by_program)} programs")
        segment = directory / "segment"
        base = [str(program), str(segment), str(pages)]
        few = _measure([*base, "100000", str(operations)])
        alone = _measure([*base, "100000", str(operations), "join"])
        two = _two([*base, "100000", str(operations)])
        segment.unlink()
        large = _measure([*base, str(many), str(operations)])
    put, get = few["put_over_ns"], few["get_over_ns"]
    print(f"  put: bare LZ4 {few['bare_compress_ns']:.0f} + {put:.0f} ns   {verdict(put, PUT_TARGET_NS)}")
    print(f"  get: bare LZ4 {few['bare_decompress_ns']:.0f} + {get:.0f} ns   {verdict(get, GET_TARGET_NS)}")
    ratios = {}
    for call in ("put", "get"):
        scale = large[f"{call}_ns"] / few[f"{call}_ns"]
        # Two busy CPUs slow each other's bare codec as well (shared caches, a shared machine): what the store
        # adds is what is left when that is divided out; both are given.
        bare = "bare_compress_ns" if call == "put" else "bare_decompress_ns"
        plain = max(f[f"{call}_ns"] for f in two) / alone[f"{call}_ns"]
        codec = max(f[bare] for f in two) / alone[bare]
        ratios[call] = {"many_to_few": scale, "two_to_one": plain, "two_to_one_bare": codec}
        print(f"  {call} with {many} pages: {scale:.2f} of 100000   {verdict(scale, SCALE_TARGET)}")
        print(
            f"  {call} beside a second process: {plain:.2f} (the bare codec: {codec:.2f})   "
            f"{verdict(plain, NEIGHBOUR_TARGET)}"
        )
    return {"few": few, "many": large, "alone": alone, "two": two, "ratios": ratios}


if __name__ == "__main__":
    sys.exit("run scripts/bench store")
