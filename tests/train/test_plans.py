"""Plans and schedule "auto" given to a Trainer from Python: run as planned, or refused."""

import functools
import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys import planner
from jaxsys.axes import AROUND, AXES, DATA, RING, TENSOR
from jaxsys.errors import UsageError
from jaxsys.hardware import device, link
from jaxsys.layered import reference_loss
from jaxsys.mesh import make_mesh
from jaxsys.model import initial_parameters, layered, preset
from jaxsys.model.kinds import BlockKind, Experts
from jaxsys.planner.constraints import Conflict
from jaxsys.planner.files import plan_file
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.named import plan_at
from jaxsys.planner.plans import Plan, Residual, State
from jaxsys.planner.runs import why_not
from jaxsys.schedule import Schedule
from jaxsys.strategies import STRATEGIES, for_layers
from jaxsys.train import Trainer
from jaxsys.train.checkpoint import CheckpointStore
from jaxsys.train.layout import AskedLayout, lay_out
from jaxsys.train.plan_file import devices_of as plan_devices
from jaxsys.train.schedules import read_schedule, taken_from

CLUSTER = planner.Cluster(device=device("cpu"), devices=4, link=link("host-memory"))
SHAPE = (2, 6)


def batch_of(rows: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 16, (rows, *SHAPE)).astype(np.int32)
    return {"inputs": tokens, "targets": tokens}


@pytest.fixture(scope="module")
def found(small_model, small_parameters):
    """A plan for 2 replicas of 2 devices, by the planner's own hand."""

    def narrow(space):
        return space.domain("replicas", 2).domain("stages", 2)

    return planner.plan(
        small_model, small_parameters, batch_of(8), cluster=CLUSTER, narrow=narrow,
    )  # fmt: skip


def trainer_of(small_model, small_parameters, **options):
    return Trainer(
        small_model, small_parameters, optax.sgd(0.1), memory_gib=float("inf"), **options
    )


def test_a_plan_is_run_whole(found, small_model, small_parameters):
    trainer = trainer_of(small_model, small_parameters, plan=found)
    assert dict(trainer.mesh.shape) == {DATA: 2, RING: 2}
    assert trainer.rows == 8
    # As the parameters it was planned with: float32.
    assert trainer.compute_dtype == jnp.float32
    assert trainer._lowered.gradient_dtype == jnp.float32
    policies = {"keep": "none", "selective": "selective", "recompute": "block"}
    assert trainer.recompute == policies[found.plan.layers[0].residual]
    # Its schedule alone says as much of the devices.
    alone = trainer_of(small_model, small_parameters, schedule=found.schedule)
    assert dict(alone.mesh.shape) == {DATA: 2, RING: 2}


def test_a_plan_trains_in_the_dtype_of_the_parameters_it_was_made_with(
    found, small_model, small_parameters
):
    """Of float32 parameters as a plain loop does; of two bytes, or where that is asked, in two."""
    batch = batch_of(8)
    trainer = trainer_of(small_model, small_parameters, plan=found)
    plain, state = small_parameters, optax.sgd(0.1).init(small_parameters)
    for _ in range(3):
        wanted, gradients = jax.value_and_grad(functools.partial(reference_loss, small_model))(
            plain, batch
        )
        updates, state = optax.sgd(0.1).update(gradients, state, plain)
        plain = optax.apply_updates(plain, updates)
        assert float(trainer.step(batch).loss) == pytest.approx(float(wanted), rel=1e-6)

    def planned(parameters, **options):
        made = planner.plan(small_model, parameters, batch, cluster=CLUSTER, **options)
        return trainer_of(small_model, small_parameters, plan=made).compute_dtype

    halves = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), small_parameters
    )
    assert planned(halves) == jnp.bfloat16
    assert planned(small_parameters, precision=planner.Precision()) == jnp.bfloat16
    assert planned({**halves, "edge": small_parameters["edge"]}) == jnp.float32


