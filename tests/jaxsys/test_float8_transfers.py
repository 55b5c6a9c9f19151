"""Weights that travel in float8: a byte a number crosses, and no bit of a step changes."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys import float8
from jaxsys.errors import UsageError
from jaxsys.lowering import lower
from jaxsys.lowering.eight_bits import decoded, encoded, scales_of
from jaxsys.mesh import make_mesh
from jaxsys.model import DecoderConfig, initial_parameters, layered
from jaxsys.model.float8_products import Float8
from jaxsys.model.kinds import BlockKind, Experts
from jaxsys.strategies import for_layers
from jaxsys.train.lora import add_adapters

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = DecoderConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=8,
)  # fmt: skip
SENT = Float8(transfers=True)


def batch_of(rows, length=12):
    tokens = np.random.default_rng(0).integers(0, 48, (rows, 2, length + 1)).astype(np.int32)
    return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}


def scales_differ(parameters):
    """Layers and matrices of unlike sizes: a scale that is another's would show."""
    sizes = iter(np.random.default_rng(1).uniform(0.3, 9, 100))
    return {
        **parameters,
        "blocks": jax.tree.map(
            lambda leaf: leaf * jnp.asarray([next(sizes) for _ in leaf]).reshape(
                -1, *[1] * (leaf.ndim - 1)
            ),
            parameters["blocks"],
        ),
    }  # fmt: skip


def run(model, schedule, mesh, dtype, config=CONFIG, **options):
    """Loss and gradients in layer order, and the compiled program."""
    step = lower(schedule, model, mesh, compute_dtype=dtype, **options)
    parameters = step.to_rest(scales_differ(initial_parameters(config, seed=1)))
    copies = mesh.size // schedule.devices // mesh.shape.get("tensor", 1)
    batch = batch_of(schedule.microbatches * copies)
    program = jax.jit(step.loss_and_gradients).lower(parameters, batch).compile()
    found = program(parameters, batch)
    return found.loss, step.from_rest(found.gradients), program.as_text() or ""


def of_weights(text, dtype):
    """Elements of gathers and permutes of a dtype in a compiled program."""
    found = re.findall(rf"= {dtype}\[([\d,]+)\]\S* (?:all-gather|collective-permute)\(", text)
    return sum(int(np.prod([int(n) for n in shape.split(",")])) for shape in found)


