"""Policies by name: a clock policy and routers, each by its name in
`jaxsys.serve.energy.registry`, as "ecofreq+energy"; a clock policy's name alone routes plainly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.serve.energy.gpu_model import SimulatedGpu
from jaxsys.serve.energy.registry import CLOCK_POLICIES, ROUTERS

SLEEPS = "+sleep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How clocks are set and requests are routed."""

    clock: str
    """Of `CLOCK_POLICIES`."""
    route: str | None = None
    """Of `ROUTERS`, for decode; None routes plainly: prompts in turn, then the fewest requests."""
    prompts: str | None = None
    """Of `ROUTERS`, for prompts; None goes by `Setting.quick_prefill`."""
    cap_w: float | None = None
    """Power limit of each GPU, where that is what holds its clock down."""
    sleeps: bool = False
    """Whether instances that are not needed sleep."""


POLICIES: dict[str, Policy] = {
    "max": Policy(clock="max"),
    "sweet-spot": Policy(clock="sweet-spot"),
    "window": Policy(clock="window"),
    "ecofreq": Policy(clock="ecofreq"),
    "ecoroute": Policy(clock="max", route="ecoroute"),
    "both": Policy(clock="ecofreq", route="ecoroute"),
    "both-energy": Policy(clock="ecofreq", route="energy"),
    "eco": Policy(clock="ecofreq", route="ecoroute", prompts="gather"),
    "ahead": Policy(clock="ahead", route="energy", prompts="gather"),
    "ahead-sleep": Policy(clock="ahead", route="energy", prompts="gather", sleeps=True),
}
"""Those that have a name of their own. `ecoroute` alone: the published router at the maximum clock.
`both-energy`: EcoFreq with the router of least energy increase; `eco`: EcoFreq with the published
router, and prompts gathered; `ahead`: Ahead with the router of least energy increase, and prompts
gathered; `ahead-sleep`: and instances that are not needed sleep."""


def policy_named(name: str) -> Policy:
    """The policy called `name`, or CLOCK+ROUTER, a clock policy alone, or cap-W: the highest clock
    under a power limit of so many watts. With "+sleep" behind it, instances that are not needed
    sleep.

    Raises:
        UsageError: if a part of it is not known.
    """
    if name in POLICIES:
        return POLICIES[name]
    awake = name.removesuffix(SLEEPS)
    if awake != name:
        return replace(policy_named(awake), sleeps=True)
    if name.startswith("cap-") and name[4:].isdecimal():
        return Policy(clock="max", cap_w=float(name[4:]))
    clock, plus, route = name.partition("+")
    route, also, prompts = route.partition("+")
    if clock not in CLOCK_POLICIES:
        known = dict.fromkeys((*POLICIES, *CLOCK_POLICIES))
        raise UsageError(
            f"policy {name!r} is not known{did_you_mean(name, known)}; use one of "
            f"{', '.join(known)}, CLOCK+ROUTER with a "
            f"router of {', '.join(ROUTERS)}, CLOCK+ROUTER+ROUTER with one for prompts behind, or "
            f"cap-WATTS, each with {SLEEPS} or without"
        )
    for given, named in ((plus, route), (also, prompts)):
        if given:
            ROUTERS.check(named)
    return Policy(clock=clock, route=route if plus else None, prompts=prompts if also else None)


def routers_of(policy: Policy, *, quick: bool = True) -> tuple[str, str]:
    """The routers before prompts and before decode.

    Args:
        quick: whether a policy with a router has one for prompts too.
    """
    prompts = "queue" if policy.route is not None and quick else "round-robin"
    return policy.prompts or prompts, policy.route or "fewest"


def check_policies(names: Sequence[str], gpus: Sequence[SimulatedGpu] = ()) -> None:
    """Raises UsageError for a policy's name that is not known, or a power limit that one of `gpus`
    cannot have."""
    for name in names:
        cap_w = policy_named(name).cap_w
        if cap_w is not None:
            for gpu in gpus:
                check_limit(cap_w, gpu)


def check_limit(cap_w: float, gpu: SimulatedGpu) -> None:
    """Raises UsageError for a power limit that a GPU cannot have."""
    idle_w = gpu.idle_power_w(gpu.spec.min_mhz) / gpu.gpus
    if not idle_w < cap_w <= gpu.spec.power_cap_w:
        raise UsageError(
            f"policy cap-{cap_w:.0f}: a limit of {cap_w:.0f} W must lie above the {idle_w:.0f} W "
            f"that {gpu.spec.name} idles at and be at most its {gpu.spec.power_cap_w:.0f} W"
        )
