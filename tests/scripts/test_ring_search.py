"""No ring plan is shorter than WZB2, or than WZB1 where all workers run the same kinds at once."""

import pytest

from jaxsys.errors import UsageError
from jaxsys.schedule import Costs, Data, Link, check, peak_live, simulate
from jaxsys.strategies import build
from studies.ring_search import plan_cost, shortest_step

TIMES = [(1, 1, 1), (2, 3, 1), (2, 5, 2), (2, 2, 3)]
PLANS = [
    "weipipe-naive",
    "weipipe-interleave",
    "weipipe-wzb1",
    "weipipe-wzb2",
    "weipipe-wzb2-paired",
]


def test_one_worker_has_nothing_to_wait_for():
    assert shortest_step(1, 1, held=1) == 3
    assert shortest_step(1, 4, held=1, times=(2, 3, 4)) == 4 * 9
    assert shortest_step(1, 4, held=1, tick_cost="together") == 4 * 3


def test_two_workers_by_hand():
    # One runs F F I I W W, the other the same a tick later.
    assert shortest_step(2, 2, held=2) == 7
    # Together: 3 ticks with an F, 3 with an I, 2 with a W.
    assert shortest_step(2, 2, held=2, tick_cost="together") == 8


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("times", TIMES)
def test_plans_are_in_the_space_that_is_searched(name, times):
    schedule = build(name, devices=2, microbatches=4)
    held = max(peak_live(schedule, check(schedule), Data.RESIDUAL, Data.TAP))
    for tick_cost in ("busiest", "together"):
        best = shortest_step(2, 4, held=held, times=times, tick_cost=tick_cost)
        assert best is not None
        assert best <= plan_cost(schedule, times=times, tick_cost=tick_cost)
    costs = Costs(
        forward_s=times[0],
        backward_s=times[1] + times[2],
        input_gradient_s=times[1],
        weight_gradient_s=times[2],
    )
    in_step = simulate(schedule, costs, Link(), lockstep=True)
    assert plan_cost(schedule, times=times) == in_step.step_s


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 4), (2, 6), (3, 3), (3, 6)])
def test_wzb2_is_shortest_with_equal_times_and_nothing_fits_in_less(p, m):
    assert plan_cost(build("weipipe-wzb2", devices=p, microbatches=m)) == 3 * m + p - 1
    assert shortest_step(p, m, held=p) == 3 * m + p - 1
    assert shortest_step(p, m, held=p - 1) is None
    if p == 2:  # and more room does not help
        assert shortest_step(p, m, held=3 * p) == 3 * m + p - 1


@pytest.mark.parametrize(("p", "m"), [(2, 4), (2, 6), (3, 6)])
@pytest.mark.parametrize("times", TIMES)
def test_wzb1_is_shortest_where_workers_run_together(p, m, times):
    f, i, w = times
    wzb1 = build("weipipe-wzb1", devices=p, microbatches=m)
    best = (m + p - 1) * (f + i) + m * w
    assert plan_cost(wzb1, times=times, tick_cost="together") == best
    assert shortest_step(p, m, held=2 * p, times=times, tick_cost="together") == best
    # The least room for that is one less than WZB1 takes; each one less costs another W, until in
    # Interleave's room nothing is shorter than Interleave.
    for less in range(p):
        held = 2 * p - 1 - less
        found = shortest_step(p, m, held=held, times=times, tick_cost="together")
        assert found == best + less * w
    interleave = build("weipipe-interleave", devices=p, microbatches=m)
    assert plan_cost(interleave, times=times, tick_cost="together") == best + (p - 1) * w


@pytest.mark.parametrize(("p", "m"), [(2, 4), (2, 6), (3, 6)])
def test_paired_wzb2_is_shortest_where_i_takes_as_long_as_f_and_w(p, m):
    times = (2, 3, 1)
    paired = build("weipipe-wzb2-paired", devices=p, microbatches=m)
    assert plan_cost(paired, times=times) == (2 * m + p - 1) * 3
    assert shortest_step(p, m, held=p, times=times) == (2 * m + p - 1) * 3
    if p == 2:  # and more room does not help
        assert shortest_step(p, m, held=3 * p, times=times) == (2 * m + p - 1) * 3


def test_how_far_from_the_shortest_with_unequal_times():
    # Two workers that run what they like, where I takes longer than F and W: best, WZB1, WZB2.
    times = (2, 5, 2)
    cost = {name: plan_cost(build(name, devices=2, microbatches=6), times=times) for name in PLANS}
    assert shortest_step(2, 6, held=4, times=times) == 59
    assert shortest_step(2, 6, held=2, times=times) == 61
    assert cost["weipipe-wzb1"] == 61
    assert cost["weipipe-wzb2-paired"] == 61
    assert cost["weipipe-interleave"] == 63
    assert cost["weipipe-wzb2"] == 65


def test_sizes_that_are_not_legal():
    with pytest.raises(UsageError, match="microbatches=3"):
        shortest_step(2, 3, held=2)
    with pytest.raises(UsageError, match="times="):
        shortest_step(2, 2, held=2, times=(1, 0, 1))
