"""The ring written by hand, which the generic lowering is timed against, computes the same step."""

import dataclasses
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.layered import reference_loss
from jaxsys.mesh import make_mesh
from jaxsys.model import initial_parameters, preset
from jaxsys.model.layers import layered

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_loss_and_gradients(monkeypatch, quickly_compiled, recompute):
    monkeypatch.syspath_prepend(SCRIPTS)
    by_hand = importlib.import_module("ring_by_hand")
    config = dataclasses.replace(preset("tiny"), num_layers=4)
    model, workers, microbatches = layered(config), 4, 4
    parameters = initial_parameters(config, seed=0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (microbatches, 1, 17))
    batch = {"inputs": jnp.asarray(tokens[..., :-1]), "targets": jnp.asarray(tokens[..., 1:])}
    expected = jax.jit(jax.value_and_grad(lambda p: reference_loss(model, p, batch)))(parameters)

    order = np.array(by_hand.rest_order(config.num_layers, workers))
    rest = parameters | {"blocks": jax.tree.map(lambda leaf: leaf[order], parameters["blocks"])}
    run = by_hand.ring_loss_and_gradients(
        model,
        make_mesh(workers, devices=jax.devices()[:workers]),
        microbatches=microbatches,
        recompute=recompute,
    )
    loss, gradients = jax.jit(run)(rest, batch)
    blocks = jax.tree.map(lambda leaf: leaf[np.argsort(order)], gradients["blocks"])

    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    for got, wanted in zip(
        jax.tree.leaves({"edge": gradients["edge"], "blocks": blocks}),
        jax.tree.leaves(expected[1]),
        strict=True,
    ):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
