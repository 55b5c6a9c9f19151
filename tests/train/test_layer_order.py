"""To layer order and back no stack of matrices is whole on a device, or cut by chance."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxsys.model import initial_parameters, layered, preset
from jaxsys.train import Trainer

CONFIG = dataclasses.replace(preset("bench-tiny"), num_layers=4)


@pytest.mark.parametrize(
    ("schedule", "more"),
    [
        ("weipipe-interleave", {"tensor": 2}),
        pytest.param("zero-3", {"tensor": 2, "context": 2}, marks=pytest.mark.slow),
        pytest.param("1f1b", {"tensor": 2, "replicas": 2}, marks=pytest.mark.slow),
    ],
)
def test_no_matrix_is_whole_on_a_device(schedule, more, capfd):
    parameters = initial_parameters(CONFIG)
    trainer = Trainer(
        layered(CONFIG), parameters, optax.adamw(1e-2), schedule=schedule, devices=2, **more
    )
    rest: Any = trainer._rest  # whose functions are compiled
    moved = rest.in_layer_order(trainer.state)
    stacks = [leaf.shape for leaf in jax.tree.leaves(parameters["blocks"]) if leaf.ndim > 2]
    for program in (
        rest.in_layer_order.lower(trainer.state).compile(),
        rest.to_rest.lower(moved).compile(),
    ):
        text = program.as_text()
        assert text is not None and stacks
        for shape in stacks:
            assert f"f32[{','.join(map(str, shape))}]" not in text, shape
    jax.tree.map(np.testing.assert_array_equal, moved.parameters, parameters)
    back = rest.to_rest(moved)
    jax.tree.map(np.testing.assert_array_equal, back.parameters, trainer.state.parameters)
    # XLA says so where it puts an array on every device to cut it otherwise.
    assert "full rematerialization" not in capfd.readouterr().err
