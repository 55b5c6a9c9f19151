"""Which governor a server's options give, and what they refuse or warn of."""

import dataclasses
import logging
from typing import Any

import jax
import pytest

from jaxsys.errors import UsageError
from jaxsys.model import preset
from jaxsys.model.contract import cache_numbers
from jaxsys.serve.deployment import DeploymentConfig
from jaxsys.serve.energy.ecofreq import EcoFreq
from jaxsys.serve.energy.ecopred import EcoPred
from jaxsys.serve.energy.ecoroute import EnergyRouter, RoundRobinRouter
from jaxsys.serve.energy.fixed_clock import FixedClock
from jaxsys.serve.energy.governor import Governor
from jaxsys.serve.energy.governors import (
    GovernorChoice,
    Served,
    make_governor,
    make_router,
)
from jaxsys.serve.energy.gpu_model import SHAPES, SimulatedGpu, gpu_spec
from jaxsys.serve.energy.profile import Profile, Sample, simulated_profile, spread_over_clocks
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.hooks import FewestRequestsRouter, NoGovernor
from jaxsys.serve.matrix import QUANTISATIONS
from jaxsys.serve.paged_model import CACHE_FORMS

CPU = jax.devices("cpu")[0]
SHAPE = SHAPES["smollm2-135m"]
H100 = SimulatedGpu(gpu_spec("h100"), SHAPE)
SERVED = Served(model=preset("smollm2-135m"))


def make(slo: Slo | None = None, served: Served = SERVED, **choice) -> Any:
    return make_governor(GovernorChoice(**choice), served, SharedSlo(slo), [CPU])


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    for name in ("h100", "a100-80g"):
        gpu = SimulatedGpu(gpu_spec(name), SHAPE)
        simulated_profile(gpu, max_batch=64, max_prefill_tokens=2048).save(folder / name)
    return folder


def test_on_cpu_the_gpu_is_modelled_and_none_leaves_it_alone():
    governor = make()
    assert isinstance(governor, Governor) and isinstance(governor.policy, EcoFreq)
    assert governor.method.startswith("modelled")
    assert isinstance(make(gpu="none"), NoGovernor)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gemma-2-2b", "DeepSeek-V3", "Qwen3-8B"])
def test_caches_are_priced_by_what_layers_keep(name):
    """Windows end what is read; a latent vector is narrow; all else grows with the length."""
    config = preset(name)
    shape = Served(model=config).shape()
    for length in (1, 100, 5000):
        kept = shape.kv_bytes(3 * length, 3)
        assert kept == pytest.approx(3 * 2 * cache_numbers(config, length))
    if config.latent is not None:
        assert shape.kv_bytes(1) == 2 * 61 * 576


@pytest.mark.parametrize("quantisation", [None, *QUANTISATIONS])
@pytest.mark.parametrize("cache_form", [None, *CACHE_FORMS])
def test_every_form_that_is_served_has_a_shape(quantisation, cache_form):
    deployment = DeploymentConfig(quantisation=quantisation, cache_form=cache_form)
    for dtype in ("float32", "bfloat16"):
        served = dataclasses.replace(SERVED, weights=deployment.weights_named(dtype))
        plain = dataclasses.replace(SERVED, weights=dtype).shape()
        for modelled in (False, True):
            shape = served.shape(modelled=modelled)
            assert shape.weight_bytes_per_parameter <= plain.weight_bytes_per_parameter
            assert (shape.kv_bytes(1) < plain.kv_bytes(1)) or cache_form is None
    half = SERVED.shape().weight_bytes_per_parameter / 2
    assert quantisation is None or served.shape().weight_bytes_per_parameter <= half


def test_the_policy_and_the_router_are_those_asked_for():
    governor = make(policy="sweet-spot")
    assert isinstance(governor, Governor) and isinstance(governor.policy, FixedClock)
    governor.start(0.0)
    assert governor.clock_mhz == 1080
    with pytest.raises(UsageError, match="'magic' is not known; use one of max, sweet-spot"):
        GovernorChoice(policy="magic")
    slo = SharedSlo()
    assert isinstance(make_router("energy", "h100", SERVED, slo), EnergyRouter)
    assert isinstance(make_router("round-robin", "h100", SERVED, slo), RoundRobinRouter)
    assert isinstance(make_router("fewest", "none", SERVED, slo), FewestRequestsRouter)
    with pytest.raises(UsageError, match="--route energy needs a model of the GPU"):
        make_router("energy", "none", SERVED, slo)


def test_a_profile_is_what_predictions_begin_from(profiles):
    governor = make(profile=str(profiles / "h100"))
    assert isinstance(governor.policy.predictor, EcoPred)


def test_a_profile_of_other_weights_is_refused(profiles):
    int8 = Served(model=SERVED.model, weights="int8")
    with pytest.raises(UsageError, match="weights='2 bytes a parameter' instead of '1 bytes"):
        make(served=int8, profile=str(profiles / "h100"))
    two = Served(model=SERVED.model, tensor_parallel=2)
    with pytest.raises(UsageError, match="tensor_parallel=1 instead of 2"):
        make(served=two, profile=str(profiles / "h100"))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"profile": "a100-80g"}, "gpu='A100-SXM4-80GB' instead of 'H100-SXM5-80GB'"),
        ({"profile": "absent"}, "does not exist"),
        ({"profile": "h100", "gpu": "none"}, "--profile needs a model of the GPU"),
    ],
)
def test_a_profile_of_other_origin_is_refused(profiles, choice, message):
    with pytest.raises(UsageError, match=message):
        make(**choice | {"profile": str(profiles / choice["profile"])})


def test_bounds_that_no_clock_can_meet_are_said_at_the_start(caplog):
    with caplog.at_level(logging.WARNING):
        make(Slo(itl_s=1e-5, ttft_s=1e-5))
    assert "ITL of 0.0 ms cannot be met" in caplog.text
    assert "TTFT of 0.0 ms cannot be met" in caplog.text
    assert caplog.text.count("served at the maximum clock") == 2
    caplog.clear()
    make()
    assert not caplog.records


def test_a_profile_of_one_clock_is_carried_over_by_the_modelled_ratios():
    clocks = H100.spec.control_mhz
    whole = simulated_profile(H100, clocks_mhz=clocks, max_batch=64, max_prefill_tokens=512)
    slower = [  # a GPU half as fast as the model, known at one clock
        Sample(s.load, s.clock_mhz, 2 * s.time_s, s.power_w)
        for s in whole.samples
        if s.clock_mhz == clocks[-1]
    ]
    profile = Profile(fingerprint=whole.fingerprint, samples=slower)
    spread = spread_over_clocks(profile, H100, clocks)
    assert spread.clocks_mhz == clocks and "ratios" in spread.notes[-1]
    truth = {(s.load, s.clock_mhz): s for s in whole.samples}
    for sample in spread.samples:
        known = truth[sample.load, sample.clock_mhz]
        assert sample.time_s == pytest.approx(2 * known.time_s)
        assert sample.power_w == pytest.approx(known.power_w)
    assert spread_over_clocks(whole, H100, clocks) is whole
