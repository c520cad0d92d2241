"""Store calls beside the bare codec, on anonymous pages of real programs: CPU time, scale, a neighbour."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, workplace

PUT_TARGET_NS = 1000
GET_TARGET_NS = 600
SCALE_TARGET = 1.5
NEIGHBOUR_TARGET = 1.2

# Programs that are on any machine with tmem; each keeps data of its own kind in memory, then waits.
PROGRAMS = {
    "syntax trees": "import ast,inspect,json,http.server,email.message,unittest,asyncio,sys\n"
    "trees=[ast.parse(open(m.__file__).read()) for m in list(sys.modules.values())\n"
    "       if str(getattr(m,'__file__','')).endswith('.py')]",
    "records": "import json,random,sys\n"
    "r=random.Random(1)\n"
    "rows=[{'id':i,'name':f'user{i}','mail':f'u{i}@example.org','score':r.random()} for i in range(90000)]\n"
    "text=json.dumps(rows); again=json.loads(text)",
    "tables": "import array,random,sqlite3,sys\n"
    "r=random.Random(2)\n"
    "floats=array.array('d',(r.gauss(0,1) for _ in range(1500000)))\n"
    "db=sqlite3.connect(':memory:'); db.execute('create table t(a integer primary key,b text,c real)')\n"
    "rows=((i,f'row {i} of many',r.random()) for i in range(300000))\n"
    "db.executemany('insert into t values(?,?,?)',rows)",
    "words": "import collections,sys\n"
    "from pathlib import Path\n"
    "texts=[p.read_text(errors='replace') for p in sorted(Path('/usr/lib/python3').rglob('*.py'))[:1200]]\n"
    "index=collections.defaultdict(set)\n"
    "for n,t in enumerate(texts):\n"
    "    for w in t.split(): index[w].add(n)",
}


def anonymous_pages(pid: int) -> bytes:
    """Return the writable private memory of a process, without pages of zeros."""
    found = bytearray()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split()
            if not fields[1].startswith("rw") or (len(fields) > 5 and fields[5] not in ("[heap]", "[stack]")):
                continue
            start, end = (int(part, 16) for part in fields[0].split("-"))
            memory.seek(start)
            data = memory.read(end - start)
            for at in range(0, len(data) - 4095, 4096):
                page = data[at : at + 4096]
                if any(page):
                    found += page
    return bytes(found)


def collect(path: Path) -> int:
    """Write the pages of all programs to `path`; their number."""
    with path.open("wb") as out:
        for name, source in PROGRAMS.items():
            program = subprocess.Popen(
                ["/usr/bin/python3", "-c", f"{source}\nprint('ready', flush=True)\nsys.stdin.read()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert program.stdin is not None
            assert program.stdout is not None
            with program.stdin, program.stdout:
                if program.stdout.readline() != b"ready\n":
                    raise RuntimeError(f"the program {name!r} failed")
                out.write(anonymous_pages(program.pid))
            program.wait(timeout=30)
        return out.tell() // 4096


def build(directory: Path) -> Path:
    """Compile the measuring program with the core's own sources and the package's options."""
    native = ROOT / "backends" / "native"
    sources = sorted(str(path) for path in native.glob("*.c") if not path.name.startswith("py_"))
    program = directory / "store"
    subprocess.run(
        [
            *("gcc", "-std=c11", "-D_GNU_SOURCE", "-O2", f"-I{native}", *sources),
            *(str(Path(__file__).with_name("store.c")), "-o", str(program), "-llz4", "-lpthread"),
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
        npages = collect(pages)
        program = build(Path(disk))
        print(f"  {npages} pages of {len(PROGRAMS)} programs")
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
