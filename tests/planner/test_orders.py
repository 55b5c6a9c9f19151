"""What a plan makes of order, split and delay is what the literature describes, to the tick."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxsys.errors import UsageError
from jaxsys.hardware import LinkSpec, device
from jaxsys.lowering.programs import block_program
from jaxsys.model import abstract_parameters, layered
from jaxsys.model.shapes import preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.estimates import plan_costs, schedule_link
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.orders import staged_schedule
from jaxsys.planner.plans import PATHS, Backward, Order, Plan
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import recognise, recognise_schedule
from jaxsys.planner.space import Space
from jaxsys.planner.workload import BlockWork, EdgeWork, Workload, decoder_workload
from jaxsys.schedule import simulate
from jaxsys.strategies import build

SPLIT = Backward.SPLIT
CHOICES = {
    "gpipe": {"order": Order.ALL_FORWARD},
    "1f1b": {"order": Order.EARLIEST_BACKWARD},
    "1f1b-overlap": {"order": Order.SPACED},
    "1f1b-interleaved": {"order": Order.EARLIEST_BACKWARD, "chunks": 2},
    "zb-h1": {"order": Order.EARLIEST_BACKWARD, "backward": SPLIT, "delay": 1},
    "zb-h2": {"order": Order.EAGER_FORWARD, "backward": SPLIT, "delay": 2},
    "zb-overlap": {"order": Order.SPACED, "backward": SPLIT},
    "weipipe-naive": {"order": Order.DEPTH_FIRST},
    "weipipe-interleave": {"order": Order.SIDE_BY_SIDE},
    "weipipe-wzb1": {"order": Order.SIDE_BY_SIDE, "backward": SPLIT},
    "weipipe-wzb2": {"order": Order.DEPTH_FIRST, "backward": SPLIT},
    "weipipe-keep": {"order": Order.KEPT},
    "weipipe-keep-weights": {"order": Order.KEPT_WEIGHTS},
    "weipipe-wzb2-paired": {"order": Order.DEPTH_FIRST, "backward": SPLIT, "delay": 1},
}


def plan_of(name: str, owners: int, layers: int = 8) -> Plan:
    ways = "ring" if name.startswith("weipipe") else "stages"
    return Plan(layers=(PATHS[0],) * layers, **{ways: owners}, **CHOICES[name])


def stage_problem(*, product_s: float, pass_s: float, stages: int, batch: int) -> Problem:
    """A layer a stage, and links that take no time: T_F = product + pass, T_W = product."""
    spec = device("h100")
    block = BlockWork(
        parameters=0.0,
        product_flops=product_s * spec.product_flops_per_s,
        elementwise_bytes=pass_s * spec.memory_bytes_per_s,
        residual_bytes=8.0,
        tap_bytes=4.0,
    )
    workload = Workload(
        name="stages",
        blocks=(block,) * stages,
        edge=EdgeWork(parameters=0),
        activation_bytes=0.0,
        tokens=1,
        model_flops=1.0,
    )
    wire = LinkSpec(name="wire", bytes_per_s=1e30, latency_s=0.0, launch_s=0.0)
    return Problem(
        workload_of=lambda size: workload,
        cluster=Cluster(device=spec, devices=stages, link=wire),
        batch=batch,
        memory_bytes=1e12,
    )


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("owners", "microbatches"), [(2, 4), (4, 4), (4, 12), (4, 16)])
def test_choices_give_the_known_schedules(name, owners, microbatches):
    plan = plan_of(name, owners)
    found = staged_schedule(plan, microbatches)
    wanted = build(name, devices=owners, microbatches=microbatches)
    assert set(found.tasks) == set(wanted.tasks)
    assert set(found.moves) == set(wanted.moves)
    assert recognise(plan) == name
    if microbatches == 16:
        assert recognise_schedule(found) == name


def test_all_of_them_are_in_the_space_and_nothing_else_is_run():
    problem = stage_problem(product_s=1e-3, pass_s=0, stages=8, batch=16)
    problem = replace(problem, cluster=replace(problem.cluster, devices=4))
    space = Space.of(problem, microbatch_sizes=[1])
    for name in CHOICES:
        assert space.contains(plan_of(name, 4)), name
    for odd in (
        replace(plan_of("1f1b", 4), delay=1),
        replace(plan_of("zb-overlap", 4), chunks=2),
        replace(plan_of("weipipe-wzb1", 4), delay=2),
        replace(plan_of("1f1b", 4), order=Order.DEPTH_FIRST),
    ):
        assert not space.contains(odd)
        with pytest.raises(UsageError, match="does not run"):
            staged_schedule(odd, 16)


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("product_s", [1e-3, 0.7e-3])
def test_bubbles_of_the_zero_bubble_paper(stages, product_s):
    """1F1B (p-1)(F+B+W), ZB-H1 (p-1)(F+B-W), ZB-H2 (p-1)(F+B-2W), B being dL/dx alone.

    ZB-H2's is what is left within a stage's span: the last stage starts p - 1 forwards late.
    """
    p, m = stages, 3 * stages
    problem = stage_problem(product_s=product_s, pass_s=1e-3 - product_s, stages=p, batch=m)
    forward, weight = 1e-3, product_s
    backward = product_s + 2 * (1e-3 - product_s)
    wanted = {
        "1f1b": forward + backward + weight,
        "zb-h1": forward + backward - weight,
        "zb-h2": forward + backward - 2 * weight,
    }
    for name, each in wanted.items():
        plan = plan_of(name, p, layers=p)
        schedule = to_schedule(problem, plan)
        costs = replace(plan_costs(problem, plan, schedule), update_s=0.0)
        result = simulate(schedule, costs, schedule_link(problem, plan), eager_sends=True)
        work = m * (forward + backward + weight)
        assert max(result.busy_s) == pytest.approx(work, rel=1e-12)
        spans = [end - start for start, end in result.spans_s]
        took = max(spans) if name == "zb-h2" else result.step_s
        assert took - work == pytest.approx((p - 1) * each, rel=1e-9, abs=1e-12)


def test_memory_of_the_zero_bubble_paper():
    """ZB-H1 holds 1F1B's p microbatches on every stage, ZB-H2 2p - 1, in residuals and taps."""
    p, m = 4, 12
    problem = stage_problem(product_s=1e-3, pass_s=0, stages=p, batch=m)
    for name, most in (("1f1b", p), ("zb-h1", p), ("zb-h2", 2 * p - 1)):
        plan = plan_of(name, p, layers=p)
        schedule = to_schedule(problem, plan)
        # A residual and a tap of the same size: what is held is counted in either.
        costs = replace(plan_costs(problem, plan, schedule), residual_bytes=1.0, tap_bytes=1.0)
        costs = replace(costs, weight_bytes=0.0, gradient_bytes=0.0, static_bytes=0.0)
        assert max(simulate(schedule, costs, schedule_link(problem, plan)).peak_bytes) <= most + 1
        held = simulate(schedule, costs, schedule_link(problem, plan)).memory[0]
        assert max(sum(row.values()) for row in held) >= most


