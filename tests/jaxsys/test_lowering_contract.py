"""What a model may be: x a tree, blocks of unlike kinds that know their layer, draw and count.

One model has all of it, and every schedule must give its loss, its metrics and every gradient leaf.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import (
    LayeredModel,
    Parameters,
    layer_key,
    microbatch_keys,
    reference_loss,
    seed_key,
    step_key,
)
from jaxsys.lowering import lower
from jaxsys.lowering.kinds import Shared
from jaxsys.mesh import make_mesh
from jaxsys.schedule import Placement
from jaxsys.strategies import NAMES, build
from jaxsys.train.evaluate import make_loss
from jaxsys.train.state import layer_shardings

WIDTH, VOCABULARY, SEQUENCES, TOKENS = 8, 16, 2, 4
TOLERANCE = 1e-5
"""Relative error of each gradient leaf in float32: sums are taken in another order."""
QUICK: Any = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
"""To compile; what is computed is the same."""

UNSAID: Any = None
"""What a block is given for its layer where it does not ask."""


def embed(edge, microbatch):
    """Python's own zero and an array of integers travel too."""
    h = edge["table"][edge["renamed"][microbatch["inputs"]]]
    return {"h": h, "aux": 0.0, "context": jnp.mean(h, axis=1), "seen": jnp.int32(0)}


def noisy(x, microbatch, layer):
    keep = jax.random.bernoulli(layer_key(microbatch["key"], layer.index), 0.7, x["h"].shape)
    return {**x, "h": jnp.where(keep, x["h"] / 0.7, 0.0), "seen": x["seen"] + 1}


def dense(weights, x, microbatch, layer):
    x = noisy(x, microbatch, layer)
    chosen = weights["square"][weights["order"]]
    h = jnp.tanh(x["h"] @ chosen + x["context"][:, None]) / (1.0 + layer.index)
    h = jnp.where(weights["on"], h, 0.0)
    return {**x, "h": x["h"] + h, "aux": x["aux"] + jnp.mean(h**2)}


def wide(weights, x, microbatch, layer):
    x = noisy(x, microbatch, layer)
    inner = jax.nn.silu(x["h"] @ weights["up"] + weights["bias"][None, None])
    return {**x, "h": x["h"] + inner @ weights["down"], "aux": x["aux"] + jnp.mean(inner)}


def head_loss(edge, x, microbatch):
    scores = jax.nn.log_softmax(x["h"] @ edge["head"], axis=-1)
    picked = jnp.take_along_axis(scores, microbatch["targets"][..., None], axis=-1)
    count = jnp.float32(picked.size)
    metrics = {"aux": x["aux"], "layers": x["seen"].astype(jnp.float32)}
    return -jnp.sum(picked) + 0.1 * count * x["aux"], count, metrics


def unlike_blocks(layers: int) -> tuple[LayeredModel, Parameters]:
    pattern = tuple("wide" if index % 3 == 0 else "dense" for index in range(layers))
    model = LayeredModel(
        embed=embed, block={"dense": dense, "wide": wide}, head_loss=head_loss, pattern=pattern
    )
    random = np.random.default_rng(layers)
    some, others = pattern.count("dense"), pattern.count("wide")

    def normal(*shape):
        return jnp.asarray(0.4 * random.normal(size=shape), jnp.float32)

    order = [random.permutation(WIDTH) for _ in range(some)]
    return model, Parameters(
        edge={
            "table": normal(VOCABULARY, WIDTH),
            "head": normal(WIDTH, VOCABULARY),
            "renamed": jnp.asarray(random.permutation(VOCABULARY), jnp.int32),
        },
        blocks={
            "dense": {
                "square": normal(some, WIDTH, WIDTH),
                "order": jnp.asarray(np.reshape(order, (some, WIDTH)), jnp.int32),
                "on": jnp.arange(some) % 4 != 3,
            },
            "wide": {
                "up": normal(others, WIDTH, 2 * WIDTH),
                "down": normal(others, 2 * WIDTH, WIDTH),
                "bias": normal(others, 2 * WIDTH),
            },
        },
    )


