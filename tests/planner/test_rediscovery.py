"""From data parallelism alone, the search finds each known strategy where it is the best plan."""

import pytest

from jaxsys.errors import UsageError
from jaxsys.planner.cats import cats, grouped
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.plans import PATHS, Order, Plan, State
from jaxsys.planner.recognise import describe, recognise, recognise_schedule
from jaxsys.planner.search import Effort, search
from jaxsys.planner.space import Space
from jaxsys.schedule import Data
from jaxsys.strategies import zero
from jaxsys.strategies.data_parallel import data_parallel
from jaxsys.strategies.pipeline import gpipe, one_f_one_b, one_f_one_b_overlap
from jaxsys.strategies.weipipe import interleave
from studies.planner_regimes import ratio_problem, regimes

REGIMES = {regime.name: regime for regime in regimes()}
LONG = ("1f1b", "zb-h1", "zero-3.5")
"""Strategies whose search takes longest, and which others of their families stand for."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in REGIMES],
)
def test_each_strategy_is_found_where_it_is_best(name):
    problem = REGIMES[name].problem
    space = Space.of(problem, microbatch_sizes=[1])
    effort = Effort(refine=1, chains=8, steps=16, pairs=300, restarts=1, tolerance=5e-3)
    result = search(space, effort=effort)
    plan = result.best.plan
    assert result.fits
    assert recognise(plan) == name, describe(plan)
    if plan.devices == plan.shard * plan.stages * plan.ring:
        assert recognise_schedule(to_schedule(problem, plan)) == name
    # All other strategies that were looked at are behind.
    others = [found for found in result.by_base if recognise(found.plan) != name]
    assert all(found.potential > result.best.potential for found in others)


@pytest.mark.parametrize(
    "schedule",
    [
        data_parallel(4, 8, chunks=3),
        zero.zero_1(4, 8, chunks=3),
        zero.zero_2(4, 12, chunks=3),
        zero.zero_3(4, 8, chunks=3),
        zero.zero_3_5(4, 8, chunks=3),
        zero.zero_3_5(4, 12, chunks=5, keep=[0, 1]),
        zero.zero_4(4, 12, chunks=3),
        zero.zero_4(4, 8, chunks=6, keep=[0], defer=[2]),
        gpipe(4, 16),
        one_f_one_b(4, 16),
        one_f_one_b_overlap(4, 16),
        interleave(4, 8),
    ],
    ids=lambda s: s.name,
)
def test_schedules_are_named_by_where_their_blocks_are(schedule):
    assert recognise_schedule(schedule) == schedule.name


def test_one_microbatch_is_zero_3_whatever_it_was_asked_to_be():
    assert recognise_schedule(zero.zero_4(4, 4, chunks=3)) == "zero-3"


def test_like_blocks_are_grouped():
    found = cats(zero.zero_3(4, 8, chunks=6))
    weights = [g for g in grouped(found) if g[0].block.data is Data.WEIGHT]
    # All chunks are gathered alike but for the distance between uses, which is each chunk's own.
    assert sum(map(len, weights)) == 6
    gradients = [g for g in grouped(found) if g[0].block.data is Data.GRADIENT]
    assert all(cat.needs for group in gradients for cat in group)
    residuals = [g for g in grouped(found) if g[0].block.data is Data.RESIDUAL]
    # A residual's lifetime depends on its chunk and device, not on the microbatch's number.
    assert len(residuals) == 6 * 4


def test_descriptions_tell_what_the_name_does_not():
    plan = Plan(
        replicas=2, shard=4, features=2, state=State.SPLIT, layers=(PATHS[-1], PATHS[-1], PATHS[0])
    )
    text = describe(plan)
    assert text.startswith("zero-4 over 4")
    for part in ("each of 2 (tp-sp)", "2 times", "recompute in 2 of 3 layers", "2 deferred"):
        assert part in text


def test_plan_files_of_another_version_or_kind_are_refused():
    plan = Plan(stages=2, order=Order.SPACED, layers=(PATHS[0],) * 4)
    value = plan.to_json()
    assert Plan.from_json(value) == plan
    with pytest.raises(UsageError, match="version 99"):
        Plan.from_json({**value, "version": 99})
    with pytest.raises(UsageError, match="format must be"):
        Plan.from_json({"rows": []})
    with pytest.raises(
        UsageError, match="its field 'order' is 'sideways', and must be one of depth-first"
    ):
        Plan.from_json({**value, "order": "sideways"})
    with pytest.raises(UsageError, match="the plan is not JSON"):
        Plan.from_json("{")


def test_a_plan_of_another_model_is_refused():
    problem = ratio_problem(ratio=1, residuals=1, turns=1, layers=4)
    with pytest.raises(UsageError, match="for 3 layers, the model has 4"):
        to_schedule(problem, Plan(shard=8, layers=(PATHS[0],) * 3))
