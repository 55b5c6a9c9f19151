"""Pipelines: legal for every size, and as long, as full and as heavy as their formulas say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.errors import UsageError
from jaxsys.schedule import Costs, Data, Link, check, peak_live, simulate
from jaxsys.strategies.pipeline import (
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    one_f_one_b_overlap,
)

RESIDUALS = {
    gpipe: lambda p, m, stage: m,
    one_f_one_b: lambda p, m, stage: min(m, p - stage),
    one_f_one_b_overlap: lambda p, m, stage: min(m, 2 * (p - 1 - stage) + 1),
}
FEW = settings(max_examples=20, deadline=None)
DEVICES = st.sampled_from([1, 2, 3, 4, 8, 16])
SIZES = {"p": DEVICES, "m": st.integers(1, 24)}
TIMES = {"forward": st.integers(1, 4), "backward": st.integers(1, 6)}


@pytest.mark.parametrize("generator", RESIDUALS)
@FEW
@given(**SIZES)
def test_legal_with_the_stated_residuals(generator, p, m):
    schedule = generator(p, m)
    found = check(schedule)
    want = [RESIDUALS[generator](p, m, stage) for stage in range(p)]
    assert peak_live(schedule, found, Data.RESIDUAL) == want


@pytest.mark.parametrize("generator", [gpipe, one_f_one_b_overlap])
@FEW
@given(**SIZES, **TIMES)
def test_bubble_in_lockstep(generator, p, m, forward, backward):
    costs = Costs(forward_s=forward, backward_s=backward)
    result = simulate(generator(p, m), costs, Link(), lockstep=True)
    assert result.step_s == (m + p - 1) * (forward + backward)
    assert result.bubble == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("generator", RESIDUALS)
@FEW
@given(**SIZES, **TIMES)
def test_bubble_where_sends_do_not_block(generator, p, m, forward, backward):
    costs = Costs(forward_s=forward, backward_s=backward)
    result = simulate(generator(p, m), costs, Link(), eager_sends=True)
    assert result.step_s == (m + p - 1) * (forward + backward)


@FEW
@given(**SIZES, **TIMES)
def test_classical_1f1b_in_lockstep_pays_for_its_mixed_ticks(p, m, forward, backward):
    costs = Costs(forward_s=forward, backward_s=backward)
    result = simulate(one_f_one_b(p, m), costs, Link(), lockstep=True)
    assert result.step_s >= (m + p - 1) * (forward + backward)
    if forward == backward or p == 1 or m == 1:
        assert result.step_s == (m + p - 1) * (forward + backward)
    elif backward > forward:  # at least one F runs beside a B
        assert result.step_s > (m + p - 1) * (forward + backward)


@pytest.mark.parametrize("generator", RESIDUALS)
@FEW
@given(**SIZES)
def test_bytes_per_link(generator, p, m):
    costs = Costs(forward_s=1, backward_s=2, activation_bytes=7)
    result = simulate(generator(p, m), costs, Link())
    # M activations down from every stage but the last, M cotangents up from all but the first.
    want = [7 * m * ((stage < p - 1) + (stage > 0)) for stage in range(p)]
    assert list(result.sent_bytes) == want


def test_overlap_hides_transfers_as_long_as_the_other_kind_of_task():
    p, m = 4, 8
    costs = Costs(forward_s=1, backward_s=2, activation_bytes=1)
    link = Link(bytes_per_s=1)  # a hop takes one F
    hidden = simulate(one_f_one_b_overlap(p, m), costs, link)
    exposed = simulate(one_f_one_b(p, m), costs, link)
    # Only the P - 1 hops of the filling and of the draining pipeline have nothing to hide under.
    assert hidden.step_s == (m + p - 1) * 3 + 2 * (p - 1)
    assert exposed.step_s > hidden.step_s + m


@FEW
@given(p=DEVICES, groups=st.integers(1, 4), v=st.integers(1, 4), **TIMES)
def test_interleaved(p, groups, v, forward, backward):
    m = p * groups
    schedule = interleaved_one_f_one_b(p, m, chunks_per_device=v)
    found = check(schedule)
    costs = Costs(forward_s=forward, backward_s=backward, activation_bytes=1)
    result = simulate(schedule, costs, Link(), eager_sends=True, known_trace=found)
    assert result.step_s == (v * m + p - 1) * (forward + backward)
    assert result.bubble == pytest.approx((p - 1) / (v * m + p - 1))
    want = [min(v * m, 2 * (p - 1 - d) + (v - 1) * p + 1) for d in range(p)]
    assert peak_live(schedule, found, Data.RESIDUAL) == want
    # 2 M (v P - 1) hops in all; one device has nowhere to send to.
    assert sum(result.sent_bytes) == (2 * m * (v * p - 1) if p > 1 else 0)


def test_interleaved_needs_whole_groups_of_microbatches():
    with pytest.raises(UsageError, match="microbatches=6 .* devices=4; use 4, 8, 12, 16"):
        interleaved_one_f_one_b(4, 6)
    with pytest.raises(UsageError, match="chunks_per_device=0 must be at least 1"):
        interleaved_one_f_one_b(4, 8, chunks_per_device=0)


@pytest.mark.parametrize("generator", RESIDUALS)
@pytest.mark.parametrize(("p", "m", "value"), [(0, 4, "devices=0"), (4, 0, "microbatches=0")])
def test_nothing_to_pipeline(generator, p, m, value):
    with pytest.raises(UsageError, match=f"{value} must be at least 1"):
        generator(p, m)
