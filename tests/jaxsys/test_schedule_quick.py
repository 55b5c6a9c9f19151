"""The compiled simulator has `simulate`'s totals, on every strategy whose layers rest on owners."""

import random

import pytest

from jaxsys.schedule import Costs, Link, Placement, simulate, trace
from jaxsys.schedule.quick import QuickMemory, QuickSchedule
from jaxsys.strategies import STRATEGIES, build

OWNED = [name for name, one in STRATEGIES.items() if one.placement is Placement.OWNER]


@pytest.mark.parametrize("name", OWNED)
@pytest.mark.parametrize("contention", [0.0, 0.15])
def test_totals_are_those_of_simulate(name, contention):
    rng = random.Random(f"{name} {contention}")
    for devices, microbatches in ((2, 4), (4, 8), (4, 16)):
        schedule = build(name, devices=devices, microbatches=microbatches)
        found = trace(schedule)
        each = [[rng.uniform(0.5, 2) for _ in range(schedule.chunks)] for _ in range(8)]
        costs = Costs(
            forward_s=each[0], backward_s=each[1], input_gradient_s=each[2],
            weight_gradient_s=each[3], embed_s=0.1, head_s=0.2, update_s=0.3, before_s=0.4,
            after_s=0.5, weight_bytes=each[4], gradient_bytes=each[5],
            activation_bytes=rng.random(), residual_bytes=each[6], tap_bytes=each[7],
            other_sent_bytes=3.0,
        )  # fmt: skip
        link = Link(
            latency_s=0.01, bytes_per_s=rng.uniform(0.5, 10), launch_s=0.02,
            contention=contention, waiting_contention=contention / 2,
        )  # fmt: skip
        wanted = simulate(schedule, costs, link, known_trace=found)
        totals = QuickSchedule(schedule).run(costs, link)
        assert totals.step_s == wanted.step_s
        assert totals.busy_s == max(wanted.busy_s)
        assert totals.sent_bytes == pytest.approx(max(wanted.sent_bytes), rel=1e-12)
        alive = QuickMemory(schedule, found).alive_bytes(costs)
        assert alive == pytest.approx(max(wanted.peak_bytes), rel=1e-12)


def test_group_collectives_are_for_simulate():
    schedule = build("dp", devices=2, microbatches=2)
    with pytest.raises(ValueError, match="dp rests replicated: use simulate"):
        QuickSchedule(schedule)
