"""Losses and derivatives that need what the whole batch is divided by before it is run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import reference_loss, with_totals
from jaxsys.train import Trainer
from jaxsys.train.adapt import from_function

V, D, T, L, ROWS, SIZE = 7, 4, 3, 2, 4, 2
RNG = np.random.default_rng(0)
PARAMETERS: Any = {
    "table": RNG.standard_normal((V, D)).astype(np.float32),
    "layers": {"w": (0.5 * RNG.standard_normal((L, D, D))).astype(np.float32)},
}


def data(size: int = SIZE) -> dict[str, np.ndarray]:
    """Microbatches [ROWS, size, T] in which unlike numbers of targets count."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (ROWS, size, T + 1)).astype(np.int32)
    targets = tokens[..., 1:].copy()
    targets[rng.random(targets.shape) < 0.4] = -1
    targets[:, 0, 0] = 1
    return {"inputs": tokens[..., :-1], "targets": targets}


def first(rows: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], rows)


def together(rows: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)


def losses_of(parameters: Any, batch: Any, act: Any = jnp.tanh) -> tuple[Any, Any, Any]:
    """Losses [B, T], which of them count, logits."""
    x = parameters["table"][batch["inputs"]]
    for n in range(L):
        x = x + act(x @ parameters["layers"]["w"][n])
    logits = x @ parameters["table"].T
    targets = batch["targets"]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return each, targets >= 0, logits


