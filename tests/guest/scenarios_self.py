"""Machines that swap to their own userspace, with all guards and without some: see `selfswap` for the plans.

A run without a guard is reported as it comes, for a guard that is not missed once may be missed next time;
only that it loses nothing is demanded. What must be clean, and what must hang, is demanded.
"""

from dataclasses import replace

from .scenarios import Figures, Run, Setting, demand, scenario
from .selfrun import options, swap_to_itself
from .selfswap import PLANS, SHORT, Outcome, Plan

MUST_BE_CLEAN = (
    "self",
    "self-long",
    "self-no-discard",
    "only-contain",
    "short-kills",
    "short-realtime",
    "upgrade",
)
RECOVERY_MS = 3000
"""In so much time a killed server must be replaced, where a virtual CPU is emulated."""
_SMALL = ("memory_mib", "segment_mib", "device_mib", "hog_mib", "churn_mib", "files_mib", "limit_s")


def do(setting: Setting, plan: Plan) -> Outcome:
    """Do a run on the kernel of the setting."""
    plan = replace(plan, kernel=setting.kernel)
    guest = setting.guest(plan.name, options(plan))
    return swap_to_itself(guest, plan)


def shrunk(plan: Plan) -> Plan:
    """Return `plan` on the smaller machine."""
    sizes = {name: getattr(SHORT, name) for name in _SMALL}
    return replace(plan, touch_s=min(plan.touch_s, SHORT.touch_s), **sizes)


def show(setting: Setting, plan: Plan) -> Figures:
    """Do a run and demand of it what can be demanded."""
    outcome = do(setting, plan if setting.long else shrunk(plan))
    row = outcome.row()
    demand(outcome.verdict != "lost", f"nothing is lost: {outcome.reason}")
    if plan.name in MUST_BE_CLEAN:
        demand(outcome.verdict == "clean", f"{plan.name}: {outcome.verdict}: {outcome.reason}")
    elif plan.name == "usual":
        demand(outcome.verdict == "hung", f"the usual guards are not enough, but it was {outcome.verdict}")
    elif plan.strikes:
        demand(outcome.verdict == "clean", f"{plan.name}: {outcome.verdict}: {outcome.reason}")
    if plan.strikes:
        demand(len(outcome.strikes) == plan.strikes, f"every strike was done: {outcome.strikes}")
    return row


def _register(plan: Plan) -> None:
    def run(setting: Setting) -> Figures:
        return show(setting, plan)

    left_out = sorted(PLANS["self"].guards - plan.guards)
    run.__doc__ = "This machine swaps to itself" + (f" without {', '.join(left_out)}." if left_out else ".")
    if plan.name == "usual":
        run.__doc__ = "This machine swaps to itself with the usual guards only, and hangs."
    elif plan.strikes:
        run.__doc__ = f"This machine swaps to itself, and its processes are struck {plan.strikes} times."
    elif plan.upgrade:
        run.__doc__ = "This machine swaps to itself while tmem is replaced by another version."
    typed: Run = run
    scenario(plan.name)(typed)


for _plan in PLANS.values():
    _register(_plan)
