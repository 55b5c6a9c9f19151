"""The search of `jaxsys plan serve`: deployments judged by replays.

The judge is the replay of the trace on the modelled GPUs, with the server's own scheduler.
Deployments are judged the smallest first, each at the highest clock; only one that keeps the
targets there is replayed under the other policies, since none of them attains more than a clock
that is always the highest.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxsys.errors import UsageError
from jaxsys.model.config import DecoderConfig
from jaxsys.serve.simulation.comparison import Setting, figures, simulate
from jaxsys.serve.simulation.deployments import Bound, Bounds, Deployment
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.plan_replays import replays
from jaxsys.serve.simulation.policies import policy_named
from jaxsys.serve.simulation.traces import RequestTrace

POLICIES_TRIED = ("max", "ahead", "sweet-spot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A deployment under a policy, replayed."""

    deployment: Deployment
    policy: str
    bound: Bound
    ttft_attainment_pct: float
    itl_attainment_pct: float
    ttft_p99_ms: float
    itl_p99_ms: float
    energy_j_per_token: float

    @property
    def attainment_pct(self) -> float:
        """The lesser of the two."""
        return min(self.ttft_attainment_pct, self.itl_attainment_pct)

    def row(self) -> dict[str, Any]:
        """Flat, named figures."""
        one = self.deployment
        return {
            "gpus": one.gpus,
            "gpu": one.gpu,
            "tensor_parallel": one.tensor_parallel,
            "prefill": one.prefill,
            "decode": one.decode,
            "max_batch": one.max_batch,
            "weights": one.weights,
            "policy": self.policy,
            "energy_j_per_token": self.energy_j_per_token,
            "bound_j_per_token": self.bound.energy_j_per_token,
            "ttft_attainment_pct": self.ttft_attainment_pct,
            "itl_attainment_pct": self.itl_attainment_pct,
            "ttft_p99_ms": self.ttft_p99_ms,
            "itl_p99_ms": self.itl_p99_ms,
        }


