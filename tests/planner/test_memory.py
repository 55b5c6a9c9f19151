"""The memory of a plan is what the trainer predicts of its program, and refuses by."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.cli import main
from jaxsys.errors import UsageError
from jaxsys.hardware import device, link
from jaxsys.mesh import make_mesh
from jaxsys.model import abstract_parameters, initial_parameters, layered, preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision
from jaxsys.planner.estimates import POLICY
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.named import compare
from jaxsys.planner.plans import PATHS, State
from jaxsys.planner.problem import Problem
from jaxsys.planner.runs import that_runs, why_not
from jaxsys.planner.space import Space
from jaxsys.planner.workload import decoder_workload
from jaxsys.schedule import Schedule
from jaxsys.strategies import NAMES, for_layers
from jaxsys.train import Trainer
from jaxsys.train.memory import StepShape, step_bytes
from jaxsys.train.plan_file import read_plan

TOKENS = 256


def config_of(layers: int):
    return dataclasses.replace(preset("byte-llama"), num_layers=layers)


def trainers_bytes(
    schedule,
    config,
    recompute,
    *,
    size: int = 1,
    gradients: Any = jnp.float32,
    looped: bool = False,
    tokens: int = TOKENS,
) -> float:
    ids = jax.ShapeDtypeStruct((size, tokens), jnp.int32)
    return step_bytes(
        StepShape(
            schedule=schedule,
            model=layered(config, implementation="shapes"),
            parameters=abstract_parameters(config),
            state_bytes=12 * config.parameter_count(),
            microbatch={"inputs": ids, "targets": ids},
            compute_dtype=jnp.bfloat16,
            gradient_dtype=gradients,
            recompute=recompute,
            looped=looped,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "layers"), [(2, 4), (4, 6)], ids=["even", "padded"])
def test_every_strategy_of_the_table_holds_what_the_trainer_says(devices, layers):
    config = config_of(layers)
    workload = decoder_workload("m", config, sequence_length=TOKENS, microbatch_size=1)
    cluster = Cluster(device=device("h100"), devices=devices, link=link("nvlink"))
    sizes = {"devices": devices, "microbatches": 2 * devices, "layers": layers}
    made = {name: for_layers(name, **sizes) for name in NAMES if name != "1f1b-interleaved"}
    if 2 * devices <= layers:
        made["1f1b-interleaved"] = for_layers("1f1b-interleaved", **sizes)
    seen = set()
    for limit in (1e12, 1.0):  # nothing recomputed; the leanest
        for row in compare(workload, cluster, microbatches=2 * devices, memory_bytes=limit).rows:
            expected = trainers_bytes(made[row.strategy], config, row.recompute)
            assert row.memory_bytes == pytest.approx(expected, rel=1e-9), row.strategy
            seen.add((row.strategy, row.recompute))
    assert len(seen) >= 2 * len(made) - 6


def plans_of(layers: int):
    """A plan of some of the common parts that the trainer runs, and the problem."""
    config = config_of(layers)
    problem = Problem(
        workload_of=lambda size: decoder_workload(
            "m", config, sequence_length=TOKENS, microbatch_size=size
        ),
        cluster=Cluster(device=device("h100"), devices=4, link=link("nvlink")),
        batch=32,
        memory_bytes=1e12,
        lowered=True,
    )
    space = that_runs(Space.of(problem, microbatch_sizes=[2]))
    rng = np.random.default_rng(0)
    # Of split features the trainer traces the parts themselves, and the planner divides the whole.
    space = space.split("features", 1)
    bases = list(space.bases())
    halves = dataclasses.replace(problem, precision=Precision(gradient_bytes=2.0))
    for number, base in enumerate(bases[i] for i in rng.permutation(len(bases))[:40]):
        options = space.codes_of(base)
        assert options is not None
        apart = dataclasses.replace(base, layers=tuple(PATHS[rng.choice(one)] for one in options))
        code = rng.choice(sorted(set.intersection(*(set(map(int, one)) for one in options))))
        alike = dataclasses.replace(base, layers=(PATHS[code],) * layers)
        yield halves if number % 2 else problem, alike if why_not(apart) else apart


@pytest.mark.parametrize("layers", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_every_plan_that_runs_holds_what_the_trainer_says(layers):
    count = 0
    for problem, plan in plans_of(layers):
        assert why_not(plan) is None
        schedule = to_schedule(problem, plan)
        policies = tuple(POLICY[path.residual] for path in plan.layers)
        gradients = jnp.float32 if problem.precision.gradient_bytes == 4 else jnp.bfloat16
        expected = trainers_bytes(
            schedule, config_of(layers), policies, size=2, gradients=gradients
        )
        found = Evaluator(problem).plan(plan).peak_bytes[0]
        assert found == pytest.approx(expected, rel=1e-6), plan
        count += 1
    assert count == 40


def plan_of(tmp_path, *arguments: str):
    """What `jaxsys plan` takes on two CPU devices: its row, and the file for `jaxsys train`."""
    table = tmp_path / "table.json"
    code = main(
        [
            *("plan", "--model", "byte-llama", "--devices", "2", "--device", "cpu"),
            *("--link", "host-memory", "--sequence-length", str(TOKENS), "--microbatches", "8"),
            *("--search-seconds", "3", "--json", str(table), *arguments),
        ]
    )
    assert code == 0
    value = json.loads(table.read_text())
    return next(row for row in value["rows"] if row["strategy"] == value["best"])


def trainer_of(schedule, recompute, memory_gib: float, replicas: int = 1) -> Trainer:
    config = preset("byte-llama")
    return Trainer(
        layered(config),
        initial_parameters(config),
        optax.adam(1e-3),
        schedule=schedule,
        mesh=make_mesh(2 // replicas, replicas),
        compute_dtype=jnp.bfloat16,
        recompute=recompute,
        memory_gib=memory_gib,
    )


def check_memory(trainer: Trainer, size: int = 1) -> None:
    batch = {
        name: np.zeros((trainer.rows, size, TOKENS), np.int32) for name in ("inputs", "targets")
    }
    trainer._check_memory(jax.tree.map(lambda leaf: leaf[0], batch))


@pytest.mark.parametrize(
    "limit_gib",
    [0.1, 0.055, *(pytest.param(g, marks=pytest.mark.slow) for g in (10, 0.075, 0.062))],
)
def test_the_winner_of_the_table_is_not_refused(tmp_path, limit_gib):
    file = tmp_path / "schedule.json"
    best = plan_of(tmp_path, "--memory-gib", str(limit_gib), "--schedule", str(file))
    assert best["memory_gib"] <= limit_gib
    schedule = Schedule.from_json(file.read_text())
    replicas = 2 // schedule.devices
    check_memory(trainer_of(schedule, best["recompute"], limit_gib, replicas))
    close = trainer_of(schedule, best["recompute"], 0.999 * best["memory_gib"], replicas)
    with pytest.raises(UsageError, match="predicted to need"):
        check_memory(close)


@pytest.mark.parametrize("limit_gib", [pytest.param(0.1, marks=pytest.mark.slow), 0.06])
def test_the_plan_that_a_search_writes_is_not_refused(tmp_path, limit_gib):
    file = tmp_path / "plan.json"
    plan_of(tmp_path, "--memory-gib", str(limit_gib), "--plan", str(file))
    planned = read_plan(file, layers=preset("byte-llama").num_layers)
    predicted_gib = json.loads(file.read_text())["predicted"]["peak_gib"]
    trainer = trainer_of(planned.schedule, planned.recompute, limit_gib, planned.schedule.replicas)
    check_memory(trainer, planned.microbatch_size)
    close = trainer_of(
        planned.schedule, planned.recompute, 0.999 * predicted_gib, planned.schedule.replicas
    )
    with pytest.raises(UsageError, match="predicted to need"):
        check_memory(close, planned.microbatch_size)


def test_a_single_turn_holds_what_the_trainer_says():
    """Shards of sums come one after another, as residuals go; in loops they are there all along."""
    config, devices, rng = config_of(4), 2, np.random.default_rng(0)
    tokens = 8 * TOKENS  # a layer's residuals are more than its shard
    problem = Problem(
        workload_of=lambda size: decoder_workload(
            "m", config, sequence_length=tokens, microbatch_size=size
        ),
        cluster=Cluster(device=device("h100"), devices=devices, link=link("nvlink")),
        batch=2 * devices,
        memory_bytes=1e12,
        lowered=True,
    )
    space = that_runs(Space.of(problem, microbatch_sizes=[2])).split("features", 1)
    checked = less = 0
    for base in space.bases():
        options = space.codes_of(base)
        if base.state is State.WHOLE or base.shard != devices or options is None:
            continue
        layers = tuple(PATHS[rng.choice(one)] for one in options)
        plan = dataclasses.replace(base, layers=layers)
        schedule = to_schedule(problem, plan)
        assert schedule.microbatches == schedule.devices == devices
        policies = tuple(POLICY[path.residual] for path in layers)
        expected, looped = (
            trainers_bytes(schedule, config, policies, size=2, looped=looped, tokens=tokens)
            for looped in (False, True)
        )
        assert Evaluator(problem).plan(plan).peak_bytes[0] == pytest.approx(expected, rel=1e-6)
        less += expected < looped
        checked += 1
    assert checked and less == checked
