"""Pipelines: legal for every size, and as long, as full and as heavy as their formulas say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.schedule import Costs, Data, Link, check, peak_live, simulate
from jaxsys.strategies.pipeline import gpipe, one_f_one_b, one_f_one_b_overlap

RESIDUALS = {
    gpipe: lambda p, m, stage: m,
    one_f_one_b: lambda p, m, stage: min(m, p - stage),
    one_f_one_b_overlap: lambda p, m, stage: min(m, 2 * (p - 1 - stage) + 1),
}
SIZES = {"p": st.sampled_from([1, 2, 3, 4, 8, 16]), "m": st.integers(1, 24)}


@pytest.mark.parametrize("generator", RESIDUALS)
@given(**SIZES)
def test_legal_with_the_stated_residuals(generator, p, m):
    schedule = generator(p, m)
    found = check(schedule)
    want = [RESIDUALS[generator](p, m, stage) for stage in range(p)]
    assert peak_live(schedule, found, Data.RESIDUAL) == want


@pytest.mark.parametrize("generator", [gpipe, one_f_one_b_overlap])
@given(**SIZES)
def test_bubble_in_lockstep(generator, p, m):
    result = simulate(generator(p, m), Costs(forward_s=1.0, backward_s=2.5), Link(), lockstep=True)
    assert result.step_s == pytest.approx((m + p - 1) * 3.5)
    assert result.bubble == pytest.approx((p - 1) / (m + p - 1))
