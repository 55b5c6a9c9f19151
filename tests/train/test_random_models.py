"""Models drawn at random train as a plain loop trains them, or are refused in one line."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import reference_loss
from jaxsys.train import Trainer

_spec = importlib.util.spec_from_file_location(
    "random_models", Path(__file__).parent / "random_models.py"
)
assert _spec is not None and _spec.loader is not None
random_models: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_models)

STEPS = 3
SEED = 5
QUICK = (4, 5, 6, 7, 10)
"""Seeds of the default suite, that adapt: dropout, kinds, positions, scans, remat, means."""


def difference(found: Any, wanted: Any) -> float:
    """The largest difference of a leaf, relative to its largest value or to 1e-2."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        worst = max(worst, float(np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b)), 1e-2)))
    return worst


def loss_and_gradients(one: Any, data: Any) -> None:
    """Asserts that an adapted model's loss and gradients are its author's, on one device."""
    options, batch = one.options, data[0]
    adapted = one.adapt({name: leaf[: options.microbatch_size] for name, leaf in batch.items()})
    rows = options.microbatches
    cut = jax.tree.map(lambda leaf: leaf.reshape(rows, -1, *leaf.shape[1:]), batch)
    keys = None
    if adapted.draws:
        cut["key"] = keys = random_models.keys_of(options, SEED, 0)
    moving, still = random_models.parted(adapted.parameters)
    found = jax.jit(
        jax.value_and_grad(
            lambda moving: reference_loss(adapted.model, random_models.joined(moving, still), cut)
        )
    )(moving)
    own, fixed = random_models.parted(one.parameters)
    wanted = jax.jit(
        jax.value_and_grad(
            lambda own: random_models.whole_loss(one, random_models.joined(own, fixed), batch, keys)
        )
    )(own)
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=5e-6)
    gradients = one.own(adapted.rebuild(random_models.joined(found[1], still)))
    assert difference(random_models.parted(gradients)[0], wanted[1]) < 2e-5


def trained(one: Any, data: Any) -> None:
    """Asserts that a model trains under its schedule as its author's loop trains it.

    One that diverges does so at the same step; a trainer then keeps what was before it.
    """
    options = one.options
    adapted = one.adapt({name: leaf[: options.microbatch_size] for name, leaf in data[0].items()})
    trainer = Trainer(
        adapted.model,
        adapted.parameters,
        random_models.optimizer(options),
        schedule=options.schedule,
        devices=4,
        microbatches=options.microbatches,
        recompute=options.recompute,
        seed=SEED,
    )
    losses = [float(trainer.step(trainer.split(batch)).loss) for batch in data]
    wanted, parameters = random_models.plain_loop(one, data, SEED, adapted.draws)
    finite = np.isfinite(wanted)
    if not finite.all():
        steps = int(np.argmin(finite))
        assert steps and not np.isfinite(losses[steps])
        losses = losses[:steps]
        wanted, parameters = random_models.plain_loop(one, data[:steps], SEED, adapted.draws)
    np.testing.assert_allclose(losses, wanted, rtol=5e-6)
    assert difference(one.own(adapted.rebuild(trainer.parameters())), parameters) < 2e-5


def outcome(seed: int, check: Callable[[Any, Any], None], **changes: Any) -> str | None:
    """None if a seed's model is what its author's is, else the one line that refuses it.

    Raises AssertionError, with the seed, if it is another, or is refused in some other way.
    """
    one = random_models.case(seed, **changes)
    try:
        check(one, random_models.batches(one.options, STEPS))
    except UsageError as error:
        # What the planner says of a model that does not run is no reason of the model's own.
        assert "\n" not in str(error) and "does not trace" not in str(error), f"seed {seed}"
        return str(error)
    except Exception as error:
        about = f"seed {seed}: {type(error).__name__}: {error}; {one.options}"
        raise AssertionError(about) from error
    return None


@pytest.mark.parametrize("seed", QUICK)
def test_a_random_model_has_its_authors_gradients(seed):
    assert outcome(seed, loss_and_gradients, layers=2, microbatches=2) is None


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_models_train_as_in_their_authors_loop(first):
    """Two hundred of them, each under a schedule drawn with it."""
    refused, failed = {}, {}
    for seed in range(first, first + 20):
        try:
            line = outcome(seed, trained)
        except AssertionError as error:
            failed[seed] = str(error)
        else:
            if line is not None:
                refused[seed] = line
        jax.clear_caches()
    assert not failed, "\n".join(f"{seed}: {text}" for seed, text in failed.items())
    # Most adapt, or equality would say little.
    assert len(refused) <= 10, "\n".join(f"{seed}: {text}" for seed, text in refused.items())