def test_residuals_and_taps_of_a_block_are_as_the_formulas_say():
    """As `workload` counts residuals; taps are each product's input and output cotangent.

    Whatever is computed again. Norms leave the gradient of their scales alone.
    """
    c = preset("byte-llama")
    tokens = 48
    heads, shared = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    width, inner = c.hidden_size, c.intermediate_size
    sums = 4 * c.num_heads * tokens  # attention's log-sum-exp
    kept = {
        "none": 2 * tokens * (4 * width + 2 * (heads + shared) + 3 * inner) + sums + 16 * tokens,
        "selective": 2 * tokens * (2 * width + 2 * (heads + shared) + 2 * inner) + sums,
        "around-attention": 2 * tokens * (width + heads) + sums,
        "block": 2 * tokens * width,
    }
    taps = 2 * tokens * (4 * width + 2 * (heads + shared) + 3 * inner) + 2 * 2 * width
    workload = decoder_workload("b", c, sequence_length=tokens, microbatch_size=1)
    assert workload.recompute_policies == tuple(kept)
    for policy, size in kept.items():
        found = workload.blocks[0].memory(policy, workload.activation_bytes)
        assert found.residual == size
        assert found.tap == taps


def test_traced_attention_keeps_what_a_fused_kernel_does():
    """Beside it the scores of attention that is not fused are kept, and its output is not."""
    config = preset("byte-llama")
    tokens = 48  # no other size: scores are told by having it twice
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    parameters = abstract_parameters(config, jnp.bfloat16)
    layer = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), parameters["blocks"])
    x = jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.bfloat16)

    def residuals(implementation):
        model = layered(config, implementation=implementation)
        program = block_program(model, layer, x, {"inputs": ids, "targets": ids}, "none")
        return [(s.shape, s.dtype) for s in program.residuals]

    fused, plain = residuals("shapes"), residuals("xla")
    assert not [shape for shape, _ in fused if shape.count(tokens) > 1]
    assert ((1, config.num_heads, tokens), jnp.float32) in fused
    assert [shape for shape, _ in plain if shape.count(tokens) > 1]
