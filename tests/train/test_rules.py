"""Optimizers on parameters at rest against a plain loop over the user's own tree on one device."""

import inspect
import warnings
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxsys.axes import RING
from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, Parameters
from jaxsys.mesh import make_mesh
from jaxsys.train import Trainer
from jaxsys.train.refusals import part_names
from jaxsys.train.rules import RuleAtRest, rule_of
from jaxsys.train.view import Layers, layer_by_layer, user_tree

LAYERS, WIDTH = 3, 8
LAYOUTS = {
    # Owners' order, the last row holding nothing, cut by rows; and shards of every layer.
    "owner": (np.array([2, 0, 3]), 4, PartitionSpec(RING)),
    "sharded": (np.arange(LAYERS), LAYERS, PartitionSpec(None, RING)),
}


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (0.3 * rng.standard_normal(shape)).astype(np.float32)


def _tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "edge": {"table": _normal(rng, 16, WIDTH), "gain": _normal(rng, WIDTH)},
        "blocks": {
            "kernel": _normal(rng, LAYERS, WIDTH, WIDTH),
            "scale": _normal(rng, LAYERS, WIDTH),
        },
    }


PARAMETERS = _tree(0)
GRADIENTS = [_tree(seed) for seed in range(1, 5)]


def by_layer(parameters: Any) -> Any:
    """A user's own tree: a module for every layer."""
    return {
        "embedding": parameters["edge"],
        **{
            f"Block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], parameters["blocks"])
            for i in range(LAYERS)
        },
    }


def whole_stacks(parameters: Any) -> Any:
    """A user's own tree whose layers are one scan: its leaves are the stacks."""
    return {"embedding": parameters["edge"], "layers": parameters["blocks"]}


def plain(optimizer: Any, view: Any, steps: int) -> tuple[Any, Any]:
    """The reference: a loop of one's own on one device."""
    parameters = jax.tree.map(jnp.asarray, view(PARAMETERS))
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, gradients):
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    for index in range(steps):
        parameters, state = step(parameters, state, view(GRADIENTS[index % 4]))
    return parameters, state


