"""Anonymous pages of programs at work: Python, Node, Redis, a C compiler. What a swap device gets to see.

`collect` starts each program, lets it build up what it keeps in memory, and copies its writable private
memory without pages of zeros. Programs that are not installed are left out and named. Needs no root: they are
children of ours. One thread.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tmem.backends import _native
from tmem.bench.grounds import wait_until
from tmem.types import PAGE_SIZE

_RUN_PAGES = 4096
COMPILER_BYTES = 80 << 20
"""At so much memory the compiler is stopped."""

# Programs that are on any machine with tmem; each keeps data of its own kind in memory, then waits.
PYTHON = {
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

_NODE = """
const fs = require('fs'), path = require('path');
const texts = [], sessions = new Map();
for (const file of fs.readdirSync('/usr/include')) {
  const name = path.join('/usr/include', file);
  if (!fs.statSync(name).isFile()) continue;
  texts.push(fs.readFileSync(name, 'utf8').split('\\n').map(l => l.split(/\\s+/)));
}
for (let i = 0; i < 120000; i++)
  sessions.set('session:' + i,
    {user: i % 9000, path: '/item/' + i * 7, seen: Date.now() - i, tags: ['a' + i % 50, 'b']});
const json = JSON.stringify([...sessions]); const again = JSON.parse(json);
console.log('ready'); process.stdin.resume();
"""


def anonymous_pages(pid: int) -> Iterator[bytes]:
    """Yield runs of the pages of a process's writable private memory, without those of zeros."""
    zeros = bytes(PAGE_SIZE)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split()
            named = len(fields) > 5 and not fields[5].startswith("[anon")
            if not fields[1].startswith("rw") or (named and fields[5] not in ("[heap]", "[stack]")):
                continue
            start, end = (int(part, 16) for part in fields[0].split("-"))
            for at in _resident(pid, start, end):
                page = os.pread(memory.fileno(), PAGE_SIZE, at)
                if len(page) == PAGE_SIZE and page != zeros:
                    yield page


def _resident(pid: int, start: int, end: int) -> Iterator[int]:
    """Yield the addresses of pages that are in memory: the others are zeros, and there are many."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        for first in range(start, end, _RUN_PAGES * PAGE_SIZE):
            npages = min(_RUN_PAGES, (end - first) // PAGE_SIZE)
            entries = os.pread(pagemap.fileno(), npages * 8, first // PAGE_SIZE * 8)
            for number in range(len(entries) // 8):
                if entries[number * 8 + 7] & 0x80:
                    yield first + number * PAGE_SIZE


@dataclass
class Collection:
    """What was collected."""

    npages: int = 0
    by_program: dict[str, int] = field(default_factory=dict)
    """Pages of each program."""
    missing: list[tuple[str, str]] = field(default_factory=list)
    """Programs that are not installed, and the packages that have them."""


KINDS = len(PYTHON) + 3
"""How many programs there are."""


def collect(
    path: Path, all_kinds: bool = True, step: Callable[[str], None] = lambda name: None
) -> Collection:
    """Write pages of the programs to `path`; of Python alone unless `all_kinds`. `step` hears of each."""
    found = Collection()
    with path.open("wb") as out:

        def take(name: str, pid: int) -> None:
            step(name)
            before = out.tell()
            for page in anonymous_pages(pid):
                out.write(page)
            found.by_program[name] = (out.tell() - before) // PAGE_SIZE
            found.npages = out.tell() // PAGE_SIZE

        for name, source in PYTHON.items():
            script = f"{source}\nprint('ready', flush=True)\nsys.stdin.read()"
            with _waiting([sys.executable, "-I", "-c", script]) as pid:
                take(name, pid)
        if all_kinds:
            for program, package, start in (
                ("node", "nodejs", _node),
                ("redis-server", "redis-server", _redis),
                ("gcc", "gcc", _compiler),
            ):
                if shutil.which(program) is None:
                    found.missing.append((program, package))
                    continue
                with start() as pid:
                    take(program, pid)
    return found


@contextmanager
def _waiting(argv: list[str]) -> Iterator[int]:
    """Run a program that says ready and then waits for the end of its input; yield its pid."""
    program = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        if program.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the program {argv[0]} failed")
        yield program.pid
    finally:
        program.kill()
        program.communicate()


def _node() -> AbstractContextManager[int]:
    return _waiting(["node", "-e", _NODE])


@contextmanager
def _redis() -> Iterator[int]:
    """A server with hashes, strings of JSON, and sorted sets."""
    with tempfile.TemporaryDirectory() as place:
        path = f"{place}/socket"
        argv = ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", place]
        server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            wait_until(Path(path).exists, "the Redis server")
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                _fill_redis(client)
            yield server.pid
        finally:
            server.kill()
            server.wait()


def _fill_redis(client: socket.socket) -> None:
    def command(*words: object) -> bytes:
        parts = [str(word).encode() for word in words]
        return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)

    nkeys = 60_000
    for first in range(0, nkeys, 500):
        batch = bytearray()
        for i in range(first, first + 500):
            batch += command(
                "HSET", f"user:{i}", "name", f"user{i}", "visits", i * 31 % 977, "mail", f"u{i}@example.org"
            )
            body = (
                f'{{"id":{i},"cart":[{i * 7 % 1009},{i * 13 % 2003}],"agent":"Mozilla/5.0 (X11; {i % 37})"}}'
            )
            batch += command("SET", f"session:{i * 2654435761 % 2**32:08x}", body)
            batch += command("ZADD", f"board:{i % 100}", i * 7919 % 100_003, f"user:{i}")
        client.sendall(batch)
        answers = b""
        while answers.count(b"\r\n") < 3 * 500:
            answers += client.recv(1 << 16)
        if b"-ERR" in answers:
            raise RuntimeError("Redis refused what it was to store")


@contextmanager
def _compiler() -> Iterator[int]:
    """cc1 in the middle of optimising the C code of pyfuse3, 1.5 MB that came with it, or else our reader."""
    cc1, triplet = _output("gcc", "-print-prog-name=cc1"), _output("gcc", "-print-multiarch")
    spec = importlib.util.find_spec("pyfuse3")
    source = Path(spec.origin or "").with_name("__init__.c") if spec else Path()
    enough_bytes = COMPILER_BYTES
    if not source.is_file():
        enough_bytes = 30 << 20
        source = Path(_native.__file__).with_name("native") / "reader.c"
    flags = _output("pkg-config", "--cflags", "fuse3")
    includes = [f"-I{sysconfig.get_path('include')}", "-imultiarch", triplet, "-D_GNU_SOURCE"]
    argv = [cc1, "-quiet", "-O2", "-g", "-w", *flags.split(), *includes]
    compiler = subprocess.Popen(
        [*argv, str(source), "-o", os.devnull], stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while _resident_bytes(compiler.pid) < enough_bytes and time.monotonic() < deadline:
            if compiler.poll() is not None:
                raise RuntimeError("the compiler ended before it was stopped")
            time.sleep(0.005)
        compiler.send_signal(signal.SIGSTOP)
        yield compiler.pid
    finally:
        compiler.kill()
        compiler.wait()


def _output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_SIZE
