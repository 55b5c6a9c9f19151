"""More functions of the kinds that users plan, where losses, towers and loops over time meet.

As `function_cases`: each gives a loss, and shapes of parameters and batch.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

_spec = importlib.util.spec_from_file_location(
    "function_cases", Path(__file__).with_name("function_cases.py")
)
assert _spec is not None and _spec.loader is not None
_cases: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_cases)
shape, ids, norm, attend = _cases.shape, _cases.ids, _cases.norm, _cases.attend
matrices, cross_entropy = _cases.matrices, _cases.cross_entropy
Case = tuple[Callable[..., jax.Array], Any, Any]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def encoder_and_decoder(wrap: Wrap) -> Case:
    """Both scanned over as many layers, with one embedding for three uses; decoders are wrapped."""
    layers, width, inner, words, rows, length, out = 4, 128, 256, 512, 16, 48, 32

    def feed(x, w):
        return x + jax.nn.gelu(norm(x, w["n2"]) @ w["up"]) @ w["down"]

    def loss(p, batch):
        def encode(x, w):
            h = norm(x, w["n1"])
            return feed(x + attend(w, h, h, causal=False), w), None

        y, _ = jax.lax.scan(encode, p["embed"][batch["inputs"]], p["encoder"])

        def decode(x, w):
            h = norm(x, w["n1"])
            x = x + attend(w["self"], h, h, causal=True)
            return feed(x + attend(w["cross"], norm(x, w["n3"]), y, causal=False), w), None

        x, _ = jax.lax.scan(wrap(decode), p["embed"][batch["outputs"]], p["decoder"])
        return cross_entropy(norm(x, p["norm"]) @ p["embed"].T, batch["targets"])

    common = {
        "up": shape(layers, width, inner), "down": shape(layers, inner, width),
        "n1": shape(layers, width), "n2": shape(layers, width),
    }  # fmt: skip
    decoder = {
        "self": matrices("qkvo", layers, width, width),
        "cross": matrices("qkvo", layers, width, width),
        "n3": shape(layers, width),
    }
    params = {
        "encoder": matrices("qkvo", layers, width, width) | common,
        "decoder": decoder | common, "embed": shape(words, width), "norm": shape(width),
    }  # fmt: skip
    tokens = {"inputs": ids(rows, length), "outputs": ids(rows, out), "targets": ids(rows, out)}
    return loss, params, tokens


def vision_transformer(wrap: Wrap) -> Case:
    """Patches by a convolution, a token for the class, and queries, keys and values in one."""
    layers, width, inner, classes, rows, side, patch, heads = 6, 96, 384, 10, 32, 32, 4, 6

    def line(x, w):
        return x @ w["kernel"] + jnp.expand_dims(w["bias"], range(x.ndim - 1))

    def centred(x, w):
        d = x - x.mean(-1, keepdims=True)
        x = d * jax.lax.rsqrt((d**2).mean(-1, keepdims=True) + 1e-6)
        wide = range(x.ndim - 1)
        return x * jnp.expand_dims(w["scale"], wide) + jnp.expand_dims(w["bias"], wide)

    def block(x, w):
        h = line(centred(x, w["n1"]), w["qkv"]).reshape(*x.shape[:2], 3, heads, -1)
        q, k, v = h[:, :, 0], h[:, :, 1], h[:, :, 2]
        seen = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5, -1)
        x = x + line(jnp.einsum("bhts,bshd->bthd", seen, v).reshape(x.shape), w["out"])
        return x + line(jax.nn.gelu(line(centred(x, w["n2"]), w["up"])), w["down"])

    def loss(p, batch):
        x = jax.lax.conv_general_dilated(
            batch["images"], p["patch"], (patch, patch), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).reshape(batch["images"].shape[0], -1, width)  # fmt: skip
        first = jnp.broadcast_to(p["class"][None, None], (x.shape[0], 1, width))
        x = jnp.concatenate([first, x], 1) + p["places"][None]
        for i in range(layers):
            x = wrap(block)(x, p[f"block_{i}"])
        return cross_entropy(centred(x, p["norm"])[:, 0] @ p["head"], batch["labels"])

    def linear(i, o):
        return {"kernel": shape(i, o), "bias": shape(o)}

    def gains():
        return {"scale": shape(width), "bias": shape(width)}

    def one():
        return {
            "n1": gains(), "n2": gains(), "qkv": linear(width, 3 * width),
            "out": linear(width, width), "up": linear(width, inner), "down": linear(inner, width),
        }  # fmt: skip

    params = {f"block_{i}": one() for i in range(layers)} | {
        "patch": shape(patch, patch, 3, width), "class": shape(width), "norm": gains(),
        "places": shape((side // patch) ** 2 + 1, width), "head": shape(width, classes),
    }  # fmt: skip
    return loss, params, {"images": shape(rows, side, side, 3), "labels": ids(rows)}


def lstm(wrap: Wrap) -> Case:
    """Two layers, each a loop over time, whose weights every turn uses."""
    width, words, rows, length, layers = 128, 256, 32, 24, 2

    def layer(xs, w):
        def step(state, x):
            h, memory = state
            z = x @ w["x"] + h @ w["h"] + w["b"][None]
            i, f, g, o = jnp.split(z, 4, -1)
            memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(memory)
            return (h, memory), h

        zero = jnp.zeros((xs.shape[0], width))
        return jax.lax.scan(step, (zero, zero), xs.swapaxes(0, 1))[1].swapaxes(0, 1)

    def loss(p, batch):
        x = p["embed"][batch["tokens"]]
        for w in p["layers"]:
            x = wrap(layer)(x, w)
        return cross_entropy(x @ p["head"], batch["targets"])

    def one():
        return matrices("xh", width, 4 * width) | {"b": shape(4 * width)}

    edge = {"embed": shape(words, width), "head": shape(width, words)}
    tokens = {"tokens": ids(rows, length), "targets": ids(rows, length)}
    return loss, {"layers": [one() for _ in range(layers)], **edge}, tokens


def two_losses(wrap: Wrap) -> Case:
    """A generator's and a discriminator's loss in one, as adversarial training has them."""
    noise, width, pixels, rows, layers = 64, 256, 192, 128, 3

    def line(x, w):
        return x @ w["w"] + w["b"][None]

    def hidden(x, w):
        return jax.nn.leaky_relu(line(x, w), 0.2)

    def generate(p, z):
        x = hidden(z, p["in"])
        for w in p["hidden"]:
            x = wrap(hidden)(x, w)
        return jnp.tanh(line(x, p["out"]))

    def judge(p, x):
        x = hidden(x, p["in"])
        for w in p["hidden"]:
            x = wrap(hidden)(x, w)
        return line(x, p["out"])

    def loss(p, batch):
        made, stop = generate(p["generator"], batch["noise"]), jax.lax.stop_gradient
        fooled = jax.nn.softplus(-judge(stop(p["judge"]), made)).mean()
        real = jax.nn.softplus(-judge(p["judge"], batch["real"])).mean()
        return fooled + real + jax.nn.softplus(judge(p["judge"], stop(made))).mean()

    def linear(i, o):
        return {"w": shape(i, o), "b": shape(o)}

    params = {
        "generator": {
            "in": linear(noise, width), "out": linear(width, pixels),
            "hidden": [linear(width, width) for _ in range(2)],
        },
        "judge": {
            "in": linear(pixels, width), "out": linear(width, 1),
            "hidden": [linear(width, width) for _ in range(layers)],
        },
    }  # fmt: skip
    return loss, params, {"noise": shape(rows, noise), "real": shape(rows, pixels)}


def contrastive_pair(wrap: Wrap) -> Case:
    """Two towers; each example is told apart from all others of the batch."""
    layers, width, inner, rows, length, words, patch = 3, 64, 256, 256, 8, 128, 48

    def block(x, w):
        h = norm(x, w["n1"])
        x = x + attend(w, h, h, causal=False, heads=4)
        return x + jax.nn.relu(norm(x, w["n2"]) @ w["up"]) @ w["down"]

    def tower(x, blocks, out):
        for w in blocks:
            x = wrap(block)(x, w)
        x = x.mean(1) @ out
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def loss(p, batch):
        text = tower(p["embed"][batch["tokens"]], p["text"], p["text_out"])
        image = tower(batch["patches"] @ p["patch"], p["image"], p["image_out"])
        scores = jnp.exp(p["heat"]) * text @ image.T
        places = jnp.arange(scores.shape[0])
        return cross_entropy(scores, places) + cross_entropy(scores.T, places)

    def one():
        return matrices("qkvo", width, width) | {
            "up": shape(width, inner), "down": shape(inner, width),
            "n1": shape(width), "n2": shape(width),
        }  # fmt: skip

    params = {
        "text": [one() for _ in range(layers)], "image": [one() for _ in range(layers)],
        "embed": shape(words, width), "patch": shape(patch, width), "heat": shape(),
        "text_out": shape(width, width), "image_out": shape(width, width),
    }  # fmt: skip
    return loss, params, {"tokens": ids(rows, length), "patches": shape(rows, length, patch)}


CASES = {
    "encoder and decoder": encoder_and_decoder,
    "vision transformer": vision_transformer,
    "LSTM": lstm,
    "two losses": two_losses,
    "contrastive pair": contrastive_pair,
}
