"""Functions of the kinds that users plan: each gives a loss, and shapes of parameters and batch.

`wrap` is put round the function of one layer, as `Planned.checkpoint` is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Case = tuple[Callable[..., jax.Array], Any, Any]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def ids(*sizes: int) -> jax.ShapeDtypeStruct:
    return shape(*sizes, dtype=jnp.int32)


def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    gain = jnp.expand_dims(gain, range(x.ndim - 1))
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def attend(w: Any, x: jax.Array, y: jax.Array, *, causal: bool, heads: int = 8) -> jax.Array:
    q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in (x @ w["q"], y @ w["k"], y @ w["v"]))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
    out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v)
    return out.reshape(*x.shape[:2], -1) @ w["o"]


def matrices(names: str, *sizes: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: shape(*sizes) for name in names}


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1))


def scan_over_layers(wrap: Wrap) -> Case:
    layers, width, inner, rows = 8, 128, 512, 256

    def loss(p, batch):
        def layer(x, w):
            return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

        x, _ = jax.lax.scan(wrap(layer), batch["x"], p["layers"])
        return jnp.mean((x @ p["out"] - batch["y"]) ** 2)

    stack = {"up": shape(layers, width, inner), "down": shape(layers, inner, width)}
    batch = {"x": shape(rows, width), "y": shape(rows, 16)}
    return loss, {"layers": stack, "out": shape(width, 16)}, batch


def llama(wrap: Wrap) -> Case:
    layers, width, inner, words, rows, length = 4, 128, 384, 512, 16, 64

    def loss(p, batch):
        def layer(x, w):
            h = norm(x, w["n1"])
            x = x + attend(w, h, h, causal=True)
            h = norm(x, w["n2"])
            return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

        x, _ = jax.lax.scan(wrap(layer), p["embed"][batch["tokens"]], p["layers"])
        return cross_entropy(norm(x, p["norm"]) @ p["head"], batch["targets"])

    stack = matrices("qkvo", layers, width, width) | {
        "gate": shape(layers, width, inner), "up": shape(layers, width, inner),
        "down": shape(layers, inner, width), "n1": shape(layers, width), "n2": shape(layers, width),
    }  # fmt: skip
    edge = {"embed": shape(words, width), "norm": shape(width), "head": shape(width, words)}
    tokens = {"tokens": ids(rows, length), "targets": ids(rows, length)}
    return loss, {"layers": stack, **edge}, tokens


def mixture_of_experts(wrap: Wrap) -> Case:
    layers, width, inner, experts, words, rows, length = 4, 64, 128, 8, 256, 16, 32

    def loss(p, batch):
        def layer(x, w):
            h = norm(x, w["n1"])
            x = x + attend(w, h, h, causal=True)
            h = norm(x, w["n2"])
            top, chosen = jax.lax.top_k(jax.nn.softmax(h @ w["router"]), 2)
            gate = jnp.sum(jax.nn.one_hot(chosen, experts) * top[..., None], -2)
            up = jax.nn.relu(jnp.einsum("btd,edf->btef", h, w["up"]))
            return x + jnp.einsum("btef,efd,bte->btd", up, w["down"], gate), None

        x, _ = jax.lax.scan(wrap(layer), p["embed"][batch["tokens"]], p["layers"])
        return cross_entropy(norm(x, p["norm"]) @ p["head"], batch["targets"])

    stack = matrices("qkvo", layers, width, width) | {
        "router": shape(layers, width, experts), "up": shape(layers, experts, width, inner),
        "down": shape(layers, experts, inner, width), "n1": shape(layers, width),
        "n2": shape(layers, width),
    }  # fmt: skip
    edge = {"embed": shape(words, width), "norm": shape(width), "head": shape(width, words)}
    tokens = {"tokens": ids(rows, length), "targets": ids(rows, length)}
    return loss, {"layers": stack, **edge}, tokens


def t5(wrap: Wrap) -> Case:
    layers, width, inner, words, rows, length, out = 3, 128, 256, 512, 16, 48, 32

    def loss(p, batch):
        y = p["embed"][batch["inputs"]]
        for w in p["encoder"]:
            h = norm(y, w["n1"])
            y = y + attend(w["self"], h, h, causal=False)
            y = y + jax.nn.relu(norm(y, w["n2"]) @ w["up"]) @ w["down"]

        def decode(x, y, w):
            h = norm(x, w["n1"])
            x = x + attend(w["self"], h, h, causal=True)
            x = x + attend(w["cross"], norm(x, w["n3"]), y, causal=False)
            return x + jax.nn.relu(norm(x, w["n2"]) @ w["up"]) @ w["down"]

        x = p["embed"][batch["decoder_inputs"]]
        for w in p["decoder"]:
            x = wrap(decode)(x, y, w)
        return cross_entropy(norm(x, p["norm"]) @ p["embed"].T, batch["targets"])

    def encoder():
        return {
            "self": matrices("qkvo", width, width), "up": shape(width, inner),
            "down": shape(inner, width), "n1": shape(width), "n2": shape(width),
        }  # fmt: skip

    def decoder():
        return encoder() | {"cross": matrices("qkvo", width, width), "n3": shape(width)}

    params = {
        "encoder": [encoder() for _ in range(layers)],
        "decoder": [decoder() for _ in range(layers)],
        "embed": shape(words, width), "norm": shape(width),
    }  # fmt: skip
    tokens = {"inputs": ids(rows, length)} | {
        name: ids(rows, out) for name in ("decoder_inputs", "targets")
    }
    return loss, params, tokens


def u_net_block(wrap: Wrap) -> Case:
    channels, rows, side = 32, 16, 16

    def convolve(x, w, stride=1):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def group(x):
        spread = jax.lax.rsqrt(x.var((1, 2), keepdims=True) + 1e-5)
        return (x - x.mean((1, 2), keepdims=True)) * spread

    def residual(x, w):
        h = convolve(jax.nn.silu(group(x)), w["a"])
        return x + convolve(jax.nn.silu(group(h)), w["b"])

    def loss(p, batch):
        x, skips = convolve(batch["x"], p["in"]), []
        for w in p["down"]:
            x = residual(x, w)
            skips.append(x)
        x = convolve(x, p["pool"], 2)
        for w in p["middle"]:
            x = wrap(residual)(x, w)
        x = jax.image.resize(x, (x.shape[0], side, side, x.shape[-1]), "nearest")
        x = convolve(x, p["unpool"])
        for merge, w in zip(p["merge"], p["up"], strict=True):
            x = residual(jnp.concatenate([x, skips.pop()], -1) @ merge, w)
        return jnp.mean((convolve(x, p["out"]) - batch["y"]) ** 2)

    def kernel(i, o):
        return shape(3, 3, i, o)

    def block(c):
        return {"a": kernel(c, c), "b": kernel(c, c)}

    params = {
        "in": kernel(4, channels), "down": [block(channels) for _ in range(2)],
        "pool": kernel(channels, 2 * channels), "middle": [block(2 * channels) for _ in range(3)],
        "unpool": kernel(2 * channels, channels), "up": [block(channels) for _ in range(2)],
        "merge": [shape(2 * channels, channels) for _ in range(2)], "out": kernel(channels, 4),
    }  # fmt: skip
    images = {"x": shape(rows, side, side, 4), "y": shape(rows, side, side, 4)}
    return loss, params, images


CASES = {
    "scan over layers": scan_over_layers,
    "Llama": llama,
    "mixture of experts": mixture_of_experts,
    "T5": t5,
    "U-Net block": u_net_block,
}
