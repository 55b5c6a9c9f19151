"""Which governor and which decode router a server's options ask for."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

from jaxsys.clocks import GpuClocks, SimulatedClocks
from jaxsys.errors import UsageError
from jaxsys.hardware import device_called
from jaxsys.mesh import Device
from jaxsys.model import DecoderConfig
from jaxsys.model.contract import cache_parts
from jaxsys.nvml import open_group
from jaxsys.serve.energy.ecopred import EcoPred
from jaxsys.serve.energy.governor import Governor
from jaxsys.serve.energy.gpu_model import (
    GPUS,
    GpuSpec,
    Load,
    ServedShape,
    SimulatedGpu,
    gpu_spec,
    shape_from_sizes,
)
from jaxsys.serve.energy.meters import CounterMeter, ModelMeter
from jaxsys.serve.energy.policy import ClockPolicy, OwnRule
from jaxsys.serve.energy.predictors import ModelPredictor, Predictor
from jaxsys.serve.energy.profile import (
    Profile,
    fingerprint_here,
    load_profile,
    simulated_fingerprint,
    simulated_profile,
    spread_over_clocks,
)
from jaxsys.serve.energy.registry import CLOCK_POLICIES, ROUTERS, Situation
from jaxsys.serve.energy.shares import Shares
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.hooks import AnyGovernor, FewestRequestsRouter, NoGovernor, Router
from jaxsys.serve.paged_model import number_bytes
from jaxsys.serve.processes.gpus import gpu_of

logger = logging.getLogger(__name__)

DEFAULT_POLICY = "ecofreq"

VALUE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.61}
"""Of one weight, by the form of the matrices; of int4 scales and what is int8 are counted."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GovernorChoice:
    """How an instance's clock and energy are dealt with."""

    gpu: str = "h100"
    """The GPU to model where there is none; "none" leaves clock and energy alone."""
    policy: str | None = None
    """Of `CLOCK_POLICIES`; EcoFreq where None and the GPU's costs are known."""
    clocks: Literal["observe", "control"] = "observe"
    """Whether a real GPU's clock may be set."""
    profile: str | None = None
    """File of `jaxsys profile serving` from which predictions begin; the modelled GPU if None."""

    def __post_init__(self) -> None:
        if self.policy is not None:
            CLOCK_POLICIES.check(self.policy)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What one instance runs, as far as its time and energy depend on it."""

    model: DecoderConfig
    weights: str = "bfloat16"
    """Form of the matrices, a dtype or a quantisation, and of the cache if it has its own: "int8",
    "bfloat16, fp8 cache". See `DeploymentConfig.weights_named`."""
    tensor_parallel: int = 1
    """GPUs that work on it together."""
    prefill_budget: int = 2048
    """Prompt tokens an iteration computes."""
    sharing: int = 1
    """Instances that have the same GPUs."""

    def shape(self, *, modelled: bool = False) -> ServedShape:
        """Its costs' shape.

        Args:
            modelled: on a GPU that is not there, which would not compute in float32.
        """
        config = self.model
        form, _, cache = self.weights.partition(", ")
        value_bytes = VALUE_BYTES[form]
        kv_bytes = 4.0 if form == "float32" else 2.0
        if modelled:
            value_bytes, kv_bytes = min(value_bytes, 2.0), 2.0
        if cache:
            kv_bytes = number_bytes(config, "bfloat16", "fp8")  # as wide as int8
        shape = shape_from_sizes(
            name="the served model",
            parameters=config.parameter_count(),
            layers=config.num_layers,
            hidden=config.hidden_size,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            heads=config.num_heads,
            vocabulary=0 if config.tie_embeddings else config.vocab_size,
            tensor_parallel=self.tensor_parallel,
            bytes_per_value=kv_bytes,
        )
        kept = {window: numbers * kv_bytes for window, numbers in cache_parts(config).items()}
        return dataclasses.replace(
            shape,
            kv_bytes_per_token=kept.pop(None),
            kv_windows=tuple((window, each) for window, each in kept.items() if window),
            weight_bytes_per_parameter=value_bytes,
            active_parameters=config.active_parameter_count(),
        )


def make_governor(
    choice: GovernorChoice, served: Served, slo: SharedSlo, group: Sequence[Device]
) -> AnyGovernor:
    """The governor of an instance on the devices of `group`.

    Raises:
        UsageError: if the options do not go together, or the profile is of something else.
    """
    profile = None if choice.profile is None else load_profile(choice.profile)
    if choice.gpu == "none":
        for option, given in (("--profile", profile), ("--policy", choice.policy)):
            if given is not None:
                raise UsageError(
                    f"{option} needs a model of the GPU beside it; name one with --gpu"
                )
        return NoGovernor()
    if group[0].platform == "cpu":
        return modelled_governor(gpu_spec(choice.gpu), served, slo, choice.policy, profile)
    control = choice.clocks == "control"
    if control and served.sharing > 1:
        raise UsageError(
            f"--clocks control needs GPUs that each have one instance, and {served.sharing} share "
            f"{group[0]}: use fewer instances (--decode 0), or observe"
        )
    clocks = open_group([gpu_of(device) for device in group], control=control)
    try:
        return real_governor(clocks, group[0].device_kind, served, slo, choice.policy, profile)
    except BaseException:
        clocks.close()
        raise


def real_governor(
    clocks: GpuClocks,
    device_kind: str,
    served: Served,
    slo: SharedSlo,
    policy: str | None = None,
    profile: Profile | None = None,
) -> Governor:
    """A policy on real GPUs, which it observes where it may not set them.

    Args:
        device_kind: what JAX calls the device.
        profile: measured here; refused where it was measured with anything else.
    """
    spec = spec_of(clocks.name)
    meter = CounterMeter(clocks, sharing=served.sharing)
    shape = served.shape()
    if spec is None:
        if policy not in (None, "own-rule"):
            raise UsageError(
                f"--policy {policy} needs what iterations cost on this GPU, and {clocks.name} is "
                f"none of {', '.join(GPUS)}; leave it out"
            )
        if clocks.can_set:
            logger.warning("%s: no clock is chosen, since its costs are not known", clocks.name)
        shares = Shares(gpu_spec("h100"), shape)  # shares need ratios of rates alone
        return Governor(OwnRule(), clocks, meter, choices_mhz=(), shares=shares)
    gpu = SimulatedGpu(spec, shape)
    if profile is not None:
        here = fingerprint_here(device_kind, served.model, served.weights, served.tensor_parallel)
        here.check(profile.fingerprint)
    chosen = control_clocks(clocks.available_mhz, gpu)

    def predictor() -> Predictor:
        known = simulated_profile(gpu, clocks_mhz=chosen)
        if profile is not None:
            known = spread_over_clocks(profile, gpu, chosen)
        return EcoPred(known, clocks_mhz=chosen, background=True)

    warn_unmeetable(gpu, slo)
    return Governor(
        _policy(policy, gpu, served, slo, chosen, predictor),
        clocks,
        meter,
        choices_mhz=chosen,
        shares=Shares(spec, shape),
        watchdog=True,  # where no clock can be set there is nothing to boost, and none is started
    )


def modelled_governor(
    spec: GpuSpec,
    served: Served,
    slo: SharedSlo,
    policy: str | None = None,
    profile: Profile | None = None,
    *,
    now_s: Callable[[], float] = time.monotonic,
) -> Governor:
    """A policy on modelled GPUs, for servers without any: what would have been done and spent."""
    gpu = SimulatedGpu(spec, served.shape(modelled=True))
    warn_unmeetable(gpu, slo)

    def predictor() -> Predictor:
        if profile is None:
            return ModelPredictor(gpu)
        return EcoPred(profile, clocks_mhz=spec.control_mhz, background=True)

    if profile is not None:
        simulated_fingerprint(gpu).check(profile.fingerprint)
    clocks = SimulatedClocks(
        available_mhz=spec.available_mhz, now_s=now_s, name=f"simulated {spec.name}"
    )
    return Governor(
        _policy(policy, gpu, served, slo, spec.control_mhz, predictor),
        clocks,
        ModelMeter(gpu, clocks),
        choices_mhz=spec.control_mhz,
        shares=Shares(spec, gpu.shape),
        # A real iteration's latency on another machine says nothing about the modelled GPU.
        judge_latency=False,
        now_s=now_s,
    )


def make_router(
    route: str, gpu_name: str, served: Served, slo: SharedSlo, *, option: str = "--route"
) -> Router:
    """The router before instances that read prompts, or before those that decode.

    Raises:
        UsageError: if there is none of that name, or no GPU is named whose model it may ask.
    """
    ROUTERS.check(route)
    if route == "fewest":  # asks nothing
        return FewestRequestsRouter()
    if gpu_name == "none":
        raise UsageError(f"{option} {route} needs a model of the GPU; name one with --gpu")
    gpu = SimulatedGpu(gpu_spec(gpu_name), served.shape(modelled=True))
    return ROUTERS.make(
        route,
        Situation(
            gpu=gpu,
            slo=slo,
            clocks_mhz=gpu.spec.control_mhz,
            top_mhz=gpu.spec.max_mhz,
            predictor=lambda: ModelPredictor(gpu),
            prefill_budget=served.prefill_budget,
        ),
    )


def _policy(
    name: str | None,
    gpu: SimulatedGpu,
    served: Served,
    slo: SharedSlo,
    clocks_mhz: tuple[int, ...],
    predictor: Callable[[], Predictor],
) -> ClockPolicy:
    return CLOCK_POLICIES.make(
        name or DEFAULT_POLICY,
        Situation(
            gpu=gpu,
            slo=slo,
            clocks_mhz=clocks_mhz,
            top_mhz=clocks_mhz[-1],
            predictor=functools.cache(predictor),
            prefill_budget=served.prefill_budget,
        ),
    )


def spec_of(name: str) -> GpuSpec | None:
    """The preset for what a GPU calls itself, e.g. "NVIDIA H100 80GB HBM3"."""
    known = device_called(name)
    return None if known is None else GPUS.get(known.name)


def control_clocks(available_mhz: tuple[int, ...], gpu: SimulatedGpu) -> tuple[int, ...]:
    """The modelled GPU's control clocks, each moved to the nearest the real one lists."""
    if not available_mhz:
        return gpu.spec.control_mhz
    if available_mhz[-1] < gpu.spec.sweet_spot_mhz:
        raise UsageError(
            f"this GPU's clocks end at {available_mhz[-1]} MHz, below the sweet spot of "
            f"{gpu.spec.name} ({gpu.spec.sweet_spot_mhz} MHz); choose the preset of its kind"
        )
    nearest = {
        min(available_mhz, key=lambda mhz, want=want: abs(mhz - want))
        for want in gpu.spec.control_mhz
    }
    return tuple(sorted(nearest | {available_mhz[-1]}))


def warn_unmeetable(gpu: SimulatedGpu, slo: SharedSlo) -> None:
    """Says once, at the start, which bound a lone short request breaks at the maximum clock."""
    top_mhz = gpu.spec.max_mhz
    for name, bound_s, what, load in (
        ("ITL", slo.current.itl_s, "one sequence", Load(batch=1, kv_tokens=1)),
        ("TTFT", slo.current.ttft_s, "one token", Load(prefill_tokens=1, prefill_requests=1)),
    ):
        alone_s = gpu.run(load, top_mhz).time_s
        if alone_s > bound_s:
            logger.warning(
                "%s of %.1f ms cannot be met: %s alone takes about %.1f ms at %d MHz of %s; "
                "served at the maximum clock",
                name,
                bound_s * 1e3,
                what,
                alone_s * 1e3,
                top_mhz,
                gpu.spec.name,
            )
