"""Zero-bubble pipelines: their published bubbles and memory, from the event simulation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.errors import UsageError
from jaxsys.schedule import Costs, Data, Link, TaskKind, check, peak_live, simulate
from jaxsys.strategies.pipeline import one_f_one_b
from jaxsys.strategies.stages import earliest_ticks
from jaxsys.strategies.zero_bubble import (
    zero_bubble_h1,
    zero_bubble_h2,
    zero_bubble_overlap,
)

FEW = settings(max_examples=20, deadline=None)
DEVICES = st.sampled_from([1, 2, 3, 4, 8, 16])
BOTH = [zero_bubble_h1, zero_bubble_h2]


def costs_of(forward=1.0, input_gradient=1.0, weight_gradient=1.0):
    return Costs(
        forward_s=forward,
        backward_s=input_gradient + weight_gradient,
        input_gradient_s=input_gradient,
        weight_gradient_s=weight_gradient,
        activation_bytes=1,
    )


def longest_idle_inside_a_span(result):
    rows = zip(result.spans_s, result.busy_s, strict=True)
    return max(end - start - busy for (start, end), busy in rows)


@pytest.mark.parametrize("generator", BOTH)
@FEW
@given(p=DEVICES, m=st.integers(1, 40))
def test_legal_and_as_long_as_no_pipeline_can_avoid(generator, p, m):
    schedule = generator(p, m)
    found = check(schedule)
    result = simulate(schedule, costs_of(), Link(), lockstep=True, known_trace=found)
    # The last stage cannot start before P - 1 forwards and has 3 M tasks. A first stage waits for
    # 2 P - 1 tasks of its first microbatch, and then has M - 1 more I and at least as many F.
    assert result.step_s == max(3 * m + p - 1, 2 * m + 2 * p - 1)
    assert schedule.ticks == result.step_s
    want = [m * ((stage < p - 1) + (stage > 0)) for stage in range(p)]
    assert list(result.sent_bytes) == want


@FEW
@given(p=DEVICES, m=st.integers(1, 40))
def test_h1_holds_what_1f1b_holds_on_its_first_stage(p, m):
    schedule = zero_bubble_h1(p, m)
    held = peak_live(schedule, check(schedule), Data.RESIDUAL, Data.TAP)
    assert max(held) == min(m, p)


@FEW
@given(p=DEVICES, m=st.integers(1, 40))
def test_h2_holds_twice_as_much_and_never_idles(p, m):
    schedule = zero_bubble_h2(p, m)
    found = check(schedule)
    assert max(peak_live(schedule, found, Data.RESIDUAL, Data.TAP)) == min(m, 2 * p - 1)
    result = simulate(schedule, costs_of(), Link(), lockstep=True, known_trace=found)
    assert longest_idle_inside_a_span(result) == max(0, 2 * p - 1 - m)
    assert result.inner_bubble == pytest.approx(
        max(0, 2 * p - 1 - m) / (3 * m + max(0, 2 * p - 1 - m))
    )


@FEW
@given(p=st.sampled_from([2, 3, 4, 8, 16]), extra=st.integers(0, 24))
def test_h1_bubble_is_a_third_of_1f1b_with_equal_times(p, extra):
    m = p + extra
    h1 = simulate(zero_bubble_h1(p, m), costs_of(), Link(), eager_sends=True)
    whole = simulate(one_f_one_b(p, m), costs_of(), Link(), eager_sends=True)
    assert h1.step_s - 3 * m == p - 1
    assert whole.step_s - 3 * m == 3 * (p - 1)


@FEW
@given(
    p=DEVICES,
    extra=st.integers(0, 20),
    forward=st.integers(2, 5),
    input_gradient=st.integers(2, 7),
    weight_gradient=st.integers(1, 2),
)
def test_bubbles_with_unequal_times(p, extra, forward, input_gradient, weight_gradient):
    m = 2 * p - 1 + extra
    costs = costs_of(forward, input_gradient, weight_gradient)
    busy = m * (forward + input_gradient + weight_gradient)
    h1 = simulate(zero_bubble_h1(p, m), costs, Link(), eager_sends=True)
    assert h1.step_s - busy == (p - 1) * (forward + input_gradient - weight_gradient)
    h2 = simulate(zero_bubble_h2(p, m), costs, Link(), eager_sends=True)
    want = (p - 1) * (forward + input_gradient - 2 * weight_gradient)
    assert longest_idle_inside_a_span(h2) == want


@pytest.mark.parametrize("generator", BOTH)
def test_weight_gradients_wait(generator):
    tasks = {(t.kind, t.device, t.microbatch): t.tick for t in generator(4, 12).tasks}
    waits = [
        tasks[TaskKind.WEIGHT_GRADIENT, 3, m] - tasks[TaskKind.INPUT_GRADIENT, 3, m]
        for m in range(12)
    ]
    assert min(waits) > 1  # the last stage's never follow at once
    assert tasks[TaskKind.WEIGHT_GRADIENT, 0, 0] == tasks[TaskKind.INPUT_GRADIENT, 0, 0] + 1


@FEW
@given(
    p=DEVICES,
    m=st.integers(1, 24),
    f=st.integers(1, 5),
    i=st.integers(1, 5),
    w=st.integers(1, 5),
)
def test_overlap_in_lockstep_whatever_the_times(p, m, f, i, w):
    schedule = zero_bubble_overlap(p, m)
    found = check(schedule)
    result = simulate(schedule, costs_of(f, i, w), Link(), lockstep=True, known_trace=found)
    assert result.step_s == (m + p - 1) * (f + i) + m * w
    residuals = peak_live(schedule, found, Data.RESIDUAL)
    assert residuals == [min(m, 2 * (p - 1 - stage) + 1) for stage in range(p)]
    assert peak_live(schedule, found, Data.TAP) == [min(m, stage + 1) for stage in range(p)]
    assert max(peak_live(schedule, found, Data.RESIDUAL, Data.TAP)) == min(m, 2 * p - 1)
    # Every hop leaves under one kind of task and lands before its reader's.
    assert all(move.arrive == move.start + 1 for move in schedule.moves)


def test_overlap_hides_hops_under_one_task():
    schedule, slow = (
        zero_bubble_overlap(4, 12),
        Link(bytes_per_s=1),
    )  # a hop takes as long as a task
    free = simulate(schedule, costs_of(), Link(), lockstep=True)
    result = simulate(schedule, costs_of(), slow, lockstep=True)
    # What is exposed are the P - 1 hops each of an empty pipeline filling and draining.
    assert result.step_s - free.step_s == 2 * (4 - 1)


@pytest.mark.parametrize("generator", [*BOTH, zero_bubble_overlap])
@pytest.mark.parametrize(("p", "m", "value"), [(0, 4, "devices=0"), (4, 0, "microbatches=0")])
def test_nothing_to_pipeline(generator, p, m, value):
    with pytest.raises(UsageError, match=f"{value} must be at least 1"):
        generator(p, m)


def ticks_of_two_steps(generator, p, m):
    """Two steps one after the other on each stage, which waits for no other stage in between."""
    schedule = generator(p, m)
    orders = []
    for device in range(p):
        mine = sorted((t for t in schedule.tasks if t.device == device), key=lambda t: t.tick)
        orders.append(
            [(t.kind, t.chunk, t.microbatch + step * m) for step in range(2) for t in mine]
        )
    return 1 + max(task.tick for task in earliest_ticks(orders, chunks=p))


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_h2_gains_where_stages_need_not_end_a_step_together(p):
    m = 2 * p
    assert ticks_of_two_steps(zero_bubble_h2, p, m) == 2 * 3 * m + (p - 1)
    assert ticks_of_two_steps(zero_bubble_h1, p, m) == 2 * (3 * m + (p - 1))
