"""Layered models written by hand whose own derivatives a schedule would make another number of."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel
from jaxsys.train import Trainer
from jaxsys.train.derivatives import check_derivatives
from jaxsys.train.lora import add_adapters

D, L = 4, 2
PARAMETERS: Any = {
    "edge": {"into": np.eye(D, dtype=np.float32)},
    "blocks": {"w": np.full((L, D, D), 0.1, np.float32)},
}
MICROBATCH = {"x": np.ones((2, D), np.float32)}


def with_derivative(backward, *, symbolic_zeros=False):
    """x w, with a derivative of one's own: backward(x, w, which are differentiated, gradient)."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def forward(x, w):
        if not symbolic_zeros:
            return x @ w, (x, w)
        return x.value @ w.value, (x.value, w.value if x.perturbed and w.perturbed else None)

    product.defvjp(forward, lambda kept, g: backward(*kept, g), symbolic_zeros=symbolic_zeros)
    return product


def model(product, where="block"):
    def used(part, x, w):
        return product(x, w) if part == where else x @ w

    def block(weights, x, microbatch, layer):
        # In a loop and a remat of the user's own, which stay whole.
        once = jax.checkpoint(lambda x: x + jnp.tanh(used("block", x, weights["w"])))
        return jax.lax.scan(lambda x, _: (once(x), None), x, None, length=2)[0]

    return LayeredModel(
        embed=lambda edge, microbatch: used("embed", microbatch["x"], edge["into"]),
        block=block,
        head_loss=lambda edge, x, microbatch: (
            jnp.sum(used("head_loss", x, edge["into"]) ** 2),
            jnp.float32(len(x)),
        ),
        layers=L,
    )


def clipped(x, w, g):
    return jnp.clip(g, -0.1, 0.1) @ w.T, x.T @ g


def reversed_sign(x, w, g):
    return -g @ w.T, x.T @ g


def by_what_is_asked(x, w, g):
    """Of x the right one where w is differentiated too, else none."""
    return (jnp.zeros_like(x) if w is None else g @ w.T), x.T @ g


@pytest.mark.parametrize("where", ["embed", "block", "head_loss"])
def test_a_derivative_that_clips_is_refused(where):
    with pytest.raises(UsageError, match=f"in {where}, a custom derivative .* is not linear"):
        check_derivatives(model(with_derivative(clipped), where), PARAMETERS, MICROBATCH)
    check_derivatives(model(with_derivative(reversed_sign), where), PARAMETERS, MICROBATCH)


def test_a_derivative_by_what_is_differentiated_is_refused():
    product = with_derivative(by_what_is_asked, symbolic_zeros=True)
    with pytest.raises(UsageError, match="in block, a custom derivative .symbolic_zeros=True"):
        check_derivatives(model(product), PARAMETERS, MICROBATCH)

    @jax.custom_vjp
    def saving(x, w):
        return x @ w

    def forward(x, w):  # keeps what is asked for alone
        kept = x.value if w.perturbed else None, w.value if x.perturbed else None
        return x.value @ w.value, kept

    def backward(kept, g):
        x, w = kept
        return None if w is None else g @ w.T, None if x is None else x.T @ g

    saving.defvjp(forward, backward, symbolic_zeros=True)
    check_derivatives(model(saving), PARAMETERS, MICROBATCH)


def gates(edge, x):
    return jax.nn.sigmoid(x @ edge["into"])[:, 0]


@pytest.mark.parametrize(
    ("weight", "moves"),
    [
        (lambda edge, x: jnp.sum(gates(edge, x)), True),
        (lambda edge, x: jnp.sum(jax.lax.stop_gradient(gates(edge, x))), False),
        (lambda edge, x: jnp.sum(gates(edge, x) > 0.5), False),
        # Losses and their count in one loop.
        (lambda edge, x: jax.lax.scan(
            lambda c, row: ((c[0] + jnp.sum(row), c[1] + 1.0), None), (0.0, 0.0), x)[0][1], False),
    ],
)  # fmt: skip
def test_a_weight_that_parameters_move_is_refused(weight, moves):
    counted = dataclasses.replace(
        model(lambda x, w: x @ w),
        head_loss=lambda edge, x, microbatch: (jnp.sum(x), weight(edge, x)),
    )
    if moves:
        with pytest.raises(UsageError, match="a weight that depends on parameters"):
            check_derivatives(counted, PARAMETERS, MICROBATCH)
    else:
        check_derivatives(counted, PARAMETERS, MICROBATCH)


def test_adapters_hide_no_derivative():
    """They wrap a model's functions; what these are is looked at all the same."""
    adapted, parameters = add_adapters(
        model(with_derivative(clipped)), PARAMETERS, rank=1, targets=["w"]
    )[:2]
    with pytest.raises(UsageError, match="in block, a custom derivative"):
        check_derivatives(adapted, parameters, MICROBATCH)


def test_a_trainer_says_so_before_it_compiles():
    trainer = Trainer(
        model(with_derivative(clipped)), PARAMETERS, optax.sgd(0.1), devices=1, schedule="dp"
    )
    with pytest.raises(UsageError, match="in block, a custom derivative"):
        trainer.step({"x": np.ones((2, 2, D), np.float32)})


@pytest.mark.parametrize("part", ["edge", "blocks", "x"])
def test_complex_numbers_are_refused(part):
    """They would be constants: gradients are of floats."""
    parameters = jax.tree.map(jnp.asarray, PARAMETERS)
    if part != "x":
        parameters[part] = jax.tree.map(lambda leaf: leaf + 0.5j, parameters[part])

    def embed(edge, microbatch):
        x = (microbatch["x"] @ edge["into"]).real
        return x + 0j if part == "x" else x

    complex_model = LayeredModel(
        embed=embed,
        block=lambda w, x, m, layer: x + (x @ w["w"]).real,
        head_loss=lambda edge, x, m: (jnp.sum(jnp.abs(x)), jnp.float32(len(x))),
        layers=L,
    )
    with pytest.raises(UsageError, match="complex"):
        trainer = Trainer(
            complex_model, parameters, optax.sgd(0.1), devices=1, schedule="dp",
            memory_gib=float("inf"),
        )  # fmt: skip
        trainer.step({"x": np.ones((2, 2, D), np.float32)})
