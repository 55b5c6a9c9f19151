"""Means that are followed through a whole model, and custom derivatives that no step can sum up."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import reference_loss
from jaxsys.train.adapt import KEY, from_function

V, D, T, L = 7, 4, 3, 2
RNG = np.random.default_rng(0)
PARAMETERS = {
    "table": RNG.standard_normal((V, D)).astype(np.float32),
    "layers": {"w": (0.5 * RNG.standard_normal((L, D, D))).astype(np.float32)},
}


def data(rows: int, size: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(1).integers(0, V, (rows, size, T + 1)).astype(np.int32)
    return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}


def logits_of(parameters: Any, tokens: Any) -> Any:
    """Of tokens [..., T], one sequence or a batch of them."""
    table = jnp.asarray(parameters["table"])

    def block(x: Any, w: Any) -> Any:
        h = x @ w
        mean = jnp.mean(h, -1, keepdims=True)
        return x + jnp.tanh(h - mean), None

    x, _ = jax.lax.scan(block, table[tokens], jnp.asarray(parameters["layers"]["w"]))
    return x @ table.T


def each(logits: Any, targets: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def mapped(parameters, batch):
    """One sample's loss, mapped over the batch along another axis than the first."""
    swapped = batch["inputs"].T, batch["targets"].T
    losses = jax.vmap(
        lambda inputs, targets: each(logits_of(parameters, inputs), targets).mean(),
        in_axes=(1, 1),
    )(*swapped)
    return jnp.mean(losses)


def one_by_one(parameters, batch):
    """The losses of one sample after another."""
    logits = logits_of(parameters, batch["inputs"])
    losses = jax.lax.map(lambda sample: each(*sample).mean(), (logits, batch["targets"]))
    return losses.mean()


def flattened(parameters, batch):
    """Tokens of all samples in a row, weighted, by a product with the weights."""
    logits = logits_of(parameters, batch["inputs"]).reshape(-1, V)
    weights = (batch["targets"].reshape(-1) > 1).astype(jnp.float32)
    return jnp.dot(each(logits, batch["targets"].reshape(-1)), weights) * (1 / jnp.sum(weights))


def with_rows(parameters, batch):
    """Recurrent along the sequence, with a loop of Python's own and an auxiliary mean a layer."""
    logits = logits_of(parameters, batch["inputs"])
    last, states = jax.lax.scan(
        lambda c, row: (0.5 * c + row, c), jnp.zeros_like(logits[:, 0]), logits.swapaxes(0, 1)
    )
    auxiliary = jnp.stack([jnp.mean(jnp.square(last)), jnp.mean(jnp.abs(states))])
    return each(logits + states.swapaxes(0, 1), batch["targets"]).mean() + auxiliary.sum()


def by_pieces(parameters, batch):
    """Losses and their number added up over pieces of the sequence, as large vocabularies want."""
    logits = logits_of(parameters, batch["inputs"])

    @jax.checkpoint
    def piece(sums, row):
        logits, targets = row
        mask = targets > 1
        return (sums[0] + jnp.sum(each(logits, targets) * mask), sums[1] + jnp.sum(mask)), None

    rows = logits.swapaxes(0, 1), batch["targets"].T
    total, count = jax.lax.scan(piece, (jnp.float32(0), jnp.int32(0)), rows)[0]
    return total / jnp.maximum(count, 1)