def test_recompute_by_layer_is_that_of_the_plan(found, small_model, small_parameters):
    kinds = (Residual.KEEP, Residual.RECOMPUTE) * 2
    paths = tuple(replace(found.plan.layers[0], residual=kind) for kind in kinds)
    sharded = Plan(shard=4, state=State.SPLIT, layers=paths)
    trainer = trainer_of(small_model, small_parameters, plan=replace(found, plan=sharded))
    assert trainer.recompute == ("none", "block") * 2
    assert dict(trainer.mesh.shape) == {DATA: 1, RING: 4}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"devices": 2}, "devices=2, but schedule .* 2 replicas of 2 devices; use devices=4"),
        ({"microbatches": 2}, "takes 4 microbatches, not microbatches=2"),
        (
            {"compute_dtype": "bfloat16"},
            r"=bfloat16, but the plan is for .*float32; .*precision=.*Precision\(weight_bytes=2\)",
        ),
        (
            {"gradient_dtype": "bfloat16"},
            r"=bfloat16, but the plan is for .*float32; .*=.*Precision\(gradient_bytes=2\)",
        ),
        ({"schedule": "dp"}, "plan and schedule='dp' are both given"),
    ],
)
def test_what_differs_from_the_plan_is_refused(
    found, small_model, small_parameters, asked, message
):
    with pytest.raises(UsageError, match=message):
        trainer_of(small_model, small_parameters, plan=found, **asked)


def test_a_mesh_of_too_few_rings_is_refused(found, small_model, small_parameters):
    mesh = make_mesh(2, 1, devices=jax.devices()[:2])
    with pytest.raises(UsageError, match="has 1 rings, but .* for 2 side by side"):
        trainer_of(small_model, small_parameters, schedule=found.schedule, mesh=mesh)


def test_split_features_of_a_model_that_says_nothing_of_them_are_no_plan(
    found, small_model, small_parameters
):
    split = replace(found, plan=Plan(features=4, layers=found.plan.layers))
    with pytest.raises(UsageError, match="tensor=4: this model does not say how its blocks are"):
        trainer_of(small_model, small_parameters, plan=split)
    with pytest.raises(Conflict, match="features are whole on each device.*Drop \\(2\\)"):
        planner.plan(
            small_model, small_parameters, batch_of(8), cluster=CLUSTER,
            narrow=lambda space: space.split("features", 2),
        )  # fmt: skip


def test_a_plan_that_splits_features_trains_as_one_device_does():
    """From the search to the step, in Python: `zero-1 over 2, each of 2` and its like."""
    config = replace(preset("tiny"), num_layers=2)
    model, parameters = layered(config), initial_parameters(config)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 1, 9)).astype(np.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    found = planner.plan(
        model, parameters, batch, cluster=CLUSTER,
        precision=planner.Precision(weight_bytes=4.0),
        narrow=lambda space: space.split("features", 2).split("state", 2),
    )  # fmt: skip
    assert "each of 2 (tp-sp)" in str(found)
    trainer = trainer_of(model, parameters, plan=found)
    assert dict(trainer.mesh.shape) == {DATA: 1, RING: 2, TENSOR: 2}
    loss, gradients = trainer.loss_and_gradients(batch)
    alone, wanted = trainer_of(
        model, parameters, schedule="dp", devices=1, microbatches=4
    ).loss_and_gradients(batch)
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()), rtol=0),
        jax.device_get(gradients),
        jax.device_get(wanted),
    )
    assert np.isfinite(float(trainer.step(batch).loss))
    assert trainer.evaluate([batch]) < loss


def test_what_is_no_plan_for_the_trainer_is_refused(found, small_model, small_parameters):
    with pytest.raises(UsageError, match="Plan is no plan; use what `jaxsys.planner.plan`"):
        trainer_of(small_model, small_parameters, plan=found.plan)
    function = replace(found, problem=replace(found.problem, lowered=False))
    with pytest.raises(UsageError, match="is of a loss function"):
        trainer_of(small_model, small_parameters, plan=function)


def test_a_plan_file_sets_recompute_and_dtype(found, small_model, small_parameters, tmp_path):
    import json

    path = tmp_path / "plan.json"
    kept = tuple(replace(layer, residual=Residual.KEEP) for layer in found.plan.layers)
    chosen = replace(found.found, plan=replace(found.plan, layers=kept))
    value = plan_file(found.problem, chosen, request={"dtype": "bfloat16"})
    path.write_text(json.dumps(value), encoding="utf-8")
    trainer = trainer_of(small_model, small_parameters, schedule=str(path))
    assert (trainer.recompute, trainer.compute_dtype) == ("none", jnp.bfloat16)
    with pytest.raises(UsageError, match="recompute=selective, but the plan is for"):
        trainer_of(small_model, small_parameters, schedule=path, recompute="selective")