class AtRest:
    """Parameters and state as a schedule keeps them on four devices."""

    def __init__(self, optimizer: Any, view: Any, layout: str) -> None:
        self.order, self.count, spec = LAYOUTS[layout]
        mesh = make_mesh(4, devices=jax.devices()[:4])
        self.at = Parameters(
            edge=jax.tree.map(
                lambda _: NamedSharding(mesh, PartitionSpec(RING)), PARAMETERS["edge"]
            ),
            blocks=jax.tree.map(lambda _: NamedSharding(mesh, spec), PARAMETERS["blocks"]),
        )
        self.parameters = self.rest(PARAMETERS)
        self.rule = rule_of(optimizer, jax.eval_shape(lambda: PARAMETERS), view)
        rows = {leaf: (self.order, self.count) for leaf in self.rule.layers}
        shapes = jax.eval_shape(lambda: self.parameters)
        self.at_rest = RuleAtRest(self.rule, shapes, rows, mesh)
        places = self.rule.shardings(mesh, shapes, self.at_rest.state_shapes, self.at)
        self.state = jax.jit(self.at_rest.init, out_shardings=places)(self.parameters)
        self.update = jax.jit(self.at_rest.update, out_shardings=(self.at, places))

    def rest(self, parameters: Any) -> Any:
        def spread(leaf: np.ndarray) -> np.ndarray:
            rows = np.zeros((self.count, *leaf.shape[1:]), leaf.dtype)
            rows[self.order] = leaf
            return rows

        blocks = jax.tree.map(spread, parameters["blocks"])
        return jax.device_put({"edge": parameters["edge"], "blocks": blocks}, self.at)

    def take(self, steps: int) -> tuple[Any, Any]:
        for index in range(steps):
            self.parameters, self.state = self.update(
                self.rest(GRADIENTS[index % 4]), self.state, self.parameters
            )
        blocks = jax.tree.map(lambda leaf: leaf[self.order], self.parameters["blocks"])
        layered = self.at_rest.to_layer_order(self.state, self.places(), self.places())
        return {"edge": self.parameters["edge"], "blocks": blocks}, self.rule.user_state(layered)

    def places(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def errors(found: Any, wanted: Any) -> float:
    """The largest difference of any leaf, relative to its largest value."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if not jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            largest = np.max(np.abs(b), initial=0) + 1e-30
            worst = max(worst, float(np.max(np.abs(a - b), initial=0) / largest))
    return worst


def check(optimizer: Any, layout: str, view: Any = None, *, steps: int = 20) -> AtRest:
    chosen = view or layer_by_layer
    mine = AtRest(optimizer, view, layout)
    parameters, state = mine.take(steps)
    wanted, wanted_state = plain(optimizer, chosen, steps)
    assert errors(chosen(parameters), wanted) < 1e-5
    assert errors(state, wanted_state) < 1e-4  # small differences of large sums
    return mine


def matrices(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def kinds(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", tree)


MASK = {
    "edge": {"table": True, "gain": False},
    "blocks": {"kernel": True, "scale": False},
}
TELLING = {
    "decay by rank": lambda: optax.adamw(0.1, weight_decay=0.5, mask=matrices),
    "decay by a tree of the stacks": lambda: optax.adamw(0.1, weight_decay=0.5, mask=MASK),
    "clipping and muon beside sgd": lambda: optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.partition({"matrix": optax.contrib.muon(0.02), "vector": optax.sgd(0.1)}, kinds),
    ),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "lamb, every third step": lambda: optax.MultiSteps(optax.lamb(0.1), 3),
}


@pytest.mark.parametrize("name", TELLING)
def test_twenty_steps_are_those_of_a_plain_loop(name):
    layout = "sharded" if "adafactor" in name else "owner"
    assert not check(TELLING[name](), layout).at_rest.layer_by_layer


# What has arguments without a default gets these.
ARGUMENTS = {
    "learning_rate": 1e-2,
    "max_delta": 0.1,
    "max_norm": 0.1,
    "clipping": 0.1,
    "threshold": 0.1,
    "decay": 0.9,
    "step_size": 0.5,
    "step_size_fn": lambda _: 0.5,
    "eta": 0.1,
    "gamma": 0.5,
    "seed": 0,
    "key": 0,
    "k": 3,
    "max_consecutive_errors": 3,
    "noise_multiplier": 0.1,
    "l2_norm_clip": 1.0,
    "base_optimizer": optax.sgd(1e-2),
    "optimizer": optax.sgd(1e-2),
    "adv_optimizer": optax.sgd(0.05),
    "inner": optax.adam(1e-2),
    "opt": optax.adam(1e-2),
    "mask": matrices,
    "freeze_mask": matrices,
    "param_labels": kinds,
    "transforms": {"matrix": optax.contrib.muon(0.02), "vector": optax.adam(0.1)},
    "should_transform_fn": lambda step, **_: step % 2 == 0,
    "every_k_schedule": 2,
    "inner_factory": optax.adam,
    "fast_optimizer": optax.sgd(1e-2),
    "sync_period": 3,
    "slow_step_size": 0.5,
    "measure": optax.tree.norm,
    "measure_name": "norm",
    "f": lambda updates, params: updates,
    "tx": optax.adam(1e-2),
    "max_backtracking_steps": 3,
    "max_linesearch_steps": 3,
}
REFUSED = {
    "lbfgs", "polyak_sgd", "scale_by_polyak", "momo", "momo_adam", "reduce_on_plateau", "sophia",
    "hutchinson_estimator_diag_hessian", "dpsgd", "differentially_private_aggregate",
    "scale_by_muon", "scale_by_distance_over_gradients", "scale_by_backtracking_linesearch",
    "scale_by_zoom_linesearch", "lookahead", "measure_with_ema",
}  # fmt: skip
"""Need values, functions, pairs of parameters or other updates; three do not take what their own
init makes."""

NAMED_BY = {"polyak_sgd": "polyak", "dpsgd": "differentially_private_aggregate",
            "measure_with_ema": "ema"}  # fmt: skip
"""By what part of theirs those are named that leave none of their own."""

UNSTABLE = {"scale_by_lbfgs"}
"""Divides differences of random gradients by each other: few steps tell."""


def _everything() -> dict[str, Any]:
    """Every optimizer and transformation of optax and optax.contrib, made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _made() | {"inject_hyperparams": optax.inject_hyperparams(optax.adamw)(1e-2)}


def _made() -> dict[str, Any]:
    found = {}
    for module in (optax, optax.contrib):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or name == "inject_hyperparams":
                continue
            needed = [
                p.name
                for p in inspect.signature(function).parameters.values()
                if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            ]
            if not all(argument in ARGUMENTS for argument in needed):
                continue
            try:
                made = function(**{argument: ARGUMENTS[argument] for argument in needed})
            except (TypeError, ValueError):
                continue
            if hasattr(made, "init") and hasattr(made, "update"):
                found[name] = made
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Specifying a key")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "optimizer"), _everything().items())
def test_all_of_optax(name, optimizer, layout):
    if name in REFUSED:
        part = NAMED_BY.get(name, name)
        with pytest.raises(UsageError, match=f"the optimizer.*{part}"):
            AtRest(optimizer, None, layout)
        return
    for view in (None, by_layer, whole_stacks):
        check(optimizer, layout, view, steps=3 if name in UNSTABLE else 20)


def test_all_of_optax_is_nearly_all_there_is():
    assert len(_everything()) > 100


@pytest.mark.parametrize(
    ("name", "optimizer", "lacking"),
    [
        ("lbfgs", optax.lbfgs(), "value, grad, value_fn"),
        ("polyak", optax.polyak_sgd(), "value"),
        ("reduce_on_plateau", optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
         "value"),
    ],
)  # fmt: skip
def test_optimizers_that_need_values_are_refused_by_name(name, optimizer, lacking):
    with pytest.raises(UsageError, match=rf"\(.*{name}.*\) needs {lacking} at every update"):
        AtRest(optimizer, None, "owner")


def test_elementwise_rules_move_nothing_and_norms_a_number_a_layer():
    mine = AtRest(optax.adamw(0.1, weight_decay=0.5, mask=matrices), None, "owner")
    lowered = mine.update.lower(mine.rest(GRADIENTS[0]), mine.state, mine.parameters)
    text = lowered.compile().as_text()
    assert text is not None
    moves = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [line for line in text.splitlines() for move in moves if f" {move}(" in line]

    mine = AtRest(optax.clip_by_global_norm(0.1), None, "owner")
    lowered = mine.update.lower(mine.rest(GRADIENTS[0]), mine.state, mine.parameters)
    text = lowered.compile().as_text()
    assert text is not None
    moved = [line for line in text.splitlines() if any(f" {m}(" in line for m in moves)]
    assert moved
    assert not [line for line in moved if f"{WIDTH}]" in line.split("=")[1].split("{")[0]]


def test_layers_with_rules_of_their_own():
    """A learning rate a layer, and one layer frozen, by labels in the user's own tree."""

    def labels(tree: Any) -> Any:
        return {name: jax.tree.map(lambda _, n=name: n, part) for name, part in tree.items()}

    rates = {"embedding": 0.1, "Block_0": 0.1, "Block_2": 0.4}
    rules: dict[Hashable, Any] = {name: optax.adam(rate) for name, rate in rates.items()}
    rules["Block_1"] = optax.set_to_zero()
    optimizer = optax.partition(rules, labels)
    mine = check(optimizer, "owner", by_layer)
    assert not mine.at_rest.layer_by_layer
    np.testing.assert_array_equal(
        mine.parameters["blocks"]["kernel"][LAYOUTS["owner"][0][1]],
        PARAMETERS["blocks"]["kernel"][1],
    )


def test_what_one_layer_tells_the_next_runs_layer_by_layer():
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        kernels, total = [], jnp.sum(updates["edge"]["gain"])
        kernel, scale = (updates["blocks"][name].layers for name in ("kernel", "scale"))
        for layer, beside in zip(kernel, scale, strict=True):
            kernels.append(layer * total)
            total = jnp.sum(kernels[-1]) + jnp.sum(beside)
        blocks = {**updates["blocks"], "kernel": Layers(kernels, "kernel")}
        return {"edge": jax.tree.map(lambda g: g * total, updates["edge"]), "blocks": blocks}, state

    optimizer = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    mine = check(optimizer, "owner", steps=2)
    assert mine.at_rest.layer_by_layer == {("blocks", "kernel")}


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (lambda p: {"edge": p["edge"]}, "leaves out parameter blocks/kernel"),
        (lambda p: {"a": p, "b": p["edge"]}, "places parameter edge/gain twice"),
        (lambda p: jax.tree.map(lambda leaf: leaf * 2, p), "more than place leaves"),
        (lambda p: jax.tree.map(lambda leaf: leaf[:1], p["blocks"]), "one of 3 layers"),
    ],
)
def test_views_that_do_something_else_are_refused(view, message):
    with pytest.raises(UsageError, match=message):
        user_tree(view, jax.eval_shape(lambda: PARAMETERS))


