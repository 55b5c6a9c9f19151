"""Attention against plain numpy, and the choice of kernel on devices this machine lacks."""

import types
from typing import Any

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.model import attend, choose_implementation
from jaxsys.model import attention as module


def fake_gpu(capability="9.0", version="PJRT C API cuda 13000"):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(platform="gpu", client=client, compute_capability=capability)


@pytest.fixture
def with_cudnn(monkeypatch):
    monkeypatch.setattr(module, "_cudnn_version", lambda: 91300)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "masked", "implementation", "reason"),
    [
        ("9.0", jnp.bfloat16, 128, False, "cudnn", "bfloat16 heads of width 128"),
        ("9.0", jnp.float16, 256, False, "cudnn", "float16"),
        ("8.0", jnp.bfloat16, 128, False, "cudnn", "bfloat16"),
        ("8.0", jnp.bfloat16, 192, False, "xla", "up to 128, not 192"),
        ("9.0", jnp.bfloat16, 264, False, "xla", "up to 256, not 264"),
        ("9.0", jnp.bfloat16, 60, False, "xla", "multiple of 8 up to 256, not 60"),
        ("9.0", jnp.float32, 128, False, "xla", "not float32"),
        ("9.0", jnp.bfloat16, 128, True, "xla", "mask"),
    ],
)
def test_choice_on_nvidia(with_cudnn, capability, dtype, head_dim, masked, implementation, reason):
    choice = choose_implementation(
        dtype=dtype, head_dim=head_dim, masked=masked, device=fake_gpu(capability)
    )
    assert choice.implementation == implementation
    assert reason in choice.reason


def test_choice_elsewhere(monkeypatch):
    monkeypatch.setattr(module, "_cudnn_version", lambda: None)
    for device, reason in (
        (fake_gpu(), "cuDNN is not installed"),
        (fake_gpu(version="rocm 6.3"), "needs CUDA, this is rocm 6.3"),
        (types.SimpleNamespace(platform="tpu"), "this is tpu"),
        (jax.devices("cpu")[0], "this is cpu"),
    ):
        choice = choose_implementation(dtype=jnp.bfloat16, head_dim=128, device=device)
        assert choice.implementation == "xla"
        assert reason in choice.reason


def plain(q, k, v, allowed):
    """[B, T, N, V] attention with allowed [B, T, S], head by head in float64."""
    batch, _, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b in range(batch):
        for n in range(heads):
            scores = q[b, :, n].astype(np.float64) @ k[b, :, n // group].T / np.sqrt(width)
            scores = np.where(allowed[b], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, :, n] = weights / weights.sum(axis=-1, keepdims=True) @ v[b, :, n // group]
    return out


def random_heads(length, keys, seed=0) -> Any:  # numpy here, a jax.Array to attend
    generator = np.random.default_rng(seed)
    return (
        generator.normal(size=(2, length, 4, 8)).astype(np.float32),
        generator.normal(size=(2, keys, 2, 8)).astype(np.float32),
        generator.normal(size=(2, keys, 2, 8)).astype(np.float32),
    )


def test_causal():
    q, k, v = random_heads(6, 6)
    allowed = np.broadcast_to(np.tril(np.ones((6, 6), bool)), (2, 6, 6))
    typed = jaxtyping.jaxtyped(attend, typechecker=beartype.beartype)
    got = typed(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(got, plain(q, k, v, allowed), atol=1e-5)


@pytest.mark.parametrize("width", [3, 13])
@pytest.mark.parametrize("implementation", ["xla", None])
def test_values_of_another_width(width, implementation):
    q, k, _ = random_heads(6, 6)
    v = np.random.default_rng(1).normal(size=(2, 6, 2, width)).astype(np.float32)
    allowed = np.broadcast_to(np.tril(np.ones((6, 6), bool)), (2, 6, 6))
    got = attend(*map(jnp.asarray, (q, k, v)), implementation=implementation)
    np.testing.assert_allclose(got, plain(q, k, v, allowed), atol=1e-5)


def test_one_query_over_padded_keys():
    q, k, v = random_heads(1, 9)
    lengths = np.array([4, 9], np.int32)
    allowed = (np.arange(9)[None, :] < lengths[:, None])[:, None, :]
    got = attend(q, k, v, causal=False, key_lengths=jnp.asarray(lengths))
    np.testing.assert_allclose(got, plain(q, k, v, allowed), atol=1e-5)


def test_queries_that_continue_a_cache():
    q, k, v = random_heads(3, 9)
    positions = np.array([[2, 3, 4], [6, 7, 8]], np.int32)
    allowed = np.arange(9)[None, None, :] <= positions[:, :, None]
    got = attend(q, k, v, query_positions=jnp.asarray(positions))
    np.testing.assert_allclose(got, plain(q, k, v, allowed), atol=1e-5)


def test_ambiguous_causality_is_refused():
    q, k, v = random_heads(3, 9)
    with pytest.raises(UsageError, match="3 queries over 9 keys is ambiguous"):
        attend(q, k, v)


def test_causal_attention_passes_no_mask(monkeypatch):
    seen = {}

    def spy(q, k, v, **options):
        seen.update(options)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    attend(*random_heads(4, 4))
    assert seen["is_causal"] and seen["mask"] is None and seen["implementation"] == "xla"
