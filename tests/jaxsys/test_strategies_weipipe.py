"""WeiPipe's turn plans: legal for every size, and as long and heavy as their formulas say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.errors import UsageError
from jaxsys.schedule import Costs, Data, Link, TaskKind, check, peak_live, simulate
from jaxsys.strategies.weipipe import interleave, naive, wzb1, wzb2, wzb2_paired

FEW = settings(max_examples=12, deadline=None)
PLANS = [naive, interleave, wzb1, wzb2, wzb2_paired]
SIZES = {"p": st.sampled_from([2, 3, 4, 5, 8]), "rounds": st.integers(1, 3)}
TIMES = {"f": st.integers(1, 4), "i": st.integers(1, 4), "w": st.integers(1, 4)}


def costs_of(f, i, w):
    return Costs(forward_s=f, backward_s=i + w, input_gradient_s=i, weight_gradient_s=w)


def step_in_lockstep(generator, p, a, f, i, w):
    """The closed formulas; a = M / P."""
    m = a * p
    if generator is naive:
        # Ticks with an F alone: P at the start, one between microbatches. B runs in all others.
        mixed = (a - 1) * (p - 1) * max(f, i + w)  # F of the next beside B of the last
        mixed += a * (p - 1) * max(f, i + w)  # F of the late workers beside B of the early ones
        return (p + a - 1) * f + mixed + a * (i + w) + (p - 1) * (i + w)
    if generator is wzb2:
        one = (p - 1) * (max(f, i) + max(i, w)) + f + i + w
        return a * one + (a - 1) * (p - 1) * max(f, w) + (p - 1) * (f + w)
    if generator is wzb2_paired:
        mixed = (p - 1) * (max(f, i) + max(i, w) + 2 * (a - 1) * max(i, f + w))
        return p * f + a * i + (a - 1) * (f + w) + p * w + mixed
    second = i + w if generator is interleave else i
    overlap = (p - 1) * min(f, second) if a == 1 else 0
    return (m + p - 1) * (f + second) + (m * w if generator is wzb1 else 0) - overlap


@pytest.mark.parametrize("generator", PLANS)
@FEW
@given(**SIZES, **TIMES)
def test_legal_and_as_long_in_lockstep_as_the_formula(generator, p, rounds, f, i, w):
    schedule = generator(p, p * rounds)
    found = check(schedule)
    costs = costs_of(f, i, w)
    result = simulate(schedule, costs, Link(), lockstep=True, known_trace=found)
    assert result.step_s == pytest.approx(step_in_lockstep(generator, p, rounds, f, i, w))
    free = simulate(schedule, costs, Link(), known_trace=found)
    assert free.step_s <= result.step_s
    # Weights are not produced by compute, so with nothing to wait for nothing is idle.
    eager = simulate(schedule, costs, Link(), eager_sends=True, known_trace=found)
    assert eager.step_s == pytest.approx(p * rounds * (f + i + w))


@FEW
@given(**SIZES)
def test_bubbles_with_equal_times(p, rounds):
    m = p * (rounds + 1)
    bubble_s = {
        generator: simulate(generator(p, m), costs_of(1, 1, 1), Link(), lockstep=True).step_s
        - 3 * m
        for generator in PLANS
    }
    assert bubble_s[interleave] == 3 * (p - 1)
    assert bubble_s[wzb1] == 2 * (p - 1)
    assert bubble_s[wzb2] == p - 1
    assert bubble_s[naive] == (rounds + 2) * (p - 1)


@FEW
@given(**SIZES, f=st.integers(1, 4), w=st.integers(1, 4))
def test_paired_waves_where_i_takes_as_long_as_f_and_w(p, rounds, f, w):
    m = p * rounds
    result = simulate(wzb2_paired(p, m), costs_of(f, f + w, w), Link(), lockstep=True)
    assert result.step_s == (2 * m + p - 1) * (f + w)


def test_naive_reaches_at_most_three_quarters_where_a_backward_takes_two_forwards():
    result = simulate(naive(8, 8 * 16), costs_of(1, 1, 1), Link(), lockstep=True)
    assert 1 - result.bubble == pytest.approx(0.77, abs=0.01)
    recompute = simulate(naive(8, 8 * 16), costs_of(1, 2, 1), Link(), lockstep=True)
    assert 1 - recompute.bubble == pytest.approx(0.68, abs=0.01)


@FEW
@given(**SIZES)
def test_with_equal_times_only_wzb2_keeps_every_worker_busy_inside_its_span(p, rounds):
    m = p * (rounds + 1)
    for generator in PLANS:
        result = simulate(generator(p, m), costs_of(1, 1, 1), Link(), lockstep=True)
        assert (result.inner_bubble == 0) == (generator is wzb2)


@pytest.mark.parametrize("generator", PLANS)
@FEW
@given(**SIZES)
def test_held(generator, p, rounds):
    schedule = generator(p, p * (rounds + 1))
    found = check(schedule)
    assert peak_live(schedule, found, Data.RESIDUAL) == [p] * p
    both = peak_live(schedule, found, Data.RESIDUAL, Data.TAP)
    assert both == ([2 * p - worker for worker in range(p)] if generator is wzb1 else [p] * p)
    weights, sums = (max(peak_live(schedule, found, d)) for d in (Data.WEIGHT, Data.GRADIENT))
    continuous = generator in (interleave, wzb1)
    # In waves the owner keeps its chunk for the next wave, in either lane.
    assert weights <= (2 if continuous else 4)
    assert sums <= (1 if continuous else 2)


@FEW
@given(**SIZES)
def test_chunks_sent(p, rounds):
    m = p * rounds
    costs = Costs(
        forward_s=1,
        backward_s=2,
        input_gradient_s=1,
        weight_gradient_s=1,
        weight_bytes=1,
        gradient_bytes=10_000,
    )

    def sent(generator):
        total = round(sum(simulate(generator(p, m), costs, Link()).sent_bytes))
        return total % 10_000, total // 10_000  # weights, sums

    hops = p * (p - 1) + p * (p - 1) // 2  # with the wave, and between owner and wave
    want = (2 * (hops - (p - 1)) * rounds, hops * rounds)  # weights skip the hop to their owner
    assert sent(naive) == sent(wzb2) == sent(wzb2_paired) == want
    # M + P - 2 hops of P chunks in each weight stream, but the last ones of F have no reader.
    weights = 2 * p * (m + p - 2) - p * (p - 1) // 2
    # M - 1 hops of P sums and, where P is even, another for each of them to go home.
    sums = p * (m - 1) + p - p % 2
    assert sent(wzb1) == (weights, sums)
    # Interleave's sums of earlier chunks start later, but all start on worker 0.
    assert sent(interleave) == (weights, sums + p * (p - 1) // 2)


@pytest.mark.parametrize("generator", PLANS)
def test_weights_and_sums_only_go_to_the_next_worker_but_for_the_last_hop(generator):
    schedule = generator(4, 12)
    for move in schedule.moves:
        if move.source != move.target and move.arrive < schedule.ticks:
            assert move.target == (move.source + 1) % 4
        assert move.arrive == move.start + 1


def test_weight_gradients_of_wzb1_wait_and_run_together():
    p, m = 4, 12
    ticks = {}
    for task in wzb1(p, m).tasks:
        if task.kind is TaskKind.WEIGHT_GRADIENT:
            ticks.setdefault(task.tick, set()).add(task.device)
    assert ticks == {tick: set(range(p)) for tick in range(2 * p, 2 * p + m)}


@pytest.mark.parametrize("generator", PLANS)
def test_sizes_that_the_ring_cannot_divide(generator):
    with pytest.raises(UsageError, match="devices=1: a weight ring needs at least 2"):
        generator(1, 4)
    with pytest.raises(UsageError, match="microbatches=6 .* devices=4; use 4, 8, 12, 16"):
        generator(4, 6)
    with pytest.raises(UsageError, match="microbatches=2 .* devices=4; use 4, 8, 12, 16"):
        generator(4, 2)
