"""Every family's paged passes give the logits of its whole forward pass.

Prompts in pieces, then single steps for a batch whose rows stand at unlike positions, then those
as one step of several tokens a row; windows,
caps, sinks, norms in other places, parallel blocks, experts and biases with it.
"""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.model import DecoderConfig, forward, initial_parameters
from jaxsys.model.experts import Chosen
from jaxsys.serve import paged_model
from jaxsys.serve.cache_groups import cache_groups
from jaxsys.serve.expert_weights import grouped_over
from jaxsys.serve.paged_attention import choose_kernels
from jaxsys.serve.weights import HeldFused, check_served, longest_served, serving_weights

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("family_cases", ROOT / "tests/jaxsys/family_cases.py")
assert spec is not None and spec.loader is not None
family_cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(family_cases)

STORED = json.loads(family_cases.STORED.read_text())["families"]
TELLING = ("gpt_oss",)
"""Windows, sinks, biases and experts; the others are slow tests."""


def described(family: str, layers: int | None = None) -> DecoderConfig:
    """A family's stored sizes, or its first layers."""
    settings = dict(STORED[family]["config"])
    if layers is not None:
        settings |= {"num_hidden_layers": layers}
        if "layer_types" in settings:
            settings["layer_types"] = settings["layer_types"][:layers]
    return DecoderConfig.from_hf(settings)


def fresh(config: DecoderConfig):
    """Parameters whose every leaf matters: norms, biases and sinks too."""
    leaves, tree = jax.tree.flatten(initial_parameters(config, seed=1))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        leaf * 3 + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def paged_logits(config, weights, tokens, pieces, more):
    """Logits behind each piece of one prompt, of `more` single tokens behind it, and of those as
    one step."""
    device = jax.devices()[0]
    kernels = choose_kernels(dtype=jnp.dtype("float32"), head_dim=config.head_dim, device=device)
    prefill = jax.jit(functools.partial(paged_model.prefill_pass, config, kernels, True))
    decode = jax.jit(functools.partial(paged_model.decode_pass, config, kernels))
    place = jax.sharding.SingleDeviceSharding(device)
    groups = len(cache_groups(config).windows)
    cache = paged_model.empty_cache(config, 24 * groups, 4, jnp.dtype("float32"), place)
    tables = np.array([[5, 2, 9, 0, 7, 3, 11, 8, 12, 14], [1, 4, 6, 10, 13, 15, 16, 17, 18, 19]])
    tables = np.concatenate([tables + 24 * g for g in range(groups)], axis=1).astype(np.int32)
    found, at, logits = [], 0, jnp.empty(0)
    for length in pieces:
        piece = np.zeros(16, np.int32)
        piece[:length] = tokens[at : at + length]
        for row in (0,) if at else (1, 0):  # the second row stays short
            logits, cache = prefill(
                weights, cache, jnp.asarray(piece), jnp.int32(at), jnp.int32(length),
                jnp.asarray(tables[row]),
            )  # fmt: skip
        found.append(np.asarray(logits[0]))
        at += length
    for step in range(more):
        positions = np.array([at + step, pieces[0] + step], np.int32)
        arrays = (jnp.asarray(a) for a in (tokens[positions], positions, tables))
        logits, cache = decode(weights, cache, *arrays)
        found.append(np.asarray(logits[0]))
        found.append(np.asarray(logits[1]))
    # The same tokens in one step, but for the last of the second row.
    several = jax.jit(functools.partial(paged_model.several_pass, config, kernels))
    starts, counts = np.array([at, pieces[0]]), np.array([more, more - 1])
    together = tokens[starts[:, None] + np.arange(more)]
    arrays = (jnp.asarray(a, jnp.int32) for a in (together, starts, counts, tables))
    logits, _ = several(weights, cache, *arrays)
    found += list(np.asarray(logits[0]))
    found += list(np.asarray(logits[1, :-1]))
    return found


@pytest.mark.parametrize(
    "family",
    [
        family if family in TELLING else pytest.param(family, marks=pytest.mark.slow)
        for family in STORED
    ],
)
def test_paged_passes_are_the_forward_pass(family):
    config = described(family, layers=2 if family in TELLING else None)
    parameters = fresh(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, 23).astype(np.int32)
    run = jax.jit(functools.partial(forward, config))
    whole = np.asarray(run(parameters, jnp.asarray(tokens[None]))[0])
    found = paged_logits(config, serving_weights(config, parameters), tokens, (6, 13), 3)
    wanted = [whole[5], whole[18]]
    for step in range(3):
        wanted += [whole[19 + step], whole[6 + step]]
    wanted += [*whole[19:22], *whole[6:8]]
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one - other).max() < 2e-4 * np.abs(other).max(), family


@pytest.mark.parametrize("form", ["fp8", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantised_experts_product_is_that_of_the_values_it_stands_for(form):
    config = described("qwen2_moe", layers=1)
    layer = serving_weights(config, fresh(config), quantisation=form).layers[0]
    assert layer.matrices["experts/router"].scale is None  # what decides keeps its bits
    assert layer.experts is not None
    values, scale = layer.experts.up
    assert isinstance(values, jax.Array) and scale is not None
    assert values.dtype.itemsize == 1 and scale.shape == values.shape[:-1]
    chosen = np.array([[0, 3], [3, 1], [0, 1], [2, 0]], np.int32)
    weights = np.random.default_rng(1).random(chosen.shape).astype(np.float32)
    rows = np.random.default_rng(0).normal(size=(4, values.shape[-1])).astype(np.float32)
    held = HeldFused(config, layer, grouped_over("walk", None, ""))
    found = held.mix(jnp.asarray(rows), Chosen(jnp.asarray(chosen), jnp.asarray(weights)))

    def meant(matrix):
        return np.asarray(matrix.values.astype(jnp.float32)) * np.asarray(matrix.scale)[..., None]

    up, down = meant(layer.experts.up), meant(layer.experts.down)
    wanted = np.zeros_like(rows)
    for row in range(4):
        for expert, weight in zip(chosen[row], weights[row], strict=True):
            gate, inner = up[expert] @ rows[row]
            wanted[row] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * inner))
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-4)


def test_lengths_past_a_changing_rotary_scale_are_refused():
    config = described("phi3")
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    settings = STORED["phi3"]["config"] | {"original_max_position_embeddings": 16}
    half = (config.rotary_dim or config.head_dim) // 2
    scaling |= {"short_factor": [1.0] * half, "long_factor": [2.0] * half}
    changed = DecoderConfig.from_hf(settings | {"rope_parameters": scaling})
    check_served(changed, 16)
    with pytest.raises(UsageError, match="max_length=17 is past the 16 positions"):
        check_served(changed, 17)
    assert longest_served(changed) == 16 < changed.max_positions
    assert longest_served(config) == config.max_positions
