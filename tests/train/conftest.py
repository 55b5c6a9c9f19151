"""A layered model small enough that a schedule compiles in a second or two, and data for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.layered import LayeredModel, Parameters

WIDTH, VOCABULARY, LAYERS = 8, 16, 4


@pytest.fixture(scope="module", autouse=True)
def _quickly(quickly_compiled, compiled_once):
    """For every module here."""


@pytest.fixture(scope="session", autouse=True)
def _devices():
    """JAX has started, with eight devices: else the first test to ask for more would get them."""
    assert len(jax.devices()) == 8


def _embed(edge, microbatch):
    return edge["table"][microbatch["inputs"]]


def _block(weights, x, microbatch, layer):
    del microbatch, layer
    return x + jnp.tanh(x @ weights["kernel"] + weights["bias"][None, None, :])


def _head_loss(edge, x, microbatch):
    logits = x @ edge["table"].T
    targets = microbatch["targets"]
    counted = targets >= 0
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]
    return jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(counted).astype(jnp.float32)


@pytest.fixture(scope="session")
def small_model() -> LayeredModel:
    """Embedding, four tanh layers, tied head with cross-entropy."""
    return LayeredModel(embed=_embed, block=_block, head_loss=_head_loss, layers=LAYERS)


@pytest.fixture(scope="session")
def small_parameters() -> Parameters:
    """Fresh parameters of `small_model`, numpy float32."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    return {
        "edge": {"table": normal(VOCABULARY, WIDTH)},
        "blocks": {"kernel": normal(LAYERS, WIDTH, WIDTH), "bias": normal(LAYERS, WIDTH)},
    }


class CountedSamples:
    """Sample i holds i in its first input, so that a test can see which samples were read."""

    def __init__(self, count: int, length: int = 4) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens = np.random.default_rng(index).integers(0, VOCABULARY, self.length + 1)
        return {
            "inputs": tokens[:-1].astype(np.int32),
            "targets": tokens[1:].astype(np.int32),
            "index": np.asarray(index, np.int64),
        }


@pytest.fixture(scope="session")
def counted_samples() -> CountedSamples:
    """Forty numbered samples."""
    return CountedSamples(40)