def test_a_decay_mask_by_rank_in_the_trainer(small_model, small_parameters):
    """No gradient at all: only decay moves anything, and only matrices."""
    still = LayeredModel(
        embed=small_model.embed,
        block=small_model.block,
        head_loss=lambda edge, x, microbatch: (0.0 * x.sum(), jnp.float32(1.0)),
        layers=small_model.layers,
    )
    given = jax.tree.map(jnp.asarray, small_parameters)
    trainer = Trainer(
        still, given, optax.adamw(0.1, weight_decay=1.0, mask=matrices), devices=2, microbatches=2,
    )  # fmt: skip
    trainer.step({"inputs": np.zeros((2, 1, 4), np.int32)})
    found = trainer.parameters()
    np.testing.assert_array_equal(found["blocks"]["bias"], small_parameters["blocks"]["bias"])
    kernel = small_parameters["blocks"]["kernel"]
    np.testing.assert_allclose(found["blocks"]["kernel"], 0.9 * kernel, rtol=1e-6)
    # What was handed over is still the caller's.
    np.testing.assert_array_equal(given["blocks"]["kernel"], kernel)


def test_names_of_parts():
    chained = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    assert {"clip_by_global_norm", "scale_by_adam"} <= {*part_names(chained)}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["weipipe-interleave", "1f1b", "zero-3"])
