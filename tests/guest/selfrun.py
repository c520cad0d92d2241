"""Does one run of a machine that swaps to itself, and says what came of it.

tmem is set up in a guest with the guards of the plan, and four loads work at the same time: a hog larger than
RAM whose pages are verified, page-cache churn, verified reads of files through `tmem mount` (from the same
segment), and reads of single pages of the device past the page cache, which tell how long it does not answer.
Beside them there may be kills, or an upgrade. Then everything is taken down in order, and the kernel's log is
searched for what must not be there. A guest that stands still is given up as hung; nothing here waits for it.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable
from typing import Any

from .machine import Command, Guest, GuestError, GuestTimeout, Options
from .selfswap import TARGETS, Outcome, Plan
from .selfupgrade import upgrade

_OWN = "/sys/fs/cgroup/tmem"
_LOWER, _MOUNT, _DEVICE = "/srv/lower", "/mnt", "/dev/nbd0"

_TROUBLE = re.compile(
    r"I/O error|Read-error|Write-error|blocked for more than|soft lockup|rcu.*stall|[Oo]ut of memory|oom-kill"
    r"|page allocation failure|BUG:|Oops|general protection|segfault|Call Trace"
)
_BEAT = re.compile(r"beat \d+: free (\d+) kB swap-free \d+ kB in (\d+) out (\d+) full ([\d.]+|-)")


def options(plan: Plan) -> Options:
    """Return the machine that `plan` wants."""
    return Options(kernel=plan.kernel, cpus=plan.cpus, memory_mib=plan.memory_mib)


def swap_to_itself(guest: Guest, plan: Plan, say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Do one run on a guest that was launched with `options` of the plan; `say` gets a line now and then."""
    run = _Run(guest, plan, say)
    began = time.monotonic()
    try:
        guest.wait_booted()
        run.set_up()
        run.load()
        run.take_down()
        run.judge()
    except _Over:
        pass
    except GuestError as error:
        run.outcome.verdict = "hung" if guest.is_hung() else "failed"
        run.outcome.reason = str(error)[-1500:]
    run.outcome.seconds = round(time.monotonic() - began, 1)
    run.read_console()
    return run.outcome


class _Over(Exception):
    """The run is over; the outcome says why."""


