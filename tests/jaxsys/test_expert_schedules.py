"""Families with experts under every schedule: loss and every gradient leaf are the plain model's.

Routers with balance losses, corrections and groups, shared experts, dense layers before those with
experts, windows and sinks, latent attention. All are slow tests but one.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.layered import Parameters, reference_loss
from jaxsys.lowering import lower
from jaxsys.mesh import make_mesh
from jaxsys.model import DecoderConfig, abstract_parameters, layered
from jaxsys.strategies import NAMES, build

STORED = json.loads((Path(__file__).parent / "data/families.json").read_text())["families"]
FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "glm4_moe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
)
DEVICES, MICROBATCHES, ROWS, TOKENS = 2, 4, 1, 6
TOLERANCE = 2e-5
"""Of a leaf's norm: sums are taken in another order."""
QUICK: Any = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def described(family: str, layers: int) -> DecoderConfig:
    """A family's stored sizes with so many layers, of the same kinds in turn."""
    settings = STORED[family]["config"] | {"num_hidden_layers": layers}
    if "layer_types" in settings:
        types = settings["layer_types"]
        settings["layer_types"] = [types[index % len(types)] for index in range(layers)]
    return DecoderConfig.from_hf(settings)


def filled(config: DecoderConfig) -> Parameters:
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
        abstract_parameters(config),
    )


def batch(config: DecoderConfig) -> dict[str, jax.Array]:
    shape = (MICROBATCHES, ROWS, TOKENS + 1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    return {"inputs": jnp.asarray(ids[..., :-1]), "targets": jnp.asarray(ids[..., 1:])}


@functools.cache
def wanted(family: str, layers: int):
    config = described(family, layers)
    run = jax.value_and_grad(functools.partial(reference_loss, layered(config)))
    return jax.jit(run, compiler_options=QUICK)(filled(config), batch(config))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        if (family, name) == ("glm4_moe", "zero-3")
        else pytest.param(family, name, marks=pytest.mark.slow)
        for family in FAMILIES
        for name in NAMES
    ],
)
def test_expert_families_under_schedules(family, name):
    schedule = build(name, devices=DEVICES, microbatches=MICROBATCHES)
    layers = max(schedule.chunks, 2)  # a dense one first, where the family has them
    config = described(family, layers)
    mesh = make_mesh(DEVICES, devices=jax.devices()[:DEVICES])
    step = lower(schedule, layered(config), mesh)
    run = jax.jit(step.loss_and_gradients, compiler_options=QUICK)
    found = run(step.to_rest(filled(config)), batch(config))
    loss, slopes = wanted(family, layers)
    np.testing.assert_allclose(found.loss, loss, rtol=2e-6)
    gradients = step.from_rest(found.gradients)
    moved = 0
    for (path, leaf), got in zip(
        jax.tree_util.tree_leaves_with_path(dict(slopes)),
        jax.tree.leaves(dict(gradients)),
        strict=True,
    ):
        length = np.linalg.norm(leaf)
        moved += length > 0
        error = np.linalg.norm(got - leaf)
        assert error <= TOLERANCE * max(length, 1e-3), f"{jax.tree_util.keystr(path)}: {error}"
    assert moved > 10