def keyed_batch(microbatches: int):
    random = np.random.default_rng(0)
    shape = (microbatches, SEQUENCES, TOKENS)
    return {
        "inputs": jnp.asarray(random.integers(0, VOCABULARY, shape), jnp.int32),
        "targets": jnp.asarray(random.integers(0, VOCABULARY, shape), jnp.int32),
        "key": microbatch_keys(step_key(jax.random.key(7, impl="rbg"), 3), microbatches),
    }


@functools.cache
def reference(layers: int, microbatches: int):
    model, parameters = unlike_blocks(layers)
    run = jax.value_and_grad(functools.partial(reference_loss, model), allow_int=True)
    return jax.jit(run, compiler_options=QUICK)(parameters, keyed_batch(microbatches))


def assert_matches_reference(name: str, layers: int, *, devices=2, microbatches=4, **options):
    schedule = build(name, devices=devices, microbatches=microbatches)
    model, parameters = unlike_blocks(layers)
    step = lower(schedule, model, make_mesh(devices, devices=jax.devices()[:devices]), **options)
    rest = step.to_rest(parameters)
    jax.tree.map(np.testing.assert_array_equal, step.from_rest(rest), parameters)
    run = jax.jit(step.loss_and_gradients, compiler_options=QUICK)
    found = run(rest, keyed_batch(microbatches))
    loss, wanted = reference(layers, microbatches)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-6)
    assert float(found.weight) == microbatches * SEQUENCES * TOKENS
    assert float(found.metrics["layers"]) == microbatches * layers
    # The loss is cross-entropy and a tenth of the mean of what blocks have added up.
    assert float(found.metrics["aux"]) > 0
    assert jax.tree.map(lambda g: (g.shape, g.dtype), found.gradients) == jax.tree.map(
        lambda p: (p.shape, p.dtype), rest
    )
    gradients = step.from_rest(found.gradients)
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        got = functools.reduce(lambda tree, key: tree[key.key], path, cast(Any, gradients))
        if leaf.dtype == jax.dtypes.float0:
            assert not np.any(got), f"{jax.tree_util.keystr(path)} is a constant"
            continue
        error = np.linalg.norm(got - leaf) / np.linalg.norm(leaf)
        assert error < TOLERANCE, f"{jax.tree_util.keystr(path)}: relative error {error}"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("weipipe-interleave", {"recompute": "none"}),
        pytest.param("zb-h1", {"recompute": "none", "unroll": True}, marks=pytest.mark.slow),
        ("dp", {"recompute": "chunk"}),
        ("zero-4", {"recompute": "selective"}),
        *[pytest.param(name, {}, marks=pytest.mark.slow) for name in NAMES],
    ],
)
def test_schedules(name, options):
    """With chunks of two layers, the last one of a single layer."""
    chunks = build(name, devices=2, microbatches=4).chunks
    assert_matches_reference(name, max(2 * chunks - 1, 3), **options)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "block", "chunk"])
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_schedules_in_depth(name, unroll, recompute):
    schedule = build(name, devices=4, microbatches=8)
    if schedule.placement is Placement.SHARDED and (unroll or recompute == "chunk"):
        pytest.skip("sharded schedules are written out, and have no chunks to compute again")
    options = {"recompute": recompute, "unroll": unroll, "devices": 4, "microbatches": 8}
    assert_matches_reference(name, 2 * schedule.chunks + 1, **options)


def test_streams_of_random_numbers_do_not_meet():
    """split(key, n)[i] is fold_in(key, i): layers, microbatches, steps and splits stay apart."""
    for start in (jax.random.key(0), jax.random.PRNGKey(0)):
        steps = [step_key(start, step) for step in range(3)]
        rows = [key for step in steps for key in microbatch_keys(step, 4)]
        layers = [layer_key(row, index) for row in rows for index in range(5)]
        splits = [key for one in [start, *steps, *rows] for key in jax.random.split(one, 8)]
        every = [*steps, *rows, *layers, *splits]
        data = {tuple(np.asarray(_raw(key)).tolist()) for key in every}
        assert len(data) == len(every)
    few, many = (microbatch_keys(jax.random.key(1), count) for count in (2, 6))
    np.testing.assert_array_equal(_raw(few), _raw(many)[:2])


def test_every_bit_of_a_seed_counts():
    """jax.random.key alone takes 1 and 2**32 + 1 for the same, unless 64-bit types are on."""
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 1, 2**63 - 1)
    data = {tuple(np.asarray(_raw(seed_key(seed))).tolist()) for seed in seeds}
    assert len(data) == len(seeds)
    for seed in seeds[:3]:
        np.testing.assert_array_equal(_raw(seed_key(seed)), _raw(jax.random.key(seed)))


