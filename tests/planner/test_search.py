"""The search finds what looking at every plan finds, fast, from data parallelism alone."""

import random
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from jaxsys.hardware import LinkSpec, device, link
from jaxsys.model.shapes import preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.constraints import Conflict
from jaxsys.planner.costs import Precision
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.explain import reasons
from jaxsys.planner.plans import PATHS, Plan, State, data_parallel_plan
from jaxsys.planner.problem import Problem
from jaxsys.planner.search import Effort, Found, Result, _Search, _uniform, exhaustive, search
from jaxsys.planner.space import Space
from jaxsys.planner.workload import BlockWork, EdgeWork, Workload, decoder_workload
from studies.planner_regimes import limited, ratio_problem


def random_problem(seed: int, layers: int) -> Problem:
    """Uneven layers, a link near the point where transfers just hide, memory near the peak."""
    rng = random.Random(seed)
    blocks = tuple(
        BlockWork(
            parameters=rng.uniform(0.5, 2) * 1e8,
            product_flops=rng.uniform(0.5, 2) * 1e12,
            residual_bytes=rng.choice([0.3, 1.0, 2.0]) * rng.uniform(0.5, 1.5) * 2e8,
        )
        for _ in range(layers)
    )
    workload = Workload(
        name=f"random {seed}",
        blocks=blocks,
        edge=EdgeWork(parameters=1e7, backward_flops=1e11),
        activation_bytes=1e7,
        tokens=1,
        model_flops=1,
    )
    forward_s = sum(b.product_flops for b in blocks) / device("h100").product_flops_per_s
    weight_bytes = sum(b.parameters for b in blocks) * 2
    # Gathering a layer takes from 0.3 to 3 times its forward pass.
    rate = 0.875 * weight_bytes / (forward_s * rng.uniform(0.3, 3.0))
    wire = LinkSpec(name="wire", bytes_per_s=rate, latency_s=rng.choice([0, 1e-5]))
    cluster = Cluster(device=device("h100"), devices=8, link=wire)
    problem = Problem(
        workload_of=lambda size: workload,
        cluster=cluster,
        batch=8 * rng.choice([2, 3, 8]),
        memory_bytes=1e12,
        precision=Precision(gradient_bytes=rng.choice([2.0, 4.0])),
    )
    lean = Space.of(problem, microbatch_sizes=[1]).domain("shard", 8).copy("refetch").reduce("each")
    peak = Evaluator(problem).plan(next(lean.bases())).peak_bytes[0]
    return replace(problem, memory_bytes=peak * rng.choice([0.97, 1.0, 1.05, 1.3]))


def narrowed(problem: Problem, size: str) -> Space:
    """Spaces that can be looked through in about a second."""
    space = Space.of(problem, microbatch_sizes=[1]).domain("shard", 8).domain("lookahead", 1)
    space = space.domain("state", "split")
    if size == "two of two":  # 4 ** 8 plans
        space = space.domain("weights", "refetch", "between").domain("gradient", "each", "deferred")
        return space.domain("residual", "keep")
    if size == "four of three":  # 12 ** 5
        return space.domain("residual", "keep")
    return space  # 24 ** 4


SETTINGS = (
    [("two of two", 8, seed, 4) for seed in range(26)]
    + [("four of three", 5, seed, 29) for seed in range(26, 40)]
    + [("all", 4, seed, 43) for seed in range(40, 50)]
)


@pytest.mark.parametrize(
    ("size", "layers", "seed"),
    [
        pytest.param(size, layers, seed, marks=[] if seed < quick else [pytest.mark.slow])
        for size, layers, seed, quick in SETTINGS
    ],
)
def test_search_equals_exhaustive_search(size, layers, seed):
    space = narrowed(random_problem(seed, layers), size)
    start = time.process_time()
    found = search(space, seed=seed, effort=Effort(chains=32, steps=140))
    assert time.process_time() - start < 5
    best = exhaustive(space)
    assert found.best.potential == pytest.approx(best.potential, rel=1e-9)


@pytest.mark.parametrize("seed", range(50, 53))
def test_search_equals_exhaustive_search_with_three_ways_to_recompute(seed):
    plain = random_problem(seed, 3)
    workload = plain.workload(1)
    blocks = tuple(
        replace(b, elementwise_bytes=5e8, selective_bytes=0.6 * b.residual_bytes)
        for b in workload.blocks
    )
    chosen = replace(workload, blocks=blocks)
    problem = replace(plain, workload_of=lambda size: chosen, memory_bytes=plain.memory_bytes * 0.9)
    space = Space.of(problem, microbatch_sizes=[1]).domain("shard", 8).domain("lookahead", 1)
    space = space.domain("state", "split")  # 36 ** 3 plans
    found = search(space, seed=seed, effort=Effort(chains=32, steps=80))
    assert found.best.potential == pytest.approx(exhaustive(space).potential, rel=1e-9)


def llama_problem(model: str = "llama-3-8b", *, devices: int = 8, sequences: int = 4) -> Problem:
    config = preset(model)
    nodes = {"node_devices": 8, "node_link": link("ib-400")} if devices > 8 else {}
    return Problem(
        workload_of=lambda size: decoder_workload(
            model, config, sequence_length=8192, microbatch_size=size
        ),
        cluster=Cluster(device=device("h100"), devices=devices, link=link("nvlink"), **nodes),
        batch=devices * sequences,
        memory_bytes=72 * 2**30,
    )


