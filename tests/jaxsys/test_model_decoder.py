"""The decoder against a plain numpy one, and its two faces against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsys.errors import UsageError
from jaxsys.layered import reference_loss
from jaxsys.model import (
    Decoder,
    abstract_parameters,
    bind_block,
    build,
    forward,
    initial_parameters,
    layered,
    parameters,
    preset,
)
from jaxsys.model.block import turn
from jaxsys.model.decoder import bind_edge
from jaxsys.model.rope import Llama3RopeScaling, inverse_frequencies

SCALED = Llama3RopeScaling(
    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
)
VARIANTS = {
    "grouped": preset("tiny"),
    "tied": dataclasses.replace(preset("tiny"), tie_embeddings=True),
    "multi-head": dataclasses.replace(preset("tiny"), num_kv_heads=4),
    "one shared": dataclasses.replace(preset("tiny"), num_kv_heads=1, rope_scaling=SCALED),
    "wide heads": dataclasses.replace(preset("tiny"), head_dim=12),
}


def plain_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def plain_rotate(x, positions, config):
    angles = positions[:, None] * inverse_frequencies(config.rope())[None, :]
    first, second = np.split(x, 2, axis=-1)
    cosines, sines = np.cos(angles), np.sin(angles)
    return np.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines], axis=-1
    )


def plain_block(config, layer, x):
    """One sequence [T, D] through one block, head by head and in float64."""
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layer)
    length = x.shape[0]
    normal = plain_norm(x, layer["attention_norm"]["scale"], config.rms_norm_eps)
    width, group = config.head_dim, config.num_heads // config.num_kv_heads
    outputs = []
    for head in range(config.num_heads):
        own = slice(head * width, (head + 1) * width)
        shared = slice(head // group * width, (head // group + 1) * width)
        q = plain_rotate(normal @ layer["attention"]["query"][:, own], np.arange(length), config)
        k = plain_rotate(normal @ layer["attention"]["key"][:, shared], np.arange(length), config)
        v = normal @ layer["attention"]["value"][:, shared]
        scores = q @ k.T / np.sqrt(width)
        scores[np.triu_indices(length, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        outputs.append(weights / weights.sum(axis=-1, keepdims=True) @ v)
    x = x + np.concatenate(outputs, axis=-1) @ layer["attention"]["out"]
    normal = plain_norm(x, layer["mlp_norm"]["scale"], config.rms_norm_eps)
    gate = normal @ layer["mlp"]["gate"]
    return x + (gate / (1 + np.exp(-gate)) * (normal @ layer["mlp"]["up"])) @ layer["mlp"]["down"]


def plain_logits(config, weights, tokens):
    edge = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights["edge"])
    head = edge["embed"]["table"].T if config.tie_embeddings else edge["head"]["kernel"]
    rows = []
    for row in tokens:
        x = edge["embed"]["table"][row]
        for index in range(config.num_layers):
            x = plain_block(config, jax.tree.map(lambda p, i=index: p[i], weights["blocks"]), x)
        rows.append(plain_norm(x, edge["norm"]["scale"], config.rms_norm_eps) @ head)
    return np.stack(rows)


def random_weights(config, seed=0):
    """Weights large enough that a wrong term shows, norm scales not one."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            generator.normal(1.0, 0.3, leaf.shape)
            if leaf.ndim == 1
            else generator.normal(0.0, 0.2, leaf.shape),
            jnp.float32,
        ),
        abstract_parameters(config),
    )


def random_tokens(config, shape, seed=1):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.integers(0, config.vocab_size, shape), jnp.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_plain_model(variant):
    config = VARIANTS[variant]
    weights, tokens = random_weights(config), random_tokens(config, (2, 11))
    expected = plain_logits(config, weights, np.asarray(tokens))
    got = forward(config, weights, tokens)
    assert got.dtype == jnp.float32
    # float32 against float64 through four layers; logits are of order 5.
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_module_and_pytree_are_one_model():
    config = preset("tiny")
    model = Decoder(config, rngs=nnx.Rngs(3))
    weights, tokens = parameters(model), random_tokens(config, (2, 9))
    np.testing.assert_array_equal(model(tokens), forward(config, weights, tokens))
    np.testing.assert_array_equal(build(config, weights)(tokens), model(tokens))
    leaves = jax.tree_util.tree_leaves_with_path(dict(weights))
    assert all(isinstance(leaf, jax.Array) for _, leaf in leaves)
    assert all(
        leaf.shape[0] == config.num_layers for path, leaf in leaves if path[0].key == "blocks"
    )


def test_parameters_of_seeds_32_bits_apart_differ():
    shapes, kernels = preset("tiny"), []
    for seed in (1, 2**32 + 1):
        kernels.append(initial_parameters(shapes, seed=seed)["blocks"]["attention"]["query"])
    assert jax.tree.all(jax.tree.map(lambda a, b: not jnp.array_equal(a, b), *kernels))


