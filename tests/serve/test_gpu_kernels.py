"""On an NVIDIA GPU: cuDNN's paged passes against the whole model in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.model import DecoderConfig, forward, initial_parameters
from jaxsys.serve import paged_model
from jaxsys.serve.matrix import WIDENED
from jaxsys.serve.paged_attention import (
    AttentionKernels,
    choose_kernels,
    portable_decode,
    portable_prefill,
)
from jaxsys.serve.weights import serving_weights

CONFIG = DecoderConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
)


@pytest.mark.gpu
def test_cudnn_passes_match_the_whole_model():
    device = jax.devices()[0]
    if device.platform == "cpu":
        pytest.skip("needs an NVIDIA GPU; set JAXSYS_TEST_GPU=1 where there is one")
    exact = jax.tree.map(
        lambda leaf: (leaf * 4 if leaf.ndim > 2 else leaf).astype(jnp.bfloat16),
        initial_parameters(CONFIG, seed=1),
    )
    tokens = np.random.default_rng(0).integers(0, 512, 340)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), exact)
    with jax.default_matmul_precision("highest"):
        whole = np.asarray(forward(CONFIG, wide, jnp.asarray(tokens[None])))[0]
    # How far the model itself strays in bfloat16 is the measure of how far the passes may.
    plain = np.asarray(forward(CONFIG, exact, jnp.asarray(tokens[None])))[0]

    def strays(logits, position):
        return np.linalg.norm(logits - whole[position]) / np.linalg.norm(whole[position])

    allowed = 1.5 * max(strays(plain[position], position) for position in range(340))
    weights = serving_weights(CONFIG, exact)
    kernels = choose_kernels(dtype=jnp.dtype("bfloat16"), head_dim=128, device=device)
    assert kernels.reason.startswith("cuDNN")
    place = jax.sharding.SingleDeviceSharding(device)
    cache = paged_model.empty_cache(CONFIG, 16, 64, jnp.dtype("bfloat16"), place)
    table = np.array([5, 2, 9, 0, 7, 3, 11, 8], np.int32)
    passes = {
        continued: jax.jit(functools.partial(paged_model.prefill_pass, CONFIG, kernels, continued))
        for continued in (False, True)
    }

    def check(logits, position):
        assert strays(logits, position) < allowed, (position, allowed)

    for start, length in ((0, 100), (100, 128), (228, 80)):
        piece = np.zeros(128, np.int32)
        piece[:length] = tokens[start : start + length]
        for continued in {start > 0, True}:
            logits, cache = passes[continued](
                weights,
                cache,
                jnp.asarray(piece),
                jnp.int32(start),
                jnp.int32(length),
                jnp.asarray(table),
            )
            check(np.asarray(logits[0]), start + length - 1)
    decode = jax.jit(functools.partial(paged_model.decode_pass, CONFIG, kernels))
    for position in range(308, 340):
        logits, cache = decode(
            weights,
            cache,
            jnp.asarray([0, tokens[position]], jnp.int32),
            jnp.asarray([0, position], jnp.int32),
            jnp.asarray(np.stack([np.full(8, 16), table]), jnp.int32),
        )
        check(np.asarray(logits[1]), position)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 7, 160])
@pytest.mark.parametrize(("form", "cached"), [("fp8", "fp8"), ("int4", None), (None, "int8")])
def test_kernels_of_small_forms_match_what_is_widened(form, cached, batch):
    """One prompt and a token behind it, the same for every request, by kernels and by XLA alone."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        pytest.skip("needs an NVIDIA GPU; set JAXSYS_TEST_GPU=1 where there is one")
    place = jax.sharding.SingleDeviceSharding(device)
    dtype = jnp.dtype("bfloat16")
    parameters = jax.tree.map(lambda leaf: leaf.astype(dtype), initial_parameters(CONFIG, seed=1))
    chosen = choose_kernels(dtype=dtype, head_dim=128, device=device)
    assert chosen.writes
    plain = AttentionKernels(decode=portable_decode, prefill=portable_prefill, reason="portable")
    tokens = np.random.default_rng(0).integers(0, 512, 101).astype(np.int32)
    table = np.arange(4, dtype=np.int32)
    found = []
    # Both sides in float8 round more than a kernel may: those products are the same in both.
    for kernels, how in ((chosen, None), (plain, WIDENED if form == "int4" else None)):
        weights = serving_weights(CONFIG, parameters, quantisation=form, placement=place, how=how)
        cache = paged_model.empty_cache(CONFIG, 16, 64, dtype, place, cached)
        run = functools.partial(paged_model.prefill_pass, CONFIG, kernels, False)
        counts = jnp.int32(0), jnp.int32(100)
        first, cache = jax.jit(run)(weights, cache, tokens[:100], *counts, table)
        second, _ = jax.jit(functools.partial(paged_model.decode_pass, CONFIG, kernels))(
            weights,
            cache,
            np.full(batch, tokens[100]),
            np.full(batch, 100, np.int32),
            np.where(np.arange(batch)[:, None] == 0, table, 16).astype(np.int32)
            if batch == 7
            else np.tile(table, (batch, 1)),
        )
        found.append([np.asarray(logits[0], np.float32) for logits in (first, second)])
    for one, other in zip(*found, strict=True):
        assert np.linalg.norm(one - other) < 0.06 * np.linalg.norm(other)