def test_common_parts_equal_exhaustive_search():
    """All ways, orders, splits and delays at once, with every uniform path, on a small model."""
    for name in ("nvlink", "ethernet-10g"):
        problem = replace(
            llama_problem("tiny", devices=4),
            cluster=Cluster(device=device("h100"), devices=4, link=link(name)),
            memory_bytes=1e9,
        )
        space = Space.of(problem, microbatch_sizes=[2]).domain("lookahead", 1)
        space = space.domain("weights", "stay", "refetch").domain("residual", "keep")
        space = space.domain("gradient", "once", "each")
        found, best = search(space), exhaustive(space)
        assert found.best.potential == pytest.approx(best.potential, rel=1e-9)


@pytest.mark.parametrize(("layers", "turns"), [(6, 4), (8, 2), (10, 4)])
def test_no_plan_is_faster_than_the_bound_that_rules_it_out(layers, turns):
    problem = ratio_problem(ratio=4, residuals=0.5, turns=turns, devices=4, layers=layers)
    space = Space.of(problem, microbatch_sizes=[1])
    outer = _Search(space, Effort(), 0, Evaluator(problem), None)
    for base in space.bases():
        options = space.codes_of(base)
        assert options is not None
        times = outer.evaluator.evaluate(base, _uniform(base, options)).step_s
        assert times.min() >= outer.bound(base) * (1 - 1e-9), base
        if base.owners > 1:
            for row, time_s in zip(_uniform(base, options), times, strict=True):
                plan = replace(base, layers=tuple(PATHS[code] for code in row))
                assert time_s >= Evaluator(problem).least_staged_step_s(plan), plan


def test_stages_that_do_not_divide_the_layers_win_where_they_should():
    """Ten layers on four devices: stages of 3, 3, 3 and 1, in memory that two stages overflow."""
    problem = ratio_problem(ratio=8, residuals=0.2, turns=4, devices=4, layers=10)
    problem = limited(
        problem,
        lambda space: (
            space.assign("layers", 4, travels="activations")
            .domain("backward", "whole")
            .order("earliest-backward", delay=0)
            .domain("residual", "keep")
        ),
    )
    space = Space.of(problem, microbatch_sizes=[1])
    effort = Effort(refine=1, chains=8, steps=16, pairs=300, restarts=1)
    found = search(space, effort=effort)
    assert found.fits and found.best.plan.stages == 4
    even = search(space.domain("stages", 1, 2).domain("ring", 1, 2), effort=effort)
    assert even.best.potential > 1.2 * found.best.potential
    stages = space.domain("shard", 1).domain("features", 1)
    assert found.best.potential == pytest.approx(exhaustive(stages).potential, rel=1e-9)


def test_search_starts_from_data_parallelism_and_only_improves():
    problem = llama_problem()
    result = search(
        Space.of(problem),
        effort=Effort(refine=1, chains=4, steps=10, pairs=4_000, restarts=1, tolerance=1e-2),
    )
    first = result.history[0].best.plan
    assert replace(first, layers=()) == replace(data_parallel_plan(8, 32), layers=())
    potentials = [moment.best.potential for moment in result.history]
    assert all(b <= a * (1 + 1e-11) for a, b in pairwise(potentials))
    assert result.fits
    assert result.best.potential <= potentials[-1]


@pytest.mark.slow
def test_eighty_layers_within_a_minute():
    problem = llama_problem("llama-3-70b", devices=64, sequences=2)
    start = time.process_time()
    result = search(Space.of(problem), effort=Effort(refine=1, chains=16, steps=40, restarts=1))
    assert time.process_time() - start < 60
    assert result.fits
    assert Space.of(problem).contains(result.best.plan)


def test_a_budget_is_counted_and_finds_the_same_every_time():
    """Not in seconds: how busy a machine is changes nothing. What was known before is not lost."""
    seen = []
    space = Space.of(llama_problem(devices=8))
    effort = Effort(work=1e5)
    result = search(space, effort=effort, progress=seen.append)
    again = search(space, effort=effort)
    assert (result.best, result.evaluated) == (again.best, again.evaluated)
    assert result.best.potential == min(moment.best.potential for moment in seen)
    more = search(space, effort=Effort(work=4e5, refine=0))
    assert more.best.potential <= result.best.potential
    known = search(space, effort=Effort(work=1.0), known=[more.best.plan])
    assert known.best.potential <= more.best.potential


def test_constraints_bind_the_search():
    problem = llama_problem()
    space = Space.of(problem).assign("layers", 4, travels="activations").redirect()
    result = search(space, effort=Effort(refine=0))
    assert result.best.plan.stages == 4
    assert {str(p.residual) for p in result.best.plan.layers} == {"recompute"}
    with pytest.raises(Conflict):
        search(space.split("features", 64))


def test_plans_survive_json():
    plan = search(Space.of(llama_problem("tiny")), effort=Effort(refine=1)).best.plan
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_as_good_of_another_name_is_the_next_and_not_the_winner_itself():
    problem = llama_problem("tiny", devices=4)
    evaluator, plan = Evaluator(problem), data_parallel_plan(4, problem.layers)
    time_s = float(evaluator.plan(plan).step_s[0])
    named = {}
    for name, one in (("dp", plan), ("zero-1", replace(plan, state=State.SPLIT))):
        named[name] = Found(
            plan=one, potential=time_s, step_s=time_s, peak_bytes=1.0, sent_bytes=1.0, compute_s=1.0
        )
    result = Result(
        best=named["zero-1"], by_base=(named["dp"], named["zero-1"]), history=(), evaluated=2,
        skipped=0, elapsed_s=0.0,
    )  # fmt: skip
    said = reasons(problem, result)
    assert said.startswith("zero-1")
    assert "the next that fits, dp, takes 0.0 % longer" in said