def check(loss: Any, size: int = SIZE, of_batch: Any = None) -> Any:
    """Loss and gradients by microbatches are the author's of the whole batch."""
    rows = data(size)
    adapted = from_function(loss, PARAMETERS, first(rows), blocks="layers")
    found = jax.value_and_grad(lambda p: reference_loss(adapted.model, p, rows))(adapted.parameters)
    wanted = jax.value_and_grad(of_batch or loss)(
        jax.tree.map(jnp.asarray, PARAMETERS), together(rows)
    )
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=2e-6)
    for a, b in zip(
        jax.tree.leaves(adapted.rebuild(found[1])), jax.tree.leaves(wanted[1]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    return adapted


def penalty(parameters: Any) -> Any:
    return 0.1 * jnp.sum(jnp.square(parameters["layers"]["w"]))


def masked_and_plain(parameters, batch):
    each, mask, logits = losses_of(parameters, batch)
    return jnp.sum(each * mask) / jnp.sum(mask) + 0.1 * jnp.mean(jnp.square(logits))


def two_masks(parameters, batch):
    each, mask, logits = losses_of(parameters, batch)
    even = batch["inputs"] % 2 == 0
    drift = jnp.square(logits).sum(-1)
    return (
        jnp.sum(each * mask) / jnp.maximum(jnp.sum(mask), 1)
        - 0.1 * jnp.sum(drift * even) / (jnp.sum(even) + 1e-6)
        + penalty(parameters)
    )


def penalty_among_the_masked(parameters, batch):
    each, mask, _ = losses_of(parameters, batch)
    return (jnp.sum(each * mask) + penalty(parameters)) / jnp.sum(mask)


def penalty_among_all(parameters, batch):
    each, _, _ = losses_of(parameters, batch)
    return (jnp.sum(each) + penalty(parameters)) / each.size


def penalty_by_samples(parameters, batch):
    each, _, _ = losses_of(parameters, batch)
    return jnp.mean(each) + len(each) * penalty(parameters)


GUARDS: dict[str, Any] = {
    "clip": lambda total, count: total / jnp.clip(count, min=1),
    "add": lambda total, count: total / (count + 1e-8),
    "where beside": lambda total, count: jnp.where(count > 0, total / count, 0.0),
    "where below": lambda total, count: total / jnp.where(count == 0, 1, count),
    "means": lambda total, count: (total / 6) / (count / 6),
}


@pytest.mark.parametrize("weights", ["counts", "small"])
@pytest.mark.parametrize("name", GUARDS)
def test_what_keeps_divisors_from_zero(name, weights):
    """Counts are above it; weights that add up to less than 1 are another matter."""

    def loss(parameters, batch):
        each, mask, _ = losses_of(parameters, batch)
        mask = mask if weights == "counts" else 0.01 * mask
        return GUARDS[name](jnp.sum(each * mask), jnp.sum(mask))

    check(loss)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "loss",
    [masked_and_plain, two_masks, penalty_among_the_masked, penalty_among_all, penalty_by_samples],
)
def test_terms_with_divisors_of_their_own(loss, size):
    check(loss, size)


PAIRS: dict[str, Any] = {
    "a penalty once": lambda p, each, mask: (
        jnp.sum(each * mask) + penalty(p), jnp.sum(mask)),
    "a penalty a sample": lambda p, each, mask: (
        jnp.sum(each) + each.size * penalty(p), each.size),
    "a mean beside": lambda p, each, mask: (
        jnp.sum(each) + jnp.mean(each**2) - jnp.sum(each * mask) / jnp.sum(mask), each.size),
    "a sum as a mean": lambda p, each, mask: (jnp.sum(each) + penalty(p), 2.0),
    "a mean as a sum": lambda p, each, mask: (jnp.sum(each * mask) / jnp.sum(mask), 1.0),
    "a root beside": lambda p, each, mask: (
        jnp.sum(jnp.sqrt(each)) + 0 * jnp.max(each) + penalty(p), each.size),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_sums_are_those_of_the_whole_batch(name, size):
    """What is no sum over samples counts once, not once a microbatch."""

    def loss(parameters, batch):
        each, mask, _ = losses_of(parameters, batch)
        return PAIRS[name](parameters, each, mask)

    def of_batch(parameters, batch):
        total, weight = loss(parameters, batch)
        return total / weight

    check(loss, size, of_batch=of_batch)


@pytest.mark.parametrize("pair", [True, False])
def test_a_microbatch_may_count_nothing(pair):
    """What keeps a divisor from zero is of the whole batch, not one for each that has none."""

    def loss(parameters, batch) -> Any:
        each, mask, _ = losses_of(parameters, batch)
        total, count = jnp.sum(each * mask), jnp.maximum(jnp.sum(mask), 1)
        return (total, count) if pair else total / count

    rows = data()
    rows["targets"][1:3] = -1
    adapted = from_function(loss, PARAMETERS, first(rows), blocks="layers")
    found = reference_loss(adapted.model, adapted.parameters, rows)
    wanted = loss(jax.tree.map(jnp.asarray, PARAMETERS), together(rows))
    wanted = wanted[0] / wanted[1] if pair else wanted
    assert float(found) == pytest.approx(float(wanted), rel=2e-6)
    rows["targets"][:] = -1
    gradients = jax.grad(lambda p: reference_loss(adapted.model, p, rows))(adapted.parameters)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def gated(parameters, batch):
    each, _, logits = losses_of(parameters, batch)
    gates = jax.nn.sigmoid(logits[..., 0])
    return jnp.sum(gates * each) / jnp.sum(gates)


def gated_sums(parameters, batch):
    each, _, logits = losses_of(parameters, batch)
    gates = jax.nn.sigmoid(logits[..., 0])
    return jnp.sum(gates * each), jnp.sum(gates)


def stopped(parameters, batch):
    each, _, logits = losses_of(parameters, batch)
    gates = jax.lax.stop_gradient(jax.nn.sigmoid(logits[..., 0]))
    return jnp.sum(gates * each) / jnp.sum(gates)


def stopped_beside_another(parameters, batch):
    return stopped(parameters, batch) + masked_and_plain(parameters, batch)


def divided_in_a_loop(parameters, batch):
    each, _, _ = losses_of(parameters, batch)
    return jax.lax.scan(lambda c, e: (c + jnp.sum(e / len(e)), None), 0.0, each.T)[0]


def test_a_model_of_one_batch_size():
    """Seen with no other number of samples, a mean is not told from a sum; a sum says so itself."""

    def losses(parameters, batch):
        each, _, logits = losses_of(parameters, batch)
        return each + 0 * jnp.sum(logits.reshape(SIZE, T, V), -1), logits

    def mean(parameters, batch):
        return losses(parameters, batch)[0].mean()

    def sums(parameters, batch):
        return jnp.sum(losses(parameters, batch)[0]), jnp.float32(SIZE * T)

    with pytest.raises(UsageError, match="takes 2 samples and not 4, by which a mean is told"):
        from_function(mean, PARAMETERS, first(data()), blocks="layers")
    from_function(sums, PARAMETERS, first(data()), blocks="layers")
    with pytest.raises(UsageError, match="the first is a mean already"):
        from_function(
            lambda p, b: (mean(p, b), SIZE * T), PARAMETERS, first(data()), blocks="layers"
        )


def test_metrics_beside_a_mean_are_means():
    def loss(parameters, batch):
        each, mask, logits = losses_of(parameters, batch)
        right = (jnp.argmax(logits, -1) == batch["targets"]) & mask
        metrics = {
            "accuracy": jnp.sum(right) / jnp.sum(mask),
            "size": jnp.mean(jnp.square(logits)),
            "largest": jnp.max(logits),
            "rate": 0.5,
        }
        return jnp.sum(each * mask) / jnp.sum(mask), metrics

    rows = data()
    adapted = from_function(loss, PARAMETERS, first(rows), blocks="layers")
    whole = with_totals(adapted.model, rows)
    found = []
    for n in range(ROWS):
        row = jax.tree.map(lambda leaf, n=n: leaf[n], whole)
        x = adapted.model.embed(adapted.parameters["edge"], row)
        for index in range(L):
            x = adapted.model.run_layer(adapted.parameters["blocks"], x, row, index)
        found.append(adapted.model.head_loss(adapted.parameters["edge"], x, row)[2])
    total = jax.tree.map(lambda *each: float(sum(each)), *found)
    wanted = loss(jax.tree.map(jnp.asarray, PARAMETERS), together(rows))[1]
    for name in ("accuracy", "size", "rate"):
        assert total[name] == pytest.approx(float(wanted[name]), rel=2e-6)
    counts = (rows["targets"] >= 0).sum((1, 2))  # what is no mean is averaged by the loss's weight
    largest = [
        float(loss(PARAMETERS, jax.tree.map(lambda leaf, n=n: leaf[n], rows))[1]["largest"])
        for n in range(ROWS)
    ]
    assert total["largest"] == pytest.approx(np.average(largest, weights=counts), rel=2e-6)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (gated, "divided by what depends on parameters"),
        (gated_sums, "the second depends on parameters"),
        (stopped_beside_another, "a divisor is made of parameters"),
        (divided_in_a_loop, "another number for more samples"),
    ],
)
def test_divisors_that_no_step_has_are_refused(loss, says):
    with pytest.raises(UsageError, match=says):
        from_function(loss, PARAMETERS, first(data()), blocks="layers")


