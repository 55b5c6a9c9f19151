"""Losses in which a sample's part reads what the whole batch adds up to, or how long it is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import reference_loss
from jaxsys.train import Trainer
from jaxsys.train.adapt import KEY, from_function

V, D, T, L, ROWS = 7, 4, 3, 2, 4
RNG = np.random.default_rng(0)
PARAMETERS: Any = {
    "table": RNG.standard_normal((V, D)).astype(np.float32),
    "scales": np.asarray([0.3, -0.2], np.float32),
    "layers": {"w": (0.5 * RNG.standard_normal((L, D, D))).astype(np.float32)},
}


def data(size: int) -> dict[str, np.ndarray]:
    """Microbatches [ROWS, size, T] in which unlike numbers of targets count."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (ROWS, size, T + 1)).astype(np.int32)
    targets = tokens[..., 1:].copy()
    targets[rng.random(targets.shape) < 0.4] = -1
    targets[:, 0, 0] = 1
    weights = rng.random((ROWS, size)).astype(np.float32)
    return {"inputs": tokens[..., :-1], "targets": targets, "weights": weights}


def first(rows: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], rows)


def together(rows: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)


def logits_of(p: Any, batch: Any) -> Any:
    x = p["table"][batch["inputs"]]
    for n in range(L):
        x = x + jnp.tanh(x @ p["layers"]["w"][n])
    return x @ p["table"].T


def losses_of(p: Any, batch: Any) -> tuple[Any, Any, Any]:
    """Losses [B, T], which of them count as float32, logits."""
    logits, targets = logits_of(p, batch), batch["targets"]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return each, (targets >= 0).astype(jnp.float32), logits


def normalised_inside(p, b):
    e, m, _ = losses_of(p, b)
    return (e * m / m.sum()).sum()


def normalised_weights(p, b):
    e, m, _ = losses_of(p, b)
    return jnp.vdot(e, m / (m.sum() + 1e-3))


def average(p, b):
    e, m, _ = losses_of(p, b)
    return jnp.average(e, weights=m)


def at_least_five(p, b):
    e, m, _ = losses_of(p, b)
    return (e * m).sum() / jnp.maximum(m.sum(), 5.0)


def at_least_one(p, b):
    e, m, _ = losses_of(p, b)
    return (e * m).sum() / jnp.maximum(m.sum(), 1)


def with_epsilon(p, b):
    e, m, _ = losses_of(p, b)
    return (e * m).sum() / (m.sum() + 1e-8)


def mean_where(p, b):
    e, m, _ = losses_of(p, b)
    return e.mean(where=m > 0)


def nan_mean(p, b):
    e, m, _ = losses_of(p, b)
    return jnp.nanmean(jnp.where(m > 0, e, jnp.nan))


def mean_of_sequences(p, b):
    e, m, _ = losses_of(p, b)
    return ((e * m).sum(1) / jnp.maximum(m.sum(1), 1)).mean()


def smoothed(p, b):
    _, m, logits = losses_of(p, b)
    labels = optax.smooth_labels(jax.nn.one_hot(b["targets"], V), 0.1)
    return (optax.softmax_cross_entropy(logits, labels) * m).sum() / m.sum()


def with_z_loss(p, b):
    e, m, logits = losses_of(p, b)
    z = jnp.square(jax.nn.logsumexp(logits, -1))
    real = (b["inputs"] > 0).astype(jnp.float32)
    return (e * m / m.sum()).sum() + 1e-2 * (z * real).sum() / real.sum()


def weighted(p, b):
    e, m, _ = losses_of(p, b)
    w = b["weights"][:, None] * m
    return (e * w).sum() / w.sum()


def weights_of_length_one(p, b):
    e, _, _ = losses_of(p, b)
    return (e.mean(1) * b["weights"] / jnp.linalg.norm(b["weights"])).sum()


def balanced(p, b):
    """Classes weigh alike: each sample by how many of its class there are."""
    e, m, _ = losses_of(p, b)
    counts = (jax.nn.one_hot(b["targets"], V) * m[..., None]).sum((0, 1))
    weights = m.sum() / (V * jnp.maximum(counts, 1))
    return (e * m * weights[b["targets"]]).mean()


def balanced_by_bincount(p, b):
    e, m, _ = losses_of(p, b)
    counts = jnp.bincount((b["targets"] + 1).reshape(-1), length=V + 1)
    return (e * m / counts[b["targets"] + 1]).sum()


def mean_of_classes(p, b):
    e, _, _ = losses_of(p, b)
    ones = jax.nn.one_hot(b["targets"], V)
    return ((ones * e[..., None]).sum((0, 1)) / jnp.maximum(ones.sum((0, 1)), 1)).mean()


def normalised_advantages(p, b):
    """As policy gradients have it: less the mean, over the deviation, of the whole batch."""
    e, m, _ = losses_of(p, b)
    reward = b["weights"]
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
    return (e * m * advantage[:, None]).sum() / m.sum()


def positive_weight(p, b):
    _, _, logits = losses_of(p, b)
    labels = (b["targets"] > 1).astype(jnp.float32)
    positive = labels.sum()
    weight = (labels.size - positive) / positive
    each = optax.sigmoid_binary_cross_entropy(logits[..., 0], labels)
    return (each * (1 + (weight - 1) * labels)).mean()


def divided_before(p, b):
    e, _, _ = losses_of(p, b)
    return (e / len(e)).sum()


def divided_twice(p, b):
    e, m, _ = losses_of(p, b)
    return (e * m / len(e)).sum() / m.sum() + (e / len(e)).mean()


def times_a_root(p, b):
    e, _, _ = losses_of(p, b)
    return e.mean() + len(e) ** 0.5 * jnp.sum(jnp.square(p["layers"]["w"]))


