"""The ZeRO family as schedules: legal, with the counts, times and memory that theory gives."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.errors import UsageError
from jaxsys.schedule import Costs, Data, Link, MoveKind, check, simulate
from jaxsys.strategies import zero

STAGES = [zero.zero_1, zero.zero_2, zero.zero_3, zero.zero_3_5, zero.zero_4]


def count(schedule, kind):
    return sum(move.kind is kind for move in schedule.moves)


@pytest.mark.parametrize("stage", STAGES)
@given(
    devices=st.integers(1, 8),
    turns=st.integers(1, 5),
    chunks=st.integers(1, 7),
    lookahead=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_every_stage_is_legal(stage, devices, turns, chunks, lookahead):
    check(stage(devices, devices * turns, chunks=chunks, lookahead=lookahead))


@given(
    data=st.data(), turns=st.integers(1, 4), chunks=st.integers(1, 5), lookahead=st.integers(1, 2)
)
@settings(max_examples=60, deadline=None)
def test_every_mixture_is_legal(data, turns, chunks, lookahead):
    sets = [data.draw(st.sets(st.integers(0, chunks - 1))) for _ in range(4)]
    check(
        zero.trajectory(
            2,
            2 * turns,
            chunks=chunks,
            keep_within=sets[0],
            keep_between=sets[1],
            defer=sets[2] - sets[3],
            accumulate=sets[3],
            lookahead=lookahead,
        )
    )


@pytest.mark.parametrize(("turns", "chunks"), [(1, 4), (3, 8), (4, 6)])
def test_collective_counts(turns, chunks):
    p = 4
    gathers = {
        "zero-1": chunks,
        "zero-2": chunks,
        "zero-3": 2 * turns * chunks,
        "zero-3.5": (turns + 1) * chunks,
        "zero-4": (turns + 1) * chunks,
    }
    for stage in STAGES:
        schedule = stage(p, p * turns, chunks=chunks)
        assert count(schedule, MoveKind.ALL_GATHER) == gathers[schedule.name]
        reductions = chunks if schedule.name == "zero-1" else turns * chunks
        assert count(schedule, MoveKind.REDUCE_SCATTER) == reductions


def test_one_microbatch_falls_back_to_zero_3():
    plain = zero.zero_3(4, 4, chunks=5)
    for stage in (zero.zero_3_5, zero.zero_4):
        assert stage(4, 4, chunks=5).moves == plain.moves


def test_zero_4_reduces_during_the_next_forward_pass_and_never_after_the_last():
    turns, chunks = 3, 4
    schedule = zero.zero_4(2, 2 * turns, chunks=chunks)
    starts = [m.start for m in schedule.moves if m.kind is MoveKind.REDUCE_SCATTER]
    forward = {
        zero.forward_tick(chunks, turn, c) for turn in range(1, turns) for c in range(chunks)
    }
    last = {zero.backward_tick(chunks, turns - 1, c) + 1 for c in range(chunks)}
    assert sorted(starts) == sorted(forward | last)


@pytest.mark.parametrize(("a", "g"), [(0.5, 0.5), (1.0, 1.0), (1.4, 1.4), (2.0, 1.5), (0.7, 2.1)])
def test_steady_microbatch_times(a, g):
    """Per layer: Z3 = max(a,f) + max(a+g,kf), Z3.5 = f + max(a+g,kf), Z4 = max(g,f) + max(a,kf)."""
    f, k, p, chunks = 1.0, 2.0, 2, 40
    weight = 2.0 * a  # (P-1)/P of it at one byte a second
    costs = Costs(forward_s=f, backward_s=k * f, weight_bytes=weight, gradient_bytes=2.0 * g)
    link = Link(bytes_per_s=1.0)

    def step(stage, turns):
        return simulate(stage(p, p * turns, chunks=chunks), costs, link).step_s

    expected = {
        zero.zero_3: max(a, f) + max(a + g, k * f),
        zero.zero_3_5: f + max(a + g, k * f),
        zero.zero_4: max(g, f) + max(a, k * f),
    }
    for stage, per_layer in expected.items():
        steady = step(stage, 5) - step(stage, 4)
        # The seam between two passes shifts what one collective hides behind.
        assert steady / chunks == pytest.approx(per_layer, abs=2 * (a + g) / chunks)


def peak(schedule, weight, residual, gradient=0.0):
    costs = Costs(
        forward_s=1,
        backward_s=2,
        weight_bytes=weight,
        residual_bytes=residual,
        gradient_bytes=gradient,
    )
    return max(simulate(schedule, costs, Link()).peak_bytes)


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 9), (0.5, 18), (1.0, 36), (3.0, 36)])
def test_keepable_of_uniform_chunks(ratio, kept):
    found = zero.keepable([1.0] * 36, [ratio] * 36)
    assert found == frozenset(range(kept))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8, 1.0, 2.0])
def test_what_is_keepable_makes_no_new_peak(ratio):
    chunks = 12
    kept = zero.keepable([1.0] * chunks, [ratio] * chunks)
    base = peak(zero.zero_3(2, 6, chunks=chunks), 1.0, ratio)
    assert peak(zero.zero_3_5(2, 6, chunks=chunks, keep=kept), 1.0, ratio) <= base + 1e-9
    if len(kept) < chunks:
        top_first = range(chunks - len(kept), chunks)
        if ratio <= 0.5:
            assert peak(zero.zero_3_5(2, 6, chunks=chunks, keep=top_first), 1.0, ratio) > base


def test_keepable_is_the_largest_legal_set_of_equal_weights():
    rng = random.Random(3)
    for _ in range(20):
        residuals = [rng.choice([0.2, 0.6, 1.0, 1.7]) for _ in range(6)]
        best = 0
        for size in range(7):
            for members in itertools.combinations(range(6), size):
                suffix = all(
                    sum(i >= low for i in members) <= sum(residuals[low:]) + 1e-9
                    for low in range(6)
                )
                best = max(best, size) if suffix else best
        assert len(zero.keepable([1.0] * 6, residuals)) == best


def test_retained_weights_live_until_the_next_forward():
    """ZeRO-3.5's B copy is the one that the next F reads; ZeRO-3's is dropped after B."""
    chunks, turns = 3, 2
    result = check(zero.zero_3_5(2, 2 * turns, chunks=chunks))
    lives = {
        (copy.block.chunk, copy.born): copy.last_use
        for copy in result.on_device(0)
        if copy.block.data is Data.WEIGHT
    }
    for chunk in range(chunks):
        backward = zero.backward_tick(chunks, 0, chunk)
        assert lives[chunk, backward] == zero.forward_tick(chunks, 1, chunk)


def test_refusals():
    with pytest.raises(UsageError, match="multiple of devices=4"):
        zero.zero_3(4, 6, chunks=2)
    with pytest.raises(UsageError, match="keep_between=\\[7\\]"):
        zero.zero_3_5(2, 4, chunks=4, keep=[7])
    with pytest.raises(UsageError, match="lookahead=0"):
        zero.zero_3(2, 4, chunks=4, lookahead=0)
    with pytest.raises(UsageError, match="both deferred and accumulated"):
        zero.trajectory(2, 4, chunks=4, defer=[1], accumulate=[1])
