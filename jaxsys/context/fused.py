"""cuDNN's attention with its log-sum-exp, forward and backward: the kernel that ring steps want.

JAX has no public way to it: `jax.nn.dot_product_attention` returns a log-sum-exp without a
derivative, and takes none for its backward pass. The functions behind it are JAX's own and may
change from release to release, so nothing of them is believed: `why_not_fused` runs both ways once
on the device against plain JAX, and steps go to `jaxsys.context.blocks` where they differ.

Legend: B batch, T query tokens, S key tokens, N query heads, G key/value heads, K head width.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float

from jaxsys.kernel_shapes import attention_shapes

from . import blocks
from .blocks import Part, Scores


def forward(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    shapes: bool = False,
) -> Part:
    """o [B, T, N, K] in the dtype of q, and lse [B, N, T] float32.

    With `shapes` it can be traced on any machine, and not be run.
    """
    if shapes:
        out, lse = _FORWARD.bind(q, k, v)
        return out, lse
    cudnn: Any = _module()
    out, lse = cudnn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        mask_type=cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK,
        sliding_window_length=window,
        return_residual=True,
    )
    return out, lse


def backward(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    out: Float[Array, "B T N K"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N K"],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    shapes: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv in the dtypes of q, k and v; `out` and `lse` are of all keys a query sees."""
    if shapes:
        dq, dk, dv = _BACKWARD.bind(q, k, v, out, lse, d_out)
        return dq, dk, dv
    cudnn: Any = _module()
    unused = jnp.zeros(0, q.dtype)
    options = {
        "scale": scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
    }
    if "score_mod" in inspect.signature(cudnn.dot_product_attention).parameters:
        options["score_mod"] = None
    dq, dk, dv = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *[unused] * 7, lse, out, d_out, **options
    )
    return dq, dk, dv


_FORWARD, _BACKWARD = attention_shapes(
    "context_attention_forward_shapes", "context_attention_backward_shapes"
)


def _module() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


@functools.cache
def why_not_fused(device: Any) -> str | None:
    """Why cuDNN's kernels are not used on a device, found by running them; None if they are.

    Not to be called while tracing.
    """
    if device.platform not in ("gpu", "cuda"):
        return f"cuDNN needs an NVIDIA GPU, this is {device.platform}"
    try:
        for causal in (True, False):
            worst = _difference(device, causal)
            if not worst < 0.03:  # bfloat16's own rounding comes to a third of that
                kind = "causal" if causal else "full"
                return f"cuDNN's {kind} attention differs from plain JAX by {worst:.2g}"
    except Exception as error:  # noqa: BLE001 - whatever other releases' functions raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"cuDNN's attention does not run: {first[:120]}"
    return None


def _difference(device: Any, causal: bool) -> float:
    """The largest relative difference from plain JAX, values and gradients, on small arrays.

    The gradients are those of keys that are a part of what the queries see: with a log-sum-exp that
    is larger than these keys' own, and an output that is not theirs alone.
    """
    random = np.random.default_rng(0)
    shapes = {
        "q": (2, 256, 4, 64),
        "k": (2, 256, 2, 64),
        "v": (2, 256, 2, 64),
        "d": (2, 256, 4, 64),
    }
    q, k, v, d_out = (
        jax.device_put(random.normal(size=shape).astype(jnp.bfloat16), device)
        for shape in shapes.values()
    )
    scale = 64**-0.5

    def ours(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        seen = blocks.causal(256) if causal else blocks.everything(256, 256)
        out, lse = blocks.forward(q, k, v, seen, Scores(scale=scale))
        kept = (0.5 * out).astype(q.dtype), lse + 0.7
        return out, lse, *blocks.backward(q, k, v, *kept, d_out, seen, Scores(scale=scale))

    def theirs(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        out, lse = forward(q, k, v, causal=causal, scale=scale)
        kept = (0.5 * out.astype(jnp.float32)).astype(q.dtype), lse + 0.7
        return out, lse, *backward(q, k, v, *kept, d_out, causal=causal, scale=scale)

    def difference(*given: jax.Array) -> jax.Array:
        worst = [
            jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)))
            / jnp.max(jnp.abs(a.astype(jnp.float32)))
            for a, b in zip(ours(*given), theirs(*given), strict=True)
        ]
        return jnp.max(jnp.stack(worst))

    # Whatever mesh the caller works on: this is one device's.
    with jax.set_mesh(Mesh(np.array([device]), ("one",), axis_types=(AxisType.Auto,))):
        return float(jax.jit(difference)(q, k, v, d_out))