def test_a_divisor_behind_a_stopped_gradient_is_a_weight():
    check(stopped)


def with_derivative(backward):
    @jax.custom_vjp
    def function(x):
        return jnp.tanh(x)

    function.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (backward(x, g),))
    return function


@jax.custom_vjp
def between(low, high, x):
    """What is given, its gradient kept between two numbers."""
    return x


between.defvjp(
    lambda low, high, x: (x, (low, high)),
    lambda kept, g: (None, None, jnp.clip(g, *kept)),
)


def clip_by_row(x, g):
    return g * jnp.minimum(1.0, 0.02 / jnp.linalg.norm(g, axis=-1, keepdims=True)) * jnp.cos(x)


CLIPS: dict[str, Any] = {
    "each element": with_derivative(lambda x, g: jnp.clip(g, -0.01, 0.01) * jnp.cos(x)),
    "each row": with_derivative(clip_by_row),
    "between arguments": lambda x: jnp.tanh(between(-0.01, 0.01, x)),
    "in a loop": lambda x: jax.lax.scan(
        lambda c, _: (jnp.tanh(between(-0.01, 0.01, c)), None), x, None, length=2
    )[0],
    "in a remat, for each sample": jax.checkpoint(jax.vmap(with_derivative(clip_by_row))),
}


