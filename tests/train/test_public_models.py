"""Models of the kinds that people write train as in a plain loop, or are refused in one line."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import microbatch_keys, reference_loss, step_key
from jaxsys.train import Trainer
from jaxsys.train.adapt import KEY

_spec = importlib.util.spec_from_file_location(
    "public_models", Path(__file__).parent / "public_models.py"
)
assert _spec is not None and _spec.loader is not None
models: Any = importlib.util.module_from_spec(_spec)
sys.modules["public_models"] = models
_spec.loader.exec_module(models)

STEPS, SEED = 5, 5
ROWS = models.ROWS


@pytest.fixture(autouse=True)
def _as_people_write_them():
    """Ranks that differ are broadcast, as everywhere but in these tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


def cut(batch: Any) -> Any:
    """Into microbatches."""
    return jax.tree.map(lambda leaf: leaf.reshape(ROWS, -1, *leaf.shape[1:]), batch)


def row(batch: Any, index: int) -> Any:
    """One microbatch."""
    return jax.tree.map(lambda leaf: leaf[index], cut(batch))


def parted(parameters: Any) -> tuple[Any, Any]:
    """What trains, and the rest."""

    def trains(leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.inexact)

    moving = jax.tree.map(lambda leaf: jnp.asarray(leaf) if trains(leaf) else None, parameters)
    return moving, jax.tree.map(lambda leaf: None if trains(leaf) else leaf, parameters)


def words(leaf: Any) -> Any:
    """Elements; of typed keys what they are made of."""
    keys = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if keys else leaf


def joined(moving: Any, still: Any) -> Any:
    """`parted` undone."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, moving, still, is_leaf=lambda leaf: leaf is None
    )


def plain_loss(made: Any, parameters: Any, batch: Any, keys: Any) -> Any:
    """The author's loss of a batch: of the whole if it is a mean, else sums over microbatches."""

    def value(microbatch: Any) -> Any:
        result = made.loss(parameters, microbatch)
        return result if isinstance(result, tuple) else (result,)

    parts = [
        value(row(batch, n) if keys is None else {**row(batch, n), KEY: keys[n]})
        for n in range(ROWS)
    ]
    if len(parts[0]) > 1 and not isinstance(parts[0][1], Mapping):
        return sum(part[0] for part in parts) / sum(part[1] for part in parts)
    if keys is None:
        return value(batch)[0]
    counted = [jnp.sum(row(batch, n)["targets"] >= 0) for n in range(ROWS)]
    return sum(part[0] * count for part, count in zip(parts, counted, strict=True)) / sum(counted)


def keys_of(draws: bool, step: Any) -> Any:
    """A step's keys."""
    return microbatch_keys(step_key(jax.random.key(SEED), step), ROWS) if draws else None


def assert_same(found: Any, wanted: Any, tolerance: float) -> None:
    """Trees are of one structure and near, relative to each leaf's largest value."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.shape(a) == np.shape(b)
        a, b = np.asarray(a, np.complex128), np.asarray(b, np.complex128)
        assert np.max(np.abs(a - b), initial=0) <= tolerance * max(np.max(np.abs(b)), 1e-2)


def batch_of(made: Any, number: int) -> Any:
    return (made.data or models.batch)(number)


def loss_and_gradients(made: Any) -> None:
    """On one device, without a schedule."""
    data = batch_of(made, 0)
    adapted = made.adapt(row(data, 0))
    keys, batch = keys_of(adapted.draws, 0), cut(data)
    if adapted.draws:
        batch = {**batch, KEY: keys}
    moving, still = parted(adapted.parameters)
    found = jax.jit(
        jax.value_and_grad(
            lambda moving: reference_loss(adapted.model, joined(moving, still), batch)
        )
    )(moving)
    own, fixed = parted(made.parameters)
    wanted = jax.jit(
        jax.value_and_grad(lambda own: plain_loss(made, joined(own, fixed), data, keys))
    )(own)
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=2e-6)
    gradients = made.own(adapted.rebuild(joined(found[1], still)))
    assert_same(parted(gradients)[0], wanted[1], 2e-5)


def trained(
    made: Any,
    schedule: str = "weipipe-interleave",
    rule: Callable[[], optax.GradientTransformation] = lambda: optax.sgd(0.1, momentum=0.9),
) -> None:
    """Five steps on two devices, and the author's own loop."""
    data = [batch_of(made, number) for number in range(STEPS)]
    adapted = made.adapt(row(data[0], 0))
    trainer = Trainer(
        adapted.model,
        adapted.parameters,
        rule(),
        schedule=schedule,
        devices=2,
        microbatches=ROWS,
        seed=SEED,
        memory_gib=float("inf"),
    )
    losses = [float(trainer.step(cut(batch)).loss) for batch in data]
    optimizer = rule()
    moving, still = parted(made.parameters)
    state = optimizer.init(moving)

    @jax.jit
    def step(moving: Any, state: Any, batch: Any, number: Any) -> Any:
        keys = keys_of(adapted.draws, number)
        value, gradients = jax.value_and_grad(
            lambda moving: plain_loss(made, joined(moving, still), batch, keys)
        )(moving)
        updates, state = optimizer.update(gradients, state, moving)
        return optax.apply_updates(moving, updates), state, value

    wanted = []
    for number, batch in enumerate(data):
        moving, state, value = step(moving, state, batch, jnp.int32(number))
        wanted.append(float(value))
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)
    found = made.own(adapted.rebuild(trainer.parameters()))
    assert_same(parted(found)[0], moving, 1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(words(a), words(b)), parted(found)[1], still
    )


def outcome(name: str, check: Callable[..., None], **options: Any) -> str | None:
    """None if a model is what its author's is, else the one line that refuses it."""
    try:
        check(models.MODELS[name](), **options)
    except UsageError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


QUICK = ("stacks_used_whole_beside_the_scan", "skips_between_stacked_layers")
QUICK_REFUSED = ("complex_leaves", "stacks_run_backwards", "a_loop_that_picks_by_index")
ADAPT = [name for name in models.MODELS if name not in models.REFUSED]


def some(names: Any, quick: tuple[str, ...]) -> list[Any]:
    """The names, all but some of them slow."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some(ADAPT, QUICK))
def test_loss_and_gradients_are_the_authors(name):
    assert outcome(name, loss_and_gradients) is None


@pytest.mark.parametrize("name", some(models.REFUSED, QUICK_REFUSED))
def test_what_no_schedule_runs_is_refused_with_its_reason(name):
    with pytest.raises(UsageError, match=models.REFUSED[name]):
        models.MODELS[name]().adapt(row(batch_of(models.MODELS[name](), 0), 0))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["weipipe-interleave", "zero-3"])
@pytest.mark.parametrize("name", ADAPT)
def test_five_steps_are_those_of_the_authors_loop(name, schedule):
    assert outcome(name, trained, schedule=schedule) is None


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["weipipe-interleave", "zero-3"])
@pytest.mark.parametrize("rule", models.RULES)
def test_what_trains_is_what_the_author_trains(rule, schedule):
    """Masks, labels by path, accumulation, schedules of rates: on scalars, vectors and matrices."""
    made = models.MODELS["scalars_by_layer"]()
    trained(made, schedule=schedule, rule=models.RULES[rule])