def test_layers_start_out_different():
    query = initial_parameters(preset("tiny"))["blocks"]["attention"]["query"]
    assert not np.array_equal(query[0], query[1])
    assert float(jnp.std(query)) == pytest.approx(0.02, rel=0.05)


def test_nnx_gradients_are_those_of_the_layered_model():
    config = dataclasses.replace(preset("tiny"), num_layers=2, tie_embeddings=True)
    model = Decoder(config, rngs=nnx.Rngs(0))
    batch = {
        "inputs": random_tokens(config, (1, 4, 9)),
        "targets": random_tokens(config, (1, 4, 9), seed=2),
    }

    def module_loss(model):
        logits = model(batch["inputs"].reshape(4, 9))
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"].reshape(4, 9)
        ).mean()

    loss, grads = nnx.jit(nnx.value_and_grad(module_loss))(model)
    reference = jax.jit(
        jax.value_and_grad(
            lambda weights: reference_loss(layered(config, loss_chunk_tokens=4), weights, batch)
        )
    )
    wanted_loss, wanted = reference(parameters(model))
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    got = nnx.to_pure_dict(nnx.state(grads))
    blocks = got.pop("blocks")
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path({"edge": got, "blocks": blocks}),
        jax.tree.leaves(dict(wanted)),
        strict=True,
    ):
        # Two orders of float32 sums.
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-7, err_msg=str(path))


def test_pieces_make_up_the_block():
    config = preset("tiny")
    layer = jax.tree.map(lambda leaf: leaf[1], random_weights(config)["blocks"])
    block = bind_block(config, layer)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 32)), jnp.float32)
    positions = jnp.arange(7, dtype=jnp.int32)[None]
    q, k, v = block.project(x, turn(config, block.kind, positions))
    assert (q.shape, k.shape, v.shape) == ((2, 7, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    y, load = block.finish(x, attended)
    assert load is None
    np.testing.assert_allclose(y, block(x), rtol=1e-5, atol=1e-6)


def test_positions_shift_nothing_but_the_rotation():
    # Rotary embedding is relative: the same shift for all tokens changes no logit.
    config = preset("tiny")
    weights, tokens = random_weights(config), random_tokens(config, (1, 8))
    shifted = jnp.arange(8, dtype=jnp.int32)[None] + 40
    np.testing.assert_allclose(
        forward(config, weights, tokens, shifted), forward(config, weights, tokens), atol=1e-3
    )


def test_later_tokens_do_not_reach_back():
    config = preset("tiny")
    weights, tokens = random_weights(config), random_tokens(config, (1, 8))
    changed = tokens.at[0, 5].add(1)
    before, after = forward(config, weights, tokens), forward(config, weights, changed)
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).max()) > 1e-2


def test_bfloat16_parameters_compute_in_bfloat16():
    config = preset("tiny")
    weights = random_weights(config)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    layer = jax.tree.map(lambda leaf: leaf[0], narrow["blocks"])
    x = jnp.ones((1, 4, 32), jnp.bfloat16)
    block = bind_block(config, layer)
    lowered = jax.jit(lambda x: block(x)).lower(x)
    assert lowered.out_info.dtype == jnp.bfloat16
    text = lowered.as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    kernels = [line for line in dots if "tensor<32x" in line or "tensor<64x" in line]
    assert len(kernels) == 7
    assert all("bf16" in line.split("->")[1] for line in kernels)
    tokens = random_tokens(config, (2, 9))
    run = jax.jit(lambda weights: forward(config, weights, tokens))
    logits = run(narrow)
    assert logits.dtype == jnp.float32
    exact = run(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow))
    # Eight bits of mantissa through four layers, logits of order 5.
    assert float(jnp.abs(logits - exact).mean()) < 0.1


def test_one_compiled_block_serves_all_layers():
    config = preset("tiny")
    text = (
        jax.jit(lambda w, t: forward(config, w, t))
        .lower(jax.eval_shape(lambda: initial_parameters(config)), jnp.zeros((1, 4), jnp.int32))
        .as_text()
    )
    assert text.count("stablehlo.while") == 1


def test_tokens_without_batch_axis_are_refused():
    config = preset("tiny")
    with pytest.raises(UsageError, match=r"shape \(4,\) must be \[B, T\]"):
        forward(config, initial_parameters(config), jnp.zeros(4, jnp.int32))


def test_a_frequent_tokens_gradient_is_summed_in_float32():
    """Ones added up in bfloat16 would stand still at 256."""
    config = preset("tiny")
    edge = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), initial_parameters(config, seed=0)["edge"]
    )
    tokens = jnp.full((1, 1000), 7)

    def total(edge):
        return bind_edge(config, edge).embed(tokens).astype(jnp.float32).sum()

    gradient = jax.grad(total)(edge)["embed"]["table"]
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient[7], np.float32), 1000)
    assert not np.asarray(gradient[:7], np.float32).any()
