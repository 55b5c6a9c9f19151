"""The compiled simulator has `simulate`'s totals, on every strategy whose layers rest on owners."""

import random
from typing import Any

import pytest

from jaxsys.schedule import Costs, Link, Placement, simulate, trace
from jaxsys.schedule.quick import QuickMemory, QuickSchedule
from jaxsys.strategies import STRATEGIES, build

OWNED = [name for name, one in STRATEGIES.items() if one.placement is Placement.OWNER]


def random_costs(rng: random.Random, chunks: int) -> Costs:
    """No two times are alike, so that nothing cancels."""
    each = [[rng.uniform(0.5, 2) for _ in range(chunks)] for _ in range(8)]
    return Costs(
        forward_s=each[0], backward_s=each[1], input_gradient_s=each[2],
        weight_gradient_s=each[3], embed_s=0.1, head_s=0.2, update_s=0.3, before_s=0.4,
        after_s=0.5, weight_bytes=each[4], gradient_bytes=each[5],
        activation_bytes=rng.random(), residual_bytes=each[6], tap_bytes=each[7],
        other_sent_bytes=3.0,
    )  # fmt: skip


def random_link(rng: random.Random, contention: float) -> Link:
    return Link(
        latency_s=0.01, bytes_per_s=rng.uniform(0.5, 10), launch_s=0.02,
        contention=contention, waiting_contention=contention / 2,
    )  # fmt: skip


@pytest.mark.parametrize("name", OWNED)
@pytest.mark.parametrize("contention", [0.0, 0.15])
def test_totals_are_those_of_simulate(name, contention):
    rng = random.Random(f"{name} {contention}")
    for devices, microbatches in ((2, 4), (4, 8), (4, 16)):
        schedule = build(name, devices=devices, microbatches=microbatches)
        found = trace(schedule)
        costs, link = random_costs(rng, schedule.chunks), random_link(rng, contention)
        wanted = simulate(schedule, costs, link, known_trace=found)
        totals = QuickSchedule(schedule).run(costs, link)
        assert totals.step_s == wanted.step_s
        assert totals.busy_s == max(wanted.busy_s)
        assert totals.sent_bytes == pytest.approx(max(wanted.sent_bytes), rel=1e-12)
        alive = QuickMemory(schedule, found).alive_bytes(costs)
        assert alive == pytest.approx(max(wanted.peak_bytes), rel=1e-12)


ONE_MIDDLE = [name for name in OWNED if name != "gpipe"]


@pytest.mark.parametrize("name", ONE_MIDDLE)
@pytest.mark.parametrize("contention", [0.0, 0.15])
@pytest.mark.parametrize("devices", [2, 3, 5])
def test_a_middle_repeated_is_what_following_every_task_gives(name, contention, devices):
    """Few microbatches stand for any number of more, whatever tasks and transfers take."""
    rng = random.Random(f"{name} {contention} {devices}")
    few = 5 * devices
    small = build(name, devices=devices, microbatches=few)
    quick = QuickSchedule(small, period=devices)
    assert quick.middle is not None and quick.middle.microbatches == devices
    for more in (1, 2, 7):
        many = build(name, devices=devices, microbatches=few + more * devices)
        costs, link = random_costs(rng, small.chunks), random_link(rng, contention)
        wanted = simulate(many, costs, link)
        totals = quick.run(costs, link, microbatches=many.microbatches)
        assert totals.step_s == pytest.approx(wanted.step_s, rel=1e-9)
        assert totals.busy_s == pytest.approx(max(wanted.busy_s), rel=1e-9)
        assert totals.sent_bytes == pytest.approx(max(wanted.sent_bytes), rel=1e-9)


def test_a_middle_is_repeated_until_times_are_steady_and_then_multiplied():
    """A million microbatches cost what some turns of the middle do."""
    rng = random.Random(1)
    quick = QuickSchedule(build("1f1b", devices=4, microbatches=16), period=1)
    costs, link = random_costs(rng, 4), random_link(rng, 0.15)
    steps = [quick.run(costs, link, microbatches=m).step_s for m in (10**5, 10**6, 10**6 + 1)]
    each = (steps[1] - steps[0]) / 9e5
    assert steps[2] - steps[1] == pytest.approx(each, rel=1e-6)
    times: Any = (costs.forward_s, costs.backward_s)
    slowest = max(f + b for f, b in zip(*times, strict=True))
    assert each >= slowest


def test_what_repeats_itself_nowhere_has_no_middle():
    """All forward passes come first: more microbatches come in two places."""
    assert QuickSchedule(build("gpipe", devices=2, microbatches=12), period=1).middle is None
    quick = QuickSchedule(build("1f1b", devices=2, microbatches=8), period=2)
    with pytest.raises(ValueError, match="9 microbatches are not 8 and turns"):
        quick.run(random_costs(random.Random(0), 2), Link(), microbatches=9)


def test_group_collectives_are_for_simulate():
    schedule = build("dp", devices=2, microbatches=2)
    with pytest.raises(ValueError, match="dp rests replicated: use simulate"):
        QuickSchedule(schedule)