def test_a_schedule_keeps_replicas_and_features_in_json():
    made = replace(for_layers("dp", devices=2, microbatches=4, layers=4), replicas=2, features=3)
    assert Schedule.from_json(made.to_json()) == made


def test_auto_chooses_for_the_first_batch(small_model, small_parameters):
    trainer = trainer_of(small_model, small_parameters, schedule="auto", devices=2)
    assert (trainer.rows, trainer.step_number, trainer.chosen) == (4, 0, None)
    with pytest.raises(UsageError, match="chosen for the first batch, and schedule is known"):
        _ = trainer.schedule
    batch = batch_of(4)
    loss = float(trainer.step(batch).loss)
    wanted = trainer_of(small_model, small_parameters, schedule="dp", devices=1, microbatches=4)
    assert loss == pytest.approx(float(wanted.step(batch).loss), rel=1e-5)
    assert trainer.chosen is not None
    assert trainer.chosen.startswith(f"auto took {trainer.schedule.name}, recompute ")


@pytest.mark.slow
def test_auto_chooses_at_once_for_a_microbatch_and_only_what_is_asked(
    small_model, small_parameters
):
    microbatch = {name: leaf[0] for name, leaf in batch_of(1).items()}
    trainer = trainer_of(
        small_model, small_parameters, schedule="auto", devices=2, microbatch=microbatch,
        recompute="block", microbatches=6,
    )  # fmt: skip
    assert (trainer.recompute, trainer.rows) == ("block", 6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"expert": 2}, {"replicas": 2, "tensor": 2}])
