"""The governor around any policy, over fake clocks: what it measures, sets and lets go."""

import threading
import time
from typing import Any

import pytest

from jaxsys.clocks import GpuClocks, GroupClocks, ObserveOnly, SimulatedClocks
from jaxsys.errors import UsageError
from jaxsys.model import preset
from jaxsys.model.kinds import Experts
from jaxsys.serve.energy.governor import Governor
from jaxsys.serve.energy.governors import (
    Served,
    control_clocks,
    modelled_governor,
    real_governor,
    spec_of,
    warn_unmeetable,
)
from jaxsys.serve.energy.gpu_model import Load, gpu_spec, simulated_gpu
from jaxsys.serve.energy.meters import CounterMeter
from jaxsys.serve.energy.policy import OwnRule
from jaxsys.serve.energy.profile import Fingerprint, Profile, simulated_profile
from jaxsys.serve.energy.shares import Shares
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.energy.watchdog import Watchdog
from jaxsys.serve.hooks import NoGovernor
from jaxsys.serve.iterations import Iteration, PrefillPiece
from jaxsys.serve.requests import Request, SamplingParameters

SERVED = Served(model=preset("llama-3-8b"))
GPU = simulated_gpu("h100", "llama-3-8b")


def request(length: int = 10) -> Any:
    return Request(0, sampling=SamplingParameters(), arrival_s=0.0, prompt_length=length)


def iteration(index: int = 1, batch: int = 4, prompts=()) -> Iteration:
    pieces = tuple(PrefillPiece(one, 0, one.prompt_length, 0, True) for one in prompts)
    decodes = tuple(request() for _ in range(batch))
    tokens = sum(one.prompt_length for one in prompts)
    return Iteration(index, pieces, decodes, (), tokens, 0, 100 * batch, batch, 1)


def simulated_clocks(**settings: Any) -> SimulatedClocks:
    return SimulatedClocks(
        available_mhz=GPU.spec.available_mhz,
        now_s=time.monotonic,
        set_latency_s=0.0,
        name="NVIDIA H100 80GB HBM3",
        **settings,
    )


@pytest.fixture
def make():
    made = []

    def build(clocks: GpuClocks | None = None, served: Served = SERVED, **how: Any) -> Governor:
        clocks = clocks or simulated_clocks()
        governor = real_governor(clocks, "NVIDIA H100", served, SharedSlo(Slo()), **how)
        made.append(governor)
        return governor

    yield build
    for governor in made:
        governor.close()


class Blind(ObserveOnly):
    def energy_j(self):
        return None

    def power_w(self):
        return None


def test_every_governor_says_all_that_the_loop_asks_for(make):
    for governor in (make(), make(policy="own-rule"), NoGovernor()):
        governor.start(0.0)
        work = iteration()
        governor.before_iteration(work, (), 0.0)
        governor.after_iteration(work, 0.01, 0.01)
        governor.before_iteration(work, (), 0.0)
        governor.dropped(1, 0.02)
        governor.idle(9.0, 0.02)
        assert governor.method.partition(":")[0] in ("measured", "none")
        assert governor.idle_after_s is None or governor.idle_after_s > 0
        assert len(governor.reading(9.0)) == 6
        governor.close()
        governor.close()


def test_energy_is_the_counter_and_requests_share_what_was_drawn(make):
    governor = make()
    work = iteration()
    governor.before_iteration(work, (), time.monotonic())
    governor.device.spend(0.5, 400.0)
    governor.after_iteration(work, 0.5, time.monotonic())
    reading = governor.reading(time.monotonic())
    assert reading.energy_j == pytest.approx(200.0)
    assert reading.power_w == 400.0
    assert sum(one.timing.energy_j or 0 for one in work.decodes) == pytest.approx(200, rel=0.51)
    assert governor.method.startswith("measured") and "not set" not in governor.method


def test_observed_only_it_says_so_and_sets_nothing(make):
    governor = make(ObserveOnly(simulated_clocks(), "no permission"))
    work = iteration()
    governor.start(0.0)
    governor.before_iteration(work, (), time.monotonic())
    assert governor.clock_mhz == 1080  # what it would have set
    assert governor.device.actual_mhz() == 1980
    assert "observed, not set: no permission" in governor.method
    governor.after_iteration(work, 0.02, time.monotonic())


