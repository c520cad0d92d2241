"""``mount -t fuse.tmem``, lines of fstab and umount(8), by the real programs and the helper as installed.

mount(8) finds helpers in /sbin only. So the tests have a mount namespace of their own, in which the helper is
laid over /usr/sbin, and the machine sees nothing of it.
"""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tmem.cli.main import run

OVERLAY = 'mount -t overlay overlay -o "lowerdir=$0:/usr/sbin" /usr/sbin && echo ready && read -r _'


@dataclass
class Machine:
    """A mount namespace with the helper, a directory to cache and one to mount on."""

    pid: int
    lower: Path
    point: Path

    def run(self, *argv: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run a program in the namespace."""
        enter = ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt"]
        # A file, not a pipe: the mount's process keeps what it was given until it has mounted.
        with (self.lower.parent / "said").open("w+") as said:
            result = subprocess.run(
                [*enter, *map(str, argv)],
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
                timeout=60,
                check=False,
            )
            said.seek(0)
            return subprocess.CompletedProcess(result.args, result.returncode, said.read())

    def mounted(self) -> str:
        """Return type and options of what is mounted, "" for nothing."""
        return self.run("findmnt", "-n", "-o", "FSTYPE,OPTIONS", "--mountpoint", self.point).stdout.strip()

    def fstab(self, options: str) -> Path:
        path = self.lower.parent / "fstab"
        path.write_text(f"{self.lower} {self.point} fuse.tmem {options} 0 0\n")
        return path


@pytest.fixture
def machine(tmp_path: Path, runtime_dir: Path, root: None) -> Iterator[Machine]:
    for name in ("lower", "point", "root"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "file").write_text("content")
    assert run(["install", "--root", str(tmp_path / "root")]) == 0
    argv = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        OVERLAY,
        str(tmp_path / "root/sbin"),
    ]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout is not None
        if keeper.stdout.readline() != "ready\n":
            pytest.skip("needs a kernel with overlayfs")
        made = Machine(keeper.pid, tmp_path / "lower", tmp_path / "point")
        try:
            yield made
        finally:
            while made.mounted():
                made.run("umount", "--lazy", made.point)
            assert keeper.stdin is not None
            keeper.stdin.close()


def read(machine: Machine) -> str:
    return machine.run("cat", machine.point / "file").stdout


def test_mounting_by_type(machine: Machine, eventually: Callable[..., None]) -> None:
    done = machine.run("mount", "-t", "fuse.tmem", machine.lower, machine.point, "-o", "ro,noatime,client=c")
    assert (done.returncode, done.stdout) == (0, "")
    kind, options = machine.mounted().split()
    assert kind == "fuse.tmem"
    assert {"ro", "noatime", "nosuid", "nodev"} <= set(options.split(","))
    assert read(machine) == "content"
    assert "Read-only" in machine.run("touch", machine.point / "new").stdout
    done = machine.run("umount", machine.point)
    assert (done.returncode, done.stdout) == (0, "")
    assert machine.mounted() == ""
    eventually(lambda: daemons(machine) == [])


def daemons(machine: Machine) -> list[int]:
    """Return the processes that serve the mount."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(machine.lower).encode() in words and any(b"mount.fuse.tmem" in word for word in words):
            found.append(int(directory.name))
    return found


@pytest.mark.parametrize(
    "options",
    [
        "defaults",
        "ro,nofail,x-systemd.after=tmem@default.service",
        "_netdev,noauto,user,comment=x,x-gvfs-hide,noexec,allow_other,timeout=0.5,name=other",
    ],
)
def test_a_line_in_fstab(machine: Machine, options: str) -> None:
    fstab = machine.fstab(options)
    done = machine.run("mount", "-T", fstab, machine.point)
    assert (done.returncode, done.stdout) == (0, "")
    flags = set(machine.mounted().split()[1].split(","))
    assert ("ro" in flags) == options.startswith("ro")
    assert ("noexec" in flags) == ("noexec" in options)
    assert ("allow_other" in flags) == ("allow_other" in options)
    assert read(machine) == "content"
    assert machine.run("umount", machine.point).returncode == 0
    assert machine.mounted() == ""


def test_mounting_everything_twice_mounts_it_once(machine: Machine) -> None:
    fstab = machine.fstab("defaults")
    for _ in range(2):
        assert machine.run("mount", "-T", fstab, "-a").returncode == 0
    assert machine.mounted().count("fuse.tmem") == 1


def test_noauto_is_left_out(machine: Machine) -> None:
    assert machine.run("mount", "-T", machine.fstab("noauto"), "-a").returncode == 0
    assert machine.mounted() == ""


@pytest.mark.parametrize("options", ["colour=blue", "cache=some", "client=a/b"])
def test_a_wrong_option_is_one_line(machine: Machine, options: str) -> None:
    done = machine.run("mount", "-t", "fuse.tmem", machine.lower, machine.point, "-o", options)
    assert done.returncode != 0
    assert done.stdout.startswith("tmem: ")
    assert done.stdout.count("\n") == 1
    assert machine.mounted() == ""


def test_remounting_is_refused_and_changes_nothing(machine: Machine) -> None:
    machine.run("mount", "-t", "fuse.tmem", machine.lower, machine.point, "-o", "ro")
    before = machine.mounted()
    done = machine.run("mount", "-o", "remount,rw", machine.point)
    assert done.returncode != 0
    assert "cannot be remounted" in done.stdout
    assert done.stdout.count("\n") == 1
    assert machine.mounted() == before
    assert read(machine) == "content"


def test_a_fake_mount_mounts_nothing(machine: Machine) -> None:
    done = machine.run("mount", "-f", "-t", "fuse.tmem", machine.lower, machine.point)
    assert done.returncode == 0, done.stdout
    assert machine.mounted() == ""


def test_unmounting_while_in_use_is_refused(machine: Machine) -> None:
    machine.run("mount", "-t", "fuse.tmem", machine.lower, machine.point)
    enter = ["nsenter", f"--mount=/proc/{machine.pid}/ns/mnt"]
    hold = ["sh", "-c", 'exec 3<"$0" && echo open && read -r _', str(machine.point / "file")]
    with subprocess.Popen(
        [*enter, *hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        done = machine.run("umount", machine.point)
        assert (done.returncode != 0, "busy" in done.stdout) == (True, True)
        assert read(machine) == "content"
        holder.communicate()
    assert machine.run("umount", machine.point).returncode == 0


def test_a_mount_whose_process_was_killed_can_be_mounted_again(
    machine: Machine, eventually: Callable[..., None]
) -> None:
    fstab = machine.fstab("defaults")
    assert machine.run("mount", "-T", fstab, machine.point).returncode == 0
    (pid,) = daemons(machine)
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
    eventually(lambda: "not connected" in machine.run("ls", machine.point).stdout)
    assert machine.run("umount", machine.point).returncode == 0
    assert machine.run("mount", "-T", fstab, machine.point).returncode == 0
    assert read(machine) == "content"
