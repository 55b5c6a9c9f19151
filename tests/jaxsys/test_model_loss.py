"""The chunked loss equals the plain one, gradients too, and never holds all logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxsys.axes import RING
from jaxsys.errors import UsageError
from jaxsys.layered import ALIKE, Layer, reference_loss
from jaxsys.mesh import make_mesh
from jaxsys.model import bind_edge, initial_parameters, layered, preset
from jaxsys.model.loss import _loss, head_loss, summed_cross_entropy

CONFIGS = {
    "untied": preset("tiny"),
    "tied": dataclasses.replace(preset("tiny"), tie_embeddings=True),
}


def sample(config, shape=(2, 11), seed=0):
    generator = np.random.default_rng(seed)
    x = jnp.asarray(generator.normal(size=(*shape, config.hidden_size)), jnp.float32)
    targets = generator.integers(0, config.vocab_size, shape).astype(np.int32)
    targets[generator.random(shape) < 0.1] = -1
    targets[generator.random(shape) < 0.1] = -100  # as PyTorch's scripts mark them
    return x, jnp.asarray(targets)


def plain_loss(config, edge, x, targets):
    """All logits at once, log-softmax, pick, mask."""
    logits = bind_edge(config, edge).logits(x)
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(logits, axis=-1), jnp.maximum(targets, 0)[..., None], axis=-1
    )[..., 0]
    return -jnp.sum(jnp.where(targets >= 0, picked, 0.0))


@pytest.mark.parametrize(
    ("tied", "chunk"),
    [
        ("untied", 4),
        ("tied", 4096),
        *(
            pytest.param(tied, chunk, marks=pytest.mark.slow)
            for tied, chunk in (("untied", 1), ("untied", 4096), ("tied", 1), ("tied", 4))
        ),
    ],
)
def test_chunks_change_nothing(tied, chunk):
    config = CONFIGS[tied]
    edge = initial_parameters(config, seed=1)["edge"]
    x, targets = sample(config)
    plain = jax.value_and_grad(lambda edge, x: plain_loss(config, edge, x, targets), argnums=(0, 1))
    wanted, wanted_grads = jax.jit(plain)(edge, x)
    chunked = jax.value_and_grad(
        lambda edge, x: head_loss(config, edge, x, targets, chunk_tokens=chunk),
        argnums=(0, 1),
        has_aux=True,
    )
    (loss, weight), grads = jax.jit(chunked)(edge, x)
    assert float(weight) == np.sum(np.asarray(targets) >= 0)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted_grads), strict=True
    ):
        # Sums of 22 tokens in another order.
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6, err_msg=str(path))


def test_all_targets_ignored_is_zero_without_nan():
    config = preset("tiny")
    edge = initial_parameters(config)["edge"]
    x, targets = sample(config)
    chunked = jax.value_and_grad(
        lambda edge: head_loss(config, edge, x, targets * 0 - 1, chunk_tokens=4), has_aux=True
    )
    (loss, weight), grads = jax.jit(chunked)(edge)
    assert (float(loss), float(weight)) == (0.0, 0.0)
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("target", [-100, 7, 63, 64, 5000])
def test_ids_beyond_the_vocabulary_are_no_number_in_parts_of_it_too(target):
    logits = jax.random.normal(jax.random.key(0), (1, 64))
    targets = jnp.full(1, target, jnp.int32)
    whole = summed_cross_entropy(logits, targets)
    parts = jax.shard_map(
        lambda logits: jax.lax.psum(_loss(logits, targets, RING)[0], RING),
        mesh=make_mesh(2),
        in_specs=PartitionSpec(None, RING),
        out_specs=PartitionSpec(),
    )(logits)
    assert bool(jnp.isnan(whole)) == (target >= 64)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_compiled_step_never_holds_all_logits():
    config = dataclasses.replace(preset("tiny"), vocab_size=1000)
    edge = initial_parameters(config)["edge"]
    x, targets = sample(config, (2, 128))

    def compiled(chunk):
        step = jax.grad(
            lambda edge, x: head_loss(config, edge, x, targets, chunk_tokens=chunk)[0],
            argnums=(0, 1),
        )
        return str(jax.jit(step).lower(edge, x).compile().as_text())

    assert "[256,1000]" in compiled(256)
    text = compiled(32)
    assert "[32,1000]" in text
    assert "[256,1000]" not in text and "[8,32,1000]" not in text


def test_head_gradients_of_bfloat16_add_up_in_float32():
    config = preset("tiny")
    narrow = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), initial_parameters(config, seed=1)["edge"]
    )
    x, targets = sample(config, (4, 256))
    x = x.astype(jnp.bfloat16)

    def error(chunk):
        @jax.jit
        @jax.grad
        def gradient(edge, x):
            return head_loss(config, edge, x, targets, chunk_tokens=chunk)[0]

        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
        grad = gradient(narrow, x)["head"]["kernel"]
        exact = gradient(wide, x.astype(jnp.float32))["head"]["kernel"]
        assert grad.dtype == jnp.bfloat16
        return float(jnp.linalg.norm(grad.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))

    # One rounding to eight bits errs by 0.24 %; a bfloat16 sum of 64 chunks would by 0.98 %.
    assert error(16) < 2 * error(1024)


def test_inside_shard_map_as_a_schedule_would_run_it():
    config = dataclasses.replace(preset("tiny"), num_layers=2)
    weights = initial_parameters(config)
    generator = np.random.default_rng(0)
    batch = {
        "inputs": jnp.asarray(generator.integers(0, 264, (2, 2, 10)), jnp.int32),
        "targets": jnp.asarray(generator.integers(-1, 264, (2, 2, 10)), jnp.int32),
    }
    model = layered(config, loss_chunk_tokens=7)
    block = model.kinds[ALIKE]

    def local(weights, batch):
        microbatch = jax.tree.map(lambda leaf: leaf[0], batch)
        x = model.embed(weights["edge"], microbatch)
        x, _ = jax.lax.scan(
            lambda x, layer: (block(layer, x, microbatch, Layer(index=jnp.int32(0))), None),
            x,
            weights["blocks"],
        )
        loss, weight = model.head_loss(weights["edge"], x, microbatch)
        return jax.lax.psum(loss, RING) / jax.lax.psum(weight, RING)

    mapped = jax.shard_map(
        local,
        mesh=make_mesh(2),
        in_specs=(PartitionSpec(), PartitionSpec(RING)),
        out_specs=PartitionSpec(),
    )
    loss, grads = jax.jit(jax.value_and_grad(mapped))(weights, batch)
    reference = jax.jit(jax.value_and_grad(lambda w: reference_loss(model, w, batch)))
    wanted, wanted_grads = reference(weights)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    for leaf, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)


def test_refusals():
    config = preset("tiny")
    x, targets = sample(config)
    with pytest.raises(UsageError, match=r"targets of shape \(2, 10\) must be \(2, 11\)"):
        head_loss(config, initial_parameters(config)["edge"], x, targets[:, :10], chunk_tokens=4)
    with pytest.raises(UsageError, match="loss_chunk_tokens=0"):
        layered(config, loss_chunk_tokens=0)
