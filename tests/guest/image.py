"""The root file system of guests: this machine's own packages, this project, and the tool, as an ext4 image.

No network, no package is installed: files are copied as dpkg lists them, with the libraries that ldd finds.
The image is made once for what it is made of, and shared: guests start from it with a scratch overlay of
their own.
"""

import compileall
import hashlib
import importlib.metadata
import os
import re
import shutil
import stat
import sys
import sysconfig
import tomllib
from pathlib import Path
from py_compile import PycInvalidationMode

from . import cache
from .cache import GuestError

PROJECT = Path(__file__).parents[2]
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES = (
    *("bash", "coreutils", "dash", "e2fsprogs", "fuse3", "libc-bin", "libc6", "mount", "util-linux"),
    *(f"lib{PYTHON}", f"lib{PYTHON}-minimal", f"lib{PYTHON}-stdlib", PYTHON, f"{PYTHON}-minimal"),
    *("libnbd-bin", "nbd-client", "nbdkit", "nbdkit-plugin-python", "python3-libnbd", "procps", "kmod"),
)
"""Their dependencies are not followed: what their programs link against is found by ldd."""

OPTIONAL = ("nbdfuse", "nbdkit-plugins-basic", "nbdkit-basic-filters", "util-linux-extra", "libc6-i386")
"""Taken if they are installed: in some releases these parts are packages of their own."""

EXTRA_BYTES = 256 << 20
"""Free space in the image, as scratch for page-cache load; sparse, so it costs nothing."""

_LEFT_OUT = re.compile(
    r"/usr/share/(doc|man|info|locale|lintian|bash-completion|bug|doc-base|applications|pixmaps|zsh|perl5)/"
    r"|/usr/lib/python3\.\d+/(test|idlelib|lib2to3|turtledemo|ensurepip|pydoc_data)/"
    r"|/nbdkit-(?!python|memory|null|file|sh|eval|data)[a-z0-9-]+-plugin\.so$"
    r"|/usr/lib/x86_64-linux-gnu/gconv/|/etc/(bash_completion\.d|init\.d|default)/|/lib/systemd/"
)
_TOOL = Path(__file__).with_name("tool")
_LIBRARY = re.compile(r"^\s(?:\S+ => )?(/\S+) \(0x", re.MULTILINE)
_MISSING = re.compile(r"^\s(\S+) => not found", re.MULTILINE)


def build() -> Path:
    """Return the image of this project as it is now."""
    files = _project_files()
    return cache.made(f"root-{_key(files)}.ext4", lambda to: _make(to, files))


def tool() -> Path:
    """Return the tool, compiled: the program of tool/ for guests."""
    sources = sorted(_TOOL.glob("*.[ch]"))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    return cache.made(f"tool-{key}", _compile_tool)


def _compile_tool(to: Path) -> None:
    warnings = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
    cache.run(
        *("gcc", "-std=c11", "-D_GNU_SOURCE", *warnings, "-O2", "-static", "-o", to),
        *sorted(_TOOL.glob("*.c")),
        "-lpthread",
    )


def _project_files() -> dict[str, Path]:
    """Return what the package consists of: names relative to it, links resolved, and the files."""
    package = PROJECT / "src" / "tmem"
    found = {}
    # Not rglob: it does not follow the links to the top-level folders.
    for folder, folders, names in os.walk(package, followlinks=True):
        folders[:] = [name for name in folders if name not in {"__pycache__", "native"}]
        for name in names:
            path = Path(folder) / name
            if path.suffix in {".py", ".pyi", ".so", ".typed"}:
                found[str(path.relative_to(package))] = path
    if "backends/_native.abi3.so" not in found:
        raise GuestError("the native core is not built: scripts/test builds it")
    return found


