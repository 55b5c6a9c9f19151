"""Plans of models that adapters made: run as planned, from Python and from a file, or refused."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsys import planner
from jaxsys.axes import DATA, RING
from jaxsys.errors import UsageError
from jaxsys.hardware import device, link
from jaxsys.planner.constraints import Conflict
from jaxsys.planner.files import plan_file
from jaxsys.planner.plans import Plan, Residual, State
from jaxsys.train import Trainer, from_nnx

V, D, T, ROWS = 16, 8, 4, 8


class Block(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(D, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.tanh(self.inner(x)))


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.table = nnx.Embed(V, D, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(4)])

    def __call__(self, tokens):
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.table.attend(x)


def mean_loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(1).integers(0, V, (ROWS, 1, T + 1)).astype(np.int32)
    return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}


def cluster(devices: int) -> planner.Cluster:
    return planner.Cluster(device=device("cpu"), devices=devices, link=link("host-memory"))


@pytest.fixture(scope="module")
def adapted():
    example = {name: leaf[0] for name, leaf in batch().items()}
    return from_nnx(Model(), example, blocks="blocks", loss=mean_loss)


def plan_of(adapted, devices=4, weight_bytes=4.0, **domains):
    def narrow(space):
        for name, values in domains.items():
            space = space.domain(name, values)
        return space

    return planner.plan(
        adapted.model,
        adapted.parameters,
        batch(),
        cluster=cluster(devices),
        precision=planner.Precision(weight_bytes=weight_bytes),
        narrow=narrow,
    )


@pytest.fixture(scope="module")
def found(adapted):
    """Two replicas of a ring or pipeline of two."""
    return plan_of(adapted, replicas=2, stages=2)


def trainer_of(adapted, **options: Any) -> Trainer:
    return Trainer(
        adapted.model,
        adapted.parameters,
        optax.adamw(1e-2, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
        seed=3,
        memory_gib=float("inf"),
        **options,
    )


def losses(trainer: Trainer) -> list[float]:
    return [float(trainer.step(batch()).loss) for _ in range(3)]


def written(found, path, **request: Any) -> str:
    value = plan_file(found.problem, found.found, request=request)
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "domains",
    [
        {"replicas": 2, "stages": 2},
        {"stages": 4},
        {"shard": 4},
        {"shard": 2, "replicas": 2},
    ],
)
def test_a_plan_trains_as_one_device_does(adapted, domains, tmp_path):
    """A model that draws: its masks are the same however it is planned."""
    found = plan_of(adapted, **domains)
    trainer = trainer_of(adapted, plan=found)
    assert trainer.mesh.size == 4 and trainer.mesh.shape[DATA] == domains.get("replicas", 1)
    policies = {"keep": "none", "selective": "selective", "recompute": "block"}
    assert trainer.recompute == policies[found.plan.layers[0].residual]
    alone = losses(trainer_of(adapted, schedule="dp", devices=1, microbatches=ROWS))
    np.testing.assert_allclose(losses(trainer), alone, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["plan", "schedule"])
def test_a_plan_file_is_the_plan(adapted, found, option, tmp_path):
    path = written(found, tmp_path / "plan.json", dtype="bfloat16")
    trainer = trainer_of(adapted, **{option: path})
    assert dict(trainer.mesh.shape) == {DATA: 2, RING: 2}
    assert trainer.compute_dtype == jnp.bfloat16
    same = trainer_of(adapted, plan=plan_of(adapted, weight_bytes=2.0, replicas=2, stages=2))
    np.testing.assert_allclose(losses(trainer), losses(same), rtol=1e-6)


def test_recompute_by_layer_is_the_plans(adapted, found):
    kinds = (Residual.KEEP, Residual.RECOMPUTE) * 2
    paths = tuple(replace(found.plan.layers[0], residual=kind) for kind in kinds)
    sharded = Plan(shard=4, state=State.SPLIT, layers=paths)
    trainer = trainer_of(adapted, plan=replace(found, plan=sharded))
    assert trainer.recompute == ("none", "block") * 2


def test_what_a_plan_does_not_say_is_refused(adapted, found, tmp_path):
    with pytest.raises(UsageError, match="devices=2, but schedule .* use devices=4"):
        trainer_of(adapted, plan=found, devices=2)
    with pytest.raises(UsageError, match="compute_dtype=bfloat16, but the plan is for .*float32"):
        trainer_of(adapted, plan=found, compute_dtype="bfloat16")
    with pytest.raises(UsageError, match=r"devices=16, but 8 cpu device\(s\) are present"):
        trainer_of(adapted, plan=plan_of(adapted, devices=16, replicas=4, stages=4))
    path = written(found, tmp_path / "plan.json", dtype="bfloat16")
    with pytest.raises(UsageError, match="compute_dtype=float32, but the plan is for .*bfloat16"):
        trainer_of(adapted, plan=path, compute_dtype="float32")
    with pytest.raises(UsageError, match="devices=8, but schedule .* use devices=4"):
        trainer_of(adapted, schedule=path, devices=8)


def test_features_of_an_adapted_model_are_not_split(adapted, found):
    split = replace(found, plan=Plan(features=4, layers=found.plan.layers))
    with pytest.raises(UsageError, match="tensor=4: this model does not say how its blocks are"):
        trainer_of(adapted, plan=split)
    with pytest.raises(Conflict, match="features are whole on each device.*Drop \\(2\\)"):
        plan_of_features(adapted)


def plan_of_features(adapted):
    return planner.plan(
        adapted.model,
        adapted.parameters,
        batch(),
        cluster=cluster(4),
        narrow=lambda space: space.split("features", 2),
    )