def tasks_with_weights_of_their_own(p, b):
    """Two tasks, each by its learned uncertainty."""
    e, m, logits = losses_of(p, b)
    s = jnp.asarray(p["scales"])
    first, second = (e * m).sum() / m.sum(), jnp.square(logits).mean()
    return jnp.exp(-s[0]) * first + s[0] + second / jnp.exp(s[1]) + s[1]


def tasks_in_a_row(p, b):
    e, m, logits = losses_of(p, b)
    found = jnp.stack([(e * m / m.sum()).sum(), jnp.square(logits).mean()])
    return jnp.sum(found)


ADAPT = [
    normalised_inside,
    normalised_weights,
    average,
    at_least_five,
    at_least_one,
    with_epsilon,
    mean_where,
    nan_mean,
    mean_of_sequences,
    smoothed,
    with_z_loss,
    weighted,
    weights_of_length_one,
    balanced,
    balanced_by_bincount,
    mean_of_classes,
    normalised_advantages,
    positive_weight,
    divided_before,
    divided_twice,
    times_a_root,
    tasks_with_weights_of_their_own,
    tasks_in_a_row,
]


QUICK = {
    normalised_inside: 1,
    at_least_five: 2,
    nan_mean: 2,
    weighted: 1,
    balanced: 2,
    balanced_by_bincount: 1,
    mean_of_classes: 2,
    normalised_advantages: 1,
    positive_weight: 2,
    divided_twice: 1,
    times_a_root: 2,
    tasks_with_weights_of_their_own: 1,
}
"""Losses of the default suite, and samples in a microbatch."""


def compared(loss: Any, size: int) -> Any:
    """Loss and gradients by microbatches are the author's of the whole batch."""
    rows = data(size)
    adapted = from_function(loss, PARAMETERS, first(rows), blocks="layers")
    found = jax.value_and_grad(lambda p: reference_loss(adapted.model, p, rows))(adapted.parameters)
    wanted = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, PARAMETERS), together(rows))
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=2e-6)
    for a, b in zip(
        jax.tree.leaves(adapted.rebuild(found[1])), jax.tree.leaves(wanted[1]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    return adapted


@pytest.mark.parametrize(
    ("loss", "size"),
    [
        pytest.param(loss, size, marks=() if QUICK.get(loss) == size else pytest.mark.slow)
        for loss in ADAPT
        for size in (1, 2, 3)
    ],
)
def test_microbatches_add_up_to_the_whole_batch(loss, size):
    compared(loss, size)


def test_what_draws_beside_a_sum_of_the_batch():
    """Draws are each microbatch's, the sum is all of theirs."""

    def loss(p, b):
        e, m, _ = losses_of(p, b)
        kept = jax.random.bernoulli(b[KEY], 0.5, e.shape)
        return (e * kept * m / m.sum()).sum()

    rows = {**data(2), KEY: jax.random.split(jax.random.key(0), ROWS)}
    adapted = from_function(loss, PARAMETERS, first(data(2)), blocks="layers")
    found = reference_loss(adapted.model, adapted.parameters, rows)
    parts = [jax.tree.map(lambda leaf, n=n: leaf[n], rows) for n in range(ROWS)]
    counts = [np.sum(part["targets"] >= 0) for part in parts]
    sums = [float(loss(PARAMETERS, part)) * n for part, n in zip(parts, counts, strict=True)]
    assert float(found) == pytest.approx(sum(sums) / sum(counts), rel=2e-6)


def root(p, b):
    return jnp.sqrt(jnp.square(logits_of(p, b)).mean())


def of_logits(p, b):
    e, _, logits = losses_of(p, b)
    return (e / jnp.abs(logits).max()).mean()


def by_places(p, b):
    e, _, _ = losses_of(p, b)
    return (e * jnp.arange(len(e))[:, None]).mean()


def hardest(p, b):
    e, _, _ = losses_of(p, b)
    return jax.lax.top_k(e.mean(1), max(1, len(e) // 2))[0].mean()


def of_a_logarithm(p, b):
    e, _, _ = losses_of(p, b)
    return e.mean() * jnp.log(len(e) + 1.0)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (root, r"at sqrt \(test_adapt_whole.py:\d+\)"),
        (of_logits, r"at reduce_max \(test_adapt_whole.py:\d+\)"),
        (hardest, "test_adapt_whole.py"),
        (by_places, "not seen to be a mean|for more samples"),
        (of_a_logarithm, "for more samples"),
    ],
)
def test_what_is_another_number_is_refused_where_it_is_written(loss, says, size):
    with pytest.raises(UsageError, match=says):
        from_function(loss, PARAMETERS, first(data(size)), blocks="layers")


@pytest.mark.parametrize(
    "schedule",
    ["weipipe-interleave", *(pytest.param(s, marks=pytest.mark.slow) for s in ("1f1b", "zero-3"))],
)
def test_replicas_share_what_the_batch_adds_up_to(schedule):
    rows, rule = data(2), optax.sgd(0.5)
    adapted = from_function(normalised_advantages, PARAMETERS, first(rows), blocks="layers")
    trainer = Trainer(
        adapted.model, adapted.parameters, rule, schedule=schedule, devices=2, replicas=2,
        microbatches=ROWS // 2, memory_gib=float("inf"),
    )  # fmt: skip
    found = [float(trainer.step(rows).loss) for _ in range(3)]
    parameters, wanted = jax.tree.map(jnp.asarray, PARAMETERS), []
    for _ in range(3):
        value, gradients = jax.jit(jax.value_and_grad(normalised_advantages))(
            parameters, together(rows)
        )
        parameters = jax.tree.map(lambda p, g: p - 0.5 * g, parameters, gradients)
        wanted.append(float(value))
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
