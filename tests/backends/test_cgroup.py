"""The limit that bounds a segment is found in cgroup v1 and v2, in parents, and from inside a container."""

from pathlib import Path

from tmem.backends import cgroup


def make_proc(directory: Path, *, groups: str, mounts: str) -> Path:
    proc = directory / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(groups)
    (proc / "self" / "mountinfo").write_text(mounts)
    return proc


def make_group(directory: Path, name: str, file: str, text: str) -> None:
    (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / name / file).write_text(text + "\n")


def test_v2_takes_the_tightest_parent(tmp_path: Path) -> None:
    mount = tmp_path / "cg"
    make_group(mount, "a", "memory.max", "1000000")
    make_group(mount, "a/b", "memory.max", "max")
    (mount / "cgroup.controllers").write_text("cpu memory\n")
    proc = make_proc(tmp_path, groups="0::/a/b\n", mounts=f"30 20 0:26 / {mount} rw - cgroup2 none rw\n")
    assert cgroup.memory_limit(proc) == cgroup.MemoryLimit(1_000_000, mount / "a")
    assert cgroup.version(proc) == 2


def test_v1_knows_its_unlimited(tmp_path: Path) -> None:
    mount = tmp_path / "memory"
    make_group(mount, ".", "memory.limit_in_bytes", "9223372036854771712")
    make_group(mount, "x", "memory.limit_in_bytes", "8388608")
    proc = make_proc(
        tmp_path,
        groups="4:memory:/x\n0::/\n",
        mounts=f"30 20 0:26 / {mount} rw shared:1 - cgroup cgroup rw,memory\n",
    )
    assert cgroup.memory_limit(proc) == cgroup.MemoryLimit(8 << 20, mount / "x")
    assert cgroup.version(proc) == 1


def test_no_limit_is_none(tmp_path: Path) -> None:
    mount = tmp_path / "cg"
    make_group(mount, "a", "memory.max", "max")
    proc = make_proc(tmp_path, groups="0::/a\n", mounts=f"30 20 0:26 / {mount} rw - cgroup2 none rw\n")
    assert cgroup.memory_limit(proc) is None


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    mount = tmp_path / "cg"
    make_group(mount, ".", "memory.max", "4096000")
    proc = make_proc(
        tmp_path, groups="0::/pods/one\n", mounts=f"30 20 0:26 /pods/one {mount} rw - cgroup2 none rw\n"
    )
    assert cgroup.memory_limit(proc) == cgroup.MemoryLimit(4_096_000, mount)


def test_this_machine_can_be_asked() -> None:
    assert cgroup.version() in (1, 2, None)
    limit = cgroup.memory_limit()
    assert limit is None or limit.limit_bytes > 0
