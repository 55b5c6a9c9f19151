"""Softmax attention through `jax.nn.dot_product_attention`, by the best kernel that may run it.

cuDNN's fused attention runs on NVIDIA GPUs for 16-bit floats and head widths that are multiples of
8 (to 256 from Hopper on, to 128 before); it never forms the [T, S] scores. Everything else goes to
XLA, which does form them: 4 * B * N * T * S bytes. The choice is made while tracing, and
`choose_implementation` says which and why.

Legend: B batch, T query tokens, S key tokens, N query heads, G key/value heads, K head width, V
width of values.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxsys.errors import UsageError
from jaxsys.kernel_shapes import attention_shapes

Implementation = Literal["cudnn", "xla", "shapes"]
"""`shapes` has the shapes of cuDNN's kernel on any machine: it is traced and cannot run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which kernel runs and the reason in words."""

    implementation: Implementation
    reason: str


def choose_implementation(
    *, dtype: DTypeLike, head_dim: int, masked: bool = False, device: Any = None
) -> Choice:
    """The kernel for heads of this dtype and width.

    Args:
        dtype: of queries, keys and values.
        head_dim: K.
        masked: whether an explicit mask is needed besides causality and lengths.
        device: a jax.Device where it will run; the default device if not given.
    """
    device = device or default_device()
    if device.platform not in ("gpu", "cuda"):
        return _xla(f"cuDNN needs an NVIDIA GPU, this is {device.platform}")
    if "cuda" not in device.client.platform_version.lower():
        return _xla(f"cuDNN needs CUDA, this is {device.client.platform_version}")
    if _cudnn_version() is None:
        return _xla("cuDNN is not installed beside this jaxlib")
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return _xla(f"cuDNN attends in bfloat16 or float16, not {dtype}")
    capability = float(device.compute_capability)
    widest = 256 if capability >= 9.0 else 128
    if head_dim > widest or head_dim % 8:
        return _xla(
            f"cuDNN at compute capability {capability} needs a head width that is a multiple of 8 "
            f"up to {widest}, not {head_dim}"
        )
    if masked:
        return _xla("an explicit mask would be materialised for cuDNN, at no gain over XLA")
    return Choice(implementation="cudnn", reason=f"{dtype} heads of width {head_dim} on CUDA")


