"""Completions and man pages: what a shell completes, and that man(1) and the shells accept them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tmem.cli import pages
from tmem.cli.main import cli

if TYPE_CHECKING:
    from tmem.backends import _native


def completed(*words: str) -> list[str]:
    """What bash is offered after these words, the last of which is being written."""
    environment = {
        **os.environ,
        "_TMEM_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("tmem", *words)),
        "COMP_CWORD": str(len(words)),
    }
    program = "import sys; sys.argv[0] = 'tmem'; from tmem.cli.main import main; main()"
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    ).stdout
    return [line.partition(",")[2] for line in out.splitlines() if line]


def test_commands_options_and_choices(runtime_dir: Path) -> None:
    assert completed("st") == ["start", "stop"]
    assert completed("swap", "") == ["add", "remove", "serve"]
    assert {"--memory", "--metrics"} <= {*completed("start", "--m")}
    assert "lz4" in completed("set", "web1", "--compress", "")


def test_clients(segment: "_native.Segment") -> None:
    for name in ("web1", "web2", "db"):
        segment.client(name)
    assert completed("set", "w") == ["web1", "web2"]
    assert completed("freeze", "") == ["db", "web1", "web2"]
    assert completed("swap", "remove", "d") == ["db"]
    assert completed("--name", "other", "list", "") == []


def test_each_command_and_option_is_in_its_man_page() -> None:
    texts = {path.name: text.replace("\\", "") for path, text in pages.manual().items()}
    seen = []

    def look(name: str, command: click.Command, context: click.Context) -> None:
        seen.append(f"{name}.1")
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                for word in (*option.opts, *option.secondary_opts):
                    assert word in texts[f"{name}.1"], (name, word)
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                assert found is not None
                look(f"{name}-{inner}", found, context)

    with click.Context(cli) as context:
        look("tmem", cli, context)
    assert sorted(seen) == sorted(texts)


def test_shells_accept_the_completions(tmp_path: Path) -> None:
    for path, text in pages.completions().items():
        shell = {"tmem": "bash", "_tmem": "zsh", "tmem.fish": "fish"}[path.name]
        assert pages.MARKER in text.splitlines()[:2]
        assert "_TMEM_COMPLETE" in text
        if program := shutil.which(shell):
            file = tmp_path / path.name
            file.write_text(text)
            subprocess.run([program, "-n", str(file)], check=True)


def test_bash_completes_by_it(segment: "_native.Segment", tmp_path: Path) -> None:
    segment.client("web1")
    text = pages.completions()[Path("usr/share/bash-completion/completions/tmem")]
    (tmp_path / "tmem").write_text(
        f"#!{sys.executable}\nimport sys; sys.argv[0] = 'tmem'\nfrom tmem.cli.main import main\nmain()\n"
    )
    (tmp_path / "tmem").chmod(0o755)
    script = f"""{text}
COMP_WORDS=(tmem set w); COMP_CWORD=2
_tmem_completion tmem
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["web1"]


def test_man_pages_have_every_option_and_no_error() -> None:
    found = {path.name: text for path, text in pages.manual().items()}
    start = found["tmem-start.1"]
    assert start.startswith(pages.MANUAL_MARKER)
    for word in (r"\-\-memory", r"\-\-metrics", "TMEM_START_MEMORY", "Create the segment if absent"):
        assert word in start
    assert r"\-\-launched" not in start  # hidden
    assert "..." not in found["tmem.1"].replace("[ARGS]...", "")
    assert pages.manual() == pages.manual()
    if groff := shutil.which("groff"):
        for name, text in found.items():
            done = subprocess.run(
                [groff, "-man", "-Tutf8", "-ww", "-z"],
                input=text,
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, ""), name


def test_everything_is_found_again_to_be_removed(tmp_path: Path) -> None:
    written = [tmp_path / path for path in pages.everything()]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert {*written} == {*pages.candidates(tmp_path)}
