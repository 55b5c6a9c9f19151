"""Collectives that are matched by their order alone wait for one another, and change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.lowering import base, lower
from jaxsys.lowering.order import after, by_order_alone
from jaxsys.lowering.xla import CPU_COMPILER_OPTIONS
from jaxsys.mesh import make_mesh
from jaxsys.model import DecoderConfig, initial_parameters, layered
from jaxsys.strategies import for_layers

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = DecoderConfig(
    vocab_size=48, hidden_size=16, intermediate_size=32, num_layers=4,
    num_heads=2, num_kv_heads=2, head_dim=8,
)  # fmt: skip


def test_a_value_hangs_on_what_comes_before_and_keeps_its_bits():
    value = [jnp.array([1.0, -0.0, jnp.nan, jnp.inf]), jnp.arange(3, dtype=jnp.uint8)]
    done = {"a": jnp.full((2, 2), jnp.nan), "b": jnp.float32(3), "none": jnp.zeros((0, 4))}
    program = jax.jit(after, compiler_options=CPU_COMPILER_OPTIONS).lower(value, done).compile()
    found = program(value, done)
    for before, behind in zip(value, found, strict=True):
        assert np.asarray(before).tobytes() == np.asarray(behind).tobytes()
    # The compiler has not seen that it makes no difference.
    text = program.as_text() or ""
    entry = text[text.index("ENTRY") :]
    assert "done__a" in entry.replace("'", "_").replace("[", "_") and "f32[2,2]" in entry
    assert "fusion(" in entry or "select(" in entry


def test_only_processes_of_cpu_devices_need_it():
    class Device:
        def __init__(self, process_index, platform="cpu"):
            self.process_index, self.platform = process_index, platform

    class Mesh:
        def __init__(self, *devices):
            self.devices = np.array(devices)

    assert by_order_alone(Mesh(Device(0), Device(1)))  # pyright: ignore[reportArgumentType]
    assert not by_order_alone(Mesh(Device(0), Device(0)))  # pyright: ignore[reportArgumentType]
    of_gpus = Mesh(Device(0, "gpu"), Device(1, "gpu"))
    assert not by_order_alone(of_gpus)  # pyright: ignore[reportArgumentType]


def test_a_step_in_order_is_the_same_step(monkeypatch):
    schedule = for_layers("zero-3", devices=2, layers=4, microbatches=6)
    parameters = initial_parameters(CONFIG, seed=1)
    tokens = np.random.default_rng(0).integers(0, 48, (6, 2, 9)).astype(np.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}

    def run():
        step = lower(schedule, layered(CONFIG), make_mesh(2, devices=jax.devices()[:2]))
        compiled = jax.jit(step.loss_and_gradients, compiler_options=step.compiler_options)
        return compiled(step.to_rest(parameters), batch)

    plain = run()
    asked = []
    monkeypatch.setattr(base, "by_order_alone", lambda mesh: not asked.append(mesh))
    ordered = run()
    assert len(asked) > 10
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(ordered), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