FORMS = ("mean", "masked", "sums", "several")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            name,
            form,
            marks=() if name == "each element" or form == "mean" else pytest.mark.slow,
        )
        for name in CLIPS
        for form in FORMS
    ],
)
def test_derivatives_that_clip_each_sample(name, form):
    def loss(parameters, batch):
        each, mask, logits = losses_of(parameters, batch, CLIPS[name])
        if form == "mean":
            return each.mean() + penalty(parameters)
        if form == "sums":
            return jnp.sum(each * mask), jnp.sum(mask)
        masked = jnp.sum(each * mask) / jnp.sum(mask)
        return masked if form == "masked" else masked + jnp.mean(jnp.square(logits))

    def of_batch(parameters, batch):
        total, weight = loss(parameters, batch)
        return total / weight

    adapted = check(loss, size=1 + (form == "mean"), of_batch=of_batch if form == "sums" else None)
    # Evaluated, batches weigh as much as counts in them.
    model, row = adapted.model.evaluation, first(data(1 + (form == "mean")))
    x = model.embed(adapted.parameters["edge"], row)
    counted = np.sum(row["targets"] >= 0) if form in ("masked", "sums") else len(row["targets"])
    assert float(model.head_loss(adapted.parameters["edge"], x, row)[1]) == counted


@jax.custom_vjp
def product(x, w):
    """x w, of which x alone gets a clipped gradient."""
    return x @ w


product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, g: (
        jnp.clip(g @ kept[1].T, -0.01, 0.01),
        jnp.einsum("btd,bte->de", kept[0], g),
    ),
)


def test_a_parameters_gradient_may_be_summed_beside_a_clipped_one():
    def loss(parameters, batch):
        x = parameters["table"][batch["inputs"]]
        for n in range(L):
            x = x + jnp.tanh(product(x, parameters["layers"]["w"][n]))
        return jnp.mean(jnp.square(x))

    check(loss)


@jax.custom_vjp
def clipped_product(x, w):
    """x w, its gradients clipped."""
    return x @ w


clipped_product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, g: (
        jnp.clip(g @ kept[1].T, -0.01, 0.01),
        jnp.clip(jnp.einsum("btd,bte->de", kept[0], g), -0.01, 0.01),
    ),
)