def attend(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    causal: bool = True,
    key_lengths: Int[Array, " B"] | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B #N #T S"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """softmax(q k^T / sqrt(K)) v, each group of N / G query heads sharing a key/value head.

    Args:
        q: queries [B, T, N, K].
        k: keys [B, S, G, K].
        v: values [B, S, G, V]; V need not be K.
        causal: query t sees keys up to t, counted from the start of both. It needs S == T unless
            `query_positions` says where the queries stand.
        key_lengths: int32 [B]; keys at or past this index are padding.
        query_positions: int32 [B, T], the key index each query stands at: for queries that
            continue a cached sequence. Materialises a [B, 1, T, S] mask.
        mask: extra boolean mask, True where attention is allowed.
        window: keys that a query sees, its own the last of them; needs `causal`.
        scale: of the scores, in place of 1 / sqrt(K).
        softcap: c, scores become c tanh(scores / c). Scores are formed then.
        sinks: a score of each head that takes part in its softmax and adds nothing; likewise.
        implementation: overrides `choose_implementation`; `shapes` looks at q, k and v alone.

    Returns:
        [B, T, N, V] in the dtype of `q`. The softmax is float32.

    Raises:
        UsageError: if `causal` meets unequal lengths without `query_positions`, or `window` comes
            without `causal`.
    """
    length, keys = q.shape[1], k.shape[1]
    if window is not None and not causal:
        raise UsageError(f"window={window} needs causal=True")
    if causal and query_positions is None and length != keys:
        raise UsageError(
            f"causal attention of {length} queries over {keys} keys is ambiguous; "
            "give query_positions or pass causal=False"
        )
    if causal and query_positions is not None:
        index = jnp.arange(keys, dtype=query_positions.dtype)[None, None, None, :]
        behind = index <= query_positions[:, None, :, None]
        if window is not None:
            behind &= index > query_positions[:, None, :, None] - window
            window = None
        mask = behind if mask is None else behind & mask
        causal = False
    if window is not None and window >= length:
        window = None  # it cuts nothing off
    if softcap is not None or sinks is not None:
        seen = _seen(length, keys, causal, window, key_lengths, mask)
        return _scored(q, k, v, seen, scale, softcap, sinks)
    own, width = q.shape[-1], v.shape[-1]
    if own < width and scale is None:
        scale = own**-0.5
    # Kernels want one width: zeros add nothing to scores, and what they give is cut off again.
    q, k, v = (_widened(a, max(own, width)) for a in (q, k, v))
    if implementation is None:
        implementation = choose_implementation(
            dtype=q.dtype, head_dim=q.shape[-1], masked=mask is not None
        ).implementation
    if implementation == "shapes":
        return _kernel_shapes(q, k, v)[..., :width]
    attended = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=key_lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return attended if width == q.shape[-1] else attended[..., :width]


def _widened(x: jax.Array, width: int) -> jax.Array:
    """With zeros behind its last axis up to `width`."""
    more = width - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more))) if more else x


def _seen(
    length: int,
    keys: int,
    causal: bool,
    window: int | None,
    key_lengths: jax.Array | None,
    mask: jax.Array | None,
) -> jax.Array | None:
    """Everything that limits what queries see, as one mask [B, N, T, S] or smaller; None: all."""
    found = [] if mask is None else [mask]
    rows = jnp.arange(length, dtype=jnp.int32)[None, None, :, None]
    columns = jnp.arange(keys, dtype=jnp.int32)[None, None, None, :]
    if causal:
        found.append(columns <= rows)
    if window is not None:
        found.append(columns > rows - window)
    if key_lengths is not None:
        found.append(columns < key_lengths[:, None, None, None])
    return functools.reduce(jnp.logical_and, found) if found else None


def _scored(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array | None,
    scale: float | None,
    softcap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Attention over scores that are formed, for what no kernel computes."""
    groups, width = k.shape[2], q.shape[-1]
    grouped = q.reshape(*q.shape[:2], groups, -1, width)
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if seen is not None:
        heads = seen.shape[1]
        split = (seen.shape[0], *((1, 1) if heads == 1 else (groups, -1)), *seen.shape[2:])
        scores = jnp.where(seen.reshape(split), scores, jnp.finfo(jnp.float32).min)
    top = jnp.max(scores, axis=-1, keepdims=True)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, groups, -1, 1, 1)
    if sink is not None:
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    weights = (weights / total).astype(q.dtype)
    out = jnp.einsum("bgrts,bsgv->btgrv", weights, v)
    return out.reshape(*q.shape[:3], v.shape[-1])


# As JAX calls cuDNN's: recompute policies go by the names.
_FORWARD, _BACKWARD = attention_shapes(
    "dot_product_attention_fwd_shapes", "dot_product_attention_bwd_shapes"
)


@jax.custom_vjp
def _kernel_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _FORWARD.bind(q, k, v)[0]


def _kernel_forward(q: jax.Array, k: jax.Array, v: jax.Array):
    out, statistics = _FORWARD.bind(q, k, v)
    return out, (q, k, v, statistics, out)


_kernel_shapes.defvjp(_kernel_forward, lambda kept, d_out: tuple(_BACKWARD.bind(*kept, d_out)))


def _xla(reason: str) -> Choice:
    return Choice(implementation="xla", reason=reason)


def default_device() -> Any:  # jax.Device is no class to type checkers
    """The device that operations run on where nothing else is said."""
    settings: Any = jax.config
    configured = settings.jax_default_device
    if configured is None:
        return jax.devices()[0]
    return jax.devices(configured)[0] if isinstance(configured, str) else configured


def _cudnn_version() -> int | None:
    # JAX has no public way to ask; its own attention code asks this module.
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return None
    return None if cuda_versions is None else cuda_versions.cudnn_get_version()