def _raw(key):
    return key if key.dtype == jnp.uint32 else jax.random.key_data(key)


def test_what_kinds_share_comes_back():
    """Arrays that both have are passed on; of the rest the longer row counts."""

    def spec(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    kinds = {
        "a": [spec(2, 3), spec(5), spec(2, 3), spec(4, dtype=jnp.int32)],
        "b": [spec(7, 2), spec(2, 3)],
        "c": [spec(2, 3), spec(1)],
    }
    shared = Shared(kinds)
    assert [s.shape for s in shared.specs] == [(2, 3), (14,), (4,)]
    random = np.random.default_rng(0)
    for kind, specs in kinds.items():
        values = [jnp.asarray(random.integers(0, 9, s.shape), s.dtype) for s in specs]
        held = shared.put(kind, values)
        assert [(h.shape, h.dtype) for h in held] == [(s.shape, s.dtype) for s in shared.specs]
        for value, back in zip(values, shared.get(kind, held), strict=True):
            np.testing.assert_array_equal(value, back)


def test_refuses_what_is_no_model():
    some = {"embed": embed, "head_loss": head_loss}
    with pytest.raises(UsageError, match="kinds 'wide' are in one of"):
        LayeredModel(block={"dense": dense, "wide": wide}, pattern=("dense",), **some)
    with pytest.raises(UsageError, match="blocks of kinds need a pattern"):
        LayeredModel(block={"dense": dense}, layers=2, **some)
    with pytest.raises(UsageError, match="layers=3 but the pattern has 2"):
        LayeredModel(block={"dense": dense}, layers=3, pattern=("dense",) * 2, **some)
    with pytest.raises(UsageError, match="block does not take"):
        LayeredModel(block=cast(Any, lambda weights, x: x), layers=2, **some)
    model, parameters = unlike_blocks(4)
    mesh = make_mesh(2, devices=jax.devices()[:2])
    step = lower(build("1f1b", devices=2, microbatches=2), model, mesh)
    with pytest.raises(UsageError, match="stacked by kinds 'dense'; the model has"):
        step.to_rest({**parameters, "blocks": {"dense": parameters["blocks"]["dense"]}})
    grown = LayeredModel(
        block={"dense": lambda w, x, m, layer: {**x, "more": x["h"]}, "wide": wide},
        pattern=model.kind_of,
        **some,
    )
    step = lower(build("1f1b", devices=2, microbatches=2), grown, mesh)
    with pytest.raises(UsageError, match="block 'dense' maps .* it must keep structure"):
        jax.eval_shape(step.loss_and_gradients, step.to_rest(parameters), keyed_batch(2))


@pytest.mark.parametrize(
    "block",
    [
        lambda weights, x, microbatch: weights * x,
        lambda weights, x, microbatch, power=1: weights * x**power,
        lambda weights, x, microbatch, layer=UNSAID: weights * x + 0 * layer.index,
        lambda *given: given[0] * given[1] + 0 * given[3].index,
    ],
)
def test_a_block_may_be_told_its_layer_or_not(block):
    model = LayeredModel(
        embed=lambda edge, microbatch: microbatch["x"],
        block=block,
        head_loss=lambda edge, x, microbatch: (jnp.sum(x), jnp.float32(1)),
        layers=2,
    )
    again = dataclasses.replace(model, layers=3)
    assert again.block is model.block
    parameters: Any = {"edge": {}, "blocks": jnp.array([2.0, 3.0])}
    assert reference_loss(model, parameters, {"x": jnp.ones((2, 1))}) == 6


def test_evaluation_runs_unlike_blocks():
    model, parameters = unlike_blocks(3)
    mesh = make_mesh(2, devices=jax.devices()[:2])
    shardings = layer_shardings(mesh)(parameters)
    loss = make_loss(model, mesh, shardings, compute_dtype=jnp.float32)
    batch = keyed_batch(3)
    total, weight = loss(jax.device_put(parameters, shardings), batch)
    wanted = jax.jit(functools.partial(reference_loss, model))(parameters, batch)
    np.testing.assert_allclose(total / weight, wanted, rtol=1e-6)