MIXED: dict[str, Any] = {
    "the norm over a batch": lambda x, w: with_derivative(lambda x, g: g / jnp.linalg.norm(g))(
        x @ w
    ),
    "a parameter's gradient": clipped_product,
    "one sample after another": lambda x, w: jax.lax.map(CLIPS["each element"], x @ w),
    "of a parameter alone": lambda x, w: (
        x @ with_derivative(lambda w, g: jnp.clip(g, -1e-2, 1e-2))(w)
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_derivatives_that_clip_more_than_a_sample_are_refused(name):
    def loss(parameters, batch):
        x = parameters["table"][batch["inputs"]]
        for n in range(L):
            x = x + MIXED[name](x, parameters["layers"]["w"][n])
        return jnp.mean(jnp.square(x))

    with pytest.raises(UsageError, match="not seen to treat each sample's alone"):
        from_function(loss, PARAMETERS, first(data()), blocks="layers")


@pytest.mark.parametrize(
    "schedule",
    [
        "weipipe-interleave",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("1f1b", "zb-h1", "zero-3", "dp")),
    ],
)
def test_a_schedule_divides_first(schedule):
    """Two replicas: of both together."""

    def loss(parameters, batch):
        each, mask, logits = losses_of(parameters, batch, CLIPS["each element"])
        return jnp.sum(each * mask) / jnp.sum(mask) + 0.1 * jnp.mean(jnp.square(logits))

    rows, rule = data(), optax.sgd(0.5)
    adapted = from_function(loss, PARAMETERS, first(rows), blocks="layers")
    trainer = Trainer(
        adapted.model, adapted.parameters, rule, schedule=schedule, devices=2, replicas=2,
        microbatches=ROWS // 2, memory_gib=float("inf"),
    )  # fmt: skip
    found = [float(trainer.step(rows).loss) for _ in range(3)]
    parameters, wanted = jax.tree.map(jnp.asarray, PARAMETERS), []
    for _ in range(3):
        value, gradients = jax.jit(jax.value_and_grad(loss))(parameters, together(rows))
        parameters = jax.tree.map(lambda p, g: p - 0.5 * g, parameters, gradients)
        wanted.append(float(value))
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    for a, b in zip(
        jax.tree.leaves(adapted.rebuild(trainer.parameters())),
        jax.tree.leaves(parameters),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    alone = float(jax.jit(loss)(parameters, together(rows)))
    assert trainer.evaluate([rows]) == pytest.approx(alone, rel=2e-6)


def _plain_mean(losses, mask):
    return (losses * mask).sum() / mask.sum()


def _divided_inside(losses, mask):
    return (losses * mask / mask.sum()).sum()


@pytest.mark.parametrize("form", [_plain_mean, _divided_inside])
def test_batches_of_unlike_counts_are_evaluated_by_what_they_weigh(form):
    """Sum over sum where the head knows both; a batch that is divided whole counts by its size."""
    random = np.random.default_rng(0)
    parameters = {
        "layers": {"kernel": (0.3 * random.standard_normal((2, 4, 4))).astype(np.float32)},
        "table": random.standard_normal((8, 4)).astype(np.float32),
    }

    def loss(parameters, batch):
        x = parameters["table"][batch["tokens"]]
        x, _ = jax.lax.scan(
            lambda x, layer: (x + jnp.tanh(x @ layer["kernel"]), None), x, parameters["layers"]
        )
        return form(jnp.square(x.sum(-1)), batch["mask"])

    def rows(kept):
        mask = random.permutation(np.arange(24) < kept).reshape(4, 6).astype(np.float32)
        return {"tokens": random.integers(0, 8, (4, 6)).astype(np.int32), "mask": mask}

    many, few = rows(20), rows(5)
    adapted = from_function(
        loss, parameters, {name: leaf[:2] for name, leaf in many.items()}, blocks="layers"
    )
    trainer = Trainer(
        adapted.model, adapted.parameters, optax.sgd(0.1), schedule="dp", devices=1,
        microbatches=2, memory_gib=float("inf"),
    )  # fmt: skip
    found = trainer.evaluate([trainer.split(many), trainer.split(few)])
    by_count = (20 * loss(parameters, many) + 5 * loss(parameters, few)) / 25
    by_size = (loss(parameters, many) + loss(parameters, few)) / 2
    assert abs(by_count - by_size) > 1e-2
    wanted = by_count if form is _plain_mean else by_size
    assert found == pytest.approx(float(wanted), rel=1e-5)


NO_PAIRS: dict[str, tuple[Any, str]] = {
    "a number of elements": (lambda e, g, b: (e.mean(), e.size), "a mean already"),
    "a number of samples": (lambda e, g, b: (e.mean(), len(e)), "a mean already"),
    "any number": (lambda e, g, b: (e.mean(), 0.5), "a mean already"),
    "a masked mean": (
        lambda e, g, b: (jnp.sum(e * (b["targets"] > 1)) / jnp.sum(b["targets"] > 1), e.size),
        "a mean already",
    ),
    "a mask's count": (lambda e, g, b: (e.mean(), jnp.sum(b["targets"] > 1)), "a mean already"),
    "a mask's mean": (lambda e, g, b: (e.mean(), jnp.mean(b["targets"] > 1)), "a mean already"),
    "what is no mean beside a mean": (
        lambda e, g, b: (e.mean() + jnp.mean(g[..., 0]) * jnp.mean(g[..., 1]), e.size),
        "a mean already",
    ),
    "a mean axis by axis": (lambda e, g, b: (e.mean(0).mean(), e.size), "a mean already"),
    "parts of a mean": (lambda e, g, b: (jnp.sum(e / e.size), e.size), "a mean already"),
    "parts of a masked mean": (
        lambda e, g, b: (jnp.sum(e * b["targets"] / jnp.sum(b["targets"])), e.size),
        "a mean already",
    ),
    "a perplexity": (lambda e, g, b: (jnp.exp(e.mean()), e.size), "a mean already"),
    "a mean of all against all": (
        lambda e, g, b: (jnp.mean(jax.nn.logsumexp(g[:, 0] @ g[:, 0].T, -1)), len(e)),
        "a mean already",
    ),
    "another mean": (lambda e, g, b: (e.mean(), jnp.mean(jnp.square(g))), "depends on parameters"),
    "itself": (lambda e, g, b: (e.mean(), e.mean()), "depends on parameters"),
    "itself, stopped": (
        lambda e, g, b: (e.mean(), jax.lax.stop_gradient(e.mean())),
        "depends on parameters",
    ),
    "accuracy": (
        lambda e, g, b: (e.mean(), jnp.mean(jnp.argmax(g, -1) == b["targets"])),
        "depends on parameters",
    ),
    "how many are right": (
        lambda e, g, b: (jnp.sum(e), jnp.sum(jnp.argmax(g, -1) == b["targets"])),
        "depends on parameters",
    ),
    "a sum and a mean": (
        lambda e, g, b: (jnp.sum(e), jnp.mean(b["targets"])),
        "does not add up over samples",
    ),
    "a sum and the largest": (
        lambda e, g, b: (jnp.sum(e), jnp.max(b["targets"])),
        "does not add up over samples",
    ),
}


WEIGHTS: dict[str, Any] = {
    "weights": lambda e, g, b: (jnp.sum(e * b["inputs"]), jnp.sum(b["inputs"])),
    "weights above zero": lambda e, g, b: (
        jnp.sum(e * b["inputs"]), jnp.maximum(0.5 * jnp.sum(b["inputs"]), 1e-6)),
    "a scaled count": lambda e, g, b: (jnp.sum(e), 2.0 * jnp.sum(b["targets"] > 1)),
    "a mean times its number": lambda e, g, b: (e.mean() * len(e), len(e)),
    "a mean of one": lambda e, g, b: (e.mean(), 1.0),
    "of any batch": lambda e, g, b: (jnp.sum(e), 48),
    "all against all": lambda e, g, b: (
        jnp.sum(jax.nn.logsumexp(g[:, 0] @ g[:, 0].T, -1)), len(e)),
    "the root of a sum": lambda e, g, b: (len(e) * jnp.sqrt(jnp.mean(e)), len(e)),
    "in pieces": lambda e, g, b: (
        jax.lax.scan(lambda c, row: (c + jnp.sum(row), None), 0.0, e.T)[0], e.size),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", WEIGHTS)
def test_sums_and_weights_are_taken(name, size):
    def loss(parameters, batch):
        each, _, logits = losses_of(parameters, batch)
        return WEIGHTS[name](each, logits, batch)

    from_function(loss, PARAMETERS, first(data(size)), blocks="layers")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", NO_PAIRS)
def test_what_else_scripts_return_beside_a_mean_is_no_weight(name, size):
    """As `jax.value_and_grad(..., has_aux=True)` has it: divided by it, all would train wrongly."""
    form, says = NO_PAIRS[name]

    def loss(parameters, batch):
        each, _, logits = losses_of(parameters, batch)
        return form(each, logits, batch)

    with pytest.raises(UsageError, match=rf"\(sum over samples, their weight\), but .*{says}"):
        from_function(loss, PARAMETERS, first(data(size)), blocks="layers")
