"""Which governor and which decode router a server's options ask for."""

import dataclasses
from typing import Literal

from jaxsys.errors import UsageError
from jaxsys.mesh import Device
from jaxsys.model import DecoderConfig
from jaxsys.nvml import open_clocks
from jaxsys.serve.energy.ecofreq import ModelPredictor, SimulatedGovernor
from jaxsys.serve.energy.ecopred import EcoPred
from jaxsys.serve.energy.ecoroute import EnergyRouter
from jaxsys.serve.energy.gpu_model import ServedShape, SimulatedGpu, gpu_spec, shape_from_sizes
from jaxsys.serve.energy.live_governor import LiveGovernor, warn_unmeetable
from jaxsys.serve.energy.measured_governor import MeasuredGovernor, spec_of
from jaxsys.serve.energy.profile import fingerprint_here, load_profile, simulated_fingerprint
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.hooks import Governor, NoGovernor, Router
from jaxsys.serve.processes.gpus import gpu_of

Route = Literal["fewest", "energy"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GovernorChoice:
    """How an instance's clock and energy are dealt with."""

    gpu: str = "h100"
    """The GPU to model where there is none; "none" leaves clock and energy alone."""
    clocks: Literal["observe", "control"] = "observe"
    """Whether a real GPU's clock may be set."""
    profile: str | None = None
    """File of `jaxsys profile serving` from which predictions begin; the modelled GPU if None."""


def make_governor(
    choice: GovernorChoice, model: DecoderConfig, slo: SharedSlo, device: Device
) -> Governor:
    """The governor of an instance on `device`."""
    profile = None if choice.profile is None else load_profile(choice.profile)
    if choice.gpu == "none":
        if profile is not None:
            raise UsageError("--profile needs a model of the GPU beside it; name one with --gpu")
        return NoGovernor()
    shape = _shape(model)
    if device.platform == "cpu":
        gpu = SimulatedGpu(gpu_spec(choice.gpu), shape)
        warn_unmeetable(gpu, slo)
        if profile is None:
            return SimulatedGovernor(gpu, slo)
        clocks_mhz = gpu.spec.control_mhz
        expected = simulated_fingerprint(gpu)
        predictor = EcoPred(profile, expected=expected, clocks_mhz=clocks_mhz, background=True)
        return SimulatedGovernor(gpu, slo, predictor=predictor)
    clocks = open_clocks(gpu_of(device), control=choice.clocks == "control")
    spec = spec_of(clocks.name)
    if spec is None:  # its costs are not known: energy is read, no clock is chosen
        return MeasuredGovernor(clocks, shape, slo)
    return LiveGovernor(
        clocks,
        SimulatedGpu(spec, shape),
        slo,
        profile=profile,
        fingerprint=fingerprint_here(device.device_kind, model.num_layers, model.hidden_size),
    )


def make_decode_router(
    route: Route, gpu_name: str, model: DecoderConfig, slo: SharedSlo
) -> Router | None:
    """The router before decode instances; None where the fewest requests decide."""
    if route == "fewest":
        return None
    if gpu_name == "none":
        raise UsageError("--route energy needs a model of the GPU; name one with --gpu")
    gpu = SimulatedGpu(gpu_spec(gpu_name), _shape(model))
    clocks_mhz = gpu.spec.control_mhz
    return EnergyRouter(
        ModelPredictor(gpu),
        slo,
        clocks_mhz=clocks_mhz,
        idle_power_w=gpu.idle_power_w(clocks_mhz[0]),
    )


def _shape(config: DecoderConfig) -> ServedShape:
    return shape_from_sizes(
        name="served model",
        parameters=config.parameter_count(),
        layers=config.num_layers,
        hidden=config.hidden_size,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
