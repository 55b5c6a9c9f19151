"""Every plan of the space trains: drawn over all axes, and compared with one device.

A plan is drawn anywhere: a base of the space, and for each layer any of its paths; or anything at
all, which then is outside the space. What is in it must run as it says, with the loss and every
gradient leaf of one device.
"""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from jaxsys.axes import AXES, JOININGS
from jaxsys.context import WAYS
from jaxsys.hardware import device, link
from jaxsys.model import DecoderConfig, initial_parameters, layered
from jaxsys.model.kinds import BlockKind, Experts
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.files import plan_file
from jaxsys.planner.plans import PATHS, Plan, Residual
from jaxsys.planner.problem import Problem
from jaxsys.planner.runs import that_runs, why_not
from jaxsys.planner.search import Found
from jaxsys.planner.space import Space
from jaxsys.planner.workload import decoder_workload
from jaxsys.train import Trainer
from jaxsys.train.plan_file import read_plan

BATCH, LENGTH, LAYERS, DEVICES = 16, 16, 4, 8
DENSE = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_layers=LAYERS,
    num_heads=4, num_kv_heads=4, head_dim=8,
)  # fmt: skip
CHOICE = Experts(count=4, active=2, intermediate_size=8, balance=0.05)
EXPERTS = replace(DENSE, kinds=(BlockKind(experts=True),), experts=CHOICE)
CONFIGS = {
    "dense": DENSE,
    "experts": EXPERTS,
    "shared experts": replace(EXPERTS, experts=replace(CHOICE, balance=0.0)),
}
"""The first and the last have sequences that devices can share; a balance of experts is of whole
microbatches."""
SLOW_DRAWS, FAST_DRAWS = 200, 1


@functools.cache
def space_of(name: str) -> Space:
    config = CONFIGS[name]
    # With a kernel for attention, so that what it made may be kept; values do not depend on it.
    problem = Problem(
        workload_of=lambda size: decoder_workload(
            name, config, sequence_length=LENGTH, microbatch_size=size, shortest_piece=1
        ),
        cluster=Cluster(
            device=device("h100"),
            devices=DEVICES,
            link=link("nvlink"),
            node_devices=DEVICES // 2,
            node_link=link("host-memory"),
        ),
        batch=BATCH,
        memory_bytes=1e12,
        lowered=True,
    )
    return that_runs(Space.of(problem, microbatch_sizes=[1, 2]))


@functools.cache
def bases_of(name: str) -> dict[tuple, list[Plan]]:
    """By how devices are divided: each division is drawn as often, however many orders it has."""
    found: dict[tuple, list[Plan]] = {}
    for base in space_of(name).bases():
        ways = (base.replicas, base.experts, base.shard, base.features, base.stages, base.ring)
        ways += (base.context, base.context_by, base.context_exchange, base.members)
        ways += (base.features_by,)
        found.setdefault(ways, []).append(base)
    return found


def drawn(seed: int) -> tuple[str, Plan]:
    """A plan of the space, and which model it is for."""
    random = np.random.default_rng(seed)
    name = tuple(CONFIGS)[seed % len(CONFIGS)]
    divisions = list(bases_of(name).values())
    bases = divisions[int(random.integers(len(divisions)))]
    base = bases[int(random.integers(len(bases)))]
    options = space_of(name).codes_of(base)
    assert options is not None
    codes = [int(random.choice(layer)) for layer in options]
    if base.recomputes_alike:
        codes = [codes[0]] * LAYERS
    return name, replace(base, layers=tuple(PATHS[code] for code in codes))


@functools.cache
def alone(name: str, size: int):
    """Loss and gradients of one device, and what they are of."""
    config = CONFIGS[name]
    model = layered(config, loss_chunk_tokens=8)
    parameters = initial_parameters(config, seed=3)
    tokens = np.random.default_rng(1).integers(0, 32, (BATCH // size, size, LENGTH + 1))
    tokens = tokens.astype(np.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    trainer = Trainer(
        model, parameters, optax.sgd(0.1), schedule="dp", devices=1, microbatches=len(tokens),
        memory_gib=float("inf"),
    )  # fmt: skip
    return model, parameters, batch, jax.device_get(trainer.loss_and_gradients(batch))


def trains(name: str, plan: Plan, folder) -> None:
    """Runs it from the file that `jaxsys plan` would write."""
    assert why_not(plan) is None
    model, parameters, batch, (wanted_loss, wanted) = alone(name, plan.microbatch_size)
    found = Found(
        plan=plan, potential=1.0, step_s=1.0, peak_bytes=1.0, sent_bytes=1.0, compute_s=1.0
    )
    path = folder / "plan.json"
    request = {"dtype": "float32", "gradients": "float32"}
    path.write_text(json.dumps(plan_file(space_of(name).problem, found, request=request)))
    assert read_plan(path, layers=LAYERS).microbatch_size == plan.microbatch_size
    trainer = Trainer(model, parameters, optax.sgd(0.1), schedule=path, memory_gib=float("inf"))
    assert trainer.mesh.size == DEVICES
    loss, gradients = trainer.loss_and_gradients(batch)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, atol=2e-5 * float(np.abs(b).max()), rtol=0, err_msg=f"{plan} {path}"
        ),
        jax.device_get(gradients),
        wanted,
    )


@pytest.mark.timeout(1800)  # a plan with many unlike ticks compiles for minutes where it is busy
@pytest.mark.parametrize(
    "seed",
    [
        seed if seed < FAST_DRAWS else pytest.param(seed, marks=pytest.mark.slow)
        for seed in range(SLOW_DRAWS)
    ],
)
def test_a_plan_that_is_drawn_trains(seed, tmp_path):
    name, plan = drawn(seed)
    assert space_of(name).contains(plan)
    trains(name, plan, tmp_path)


def test_what_is_drawn_reaches_every_axis():
    plans = [drawn(seed)[1] for seed in range(SLOW_DRAWS)]
    for axis in AXES:
        assert {getattr(plan, axis) for plan in plans} >= {1, 2, 4}, axis
    assert {plan.context_by for plan in plans} == set(WAYS)
    assert {plan.features_by for plan in plans} == set(JOININGS)
    assert any(plan.context > 1 and plan.owners > 1 for plan in plans)
    assert {path.residual for plan in plans for path in plan.layers} == set(Residual)


def test_what_no_step_runs_is_outside_the_space():
    """Anything drawn field by field that the trainer would refuse is no plan of the space."""
    random = np.random.default_rng(5)
    refused = 0
    for seed in range(60):
        name, plan = drawn(seed)
        layers = tuple(PATHS[int(random.integers(len(PATHS)))] for _ in range(LAYERS))
        changed = replace(plan, layers=layers)
        if why_not(changed) is not None:
            refused += 1
            assert not space_of(name).contains(changed), changed
    assert refused > 10
