"""The simulator's body of measured hardware: what was measured comes out, lines lie between."""

import pytest

from jaxsys.errors import UsageError
from jaxsys.serve.energy.gpu_model import Load, simulated_gpu
from jaxsys.serve.energy.profile import Fingerprint, Profile, Sample
from studies.measured_gpu import MeasuredGpu

GPU = simulated_gpu("h100", "llama-3-8b")
SAMPLES = (
    Sample(Load(batch=2, kv_tokens=200, bucket=2), 1980, 0.010, 300.0),
    Sample(Load(batch=2, kv_tokens=600, bucket=2), 1980, 0.012, 320.0),
    Sample(Load(batch=8, kv_tokens=900, bucket=8), 1980, 0.020, 400.0),
    Sample(Load(prefill_tokens=20, prefill_requests=1), 1980, 0.030, 500.0),
    Sample(Load(prefill_tokens=32, prefill_requests=1), 1980, 0.032, 500.0),
    Sample(Load(prefill_tokens=128, prefill_requests=1), 1980, 0.080, 600.0),
    Sample(Load(prefill_tokens=128, prefill_requests=1, cached_tokens=100), 1980, 0.1, None),
)


def measured(samples=SAMPLES, face_s=(0.0, 0.0)):
    profile = Profile(
        fingerprint=Fingerprint(gpu="H100", model="32x4096", engine="test"), samples=samples
    )
    return MeasuredGpu(
        profile,
        GPU.spec,
        GPU.shape,
        piece_buckets=(32, 128),
        idle_w=90.0,
        kv_capacity_tokens=5000,
        face_s=face_s,
    )


def test_what_was_measured_comes_out_and_lines_lie_between():
    gpu = measured()
    assert gpu.kv_capacity_tokens == 5000
    assert gpu.idle_power_w(345) == 90.0
    decode = gpu.run(Load(batch=2, kv_tokens=400, bucket=2), 1980)
    assert (decode.time_s, decode.power_w) == pytest.approx((0.011, 310.0))
    # Three sequences run as the eight that the step is compiled for.
    assert gpu.run(Load(batch=3, kv_tokens=900, bucket=8), 1980).time_s == pytest.approx(0.020)
    assert gpu.run(Load(batch=3, kv_tokens=900), 1980).time_s == pytest.approx(0.020)
    assert gpu.run(Load(32, 1), 1980).time_s == pytest.approx(0.031)  # the mean of two
    late = gpu.run(Load(128, 1, 50), 1980)
    assert (late.time_s, late.power_w) == pytest.approx((0.090, 600.0))
    mixed = gpu.run(Load(32, 1, 0, 8, 900, 8), 1980)
    assert mixed.time_s == pytest.approx(0.051)
    assert mixed.energy_j == pytest.approx(0.031 * 500 + 0.020 * 400)


def test_serving_adds_to_decode_steps_while_the_gpu_idles():
    gpu = measured(face_s=(0.001, 0.0005))
    step = gpu.run(Load(batch=8, kv_tokens=900, bucket=8), 1980)
    assert step.time_s == pytest.approx(0.020 + 0.001 + 8 * 0.0005)
    assert step.energy_j == pytest.approx(0.020 * 400 + 0.005 * 90)
    assert gpu.run(Load(32, 1), 1980).time_s == pytest.approx(0.031)


def test_a_profile_without_one_phase_is_refused():
    with pytest.raises(UsageError, match="must hold decode steps and prompts"):
        measured(SAMPLES[:3])
