"""What steps lean on in a release of JAX, asked of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxsys.axes import RING
from jaxsys.lowering import xla
from jaxsys.mesh import make_mesh


@pytest.fixture
def mesh():
    return make_mesh(4)


def test_barriers_stay_between_equal_products(mesh):
    assert xla.products_beside_a_barrier(xla.CPU_COMPILER_OPTIONS) == 2
    assert xla.lacks(mesh) == ()


def test_a_release_that_merges_across_barriers_is_named(mesh, monkeypatch):
    monkeypatch.setattr(xla, "products_beside_a_barrier", lambda options: 1)
    (sentence,) = xla.lacks.__wrapped__(mesh)
    assert sentence.startswith(f"JAX {jax.__version__} merges equal products across barriers")


def test_a_donated_state_is_written_in_place(mesh):
    """What a step takes and gives back lies in one place, so that two states are never held."""
    spread = NamedSharding(mesh, PartitionSpec(RING))
    state = jax.ShapeDtypeStruct((4, 1024), jnp.float32, sharding=spread)
    step = jax.jit(lambda x: x + 1, donate_argnums=0, out_shardings=spread)
    memory = step.lower(state).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes == 4096


def test_a_ring_passes_on_and_gathers_in_the_order_of_its_axis(mesh):
    def around(x):
        there = lax.ppermute(x, RING, [(i, (i + 1) % 4) for i in range(4)])
        return there, lax.all_gather(x, RING, axis=0, tiled=True)

    spec = PartitionSpec(RING)
    run = jax.jit(jax.shard_map(around, mesh=mesh, in_specs=spec, out_specs=(spec, spec)))
    passed, gathered = run(jnp.arange(4.0))
    assert passed.tolist() == [3, 0, 1, 2]
    assert gathered.reshape(4, 4).tolist() == [[0, 1, 2, 3]] * 4


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, True),
        ({"NCCL_P2P_DISABLE": "0"}, True),
        ({"NCCL_P2P_DISABLE": "1"}, False),
        ({"NCCL_P2P_LEVEL": "NVL"}, True),
        ({"NCCL_P2P_LEVEL": "LOC"}, False),
    ],
)
def test_settings_that_turn_peer_access_off_hold_for_peer_copies(settings, allowed, monkeypatch):
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.delenv("NCCL_P2P_LEVEL", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert xla.peer_access_is_allowed() == allowed