def _key(files: dict[str, Path]) -> str:
    """Name the content: of the project, the tool, this recipe, and the versions of packages."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name, path in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    digest.update(tool().name.encode())
    digest.update("".join(sorted(f"{one.name} {one.version}\n" for one in _distributions())).encode())
    digest.update(cache.run("dpkg-query", "-W", "-f", "${Package} ${Version}\n").encode())
    return digest.hexdigest()[:16]


def _make(to: Path, files: dict[str, Path]) -> None:
    stage = to.with_suffix(".d")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        _skeleton(stage)
        _copy_packages(stage)
        site = stage / "usr" / "local" / "lib" / PYTHON / "dist-packages"
        _copy_distributions(site, stage)
        for name, path in files.items():
            target = site / "tmem" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        # Compiling takes an emulated CPU seconds at every start.
        compileall.compile_dir(
            site,
            quiet=2,
            stripdir=str(stage),
            invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,
            maxlevels=20,
            workers=1,
        )
        _commands(stage)
        target = stage / "usr" / "lib" / "guest" / "tool"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(tool(), target)
        (stage / "usr" / "local" / "bin" / "guest-tool").symlink_to("/usr/lib/guest/tool")
        _libraries(stage)
        _applets(stage)
        cache.run("ldconfig", "-r", stage)
        used = sum(path.lstat().st_size + 4096 for path in stage.rglob("*"))
        size_mib = (used + used // 8 + EXTRA_BYTES >> 20) + 1
        options = ("-q", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0,lazy_itable_init=1")
        cache.run("mke2fs", *options, "-d", stage, to, f"{size_mib}M")
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _skeleton(stage: Path) -> None:
    folders = ("dev", "proc", "sys", "run", "tmp", "root", "mnt", "home", "srv")
    for folder in (*folders, "var/tmp", "var/lib", "etc", "usr/bin", "usr/sbin", "usr/lib", "usr/local/bin"):
        (stage / folder).mkdir(parents=True, exist_ok=True)
    for name, target in (
        ("usr/lib64", None),
        *((name, f"usr/{name}") for name in ("bin", "sbin", "lib", "lib64")),
    ):
        if target is None:
            (stage / name).mkdir()
        else:
            (stage / name).symlink_to(target)
    (stage / "var" / "run").symlink_to("/run")
    etc = {
        "passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
        "group": "root:x:0:\nnogroup:x:65534:\n",
        "hosts": "127.0.0.1 localhost\n10.0.2.2 host\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "ld.so.conf": "/usr/local/lib\n/usr/lib/x86_64-linux-gnu\n",
        "fuse.conf": "user_allow_other\n",
        "fstab": "",
    }
    for name, text in etc.items():
        (stage / "etc" / name).write_text(text, encoding="utf-8")
    (stage / "etc" / "mtab").symlink_to("/proc/self/mounts")


def _installed() -> set[str]:
    listed = cache.run("dpkg-query", "-W", "-f", "${db:Status-Abbrev}${Package}\n")
    return {line[3:].strip() for line in listed.splitlines() if line.startswith("ii")}


def _copy_packages(stage: Path) -> None:
    installed = _installed()
    absent = [name for name in PACKAGES if name not in installed]
    if absent:
        raise GuestError(
            f"guests are made of packages that are missing here: apt-get install {' '.join(absent)}"
        )
    names = [*PACKAGES, *(name for name in OPTIONAL if name in installed)]
    listed = cache.run("dpkg", "-L", *names, *_debian_distributions(installed))
    for line in listed.splitlines():
        if line.startswith("/") and not _LEFT_OUT.search(line):
            _copy(Path(line), stage)


def _copy(path: Path, stage: Path) -> None:
    """Copy a file of this machine, with what Python compiled of it, to the same place in the stage."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # listed but removed, or not for us to see
        return
    if stat.S_ISDIR(mode):
        return
    # Of /lib/x it is /usr/lib/x that is meant; the last part may be a link of its own.
    target = stage / (path.parent.resolve() / path.name).relative_to("/")
    if target.exists() or target.is_symlink():
        return
    if not os.access(path, os.R_OK):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, target, follow_symlinks=False)
    if path.is_symlink():
        goal = path.resolve()
        if goal.is_file() and goal.is_relative_to("/usr"):
            _copy(goal, stage)
    if path.suffix == ".py":
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.{sys.implementation.cache_tag}.pyc"):
            _copy(compiled, stage)


def _distributions() -> list[importlib.metadata.Distribution]:
    """Return the distributions that the project needs to run, itself included."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = ["tmem"]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system, by its marker
        for line in found[name].requires or ():
            match = re.match(r"[A-Za-z0-9._-]+", line)
            if match is not None and "extra ==" not in line:
                wanted.append(match[0].lower())
    return list(found.values())


def _debian_distributions(installed: set[str]) -> list[str]:
    """Return the packages of those that are not in the virtual environment, but the system's."""
    outside = (one.name for one in _distributions() if not _in_environment(one))
    return [package for name in outside if (package := f"python3-{name.lower()}") in installed]


def _in_environment(distribution: importlib.metadata.Distribution) -> bool:
    return Path(str(distribution.locate_file(""))).is_relative_to(sysconfig.get_path("purelib"))


def _copy_distributions(site: Path, stage: Path) -> None:
    system = stage / "usr" / "lib" / "python3" / "dist-packages"
    system.mkdir(parents=True, exist_ok=True)
    for one in _distributions():
        if not _in_environment(one):
            continue
        for file in one.files or ():
            source = Path(str(one.locate_file(file)))
            if ".." in file.parts or not source.is_file() or file.suffix in {".pth", ".pyc"}:
                continue
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def _commands(stage: Path) -> None:
    """Make the project's commands, as an installer would."""
    with (PROJECT / "pyproject.toml").open("rb") as file:
        scripts: dict[str, str] = tomllib.load(file)["project"]["scripts"]
    for name, entry in scripts.items():
        module, _, function = entry.partition(":")
        path = stage / "usr" / "local" / "bin" / name
        path.write_text(
            f"#!/usr/bin/python3\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n",
            encoding="utf-8",
        )
        path.chmod(0o755)
    for name in ("python3", "python"):
        link = stage / "usr" / "bin" / name
        if not link.is_symlink():
            link.symlink_to(PYTHON)
    # mount -t fuse.tmem looks here
    (stage / "usr" / "sbin" / "mount.fuse.tmem").symlink_to("/usr/local/bin/mount.fuse.tmem")


def _libraries(stage: Path) -> None:
    """Add the shared libraries that programs and libraries of the stage need."""
    binaries = [
        str(path) for path in stage.rglob("*") if path.is_file() and not path.is_symlink() and _is_elf(path)
    ]
    output = cache.run("ldd", *binaries, check=False)
    for library in sorted(set(_LIBRARY.findall(output))):
        _copy(Path(library), stage)
    for resolver in ("libnss_files.so.2", "libgcc_s.so.1"):  # opened at run time, so ldd does not see them
        _copy(Path("/usr/lib/x86_64-linux-gnu") / resolver, stage)


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _applets(stage: Path) -> None:
    """Let busybox be every command that there is no program for."""
    busybox = stage / "usr" / "bin" / "busybox"
    shutil.copy2("/bin/busybox", busybox)
    for name in cache.run(busybox, "--list").split():
        taken = any(os.path.lexists(stage / "usr" / folder / name) for folder in ("bin", "sbin"))
        if not taken and name not in {"init", "linuxrc"}:
            (stage / "usr" / "bin" / name).symlink_to("busybox")
