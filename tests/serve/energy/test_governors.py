"""Which governor a server's options give, and what they refuse or warn of."""

import logging

import jax
import pytest

from jaxsys.errors import UsageError
from jaxsys.model import DecoderConfig
from jaxsys.serve.energy.ecofreq import SimulatedGovernor
from jaxsys.serve.energy.ecopred import EcoPred
from jaxsys.serve.energy.governors import GovernorChoice, make_governor
from jaxsys.serve.energy.gpu_model import SHAPES, SimulatedGpu, gpu_spec
from jaxsys.serve.energy.profile import Profile, Sample, simulated_profile, spread_over_clocks
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.hooks import NoGovernor

CPU = jax.devices("cpu")[0]
SHAPE = SHAPES["smollm2-135m"]
H100 = SimulatedGpu(gpu_spec("h100"), SHAPE)
MODEL = DecoderConfig(
    vocab_size=64,
    hidden_size=SHAPE.hidden,
    intermediate_size=64,
    num_layers=SHAPE.layers,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
)


def make(slo: Slo | None = None, **choice):
    return make_governor(GovernorChoice(**choice), MODEL, SharedSlo(slo), CPU)


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    for name in ("h100", "a100-80g"):
        gpu = SimulatedGpu(gpu_spec(name), SHAPE)
        simulated_profile(gpu, max_batch=64, max_prefill_tokens=2048).save(folder / name)
    return folder


def test_on_cpu_the_gpu_is_modelled_and_none_leaves_it_alone():
    assert isinstance(make(), SimulatedGovernor)
    assert isinstance(make(gpu="none"), NoGovernor)


def test_a_profile_is_what_predictions_begin_from(profiles):
    governor = make(profile=str(profiles / "h100"))
    assert isinstance(governor, SimulatedGovernor)
    assert isinstance(governor.inner.predictor, EcoPred)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"profile": "a100-80g"}, "gpu='A100-SXM4-80GB' instead of 'H100-SXM5-80GB'"),
        ({"profile": "absent"}, "does not exist"),
        ({"profile": "h100", "gpu": "none"}, "name one with --gpu"),
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