def test_no_counter_is_none(make):
    governor = make(Blind(simulated_clocks(), "blind"))
    work = iteration()
    governor.before_iteration(work, (), time.monotonic())
    governor.after_iteration(work, 0.02, time.monotonic())
    reading = governor.reading(time.monotonic())
    assert reading.energy_j is None and reading.power_w is None
    assert work.decodes[0].timing.energy_j is None


def test_the_watchdog_boosts_while_the_iteration_still_runs(make):
    governor = make()
    governor.start(time.monotonic())
    governor.before_iteration(iteration(), (), time.monotonic())
    assert governor.device.actual_mhz() == 1080
    deadline = time.monotonic() + 10
    while governor.device.actual_mhz() != 1980 and time.monotonic() < deadline:
        time.sleep(0.002)
    assert governor.device.actual_mhz() == 1980
    assert governor.record.alarms == 1


def test_iterations_planned_ahead_are_matched_with_their_own_predictions(make):
    governor = make()
    policy = governor.policy
    small, large = iteration(1, batch=1), iteration(2, batch=60)
    governor.before_iteration(small, (), 0.0)
    small_s = policy.predicted_s
    governor.before_iteration(large, (), 0.0)
    assert policy.predicted_s > small_s
    seen = []
    policy.learn = lambda ran: seen.append((ran.load.batch, ran.predicted_s))
    governor.after_iteration(small, small_s, 0.0)
    governor.after_iteration(large, 0.01, 0.0)
    assert [batch for batch, _ in seen] == [1, 60]
    assert seen[0][1] == small_s < seen[1][1]
    assert governor.record.overruns == 0


def test_the_clock_falls_when_idle_is_told_and_not_when_energy_is_read(make):
    governor = make()
    governor.start(0.0)
    governor.reading(100.0)
    assert governor.device.asked_mhz() == 1980
    governor.idle(0.4, 0.0)
    assert governor.device.asked_mhz() == 1980
    governor.idle(0.6, 0.0)
    assert governor.device.asked_mhz() == 1080


def test_a_closed_governor_sets_no_clock(make):
    governor = make()
    governor.start(0.0)
    governor.close()
    assert governor.device.asked_mhz() is None
    governor.before_iteration(iteration(), (), 0.0)  # a loop that hung goes on
    governor.idle(9.0, 0.0)
    assert governor.device.asked_mhz() is None


def test_a_gpu_whose_costs_are_not_known_is_read_and_left_alone(make):
    clocks = simulated_clocks()
    clocks.name = "NVIDIA T4"
    governor = make(clocks)
    assert isinstance(governor.policy, OwnRule)
    governor.start(0.0)
    work = iteration()
    governor.before_iteration(work, (), 0.0)
    clocks.spend(0.1, 50.0)
    governor.after_iteration(work, 0.1, 0.1)
    governor.idle(9.0, 0.1)
    assert clocks.asked_mhz() is None and governor.clock_mhz == 1980
    assert work.decodes[0].timing.energy_j is not None
    with pytest.raises(UsageError, match="--policy ecofreq needs what iterations cost"):
        make(clocks, policy="ecofreq")
    assert spec_of("NVIDIA T4") is None
    assert spec_of("NVIDIA H100 80GB HBM3") is gpu_spec("h100")


# --- tensor-parallel groups -------------------------------------------------------------------


def test_a_group_is_one_gpu_with_joint_power_and_energy():
    one, two = simulated_clocks(), simulated_clocks()
    group = GroupClocks([one, two])
    assert isinstance(group, GpuClocks)
    group.set_clock(1080)
    assert (one.asked_mhz(), two.asked_mhz(), group.asked_mhz()) == (1080, 1080, 1080)
    one.spend(2.0, 100.0)
    assert group.power_w() is None  # of the other nothing is known: half a sum is none
    two.spend(1.0, 300.0)
    assert (group.power_w(), group.energy_j()) == (400.0, 500.0)
    two.clamp_mhz = 600
    assert group.actual_mhz() == 600 and group.throttle_reasons() == {"power_cap"}
    blind = GroupClocks([one, Blind(two, "blind")])
    assert blind.energy_j() is None and not blind.can_set and blind.reason == "blind"
    group.close()
    assert (one.asked_mhz(), two.asked_mhz()) == (None, None)