def pairs_in_a_row(parameters, batch):
    """Both parts of each pair in one call, one batch behind the other, as DPO has them."""
    both = jnp.concatenate([batch["inputs"], batch["targets"]])
    scores = jnp.tanh(logits_of(parameters, both)).mean((1, 2))
    chosen, other = scores[: len(scores) // 2], scores[len(scores) // 2 :]
    return -jax.nn.log_sigmoid(chosen - other).mean() + 0.1 * jnp.square(scores).mean()


def real_and_made_up(parameters, batch):
    """Two batches in one array, and what each is in a constant beside it."""
    count = len(batch["inputs"])
    both = jnp.concatenate([batch["inputs"], batch["targets"]])
    labels = jnp.concatenate([jnp.ones(count), jnp.zeros(count)])
    scores = logits_of(parameters, both).mean((1, 2))
    return optax.sigmoid_binary_cross_entropy(scores, labels).mean()


def pairs_side_by_side(parameters, batch):
    """The same, taken apart by an axis of their own."""
    both = jnp.stack([batch["inputs"], batch["targets"]]).reshape(-1, T)
    scores = jnp.tanh(logits_of(parameters, both)).mean((1, 2)).reshape(2, -1)
    return -jax.nn.log_sigmoid(scores[0] - scores[1]).mean()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "loss",
    [
        mapped,
        one_by_one,
        flattened,
        with_rows,
        by_pieces,
        pairs_in_a_row,
        pairs_side_by_side,
        real_and_made_up,
    ],
)
def test_a_mean_is_found_through_the_whole_model(loss, size):
    rows = data(2, size)
    adapted = from_function(
        loss, PARAMETERS, jax.tree.map(lambda leaf: leaf[0], rows), blocks="layers"
    )
    whole = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)
    found = reference_loss(adapted.model, adapted.parameters, rows)
    assert float(found) == pytest.approx(float(loss(PARAMETERS, whole)), rel=2e-6)


def put_into_places(parameters, batch):
    """Some of each sample's set by index, and added up by numbers of its own."""
    inputs = jnp.asarray(batch["inputs"]).at[:, -1].set(0)
    logits = logits_of(parameters, inputs).at[..., 0].add(-1.0)
    sums = jax.vmap(lambda rows, ids: jax.ops.segment_sum(rows, ids, V))(logits, batch["targets"])
    return jnp.tanh(sums).mean()


def centred_in_groups(parameters, batch, groups=(-1, 2)):
    """Two answers to a prompt in a row, less their mean."""
    losses = each(logits_of(parameters, batch["inputs"]), batch["targets"]).mean(1)
    rows = losses.reshape(groups)
    rows = rows - rows.mean(1, keepdims=True)
    return jnp.mean(jnp.square(rows.reshape(-1)) + losses)


def preferred_by_stride(parameters, batch, step=lambda rows: 2):
    """Pairs in a row, taken apart by a step over all."""
    losses = each(logits_of(parameters, batch["inputs"]), batch["targets"]).mean(1)
    step = step(len(losses))
    return -jax.nn.log_sigmoid(losses[::step] - losses[1::step]).mean()


def by_numbers_of_samples(parameters, batch):
    """Each sample's own place, read and written by the numbers of samples."""
    logits, rows = logits_of(parameters, batch["inputs"]), jnp.arange(len(batch["inputs"]))
    last = logits[rows, batch["targets"][:, 0] % T]
    chosen = jax.nn.log_softmax(last)[rows, batch["targets"][:, 1]]
    marked = jnp.zeros(last.shape).at[rows, batch["targets"][:, 2]].set(1.0)
    return jnp.mean(chosen) + jnp.mean(marked * last)


def by_matrices(parameters, batch):
    """A matrix of each sample's, taken apart."""
    logits = logits_of(parameters, batch["inputs"])[..., :3]
    matrices = logits @ jnp.swapaxes(logits, 1, 2) + 2 * jnp.eye(T)[None]
    factors = jnp.linalg.cholesky(matrices)
    return jnp.mean(jnp.log(jnp.diagonal(factors, axis1=1, axis2=2)).sum(-1))


@pytest.mark.parametrize(
    "loss",
    [
        put_into_places,
        centred_in_groups,
        preferred_by_stride,
        by_numbers_of_samples,
        by_matrices,
    ],
)
def test_places_groups_and_matrices_of_samples(loss):
    rows = data(2, 4)
    example = jax.tree.map(lambda leaf: leaf[0], rows)
    adapted = from_function(loss, PARAMETERS, example, blocks="layers")
    whole = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)
    found = reference_loss(adapted.model, adapted.parameters, rows)
    assert float(found) == pytest.approx(float(loss(PARAMETERS, whole)), rel=2e-6)


