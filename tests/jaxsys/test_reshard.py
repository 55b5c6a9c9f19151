"""Arrays change their layout one mesh axis at a time, and none is ever whole where it need not."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsys.lowering.reshard import reshard, steps_between

NAMES = ("a", "b", "c")
P = PartitionSpec


def mesh() -> Mesh:
    grid = np.array(jax.devices()[:8]).reshape(2, 2, 2)
    return Mesh(grid, NAMES, axis_types=(AxisType.Auto,) * 3)


def random_spec(random: np.random.Generator, axes: int) -> PartitionSpec:
    cuts: list[list[str]] = [[] for _ in range(axes)]
    for name in random.permutation(NAMES):
        if random.random() < 0.8:
            cuts[int(random.integers(axes))].append(str(name))
    return P(*(tuple(cut) if cut else None for cut in cuts))


@pytest.mark.parametrize("seed", range(8))
def test_values_stay_and_lie_as_asked(seed):
    random = np.random.default_rng(seed)
    axes = 2 + seed % 2
    source, target = random_spec(random, axes), random_spec(random, axes)
    on = mesh()
    whole = np.arange(8**axes, dtype=np.float32).reshape((8,) * axes)
    given = jax.device_put(whole, NamedSharding(on, source))
    wanted = NamedSharding(on, target)
    found = jax.jit(lambda x: reshard(x, on, source, target), out_shardings=wanted)(given)
    np.testing.assert_array_equal(np.asarray(found), whole)
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])


@pytest.mark.parametrize(
    ("shape", "source", "target", "gathers"),
    [
        ((4, 8, 8), P("a", None, "b"), P(None, ("a", "b")), 0),
        ((4, 8, 8), P("a", "b"), P(None, ("a", "b")), 0),  # b stands aside along the last axis
        ((4, 8), P("a", "b"), P(None, ("a", "b")), 1),  # and here has no third to stand along
        ((3, 8, 5), P(None, "b"), P(None, ("a", "b")), 1),  # nowhere else to be cut
        ((4, 8), P("a", "b"), P(None, "a"), 1),  # b is asked to cut nothing
        ((4, 8), P("a"), P("a"), 0),
    ],
)
def test_only_what_has_no_place_is_gathered(shape, source, target, gathers):
    sizes: dict[str, int] = dict.fromkeys(NAMES, 2)
    steps = steps_between(shape, sizes, source, target)
    assert sum(step.target is None for step in steps) == gathers


def test_every_pair_of_layouts_has_steps():
    sizes: dict[str, int] = dict.fromkeys(NAMES, 2)
    cuts = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("c", "a"), ("a", "b", "c")]
    specs = [
        P(*(cut or None for cut in pair))
        for pair in itertools.product(cuts, cuts)
        if len({*pair[0], *pair[1]}) == len(pair[0]) + len(pair[1])
    ]
    for source, target in itertools.product(specs, specs):
        steps = steps_between((16, 16), sizes, source, target)
        assert len(steps) <= 12
        assert bool(steps) == (source != target)