class _Run:
    """One run on its guest."""

    def __init__(self, guest: Guest, plan: Plan, say: Callable[[str], None]) -> None:
        self.guest, self.plan, self.outcome = guest, plan, Outcome(plan)
        self._say = say
        self._commands: dict[str, Command] = {}
        self._contained = "contain" in plan.guards

    # Up

    def set_up(self) -> None:
        """Start tmem with the guards of the plan, swap to it, mount."""
        guest, plan = self.guest, self.plan
        guest.run("sysctl -q kernel.hung_task_timeout_secs=30")
        if "watermarks" in plan.guards:
            guest.run(["tmem", "watermarks"])
        if self._contained:
            said = guest.run(["tmem", "contain", "--memory", f"{plan.segment_mib}M"])
            self.outcome.figures["contain"] = said.stdout.splitlines()
        self._set_swappability()
        self._start("manager", self._kept(*self._manager()))
        self._until("test -S /run/tmem/default.d/control.sock", "the manager answers")
        add = ["tmem", "swap", "add", "g", "--size", f"{plan.device_mib}M", "--attach", "--force"]
        add += ["--realtime"] if "realtime" in plan.guards else []
        add += [] if plan.discard else ["--no-discard"]
        guest.run(add, 300)
        if plan.io_timeout_ms:
            guest.run(f"echo {plan.io_timeout_ms} >/sys/block/nbd0/queue/io_timeout")
        guest.run(["mkdir", "-p", _LOWER])
        self._start("mount", self._kept("tmem", "mount", "-f", _LOWER, _MOUNT, "-o", "client=files"))
        self._until(f"mountpoint -q {_MOUNT} && ls {_MOUNT}", "the mount answers")
        self._leave_out()

    def _set_swappability(self) -> None:
        """Make the group of ours, unless `tmem contain` has, and let it be swapped out or not."""
        if "unswapped" in self.plan.guards:
            self.guest.run(f"mkdir -p {_OWN} && echo 0 >{_OWN}/memory.swap.max")
        elif self._contained:
            self.guest.run(f"echo max >{_OWN}/memory.swap.max")

    def _kept(self, *argv: str) -> list[str]:
        """Return the command that keeps `argv` running, as a service manager would, in tmem's group."""
        own = self._contained or "unswapped" in self.plan.guards
        return ["guest-tool", "keep", *(["-g", _OWN] if own else []), *argv]

    def _manager(self) -> list[str]:
        guards = self.plan.guards
        without = {"locks": "-ipc_lock", "flusher": "-sys_resource"}
        dropped = ",".join(capability for guard, capability in without.items() if guard not in guards)
        return [
            *(["setpriv", f"--bounding-set={dropped}"] if dropped else []),
            *(["prlimit", "--memlock=0"] if "locks" not in guards else []),
            *("tmem", "start", "--memory", f"{self.plan.segment_mib}M"),
            *(["--realtime"] if "realtime" in guards else []),
        ]

    def _leave_out(self) -> None:
        """Take away the guards that can only be taken away from what runs."""
        if "oom" not in self.plan.guards:
            for pid in self.pids().values():
                self.guest.run(f"echo 0 >/proc/{pid}/oom_score_adj")
        if "refill" not in self.plan.guards:
            self.guest.run(["kill", "-STOP", str(self.pids()["manager"])])
            return  # and doctor would wait for it
        said = self.guest.run(["tmem", "doctor", "--json"], check=False).stdout
        findings = [one for one in json.loads(said)["findings"] if one["group"] == "guard"]
        self.outcome.guards = {one["name"].removeprefix("g: "): one["detail"] for one in findings}

    # Load

    def load(self) -> None:
        """Let the loads work until the hog has ended."""
        plan, span = self.plan, str(self.plan.limit_s)
        size = ["-s", f"{plan.files_mib}M", "-t", span, "-r", str(plan.seed)]
        forgiving = ["-e"] if plan.strikes else []
        reader = self._start("reader", ["guest-tool", "reader", *size, *forgiving, _LOWER, _MOUNT])
        reader.wait_for("reading", 300)
        self.guest.watch(stall_s=plan.stall_s, keys="mwlt")
        hog = ["-s", f"{plan.hog_mib}M", "-t", str(plan.touch_s), "-c", str(plan.noise_words), "-o", "500"]
        began = time.monotonic()
        self._start("hog", ["guest-tool", "hog", *hog, "-r", str(plan.seed)])
        self._start("churn", ["guest-tool", "churn", "-s", f"{plan.churn_mib}M", "-t", span, "/srv"])
        self._follow(lambda: self._swapped_out() > 2000, began)
        self._start("strike", self._strike())
        if plan.upgrade:
            self._follow(lambda: self._hog_is("touch"), began)
            self.outcome.figures["upgrade"] = upgrade(self.guest, reader, self.pids)
        self._follow(lambda: self._hog_is("verify"), began)
        if plan.strikes and self._commands["hog"].running:
            self._follow(lambda: not self._commands["strike"].running, began)
        for name in ("strike", "churn", "reader"):  # what is left to do is the hog's own, and slow enough
            self._end(name)
        self._follow(lambda: False, began)
        result = self._commands["hog"].wait(1)
        self.outcome.figures["load_s"] = round(time.monotonic() - began, 1)
        self.outcome.loads["hog"] = {**_last_json(result.stdout), "rc": result.rc}

    def _strike(self) -> list[str]:
        plan = self.plan
        # Where there is tmem's group: what measures must not wait for memory.
        argv = ["sh", "-c", f'echo 0 >{_OWN}/cgroup.procs; exec guest-tool strike "$@"', "sh"]
        argv += ["-d", _DEVICE, "-r", str(plan.seed), "-t", str(plan.limit_s)]
        if plan.strikes:
            argv += ["-n", str(plan.strikes), "-p", str(plan.stops_percent)]
            argv += ["-i", f"{plan.least_pause_s:g}", "-a", f"{plan.most_pause_s:g}"]
            argv += [f"{name}={TARGETS[name]}" for name in plan.strike_targets]
        return argv

    def _follow(self, reached: Callable[[], bool], began: float) -> None:
        """Return when `reached` says so or the hog has ended; end the run if the guest stands still."""
        hog, said = self._commands["hog"], time.monotonic()
        while hog.running and not reached():
            console = self.guest.console()
            if console.rfind("HANG: ") > console.rfind("MOVES AGAIN"):
                time.sleep(10)  # the post mortem is worth the wait
                self._give_up("hung", f"no page of the hog for {self.plan.stall_s} s: {self._last_beat()}")
            if not self.guest.alive:
                self._give_up("hung", f"the guest has ended: {self.guest.console_tail(5)}")
            now = time.monotonic()
            if now - began > self.plan.limit_s:
                self._give_up("failed", f"too slow: after {self.plan.limit_s} s {hog.stdout[-60:]}")
            if now - said > 30:
                said = now
                self._say(f"{self.plan.name}: {now - began:.0f} s, {self._last_beat()}")
            time.sleep(0.3)

    def _hog_is(self, phase: str) -> bool:
        return f"\n{phase} " in self._commands["hog"].stdout[-200:]

    def _give_up(self, verdict: str, reason: str) -> None:
        self.outcome.verdict, self.outcome.reason = verdict, reason
        self._collect_strikes()
        raise _Over

    def _end(self, name: str) -> None:
        """End a load and note its figures."""
        command = self._commands[name]
        if command.running:
            command.signal(15)
        result = command.wait(120)
        self.outcome.loads[name] = {**_last_json(result.stdout), "rc": result.rc}
        if result.rc != 0:
            self.outcome.loads[name]["said"] = result.stderr.strip()[-300:]
        if name == "strike":
            self._collect_strikes()

    def _collect_strikes(self) -> None:
        if "strike" in self._commands:
            lines = map(_json, self._commands["strike"].stdout.splitlines())
            self.outcome.strikes = [line for line in lines if "target" in line]

    # Down

    def take_down(self) -> None:
        """Stop swapping and everything else, in the right order."""
        guest, figures = self.guest, self.outcome.figures
        if "refill" not in self.plan.guards:
            guest.run(["kill", "-CONT", str(self.pids()["manager"])])
        figures["pressure"] = guest.run(["cat", "/proc/pressure/memory"]).stdout.splitlines()
        figures["pools"] = _pools(guest.run(["tmem", "list", "--json"]).stdout)
        began = time.monotonic()
        self._commands["mount"].signal(15)
        self._commands["mount"].wait(60)
        guest.run(["tmem", "swap", "remove", "g"], 240)
        figures["remove_s"] = round(time.monotonic() - began, 1)
        self._commands["manager"].signal(15)
        self._commands["manager"].wait(60)
        for name in ("manager", "mount"):
            figures[f"{name}s"] = self._commands[name].stdout.count("start ")

    def judge(self) -> None:
        """Say what it was, now that everything has ended."""
        outcome = self.outcome
        lines = self.guest.run(["dmesg"]).stdout.splitlines()
        outcome.trouble = [line for line in lines if _TROUBLE.search(line)][:40]
        lost = [name for name, load in outcome.loads.items() if load["rc"] == 1]
        failed = [name for name, load in outcome.loads.items() if load["rc"] != 0]
        if outcome.loads.get("strike", {}).get("failed_probes"):
            failed.append("strike")
        outcome.verdict = "lost" if lost else "trouble" if outcome.trouble or failed else "clean"
        outcome.reason = "; ".join(
            [*(f"{name}: {outcome.loads[name]}" for name in lost or failed), *outcome.trouble[:3]]
        )

    def read_console(self) -> None:
        """Take from the heartbeats what they tell of the whole time."""
        beats = _BEAT.findall(self.guest.console())
        if beats:
            pressures = [float(beat[3]) for beat in beats if beat[3] != "-"]
            self.outcome.figures |= {
                "least_free_kb": min(int(beat[0]) for beat in beats),
                "swapped_in": int(beats[-1][1]),
                "swapped_out": int(beats[-1][2]),
                "full_avg10_most": max(pressures, default=None),
                "full_avg10_mean": round(sum(pressures) / max(len(pressures), 1), 1),
            }

    # Help

    def pids(self) -> dict[str, int]:
        """Return the process ids of everybody of ours."""
        script = "; ".join(f"echo {name} $(cat {path})" for name, path in TARGETS.items())
        found = {}
        for line in self.guest.run(script).stdout.splitlines():
            name, _, text = line.partition(" ")
            if match := re.search(r'"pid": (\d+)', text) or re.match(r"(\d+)", text):
                found[name] = int(match[1])
        return found

    def _start(self, name: str, argv: list[str]) -> Command:
        self._commands[name] = self.guest.start(argv)
        return self._commands[name]

    def _until(self, condition: str, what: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while self.guest.run(condition, timeout_s, check=False).rc != 0:
            said = "".join(command.stdout + command.stderr for command in self._commands.values())
            if time.monotonic() > deadline or "ended with" in said:
                raise GuestTimeout(f"not within {timeout_s:g} s: {what}; {said[-800:]}")

    def _swapped_out(self) -> int:
        beats = _BEAT.findall(self._last_beat())
        return int(beats[0][2]) if beats else 0

    def _last_beat(self) -> str:
        lines = self.guest.console().splitlines()
        return next((line for line in reversed(lines) if line.startswith("beat ")), "")


def _pools(text: str) -> dict[str, Any]:
    """Return the interesting figures of each client's pools in what `tmem list --json` says."""
    wanted = ("pages", "pages_max", "puts", "puts_refused", "gets", "gets_hit", "flushes", "corrupt_pages")
    return {
        client["name"]: [{key: pool.get(key) for key in ("type", *wanted)} for pool in client["pools"]]
        for client in json.loads(text)["clients"]
    }


def _json(line: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


def _last_json(text: str) -> dict[str, Any]:
    return next((found for line in reversed(text.splitlines()) if (found := _json(line))), {})