def test_a_group_is_closed_whole_whatever_one_of_it_raises():
    class Broken(SimulatedClocks):
        def close(self):
            raise RuntimeError("lost")

    broken = Broken(available_mhz=(1080, 1980), now_s=lambda: 0.0)
    other = simulated_clocks()
    other.set_clock(1080)
    with pytest.raises(RuntimeError, match="lost"):
        GroupClocks([other, broken, other]).close()
    assert other.asked_mhz() is None


def qwen(tensor_parallel: int) -> Served:
    model = preset("llama-3-8b")
    import dataclasses

    model = dataclasses.replace(
        model, hidden_size=5120, intermediate_size=25600, num_layers=64, num_heads=64,
        num_kv_heads=8, head_dim=128, vocab_size=151936,
    )  # fmt: skip
    return Served(model=model, tensor_parallel=tensor_parallel)


def test_a_tensor_parallel_instance_is_governed_as_what_it_is(make):
    """Qwen3-32B on two H100s: a step as the model of two has it, and the power of both."""
    clocks = [simulated_clocks(), simulated_clocks()]
    governor = make(GroupClocks(clocks), served=qwen(2))
    two = governor.policy.predictor
    load = Load(batch=16, kv_tokens=16_000)
    known = simulated_gpu("h100", "qwen3-32b").run(load, 1980)
    times_s, powers_w = two.what_if([load], (1980,))
    assert times_s[0][0] == pytest.approx(known.time_s, rel=0.1)
    assert powers_w[0][0] == pytest.approx(known.power_w, rel=0.1)
    alone = make(simulated_clocks(), served=qwen(1)).policy.predictor
    assert alone.what_if([load], (1980,))[0][0][0] > 1.6 * times_s[0][0]
    governor.start(0.0)
    governor.before_iteration(iteration(), (), 0.0)
    assert clocks[0].asked_mhz() == clocks[1].asked_mhz() == 1080


def test_a_model_that_no_single_gpu_holds_is_governed_as_a_group():
    with pytest.raises(UsageError, match="does not fit 1 x H100"):
        modelled_governor(gpu_spec("h100"), big(1), SharedSlo())
    now = 0.0
    governor = modelled_governor(gpu_spec("h100"), big(4), SharedSlo(), now_s=lambda: now)
    work = iteration(prompts=[request(500)])
    governor.before_iteration(work, (), now)
    now = 1.0
    governor.after_iteration(work, 1.0, now)
    energy_j = governor.reading(1.0).energy_j
    expected = simulated_gpu("h100", "llama-3-70b").run(Load(500, 1, 0, 4, 400), 1080)
    assert energy_j == pytest.approx(expected.energy_j, rel=0.05)


def big(tensor_parallel: int) -> Served:
    return Served(model=preset("llama-3-70b"), tensor_parallel=tensor_parallel)


# --- energy apportioned -----------------------------------------------------------------------


class SteppingClocks(SimulatedClocks):
    """As a real GPU's: the counter steps every 100 ms, and power is off by what a test says."""

    error: float = 1.0

    def power_w(self):
        power_w = super().power_w()
        return None if power_w is None else power_w * STEPPING["error"]


STEPPING = {"error": 1.0}


