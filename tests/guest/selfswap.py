"""What a run of a machine that swaps to itself is like, and what came of it; `selfrun` does it.

Here are the plans by name; scripts/guest and the tests choose among them.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

GUARDS = ("contain", "unswapped", "realtime", "watermarks", "locks", "flusher", "oom", "refill")
"""What keeps such a machine alive, each of which a run may leave out: limits for everything else, a group of
our own that is never swapped out, SCHED_RR, more memory kept free, locked memory, PR_SET_IO_FLUSHER, the OOM
score, and the manager that backs memory ahead."""

USUAL = frozenset({"locks", "flusher", "oom", "refill"})
"""The guards that everybody would think of."""

_STATE = "/run/tmem/default.d"
TARGETS = {
    "server": f"{_STATE}/swap-g.server",
    "standby": f"{_STATE}/standby-g.server",
    "keeper": f"{_STATE}/service-keeper-g.json",
    "manager": f"{_STATE}/manager.lock",
    "mount": f"{_STATE}/mount-files.json",
}
"""Who may be struck, and the file with the process id of each."""


@dataclass(frozen=True)
class Plan:
    """One run: the machine, its guards, its loads. Sizes in MiB, times in seconds of the guest.

    The sizes fit together: RAM is the segment, the limit of everything else, and room; the device takes the
    hog but for what stays in RAM; and the segment takes the device, compressed.
    """

    name: str
    guards: frozenset[str] = frozenset(GUARDS)
    kernel: str = "6.1"
    cpus: int = 2
    memory_mib: int = 576
    segment_mib: int = 224
    device_mib: int = 870
    hog_mib: int = 864
    noise_words: int = 100
    """Of a page's 512: how well the hog's pages compress (100: 4 times)."""
    discard: bool = True
    touch_s: int = 60
    """For how long the hog touches pages at random when all are written; then it verifies each."""
    churn_mib: int = 32
    files_mib: int = 48
    stall_s: int = 60
    """After so long without a page of the hog the machine counts as hung."""
    limit_s: int = 1800
    """For how long the hog may take, of the host's time."""
    strikes: int = 0
    """How many processes to kill or stop; the first as soon as the hog swaps, while it writes its pages."""
    strike_targets: tuple[str, ...] = tuple(TARGETS)
    stops_percent: int = 25
    """How many of the strikes are SIGSTOP, and SIGCONT after up to a second; the others are SIGKILL."""
    least_pause_s: float = 1
    most_pause_s: float = 2
    io_timeout_ms: int = 0
    """Of the device's queue; 0: what tmem sets."""
    upgrade: bool = False
    seed: int = 1

    def without(self, *guards: str, name: str | None = None) -> "Plan":
        """Return the same plan without these guards."""
        return replace(self, name=name or f"no-{'-'.join(guards)}", guards=self.guards - set(guards))


@dataclass
class Outcome:
    """What came of a run."""

    plan: Plan
    verdict: str = "failed"
    """``clean``; ``hung``; ``lost`` (a page or a block was not what it must be); ``trouble`` (nothing lost,
    but the kernel's log has what should not be there, or a load failed); ``failed`` (the run itself)."""
    reason: str = ""
    seconds: float = 0
    """Of the host's time, all in all."""
    guards: dict[str, str] = field(default_factory=dict)
    """What `tmem doctor` said of each guard when the load began."""
    loads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The figures of each load: hog, churn, reader, strike."""
    strikes: list[dict[str, Any]] = field(default_factory=list)
    """Each strike: who, how, after how many ms the device answered, and how long the hog stood still."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Pages in and out, pressure, memory, times."""
    trouble: list[str] = field(default_factory=list)
    """Lines of the kernel's log that should not be there."""

    def row(self) -> dict[str, Any]:
        """Return it for a file of results."""
        value = asdict(self)
        value["plan"]["guards"] = sorted(self.plan.guards)
        return value


SELF = Plan("self")
SHORT = replace(
    SELF,
    name="short",
    memory_mib=368,
    segment_mib=56,
    device_mib=190,
    hog_mib=200,
    touch_s=10,
    churn_mib=16,
    files_mib=16,
    limit_s=900,
)
"""For CI: a smaller machine, and a hog that is larger than what the kernel leaves of its RAM."""
KILLS = replace(SELF, name="kills", strikes=40, touch_s=90)

PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        SELF,
        replace(SELF, name="self-long", touch_s=600, limit_s=1800),
        replace(SELF, name="self-no-discard", discard=False),
        SELF.without("realtime", "watermarks", name="only-contain"),
        SELF.without("contain", name="only-realtime"),
        *(SELF.without(guard) for guard in GUARDS[1:]),
        *(SELF.without("contain", guard) for guard in GUARDS[1:]),
        *(
            SELF.without("realtime", "watermarks", guard, name=f"only-contain-no-{guard}")
            for guard in GUARDS[3:]
        ),
        replace(SELF, name="usual", guards=USUAL),
        KILLS,
        *(replace(KILLS, name=f"kills-{ms}", io_timeout_ms=ms) for ms in (500, 1000, 2000)),
        replace(KILLS, name="kills-only-contain", guards=SELF.guards - {"realtime", "watermarks"}),
        replace(
            SELF, name="upgrade", upgrade=True, memory_mib=496, segment_mib=96, device_mib=400, hog_mib=384
        ),
        replace(SHORT, name="short-kills", guards=SELF.guards - {"realtime", "watermarks"}, strikes=2),
        replace(SHORT, name="short-realtime", guards=SELF.guards - {"contain"}),
    )
}