CASES = [
    ("zero-3", {}, {}),
    pytest.param("weipipe-interleave", {}, {}, marks=pytest.mark.slow),
    ("weipipe-keep", {"member": 2}, {"recompute": "none"}),
    pytest.param("zero-1", {}, {}, marks=pytest.mark.slow),
    pytest.param("zero-3", {"tensor": 2}, {"unroll": True}, marks=pytest.mark.slow),
    pytest.param("zero-4", {}, {"recompute": "selective"}, marks=pytest.mark.slow),
    pytest.param("weipipe-keep-weights", {"tensor": 2}, {"unroll": True}, marks=pytest.mark.slow),
    pytest.param("weipipe-wzb1", {}, {"recompute": "none"}, marks=pytest.mark.slow),
    pytest.param("weipipe-naive", {"data": 2}, {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "around", "options"), CASES)
def test_no_bit_changes_and_half_the_bytes_cross(name, around, options):
    layers = CONFIG.num_layers
    schedule = for_layers(name, devices=2, layers=layers, microbatches=2)
    count = 2 * int(np.prod([*around.values()]))
    mesh = make_mesh(2, devices=jax.devices()[:count], **around)
    model = layered(CONFIG, float8=SENT)
    plain = replace(model, travels_in_float8=None)
    if "tensor" in around:  # of a part of the model too
        whole = plain
        plain = replace(plain, in_parts=lambda sizes: quiet(model.in_parts(sizes), whole))
    loss, gradients, text = run(model, schedule, mesh, jnp.bfloat16, **options)
    wanted, others, wide = run(plain, schedule, mesh, jnp.bfloat16, **options)
    assert np.isfinite(float(loss)) and float(loss) == float(wanted)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert of_weights(text, "u8") > 0 == of_weights(wide, "u8")


def quiet(parts, whole):
    return replace(parts, model=replace(parts.model, travels_in_float8=None), whole=whole)


@pytest.mark.slow
def test_models_of_unlike_blocks_have_each_its_own():
    """Kinds of blocks whose rows are of unlike lengths, in a ring and in shards."""
    config = replace(
        CONFIG,
        num_layers=4,
        kinds=(BlockKind(), BlockKind(experts=True, name="experts")),
        pattern=("block", "experts", "experts", "block"),
        experts=Experts(count=4, active=2, intermediate_size=8, shared_size=16),
    )
    model = layered(config, float8=SENT)
    plain = replace(model, travels_in_float8=None)
    mesh = make_mesh(2, devices=jax.devices()[:2])
    for name in ("weipipe-interleave", "zero-3"):
        schedule = for_layers(name, devices=2, layers=4, microbatches=2)
        loss, gradients, text = run(model, schedule, mesh, jnp.float32, config)
        assert of_weights(text, "u8") > 0
        wanted, others, _ = run(plain, schedule, mesh, jnp.float32, config)
        assert float(loss) == float(wanted)
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_arrives_is_what_was_sent(dtype):
    """Rounded once: whatever the size, and again rounded it is the same."""
    random = np.random.default_rng(0)
    sizes = 10.0 ** random.uniform(-24, 30, (64, 1, 1))
    leaf = jnp.asarray(random.normal(size=(64, 8, 16)) * sizes, dtype)
    leaf = leaf.at[0].set(0).at[1, 0, 0].set(449).at[2, 0, 0].set(448 * 2.0**20)
    scales = scales_of([leaf], ())[0]
    found = decoded(encoded(leaf, scales), scales, dtype)
    assert (np.log2(np.asarray(scales)) % 1 == 0).all()
    wide, most = np.asarray(leaf, np.float64), np.abs(np.asarray(leaf, np.float64)).max((1, 2))
    assert (most <= 448 * np.asarray(scales, np.float64)).all()
    assert (most[3:] > 224 * np.asarray(scales[3:], np.float64)).all()
    apart = np.abs(np.asarray(found, np.float64) - wide)
    assert (
        apart <= np.maximum(np.abs(wide) / 16, 2.0**-10 * np.asarray(scales)[:, None, None])
    ).all()
    for row, kept in zip(leaf[:12], found[:12], strict=True):
        values, scale = float8.scaled(row, float8.E4M3, powers=True)
        again, other = float8.scaled(kept, float8.E4M3, powers=True)
        times = scale.item() / other.item()
        assert np.array_equal(values.astype(float) * times, again.astype(float))


@pytest.mark.parametrize("sick", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(sick):
    leaf = jnp.ones((2, 4, 4)).at[0, 1, 1].set(sick)
    scales = scales_of([leaf], ())[0]
    found = np.asarray(decoded(encoded(leaf, scales), scales, jnp.float32))
    assert np.isnan(found[0]).all() and (found[1] == 1).all()


def test_only_what_is_multiplied_forward_travels():
    model = layered(CONFIG, float8=replace(SENT, forward=("mlp/.*",)))
    assert model.travels_in_float8 is not None
    assert model.travels_in_float8("mlp", "up")
    assert not model.travels_in_float8("attention", "query")
    assert not model.travels_in_float8("attention_norm", "scale")
    assert layered(CONFIG, float8=Float8()).travels_in_float8 is None


@pytest.mark.parametrize(
    ("rules", "name", "dtype", "message"),
    [
        (SENT, "dp", jnp.float32, "schedule dp sends no weights, which float8 transfers are of"),
        (SENT, "1f1b", jnp.float32, "schedule 1f1b sends no weights"),
        (SENT, "zero-3", jnp.float16, "compute_dtype is float16; use bfloat16 or float32"),
        (
            replace(SENT, forward=()),
            "zero-3",
            jnp.float32,
            "forward product is in float8, which no",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(rules, name, dtype, message):
    schedule = for_layers(name, devices=2, layers=CONFIG.num_layers, microbatches=2)
    with pytest.raises(UsageError, match=message):
        mesh = make_mesh(2, devices=jax.devices()[:2])
        lower(schedule, layered(CONFIG, float8=rules), mesh, compute_dtype=dtype)


def test_adapters_would_be_added_to_what_is_rounded():
    with pytest.raises(UsageError, match="adapters are added to weights as they are"):
        add_adapters(
            layered(CONFIG, float8=SENT),
            initial_parameters(CONFIG, seed=1),
            rank=2,
            targets=("up",),
        )


def test_matrices_that_no_axis_divides_do_not_travel():
    schedule = for_layers("zero-3", devices=5, layers=2, microbatches=5)
    config = replace(CONFIG, vocab_size=48)
    model = layered(config, float8=SENT)
    step = lower(schedule, model, make_mesh(5, devices=jax.devices()[:5]))
    parameters = step.to_rest(initial_parameters(config, seed=1))
    with pytest.raises(UsageError, match="5 devices divide no axis of the matrices that would"):
        jax.jit(step.loss_and_gradients).lower(parameters, batch_of(5))