@pytest.mark.parametrize("error", [1.0, 1.3, 0.7])
def test_shares_and_idle_time_add_up_to_the_counter(error):
    """However wrong the power reading is, within a fraction of a second's energy."""
    STEPPING["error"] = error
    now = 0.0
    clocks = SteppingClocks(
        available_mhz=(1080, 1980), now_s=lambda: now, set_latency_s=0.0, counter_step_s=0.1
    )
    shares = Shares(gpu_spec("h100"), GPU.shape)
    governor = Governor(
        OwnRule(), clocks, CounterMeter(clocks), choices_mhz=(), shares=shares, now_s=lambda: now
    )
    everyone = []
    for burst in range(6):
        work = [iteration(1, batch=4), iteration(2, batch=1, prompts=[request(900)])]
        for one in work:
            everyone += [*one.decodes, *(piece.request for piece in one.prefills)]
        for step in range(200):
            one = work[step % 2]
            governor.before_iteration(one, (), now)
            took_s = 0.01 + 0.02 * (step % 2)
            clocks.spend(took_s, 300.0 + 100 * burst)
            now += took_s
            governor.after_iteration(one, took_s, now)
        quiet_since_s = now
        for _ in range(8):
            clocks.spend(0.25, 90.0)
            now += 0.25
            governor.idle(now, quiet_since_s)
    reading: Any = governor.reading(now)
    shared_j = sum(one.timing.energy_j for one in everyone)
    assert shared_j + reading.idle_j == pytest.approx(clocks._energy_j, rel=0.01)
    assert reading.idle_j == pytest.approx(6 * 2.0 * 90.0, rel=0.35)
    assert shared_j > 0.9 * (clocks._energy_j - 6 * 2.0 * 90.0)


def test_a_request_bears_what_it_causes():
    shares = Shares(gpu_spec("h100"), GPU.shape)
    short, long = request(100), request(8000)
    work = Iteration(1, (), (short, long), (), 0, 0, 8100, 2, 1)
    shares.give(work, 10.0)
    assert short.timing.energy_j + long.timing.energy_j == pytest.approx(10.0)
    kv_s = 7900 * GPU.shape.kv_bytes_per_token / GPU.spec.hbm_bytes_per_s
    whole = GPU.run(Load(batch=2, kv_tokens=8100, bucket=2), 1980)
    fixed_s = GPU.shape.layers * GPU.engine.layer_s
    # The bytes that one reads more, as the share of the step that they take.
    more = (long.timing.energy_j - short.timing.energy_j) / 10.0
    assert more == pytest.approx(kv_s / (whole.time_s - fixed_s), rel=0.1)
    prompt, beside = request(2000), request(100)
    mixed = Iteration(
        1, (PrefillPiece(prompt, 0, 2000, 0, True),), (beside,), (), 2000, 0, 100, 1, 1
    )
    shares.give(mixed, 100.0)
    assert prompt.timing.energy_j > 98
    assert prompt.timing.prefill_energy_j == prompt.timing.energy_j
    assert beside.timing.prefill_energy_j is None
    assert prompt.timing.energy_j + beside.timing.energy_j == pytest.approx(100)


def test_guessed_tokens_are_borne_by_whom_they_are_for():
    shares = Shares(gpu_spec("h100"), GPU.shape)
    guessed, plain = request(100), request(100)
    shares.give(Iteration(1, (), (guessed, plain), (), 0, 0, 200, 2, 1, ((1, 2, 3), ())), 8.0)
    assert guessed.timing.energy_j + plain.timing.energy_j == pytest.approx(8.0)
    assert guessed.timing.energy_j == pytest.approx(4 * plain.timing.energy_j, rel=0.1)


def test_gpus_that_instances_share_are_counted_once():
    clocks = simulated_clocks()
    governors = [
        real_governor(
            clocks, "H100", Served(model=SERVED.model, sharing=2), SharedSlo(), "own-rule"
        )
        for _ in range(2)
    ]
    clocks.spend(1.0, 300.0)
    readings = [governor.reading(1.0) for governor in governors]
    assert sum(one.energy_j or 0 for one in readings) == pytest.approx(300.0)
    assert sum(one.power_w or 0 for one in readings) == pytest.approx(300.0)
    assert "in equal parts to 2 instances" in governors[0].method


def test_a_modelled_gpu_accounts_for_work_and_idleness():
    now = 0.0
    governor = modelled_governor(gpu_spec("h100"), SERVED, SharedSlo(), now_s=lambda: now)
    governor.start(now)
    work = iteration(prompts=[request(500)], batch=3)
    for _ in range(5):
        governor.before_iteration(work, (), now)
        now += 0.05
        governor.after_iteration(work, 0.05, now)
    busy: Any = governor.reading(now)
    assert 0 < busy.energy_j < busy.energy_at_max_j
    shared_j = sum(r.timing.energy_j or 0.0 for r in [work.prefills[0].request, *work.decodes])
    assert shared_j + busy.idle_j == pytest.approx(busy.energy_j)
    assert busy.power_w is None  # a GPU that is not there draws nothing
    governor.idle(now + 0.5, now)
    governor.idle(now + 10.0, now)
    idle: Any = governor.reading(now + 10.0)
    assert idle.energy_j - busy.energy_j == pytest.approx(10 * GPU.idle_power_w(1080), rel=0.02)
    assert idle.idle_j - busy.idle_j == pytest.approx(idle.energy_j - busy.energy_j)


