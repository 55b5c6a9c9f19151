"""EcoPred: accurate on its profile, monotone where physics is, and right again after drift."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.errors import UsageError
from jaxsys.serve.energy.ecopred import EcoPred, EcoPredConfig
from jaxsys.serve.energy.gpu_model import Load, simulated_gpu
from jaxsys.serve.energy.profile import (
    Fingerprint,
    Profile,
    Sample,
    load_profile,
    simulated_profile,
)

GPU = simulated_gpu("h100", "llama-3-8b")
CLOCKS = GPU.spec.control_mhz
PROFILE = simulated_profile(GPU, noise=0.02)
FRESH = EcoPred(PROFILE)
"""Shared by tests that only read it."""


def traffic(count: int, seed: int, kind: str = "decode", factor=lambda load, mhz: 1.0):
    """Iterations as traffic brings them, not as the profile swept them."""
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        if kind == "decode":
            batch = int(generator.integers(1, 512))
            load = Load(batch=batch, kv_tokens=int(batch * generator.uniform(50, 800)))
        else:
            prompts = int(generator.integers(1, 16))
            tokens = int(generator.integers(prompts * 20, min(8192, prompts * 1500)))
            load = Load(prefill_tokens=tokens, prefill_requests=prompts)
        mhz = int(generator.choice(CLOCKS))
        outcome = GPU.run(load, mhz)
        samples.append(Sample(load, mhz, outcome.time_s * factor(load, mhz), outcome.power_w))
    return samples


def prediction_error(predictor: EcoPred, samples: list[Sample]) -> float:
    """Mean absolute relative error of predicted times over `samples`."""
    errors = []
    for mhz in {sample.clock_mhz for sample in samples}:
        of_clock = [sample for sample in samples if sample.clock_mhz == mhz]
        times, _ = predictor.what_if([sample.load for sample in of_clock], (mhz,))
        truth = np.array([sample.time_s for sample in of_clock])
        errors.append(np.abs(times[:, 0] / truth - 1))
    return float(np.mean(np.concatenate(errors)))


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_traffic_unlike_the_sweep_is_predicted(kind):
    samples = traffic(400, 1, kind)
    assert prediction_error(FRESH, samples) < 0.04
    powers = [FRESH.what_if([s.load], (s.clock_mhz,))[1][0, 0] for s in samples]
    truth = [s.power_w for s in samples]
    assert np.mean(np.abs(np.array(powers) / truth - 1)) < 0.04


@pytest.mark.parametrize(
    "load",
    [
        Load(prefill_tokens=24_000, prefill_requests=3),
        Load(prefill_tokens=8192, prefill_requests=1, cached_tokens=60_000),
        Load(batch=1200, kv_tokens=440_000),
    ],
    ids=["queue longer than an iteration", "long context", "large batch"],
)
def test_load_beyond_the_profile_goes_on_costing(load):
    truth_s = GPU.run(load, CLOCKS[1]).time_s
    assert FRESH.what_if([load], CLOCKS)[0][0, 1] == pytest.approx(truth_s, rel=0.25)


loads = st.one_of(
    st.builds(Load, batch=st.integers(1, 1500), kv_tokens=st.integers(0, 450_000)),
    st.builds(
        Load,
        prefill_tokens=st.integers(1, 20_000),
        prefill_requests=st.integers(1, 200),
        cached_tokens=st.integers(0, 30_000),
    ),
)


@given(load=loads)
def test_a_higher_clock_is_never_slower_nor_thriftier_in_power(load):
    times, powers = FRESH.what_if([load], CLOCKS)
    assert (np.diff(times[0]) <= 1e-9 * times[0, :-1]).all()
    assert (np.diff(powers[0]) >= -1e-6 * powers[0, :-1]).all()
    assert (times > 0).all() and np.isfinite(powers).all()


@given(
    load=loads,
    # Not prompts alone: the same tokens in more prompts attend to less.
    name=st.sampled_from(["batch", "kv_tokens", "prefill_tokens", "cached_tokens"]),
    more=st.integers(1, 2000),
)
def test_more_load_is_never_faster(load, name, more):
    if (name in ("batch", "kv_tokens")) != (load.batch > 0):
        return
    more_load = replace(load, **{name: getattr(load, name) + more})
    before, after = FRESH.what_if([load, more_load], CLOCKS)[0]
    assert (after >= before * (1 - 1e-9)).all()


@given(chosen=st.lists(loads | st.just(Load(7, 2, 3, 4, 50)), min_size=1, max_size=3))
def test_few_loads_and_many_are_answered_alike(chosen):
    few = FRESH.what_if(chosen, CLOCKS)
    many = FRESH.what_if([*chosen, *[Load(batch=1)] * 20], CLOCKS)
    for one, other in zip(few, many, strict=True):
        assert one == pytest.approx(other[: len(chosen)])


def test_mixed_iterations_cost_at_least_either_part():
    prefill = Load(prefill_tokens=1000, prefill_requests=2)
    decode = Load(batch=50, kv_tokens=20_000)
    mixed = Load(prefill_tokens=1000, prefill_requests=2, batch=50, kv_tokens=20_000)
    times, powers = FRESH.what_if([prefill, decode, mixed], CLOCKS)
    assert (times[2] >= np.maximum(times[0], times[1])).all()
    assert (times[2] <= times[0] + times[1]).all()
    truth = GPU.run(mixed, CLOCKS[0])
    assert times[2, 0] == pytest.approx(truth.time_s, rel=0.15)
    assert powers[2, 0] == pytest.approx(truth.power_w, rel=0.15)
    assert FRESH.energy_j([mixed], CLOCKS)[0, 0] == pytest.approx(times[2, 0] * powers[2, 0])


DRIFTS = {
    "30 % slower": lambda load, mhz: 1.3,
    "30 % faster": lambda load, mhz: 0.7,
    "30 % slower at low clocks": lambda load, mhz: 1.3 if mhz < 1400 else 1.0,
    "30 % slower at high load": lambda load, mhz: 1 + 0.3 * min(1.0, load.batch / 300),
}


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("drift", DRIFTS)
def test_a_miscalibrated_predictor_is_right_within_200_iterations(drift, kind):
    factor = DRIFTS[drift]
    predictor = EcoPred(PROFILE)
    unseen = traffic(300, 7, kind, factor)
    before = prediction_error(predictor, unseen)
    generator = np.random.default_rng(3)
    for sample in traffic(200, 8, kind, factor):
        noisy_s = sample.time_s * math.exp(0.02 * generator.standard_normal())
        predictor.observe(sample.load, sample.clock_mhz, noisy_s, None)
    after = prediction_error(predictor, unseen)
    assert after < 0.05
    assert after <= before + 0.002


@pytest.mark.parametrize("seed", range(5))
def test_adaptation_does_not_worsen_a_right_predictor(seed):
    predictor = EcoPred(PROFILE)
    unseen = traffic(300, 100 + seed)
    before = prediction_error(predictor, unseen)
    generator = np.random.default_rng(seed)
    for sample in traffic(600, 200 + seed):
        # Heavy-tailed noise: one iteration in fifty stalls.
        noise = 0.08 * generator.standard_normal() + (2.0 if generator.random() < 0.02 else 0.0)
        predictor.observe(sample.load, sample.clock_mhz, sample.time_s * math.exp(noise), None)
    assert prediction_error(predictor, unseen) <= before + 0.01


def test_drift_that_ends_is_forgotten():
    predictor = EcoPred(PROFILE)
    for sample in traffic(200, 1, factor=lambda load, mhz: 1.3):
        predictor.observe(sample.load, sample.clock_mhz, sample.time_s, None)
    assert predictor.correction(prefill=False) == pytest.approx(1.3, rel=0.05)
    assert predictor.correction(prefill=True) == 1.0  # the other phase saw nothing
    for sample in traffic(300, 2):
        predictor.observe(sample.load, sample.clock_mhz, sample.time_s, None)
    assert prediction_error(predictor, traffic(200, 3)) < 0.05


def test_monotone_still_after_refit():
    predictor = EcoPred(PROFILE, config=EcoPredConfig(refit_every=0))
    for sample in traffic(200, 1, factor=DRIFTS["30 % slower at high load"]):
        predictor.observe(sample.load, sample.clock_mhz, sample.time_s, None)
    assert predictor.refit(prefill=False)
    batches = [Load(batch=b, kv_tokens=40_000) for b in range(1, 600, 7)]
    times, _ = predictor.what_if(batches, CLOCKS)
    assert (np.diff(times, axis=0) >= -1e-9).all()
    assert (np.diff(times, axis=1) <= 1e-9).all()


def test_boosting_in_the_background_is_taken_up():
    predictor = EcoPred(PROFILE, background=True, config=EcoPredConfig(refit_every=64))
    samples = traffic(300, 1, factor=DRIFTS["30 % slower at high load"])
    for sample in samples[:128]:
        predictor.observe(sample.load, sample.clock_mhz, sample.time_s, None)
    deadline = time.monotonic() + 20
    while predictor.refits(prefill=False) == 0 and time.monotonic() < deadline:
        for sample in samples[128:]:
            predictor.observe(sample.load, sample.clock_mhz, sample.time_s, None)
            time.sleep(0.001)
    assert predictor.refits(prefill=False) > 0


def test_buckets_shape_the_decode_table():
    padded = Profile(
        fingerprint=PROFILE.fingerprint,
        buckets=(8, 64),
        samples=[
            Sample(
                Load(batch=b, kv_tokens=10 * b, bucket=8 if b <= 8 else 64),
                mhz,
                0.01 if b <= 8 else 0.02,
                None,
            )
            for b in (1, 2, 4, 8, 9, 16, 32, 64)
            for mhz in (1000, 2000)
        ]
        + [s for s in PROFILE.samples if s.load.prefill_tokens and s.clock_mhz == CLOCKS[0]],
    )
    predictor = EcoPred(padded, clocks_mhz=(1000, 2000))
    times, powers = predictor.what_if([Load(batch=8, kv_tokens=80), Load(batch=9)], (1000,))
    assert times[:, 0] == pytest.approx([0.01, 0.02], rel=0.05)
    assert np.isnan(powers).all()  # no power was read: nothing is invented


def test_a_profile_survives_its_file_and_is_refused_elsewhere(tmp_path):
    small = Profile(fingerprint=PROFILE.fingerprint, samples=PROFILE.samples[:50], buckets=(1, 2))
    small.save(tmp_path / "p.json")
    again = load_profile(tmp_path / "p.json")
    assert list(again.samples) == list(small.samples) and again.buckets == (1, 2)
    # The form before this one timed later pieces of prompts with the earlier ones.
    later = sum(sample.load.cached_tokens > 0 for sample in PROFILE.samples)
    PROFILE.save(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text().replace("jaxsys-profile-2", "jaxsys-profile-1")
    (tmp_path / "p.json").write_text(text)
    old = load_profile(tmp_path / "p.json")
    assert 0 < later == len(PROFILE.samples) - len(old.samples)
    assert str(later) in old.notes[-1]
    other = Fingerprint(gpu="A100", model="llama-3-8b", engine="simulated")
    with pytest.raises(UsageError, match=r"gpu='H100-SXM5-80GB' instead of 'A100'.*profile"):
        EcoPred(PROFILE, expected=other)


@pytest.mark.parametrize(
    ("text", "message"),
    [("nonsense", "not JSON"), ("[]", "not of form"), ('{"form": "jaxsys-profile-1"}', "damaged")],
)
def test_damaged_profiles_are_refused(tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_profile(path)
    with pytest.raises(UsageError, match="does not exist"):
        load_profile(tmp_path / "absent.json")


def test_too_small_profiles_and_unknown_clocks_are_refused():
    with pytest.raises(UsageError, match="0 prefill and 0 decode"):
        EcoPred(Profile(fingerprint=PROFILE.fingerprint, samples=()), clocks_mhz=(1,))
    with pytest.raises(UsageError, match=r"1234.*knows 1080"):
        FRESH.what_if([Load(batch=1)], (1234,))


def test_all_what_ifs_of_a_decision_take_under_a_third_of_a_millisecond():
    decision = [s.load for s in traffic(8, 1)]
    FRESH.what_if(decision, CLOCKS)
    times = []
    for _ in range(400):
        start = time.thread_time()  # this thread's own time: other work on the machine is not ours
        FRESH.what_if(decision, CLOCKS)
        times.append(time.thread_time() - start)
    assert sorted(times)[len(times) // 2] < 0.3e-3
