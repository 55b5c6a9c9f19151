"""Sequences that several devices share, as plans: found, named, refused, written and run again."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.cli import main
from jaxsys.context import ContextSplit
from jaxsys.hardware import device, link
from jaxsys.lowering.memory import tree_bytes
from jaxsys.model import initial_parameters, layered, preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.command import train_command
from jaxsys.planner.constraints import Conflict
from jaxsys.planner.estimates import microbatches, plan_costs, schedule_link
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.plans import Gradient, LayerPath, Plan, Residual, State, Weights
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import describe, recognise
from jaxsys.planner.runs import that_runs
from jaxsys.planner.search import Effort, search
from jaxsys.planner.space import Space
from jaxsys.planner.workload import decoder_workload
from jaxsys.schedule import Schedule, Task, TaskKind, simulate
from jaxsys.schedule.inside import attention_transfers, timed
from jaxsys.schedule.render import chrome_trace
from jaxsys.train import Trainer
from jaxsys.train.cli import parser
from jaxsys.train.layout import AskedLayout, lay_out

LONG = preset("Llama-3.2-1B")
SMALL = dataclasses.replace(preset("bench-tiny"), num_layers=2)


def problem_of(config=LONG, *, length=65536, devices=2, batch=1, name="nvlink", **more) -> Problem:
    return Problem(
        workload_of=functools.cache(
            lambda size: decoder_workload(
                "it", config, sequence_length=length, microbatch_size=size, **more
            )
        ),
        cluster=Cluster(device=device("h200"), devices=devices, link=link(name)),
        batch=batch,
        memory_bytes=1e12,
        lowered=True,
    )


def shared(layers: int, residual: Residual = Residual.ATTENTION, **how) -> Plan:
    path = LayerPath(weights=Weights.REFETCH, gradient=Gradient.EACH, residual=residual)
    return Plan(state=State.SPLIT, layers=(path,) * layers, **how)


def test_one_long_sequence_is_shared():
    """A search comes to it from data parallelism, which one sequence does not allow."""
    problem = problem_of(dataclasses.replace(LONG, num_layers=4))
    space = that_runs(Space.of(problem)).split("features", 1).domain("stages", 1).domain("ring", 1)
    found = search(space, effort=Effort(refine=1, chains=2, steps=4, restarts=1)).best
    assert found.plan.context == 2
    assert recognise(found.plan).startswith("cp-")
    alone = Evaluator(dataclasses.replace(problem, cluster=Cluster(
        device=device("h200"), devices=1, link=link("nvlink")
    ))).plan(Plan(layers=(dataclasses.replace(
        found.plan.layers[0], weights=Weights.STAY
    ),) * 4))  # fmt: skip
    assert 1.7 < alone.step_s[0] / found.step_s < 2.0


def test_what_a_ring_sends_hides_and_what_heads_send_does_not():
    costs = {
        by: Evaluator(problem_of()).plan(shared(LONG.num_layers, context=2, context_by=by))
        for by in ("ring", "gather", "ulysses")
    }
    compute = {by: float(found.compute_s[0]) for by, found in costs.items()}
    waits = {by: float(found.step_s[0]) - compute[by] for by, found in costs.items()}
    assert waits["ring"] > 0 and waits["gather"] > 0 and waits["ulysses"] > 0
    slow = {
        by: Evaluator(problem_of(name="ethernet-10g")).plan(
            shared(LONG.num_layers, context=2, context_by=by)
        )
        for by in ("ring", "ulysses")
    }
    # Grouped heads: a ring sends few keys and values, an exchange all queries and outputs too.
    assert slow["ring"].sent_bytes[0] < slow["ulysses"].sent_bytes[0]
    assert slow["ring"].step_s[0] < slow["ulysses"].step_s[0]


def test_the_order_of_transfers_and_what_waits_for_them():
    forward = attention_transfers("ring", 4, backward=False)
    assert [(t.after, t.before) for t in forward] == [(-1, 1), (-1, 2), (-1, 3)]
    sizes = dict.fromkeys(forward, (1.0, 10.0))
    hidden, inside = timed(forward, sizes, [1.0] * 4)
    assert hidden == 4.0 and [one.start_s for one in inside] == [0.0, 1.0, 2.0]
    exposed, _ = timed(forward, dict.fromkeys(forward, (2.0, 10.0)), [1.0] * 4)
    assert exposed == 3 * 2.0 + 1.0
    slowed, _ = timed(forward, sizes, [1.0] * 4, contention=1.0)
    # Three seconds of transfers, beside which half as much is done.
    assert slowed == 4.0 + 1.5
    back = attention_transfers("ring", 2, backward=True)
    late, _ = timed(back, dict.fromkeys(back, (1.0, 10.0)), [1.0, 1.0])
    assert late == 3.0  # the gradients come home after the last visit
    assert attention_transfers("ring", 1, backward=True) == ()


@pytest.mark.parametrize("by", ["ring", "gather", "ulysses"])
def test_memory_is_the_trainers(by):
    """What a plan says that a device holds is what the trainer refuses steps by."""
    config, length = SMALL, 4096
    problem = problem_of(config, length=length, fused_attention=False)
    plan = shared(2, Residual.RECOMPUTE, context=2, context_by=by)
    planned = float(Evaluator(problem).plan(plan).peak_bytes[0])
    trainer = Trainer(
        layered(config), initial_parameters(config), optax.adam(1e-3),
        schedule=to_schedule(problem, plan), compute_dtype="bfloat16", recompute="block",
    )  # fmt: skip
    assert trainer.schedule.context == 2 and trainer._lowered.context is not None
    assert trainer._lowered.context.by == by
    from jaxsys.train.memory import StepShape, step_bytes

    shapes = {n: jax.ShapeDtypeStruct((1, length), jnp.int32) for n in ("inputs", "targets")}
    parameters = jax.eval_shape(lambda: initial_parameters(config))
    counted = step_bytes(
        StepShape(
            schedule=trainer.schedule, model=trainer.model,
            parameters=parameters, state_bytes=3 * tree_bytes(parameters, "float32"),
            microbatch=shapes, compute_dtype=jnp.bfloat16, gradient_dtype=jnp.float32,
            recompute="block", context=dataclasses.replace(trainer._lowered.context, fused=True),
        )
    )  # fmt: skip
    assert planned == pytest.approx(counted, rel=0.01)


def test_what_does_not_divide_is_refused_with_what_does():
    space = Space.of(problem_of(length=65536 + 16, devices=16))
    with pytest.raises(Conflict, match="sequences of 65552 tokens shared by 1, 2, 4, 8 devices"):
        _ = space.split("sequences", 16).left
    odd = dataclasses.replace(SMALL, num_heads=6, num_kv_heads=3)
    space = Space.of(problem_of(odd, devices=4, shortest_piece=1))
    assert any(base.context == 4 for base in space.split("sequences", 4).bases())
    with pytest.raises(Conflict, match="6 query and 3 key/value heads exchanged by no devices"):
        _ = space.split("sequences", 4).domain("context_by", "ulysses").left
    windowed = Space.of(problem_of(preset("gemma-3-1b-pt"), length=32768, devices=4))
    bases = list(windowed.split("sequences", 4).domain("stages", 1).domain("ring", 1).bases())
    assert bases and {base.context_by for base in bases} == {"ulysses"}


def test_a_schedule_says_it_and_a_trace_draws_it(tmp_path):
    problem = problem_of(SMALL, length=8192, devices=4, batch=2)
    plan = shared(2, shard=2, context=2)
    schedule = to_schedule(problem, plan)
    assert Schedule.from_json(schedule.to_json()) == schedule
    costs = plan_costs(problem, plan, schedule)
    found = simulate(schedule, costs, schedule_link(problem, plan))
    inside = [event for event in found.events if event.stream == "inside"]
    compute = [e for e in found.events if e.stream == "compute"]
    tasks = [e for e in compute if isinstance(e.work, Task) and e.work.kind is TaskKind.FORWARD]
    a_task = tasks[0]
    mine = [e for e in inside if e.device == a_task.device and e.start_s < a_task.end_s]
    assert [e.label for e in mine] == ["hop of keys and values"]
    assert a_task.start_s <= mine[0].start_s < mine[0].end_s <= a_task.end_s
    drawn = chrome_trace(found)["traceEvents"]
    assert {e["args"]["name"] for e in drawn if e["name"] == "thread_name"} == {
        "compute", "send", "inside",
    }  # fmt: skip
    assert describe(plan) == "zero-3 over 2, each of 2 (cp-ring), recompute around attention"


def test_the_command_that_runs_a_row(capsys, tmp_path):
    file = tmp_path / "table.json"
    main([
        "plan", "--model", "bench-tiny", "--devices", "4", "--device", "h200",
        "--sequence-length", "65536", "--microbatches", "2", "--json", str(file),
    ])  # fmt: skip
    out = capsys.readouterr().out
    rows = [row["strategy"] for row in json.loads(file.read_text())["rows"]]
    assert {"cp-ring", "cp-gather", "cp-ulysses"} <= {
        name for row in rows for name in ("cp-ring", "cp-gather", "cp-ulysses") if name in row
    }
    line = next(line for line in out.splitlines() if "jaxsys train" in line and "cp-ring" in line)
    options = parser("jaxsys train").parse_args(line.split("`")[1].split()[2:])
    assert options.context in (2, 4) and options.context_by == "ring"
    split = ContextSplit(parts=options.context, by=options.context_by)
    layout = lay_out(
        preset("bench-tiny"),
        jax.devices()[: options.devices],
        AskedLayout(
            schedule=options.schedule, split=split, microbatches=options.microbatches,
            microbatch_size=options.microbatch_size, sequence_length=options.sequence_length,
        ),
    )  # fmt: skip
    assert layout.mesh.shape["context"] == options.context
    assert layout.rows == 2


def test_commands_say_all_of_a_plan_or_nothing():
    problem = problem_of(SMALL, length=8192, devices=8, batch=2)
    plan = shared(2, shard=2, context=4, context_by="mixed", context_exchange=2)
    said = train_command(
        plan, model="bench-tiny", sequence_length=8192, gradients="bfloat16",
        microbatches=microbatches(problem, plan),
    )  # fmt: skip
    assert said == (
        "jaxsys train --model bench-tiny --schedule zero-3 --devices 8 --context 4 --context-by "
        "mixed --context-exchange 2 --microbatches 2 --microbatch-size 1 --sequence-length 8192 "
        "--recompute around-attention --dtype bfloat16 --gradients bfloat16"
    )
    unlike = dataclasses.replace(
        plan, layers=(plan.layers[0], dataclasses.replace(plan.layers[0], residual=Residual.KEEP))
    )
    assert (
        train_command(unlike, model="m", sequence_length=1, microbatches=2, gradients="float32")
        is None
    )


@pytest.mark.parametrize("asked", [{"context": 4}, {"context": ContextSplit(parts=2, by="gather")}])
def test_what_a_schedule_says_is_not_contradicted(asked):
    problem = problem_of(SMALL, length=64, shortest_piece=1, devices=2)
    schedule = to_schedule(problem, shared(2, context=2))
    with pytest.raises(ValueError, match="is planned for context=2 .ring.; leave it out"):
        Trainer(
            layered(SMALL), initial_parameters(SMALL), optax.sgd(0.1), schedule=schedule, **asked
        )
    assert np.prod(list(Trainer(
        layered(SMALL), initial_parameters(SMALL), optax.sgd(0.1), schedule=schedule,
    ).mesh.shape.values())) == 2  # fmt: skip