# --- profiles, presets, bounds ----------------------------------------------------------------


def profile_of(**changes: Any) -> Profile:
    from jaxsys.serve.energy.profile import fingerprint_here

    whole = simulated_profile(GPU, clocks_mhz=(1980,), max_batch=64, max_prefill_tokens=512)
    print_of = {"gpu": "NVIDIA H100", "model": SERVED.model, "weights": "bfloat16"}
    return Profile(fingerprint=fingerprint_here(**print_of | changes), samples=whole.samples)


def test_a_profile_is_refused_by_what_it_was_measured_for(make):
    import dataclasses

    make(profile=profile_of())
    many_heads = dataclasses.replace(SERVED.model, num_kv_heads=32)
    experts = Experts(count=8, active=2, intermediate_size=14336)
    kind = SERVED.model.kinds[0]
    with_experts = dataclasses.replace(
        SERVED.model, experts=experts, kinds=(dataclasses.replace(kind, experts=True),)
    )
    with_window = dataclasses.replace(SERVED.model, kinds=(dataclasses.replace(kind, window=512),))
    dense, mixed = dataclasses.replace(kind, name="dense"), with_experts.kinds[0]
    after_dense = dataclasses.replace(
        with_experts,
        kinds=(dense, mixed),
        pattern=("dense",) * 3 + (mixed.name,) * (SERVED.model.num_layers - 3),
    )
    ungated = dataclasses.replace(SERVED.model, gated=False)
    for changes, message in (
        ({"gpu": "NVIDIA H200"}, "gpu='NVIDIA H200' instead of 'NVIDIA H100'"),
        ({"model": many_heads}, "32 heads and 32 of keys and values of 128"),
        ({"model": with_experts}, "2 of 8 experts of 14336"),
        ({"model": after_dense}, "2 of 8 experts of 14336 in 29 layers"),
        ({"model": with_window}, "windows of 512 in 32"),
        ({"model": ungated}, "two matrices of feed-forward"),
        ({"weights": "int8"}, "weights='int8' instead of 'bfloat16'"),
        ({"tensor_parallel": 2}, "tensor_parallel=2 instead of 1"),
    ):
        with pytest.raises(UsageError, match=message):
            make(profile=profile_of(**changes))
    earlier = Profile(
        fingerprint=Fingerprint(gpu="NVIDIA H100", model="32x4096", engine="jaxsys"),
        samples=profile_of().samples,
    )
    with pytest.raises(UsageError, match="weights='not recorded' instead of 'bfloat16'"):
        make(profile=earlier)


def test_control_clocks_are_ones_the_gpu_lists():
    assert control_clocks((1005, 1095, 1410, 1990), GPU) == (1095, 1410, 1990)
    assert control_clocks((), GPU) == GPU.spec.control_mhz
    with pytest.raises(UsageError, match="end at 900 MHz, below the sweet spot"):
        control_clocks((300, 900), GPU)


def test_an_itl_no_clock_can_meet_is_said(caplog):
    warn_unmeetable(GPU, SharedSlo(Slo(itl_s=0.001)))
    assert "ITL of 1.0 ms cannot be met" in caplog.text
    caplog.clear()
    warn_unmeetable(GPU, SharedSlo(Slo()))
    assert not caplog.records


def test_a_lifted_or_moved_deadline_raises_no_alarm():
    rung = threading.Event()
    watchdog = Watchdog(rung.set, now_s=time.monotonic)
    watchdog.expect(time.monotonic() + 0.02)
    watchdog.lift()
    assert not rung.wait(0.1)
    watchdog.expect(time.monotonic() + 0.02)
    assert rung.wait(10)
    watchdog.close()