@pytest.mark.parametrize("schedule", ["zero-1", "weipipe-interleave"])
def test_state_goes_to_layer_order_and_back_however_it_is_split(sizes, schedule, tmp_path):
    """What is saved where several devices compute a block is read where one does."""
    config = replace(
        preset("tiny"),
        kinds=(BlockKind(experts=True),),
        experts=Experts(count=4, active=2, intermediate_size=32),
    )
    model, parameters = layered(config), initial_parameters(config)
    optimizer = optax.chain(optax.adafactor(1e-2, min_dim_size_to_factor=4), optax.adam(1e-2))

    def trainer(**options):
        return Trainer(model, parameters, optimizer, memory_gib=float("inf"), **options)

    split = trainer(schedule=schedule, devices=2, **sizes)
    tokens = np.random.default_rng(0).integers(0, 256, (split.rows, 1, 9)).astype(np.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    split.step(batch)
    store = CheckpointStore(tmp_path)
    split.save(store)
    store.wait()
    whole = trainer(schedule="dp", devices=1, microbatches=split.rows)
    assert whole.restore(store) == 1
    for found, wanted in zip(
        jax.tree.leaves(whole.host_parameters()), jax.tree.leaves(split.host_parameters()),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(found, wanted)
    again = trainer(schedule=schedule, devices=2, **sizes)
    again.restore(store)
    np.testing.assert_allclose(
        float(again.step(batch).loss), float(whole.step(batch).loss), rtol=1e-5
    )


def test_a_schedules_file_that_breaks_a_rule_is_one_line(tmp_path):
    whole = for_layers("weipipe-interleave", devices=2, layers=4, microbatches=4)
    file = tmp_path / "ring.json"
    for tasks, says in (
        (whole.tasks[1:], "is never done"),
        ((*whole.tasks, whole.tasks[0]), "is done twice"),
    ):
        text = json.dumps(json.loads(whole.to_json()) | {"tasks": [asdict(one) for one in tasks]})
        file.write_text(text)
        with pytest.raises(UsageError, match=f"'{file}' breaks a rule: .*{says}; have `jaxsys"):
            read_schedule(file)
    for wrong in ("2", 0, 1.5):
        file.write_text(json.dumps(json.loads(whole.to_json()) | {"replicas": wrong}))
        with pytest.raises(UsageError, match="replicas.*must be a whole number from 1 to"):
            read_schedule(file)
    file.write_text(whole.to_json())
    assert read_schedule(file) == whole


def plan_of(strategy: str, **around) -> Plan:
    place = STRATEGIES[strategy].place
    assert place is not None
    return replace(plan_at(place, "block", 2, 4, 1), **around)


SPLITS = {
    "replicas": plan_of("1f1b", replicas=2),
    "experts": plan_of("zero-3", experts=2),
    "context": plan_of("zero-3", context=4, context_by="mixed", context_exchange=2),
    "members": plan_of("weipipe-keep", members=2),
    "features": plan_of("zero-3", features=2, features_by="ring"),
}
"""A plan along each axis that stands around a schedule's devices or within its places."""


@pytest.mark.parametrize("axis", [axis.name for axis in AROUND.values()])
def test_what_a_schedules_file_says_of_an_axis_is_laid_out_again(axis, tmp_path):
    plan, config = SPLITS[axis], replace(preset("tiny"), num_layers=4)
    if axis == "experts":
        mixture = Experts(count=4, active=2, intermediate_size=32)
        config = replace(config, kinds=(BlockKind(experts=True),), experts=mixture)
    assert getattr(plan, axis) > 1 and why_not(plan) is None
    sizes: Any = SimpleNamespace(layers=4, batch=16)
    made = to_schedule(sizes, plan)
    file = tmp_path / "schedule.json"
    file.write_text(made.to_json())
    assert Schedule.from_json(file.read_text()) == made
    assert plan_devices(file) == plan.devices
    asked = AskedLayout(schedule=str(file), microbatch_size=1, sequence_length=32)
    layout = lay_out(config, jax.devices()[: plan.devices], asked)
    assert layout.schedule == made
    assert layout.mesh.shape[AXES[axis].mesh] == getattr(plan, axis)
    assert layout.rows * layout.microbatch_size == 16
    assert layout.split == plan.split


@pytest.mark.parametrize("axis", AROUND.values(), ids=lambda axis: axis.asked)
@pytest.mark.parametrize("says", [1, 4])
def test_what_is_asked_of_an_axis_beside_a_file_that_says_otherwise_is_refused(
    axis, says, small_model, small_parameters, tmp_path
):
    """Also where the file's number is the usual one."""
    around = {axis.name: says}
    made = replace(for_layers("zero-3", devices=2, layers=4, microbatches=4), **around)
    file = tmp_path / "schedule.json"
    file.write_text(made.to_json())
    # A place of a ring is shared by members in rings alone, and zero-3 is none.
    plan = plan_of("weipipe-keep" if axis.name == "members" else "zero-3", **around)
    value = {
        "format": "jaxsys-plan-file",
        "version": 1,
        "for": {"layers": 4, "devices": plan.devices, "batch": 16},
        "plan": plan.to_json(),
    }
    planned = tmp_path / "plan.json"
    planned.write_text(json.dumps(value))
    assert why_not(plan) is None
    config = replace(preset("tiny"), num_layers=4)
    asked, split = taken_from({axis.asked: 2})
    for path in (file, planned):
        with pytest.raises(UsageError, match=f"{axis.asked}=2.* is .*for .*; leave it out"):
            lay_out(
                config, jax.devices(), AskedLayout(schedule=str(path), around=asked, split=split)
            )
        with pytest.raises(UsageError, match=f"{axis.asked}=2.* is .*for .*; leave it out"):
            trainer_of(small_model, small_parameters, schedule=path, **{axis.asked: 2})


def test_a_mesh_that_splits_more_than_a_file_says_is_refused(
    small_model, small_parameters, tmp_path
):
    file = tmp_path / "schedule.json"
    file.write_text(for_layers("dp", devices=2, layers=4, microbatches=4).to_json())
    mesh = make_mesh(2, 2, devices=jax.devices()[:4])
    with pytest.raises(UsageError, match="the mesh has 2 rings, but schedule dp is planned for 1"):
        trainer_of(small_model, small_parameters, schedule=file, mesh=mesh)
    # What is no file says nothing of rings beside its own.
    made = read_schedule(file)
    assert trainer_of(small_model, small_parameters, schedule=made, mesh=mesh).rows == 8