def judge(
    config: DecoderConfig, deployment: Deployment, bounds: Bounds, trace: RequestTrace, policy: str
) -> Judged:
    """Replays `trace` on a deployment under one policy."""
    gpu = bounds.gpu(deployment.gpu, deployment.tensor_parallel, deployment.weights)
    if gpu is None:
        raise UsageError(f"the model does not fit {deployment.label}")
    setting = Setting(
        gpu=gpu,
        cluster=ClusterConfig(
            gpu=gpu,
            prefill_instances=deployment.prefill,
            decode_instances=deployment.decode,
            max_batch=deployment.max_batch,
            max_prefill_tokens=bounds.prefill_budget,
        ),
        slo=bounds.slo,
        clocks_mhz=gpu.spec.control_mhz,
        predictor="model",
    )
    found = figures(simulate(trace, policy_named(policy), setting), bounds.slo)
    return Judged(
        deployment=deployment,
        policy=policy,
        bound=bounds.of(deployment),
        ttft_attainment_pct=found["ttft_attainment_pct"],
        itl_attainment_pct=found["itl_attainment_pct"],
        ttft_p99_ms=found["ttft_p99_ms"],
        itl_p99_ms=found["itl_p99_ms"],
        energy_j_per_token=found["energy_j_per_token"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search found."""

    judged: list[Judged]
    passed: int
    """Deployments that the bound let pass."""
    cut_short: bool
    """Time was up, or replays were, before all of them were judged."""


def search(
    config: DecoderConfig,
    trace: RequestTrace,
    bounds: Bounds,
    known: Sequence[tuple[Deployment, Bound]],
    *,
    target_pct: float,
    policies: Sequence[str] = POLICIES_TRIED,
    most: int = 40,
    seconds: float = 240.0,
    jobs: int = 1,
    say: Callable[[Judged], None] = lambda found: None,
) -> Search:
    """Judges deployments, the smallest and least energetic first, within a budget.

    Args:
        target_pct: attainment to be kept.
        most: replays.
        jobs: processes that replay; what is found does not depend on them, but for what time cuts.
        say: is given each as it is judged.
    """
    judged: list[Judged] = []
    ends_s = time.monotonic() + seconds
    cut_short = False
    ordered = sorted(known, key=lambda one: (one[0].gpus, one[1].energy_j_per_token))

    def worth_judging(deployment: Deployment, bound: Bound) -> bool:
        # As many GPUs that keep the target are better spent on a deployment of less energy.
        best_j = min(
            (
                one.energy_j_per_token
                for one in judged
                if one.deployment.gpus <= deployment.gpus and one.attainment_pct >= target_pct
            ),
            default=math.inf,
        )
        return bound.energy_j_per_token < best_j

    def likely(place: int, number: int) -> Iterator[tuple[Deployment, str]]:
        """What is asked for behind a deployment's policy of that number."""
        if number:
            yield from ((ordered[place][0], policy) for policy in policies[number + 1 :])
        yield from ((one, policies[0]) for one, bound in ordered[place + 1 :]
                    if worth_judging(one, bound))  # fmt: skip

    answer = functools.partial(_judge, config, bounds, trace)
    with replays(answer, jobs) as found_of:
        for place, (deployment, bound) in enumerate(ordered):
            if not worth_judging(deployment, bound):
                continue
            for number, policy in enumerate(policies):
                if len(judged) >= most or time.monotonic() > ends_s:
                    cut_short = True
                    break
                found = found_of.get((deployment, policy), likely(place, number))
                judged.append(found)
                say(found)
                if not number and found.attainment_pct < target_pct:
                    break
            if cut_short:
                break
    return Search(judged=judged, passed=len(ordered), cut_short=cut_short)


def _judge(
    config: DecoderConfig, bounds: Bounds, trace: RequestTrace, key: tuple[Deployment, str]
) -> Judged:
    return judge(config, key[0], bounds, trace, key[1])


def frontier(judged: Sequence[Judged]) -> list[Judged]:
    """Those than which none has as few GPUs, as little energy a token and as much attainment."""

    def figures_of(one: Judged) -> tuple[float, float, float]:
        return one.deployment.gpus, one.energy_j_per_token, -one.attainment_pct

    kept = []
    for one in judged:
        mine = figures_of(one)
        if not any(
            all(a <= b for a, b in zip(figures_of(other), mine, strict=True))
            and figures_of(other) != mine
            for other in judged
        ):
            kept.append(one)
    return sorted(kept, key=figures_of)


def chosen_of(judged: Sequence[Judged], target_pct: float) -> Judged | None:
    """Of those that keep the target the one of the fewest GPUs, then of the least energy."""
    keeping = [one for one in judged if one.attainment_pct >= target_pct]
    return min(keeping, key=lambda o: (o.deployment.gpus, o.energy_j_per_token), default=None)


def halving(
    chosen: Judged,
    judged: Sequence[Judged],
    bounds: Bounds,
    *,
    longest: int,
    roomiest: Callable[[int], int | None],
) -> list[str]:
    """What it would take to halve the cost, the energy, and the share that comes too late.

    Args:
        longest: tokens of a request.
        roomiest: the most tokens that an instance of at most so many GPUs holds, 0 where the model
            does not fit, None where no instance so small was asked for.
    """
    lines = []
    gpus = chosen.deployment.gpus
    fewer = [one for one in judged if 2 * one.deployment.gpus <= gpus]
    best = max(fewer, key=lambda one: one.attainment_pct, default=None)
    if best is not None:
        lines.append(
            f"half the cost: {best.deployment.label} under {best.policy} attains "
            f"{best.attainment_pct:.1f} %"
        )
    elif gpus < 2:
        lines.append("half the cost: it is one GPU")
    elif (room := roomiest(gpus // 2)) is None:
        lines.append("half the cost: no instance so small is allowed (--tensor-parallel)")
    elif room < longest:
        held = f"{room} tokens of a request of {longest}" if room else "not even the weights"
        lines.append(
            f"half the cost: memory is the reason; an instance of {gpus // 2} GPUs at most holds "
            f"{held}"
        )
    else:
        share = min(1.0, bounds.least_rate(chosen.deployment) / 2)
        lines.append(
            f"half the cost: no deployment of {gpus // 2} GPUs passes the bound; they would serve "
            f"about {100 * share:.0f} % of the rate"
        )
    least = min(judged, key=lambda one: one.energy_j_per_token)
    half_j = chosen.energy_j_per_token / 2
    if least.energy_j_per_token <= half_j:
        lines.append(
            f"half the energy: {least.deployment.label} under {least.policy}, at "
            f"{least.energy_j_per_token:.3f} J a token and {least.attainment_pct:.1f} %"
        )
    else:
        lines.append(
            f"half the energy: none of {len(judged)} replays; the least is "
            f"{least.energy_j_per_token:.3f} J a token, {least.deployment.label} under "
            f"{least.policy}, and this deployment's bound {chosen.bound.energy_j_per_token:.3f}"
        )
    late_pct = 100 - chosen.attainment_pct
    if late_pct < 0.05:
        lines.append("half the late: next to nothing is late")
        return lines
    better = [one for one in judged if 100 - one.attainment_pct <= late_pct / 2]
    cheapest = min(
        better, key=lambda one: (one.deployment.gpus, one.energy_j_per_token), default=None
    )
    if cheapest is None:
        lines.append(f"half the late ({late_pct:.1f} %): none of {len(judged)} replays")
    else:
        lines.append(
            f"half the late ({late_pct:.1f} %): {cheapest.deployment.label} under "
            f"{cheapest.policy}, {cheapest.energy_j_per_token:.3f} J a token"
        )
    return lines