@pytest.mark.parametrize("name", ["clipped, with a mask of the model's own tree", "muon"])
def test_a_flax_model_under_every_kind_of_schedule(schedule, name):
    """What a Linen script hands to optax is what the optimizer sees; three layers do not divide."""
    from flax import linen

    from jaxsys.train import from_linen, next_token_loss

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x + linen.Dense(8)(jnp.tanh(linen.Dense(16)(linen.LayerNorm()(x))))

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            embedding = linen.Embed(16, 8)
            x = embedding(tokens)
            for _ in range(3):
                x = Block()(x)
            return embedding.attend(linen.LayerNorm()(x))

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16, (2, 4, 2, 6)).astype(np.int32)
    batches = [{"inputs": part, "targets": np.roll(part, -1, -1)} for part in tokens]
    model = Model()
    parameters = model.init(jax.random.key(0), batches[0]["inputs"][0])["params"]
    optimizer = optax.contrib.muon(1e-2)
    if name != "muon":
        mask = matrices(parameters)
        optimizer = optax.chain(
            optax.clip_by_global_norm(0.3), optax.adamw(1e-2, weight_decay=0.5, mask=mask)
        )

    @jax.jit
    def step(parameters, state, batch):
        def loss(parameters):
            rows = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), batch)
            logits = cast(jax.Array, model.apply({"params": parameters}, rows["inputs"]))
            total, weight = next_token_loss(logits, rows)
            return total / weight

        updates, state = optimizer.update(jax.grad(loss)(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    example = {key: leaf[0] for key, leaf in batches[0].items()}
    adapted = from_linen(model, {"params": parameters}, example, blocks="Block_")
    trainer = Trainer(
        adapted.model, adapted.parameters, optimizer, schedule=schedule, devices=2, microbatches=4
    )
    wanted, state = parameters, optimizer.init(parameters)
    for index in range(20):
        wanted, state = step(wanted, state, batches[index % 2])
        trainer.step(batches[index % 2])
    assert errors(adapted.rebuild(trainer.parameters())["params"], wanted) < 1e-4
    assert jax.tree.structure(trainer.optimizer_state()) == jax.tree.structure(state)