@pytest.mark.parametrize("groups", [(2, -1), (1, -1)])
def test_groups_that_grow_with_the_batch_are_refused(groups):
    example = jax.tree.map(lambda leaf: leaf[0], data(1, 4))
    with pytest.raises(UsageError, match="not seen to be a mean"):
        from_function(
            lambda p, b: centred_in_groups(p, b, groups), PARAMETERS, example, blocks="layers"
        )


@pytest.mark.parametrize("step", [lambda rows: rows // 2, lambda rows: 3])
def test_steps_that_do_not_divide_or_grow_with_the_batch_are_refused(step):
    example = jax.tree.map(lambda leaf: leaf[0], data(1, 4))
    with pytest.raises((UsageError, TypeError)):
        from_function(
            lambda p, b: preferred_by_stride(p, b, step), PARAMETERS, example, blocks="layers"
        )


def centred(parameters, batch):
    logits = logits_of(parameters, batch["inputs"])
    return each(logits - jnp.mean(logits, 0, keepdims=True), batch["targets"]).mean()


def contrastive(parameters, batch):
    pooled = logits_of(parameters, batch["inputs"]).mean(1)
    return each(pooled @ pooled.T, jnp.arange(pooled.shape[0])).mean()


def pairs_of_neighbours(parameters, batch):
    both = jnp.concatenate([batch["inputs"], batch["targets"]])
    scores = logits_of(parameters, both).mean((1, 2))
    return jnp.tanh(scores[1:] - scores[:-1]).mean()


def marked_by_halves(parameters, batch):
    count = len(batch["inputs"])
    marks = jnp.concatenate([jnp.ones(count // 2), jnp.zeros(count - count // 2)])
    return (each(logits_of(parameters, batch["inputs"]), batch["targets"]).mean(1) * marks).mean()


def in_another_order(parameters, batch):
    logits = logits_of(parameters, batch["inputs"])
    rows = jnp.arange(len(logits))
    return each(logits[(rows + 1) % len(rows), 0], batch["targets"][:, 0]).mean()


def by_place(parameters, batch):
    losses = each(logits_of(parameters, batch["inputs"]), batch["targets"]).mean(1)
    return jnp.mean(losses * jnp.arange(losses.shape[0]))


def running(parameters, batch):
    losses = each(logits_of(parameters, batch["inputs"]), batch["targets"]).mean(1)
    return jnp.mean(jax.lax.cumsum(losses))


def handed_on(parameters, batch):
    losses = each(logits_of(parameters, batch["inputs"]), batch["targets"]).mean(1)
    return jax.lax.scan(lambda c, row: (c + row, c * row), 0.0, losses)[1].mean()


def by_pieces_from_one(parameters, batch):
    losses = each(logits_of(parameters, batch["inputs"]), batch["targets"])
    total = jax.lax.scan(lambda c, row: (c + jnp.sum(row), None), 1.0, losses.T)[0]
    return total / losses.size


def by_pieces_squared(parameters, batch):
    losses = each(logits_of(parameters, batch["inputs"]), batch["targets"])
    squares = jax.lax.scan(lambda c, row: (c + jnp.sum(row) ** 2, None), 0.0, losses.T)[0]
    return squares / losses.size


@pytest.mark.parametrize(
    "loss",
    [
        centred,
        contrastive,
        pairs_of_neighbours,
        in_another_order,
        marked_by_halves,
        by_place,
        running,
        handed_on,
        by_pieces_from_one,
        by_pieces_squared,
    ],
)
def test_samples_that_enter_each_others_parts_are_refused(loss):
    example = jax.tree.map(lambda leaf: leaf[0], data(1, 3))
    with pytest.raises(UsageError, match="not seen to be a mean over samples"):
        from_function(loss, PARAMETERS, example, blocks="layers")


def test_draws_with_a_fixed_key_are_named():
    def loss(parameters, batch):
        logits = logits_of(parameters, batch["inputs"])
        noise = jax.random.normal(jax.random.key(0), logits.shape)
        return each(logits + noise, batch["targets"]).mean()

    example = jax.tree.map(lambda leaf: leaf[0], data(1, 3))
    with pytest.raises(UsageError, match="drawn with a fixed key.*'key'"):
        from_function(loss, PARAMETERS, example, blocks="layers")


def test_one_group_is_told_what_it_takes():
    example = jax.tree.map(lambda leaf: leaf[0], data(1, 2))
    with pytest.raises(UsageError, match="at least two whole ones"):
        from_function(centred_in_groups, PARAMETERS, example, blocks="layers")


def test_a_raw_key_is_no_sample():
    """Two words of a key beside two samples."""

    def loss(parameters, batch):
        logits = logits_of(parameters, batch["inputs"])
        kept = jax.random.bernoulli(batch[KEY], 0.5, logits.shape)
        return each(jnp.where(kept, logits, 0.0), batch["targets"]).mean()

    rows = {**data(2, 2), KEY: np.asarray([[1, 2], [3, 4]], np.uint32)}
    adapted = from_function(
        loss, PARAMETERS, jax.tree.map(lambda leaf: leaf[0], rows), blocks="layers"
    )
    wanted = [loss(PARAMETERS, jax.tree.map(lambda leaf, n=n: leaf[n], rows)) for n in (0, 1)]
    found = reference_loss(adapted.model, adapted.parameters, rows)
    assert float(found) == pytest.approx(float(sum(wanted)) / 2, rel=2e-6)


def with_derivative(backward):
    @jax.custom_vjp
    def function(x):
        return jnp.tanh(x)

    function.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (backward(x, g),))
    return function


def scanned(x, g):
    return jax.lax.scan(lambda c, row: (c + row, c), jnp.zeros_like(g[0]), g * x)[1]


LINEAR = {
    "straight through": lambda x, g: g,
    "reversed": lambda x, g: -0.5 * g,
    "where": lambda x, g: jnp.where(x > 0, g * jnp.cos(x), 0.0),
    "products": lambda x, g: (g @ jnp.eye(D)) / (1 + jnp.exp(x)) - jnp.cumsum(g, 1),
    "a loop": scanned,
}
OTHER = {
    "clips": lambda x, g: jnp.clip(g, -0.1, 0.1),
    "normalises": lambda x, g: g / jnp.linalg.norm(g),
    "signs": lambda x, g: jnp.sign(g),
    "rounds": lambda x, g: jnp.round(8 * g) / 8,
    "adds": lambda x, g: g + 0.01 * x,
    "squares": lambda x, g: g * g,
    "chooses": lambda x, g: jnp.where(g > 0, g, 0.5 * g),
}


@pytest.mark.parametrize("name", [*LINEAR, *OTHER])
@pytest.mark.parametrize("inside", ["", "scan"])
def test_derivatives_that_are_not_linear_are_seen(name, inside):
    act: Any = with_derivative({**LINEAR, **OTHER}[name])
    if inside:
        once = act

        def looped(x):  # in a loop that stays one
            return jax.lax.scan(lambda c, _: (once(c), None), x, None, length=2)[0]

        act = looped

    def loss(parameters, batch):
        x = jnp.asarray(parameters["table"])[batch["inputs"]]
        for n in range(L):
            x = x + act(x @ jnp.asarray(parameters["layers"]["w"])[n])
        return each(x @ jnp.asarray(parameters["table"]).T, batch["targets"]).mean()

    example = jax.tree.map(lambda leaf: leaf[0], data(1, 2))
    if name != "normalises":  # over the whole batch
        adapted = from_function(loss, PARAMETERS, example, blocks="layers")
        # Where it is not linear, what is divided by is known before: see test_adapt_totals.
        assert (adapted.model.totals is None) == (name in LINEAR)
        return
    with pytest.raises(UsageError, match="not linear in the gradient"):
        from_function(loss, PARAMETERS, example, blocks="layers")


def masked_by_draws(parameters, batch):
    """Tokens that are hidden by the order of draws, as masked autoencoders choose them."""
    order = jnp.argsort(jax.random.uniform(batch[KEY], batch["inputs"].shape), axis=1)
    kept = jnp.take_along_axis(batch["inputs"], order[:, :1], 1)
    noise = jnp.asarray([0.0, 0.5, 1.0])[jax.random.randint(batch[KEY], (len(kept),), 0, 3)]
    losses = each(logits_of(parameters, kept), batch["targets"][:, :1]) + noise[:, None]
    mask = (order == 0).astype(jnp.float32)
    return (losses * mask).sum() / mask.sum()


def test_what_draws_choose_is_a_samples_own():
    rows = data(2, 2)
    keys = jax.random.split(jax.random.key(0), 2)
    example = jax.tree.map(lambda leaf: leaf[0], rows)
    adapted = from_function(masked_by_draws, PARAMETERS, example, blocks="layers")
    wanted = [
        float(
            masked_by_draws(
                PARAMETERS, {**jax.tree.map(lambda leaf, n=n: leaf[n], rows), KEY: keys[n]}
            )
        )
        for n in (0, 1)
    ]
    found = reference_loss(adapted.model, adapted.parameters, {**rows, KEY: keys})
    assert float(found) == pytest.approx(sum(wanted) / 2, rel=2e-6)


def test_leaves_that_are_no_arrays():
    """Floats of Python's train, as jax.grad has it; integers, names and functions stay."""
    parameters = {
        "scale": 0.5,
        "table": PARAMETERS["table"],
        "layers": [
            {"w": w, "rate": 0.1 * n, "power": 2, "name": "tanh", "act": jnp.tanh}
            for n, w in enumerate(PARAMETERS["layers"]["w"])
        ],
    }

    def loss(parameters, batch):
        x = jnp.asarray(parameters["table"])[batch["inputs"]] * parameters["scale"]
        for layer in parameters["layers"]:
            for _ in range(layer["power"]):
                x = x + layer["act"](x @ layer["w"]) + layer["rate"]
            x = getattr(jnp, layer["name"])(x)
        return each(x @ jnp.asarray(parameters["table"]).T, batch["targets"]).mean()

    rows = data(1, 2)
    example = jax.tree.map(lambda leaf: leaf[0], rows)
    adapted = from_function(loss, parameters, example, blocks="layers")
    found = jax.grad(lambda p: reference_loss(adapted.model, p, rows))(adapted.parameters)
    own = adapted.rebuild(found)
    assert [own["layers"][1][name] for name in ("power", "name", "act")] == [2, "tanh", jnp.tanh]
    moving = {"scale": 0.5, "rates": [0.0, 0.1]}

    def of(moving):
        layers = [
            {**layer, "rate": rate}
            for layer, rate in zip(parameters["layers"], moving["rates"], strict=True)
        ]
        return loss({**parameters, "scale": moving["scale"], "layers": layers}, example)

    wanted = jax.grad(of)(moving)
    assert float(own["scale"]) == pytest.approx(float(wanted["scale"]), rel=1e-5)
    np.testing.assert_allclose(
        [layer["rate"] for layer in own["layers"]], wanted["rates"], rtol=1e-5
    )


def test_a_tree_may_hold_nothing_in_places():
    """None where a leaf is left out, as partitions of modules have it."""
    parameters = {**PARAMETERS, "bias": None, "other": (None, np.arange(3))}
    example = jax.tree.map(lambda leaf: leaf[0], data(1, 2))
    adapted = from_function(mapped, parameters, example, blocks="layers")
    rebuilt = adapted.rebuild(adapted.parameters)
    assert jax.tree.structure(rebuilt) == jax.tree.structure(parameters)
    jax.tree.map(np.testing.assert_array_equal, rebuilt, parameters)


def test_a_stack_of_unlike_blocks_stays_one():
    """Rules by rank and norm see it whole, as the user's own loop has it."""

    def loss(parameters, batch):
        x = jnp.asarray(parameters["table"])[batch["inputs"]]
        for n, act in enumerate((jnp.tanh, jnp.sin)):
            x = x + act(x @ jnp.asarray(parameters["layers"]["w"])[n])
        return each(x @ jnp.asarray(parameters["table"]).T, batch["targets"]).mean()

    rows = data(2, 2)
    example = jax.tree.map(lambda leaf: leaf[0], rows)
    adapted = from_function(loss, PARAMETERS, example, blocks="layers")
    view = adapted.model.view
    assert view is not None
    shapes = jax.tree.map(np.shape, view(adapted.parameters))
    assert shapes == jax.tree.map(np.shape, PARAMETERS)
    wanted = [loss(PARAMETERS, jax.tree.map(lambda leaf, n=n: leaf[n], rows)) for n in (0, 1)]
    found = reference_loss(adapted.model, adapted.parameters, rows)
    assert float(found) == pytest.approx(float(sum(wanted)) / 2, rel=2e-6)


def test_constraints_by_a_mesh_of_the_models_own_are_left_out():
    """They say where arrays lie, which a schedule does; without a mesh their names mean nothing."""

    def loss(parameters, batch, constrained=True):
        x = jnp.asarray(parameters["table"])[batch["inputs"]]
        for n in range(L):
            x = x + jnp.tanh(x @ jnp.asarray(parameters["layers"]["w"])[n])
            if constrained:
                x = jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec("rows"))
        return each(x @ jnp.asarray(parameters["table"]).T, batch["targets"]).mean()

    rows = data(1, 2)
    example = jax.tree.map(lambda leaf: leaf[0], rows)
    with pytest.raises(UsageError, match="constrains shardings by names of axes"):
        from_function(loss, PARAMETERS, example, blocks="layers")
    axes = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((2,), ("rows",), axis_types=axes)):
        adapted = from_function(loss, PARAMETERS, example, blocks="layers")
    found = reference_loss(adapted.model, adapted.parameters, rows)
    wanted = loss(PARAMETERS, example, constrained=False)
    assert float(found) == pytest.approx(float(wanted), rel=2e-6)


def test_layers_may_lie_in_unlike_ways_on_explicit_axes():
    mesh = jax.make_mesh((2,), ("x",))
    cut, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (["x"], [])
    )
    layers = [
        {"w": jax.device_put(w, where)}
        for w, where in zip(PARAMETERS["layers"]["w"], (cut, whole), strict=True)
    ]
    parameters = {"table": jax.device_put(PARAMETERS["table"], whole), "layers": layers}

    def loss(parameters, batch):
        x = jnp.asarray(parameters["table"])[batch["inputs"]]
        for layer in parameters["layers"]:
            x = x + jnp.tanh(x @ layer["w"])
        return each(x @ jnp.asarray(parameters["table"]).T, batch["targets"]).mean()

    example = jax.tree.map(lambda leaf: leaf[0], data(1, 2))
    for current in (contextlib.nullcontext, lambda: jax.set_mesh(mesh)):
        with current():
            adapted = from_function(loss, parameters, example, blocks="layers")
            rebuilt = adapted.rebuild(adapted.parameters)
        jax.tree.map(np.testing.assert_array_equal, rebuilt, parameters)


def test_a_batch_is_like_the_example():
    def loss(parameters, batch):
        x = jnp.asarray(parameters["table"])[batch["inputs"]]
        x = x + jnp.tanh(x @ jnp.asarray(parameters["layers"]["w"])[0])
        x = x + jnp.tanh(x @ jnp.asarray(parameters["layers"]["w"])[1])
        return each(x @ jnp.asarray(parameters["table"]).T, batch["targets"]).mean()

    rows = data(1, 2)
    example = jax.tree.map(lambda leaf: leaf[0], rows)
    adapted = from_function(loss, PARAMETERS, example, blocks="layers")
    with pytest.raises(UsageError, match="no leaf targets, which the example has; it has inputs"):
        reference_loss(adapted.model, adapted.parameters, {"inputs": rows["inputs"]})
    with pytest.raises(UsageError, match="leaf inputs has 1 axes, the example's 2"):
        reference_loss(adapted.model, adapted.parameters, example)
