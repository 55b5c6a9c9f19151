"""A lowered schedule must give the loss and every gradient leaf of a single-device reference."""

import collections
import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, Parameters, reference_loss
from jaxsys.lowering import RECOMPUTE_POLICIES, LoweredStep, apart, lower, xla
from jaxsys.lowering.bodies import MOST_TICKS_THAT_PAY
from jaxsys.lowering.programs import INDEX, block_program
from jaxsys.lowering.split import split_backward
from jaxsys.lowering.tables import build_tables
from jaxsys.mesh import make_mesh
from jaxsys.schedule import Placement, Schedule, TaskKind, check
from jaxsys.strategies import NAMES, build
from jaxsys.strategies.data_parallel import data_parallel
from jaxsys.strategies.pipeline import one_f_one_b
from jaxsys.strategies.weipipe import interleave

WIDTH, VOCABULARY, SEQUENCES, TOKENS = 16, 32, 2, 6
TOLERANCE = 1e-5
"""Relative error of each gradient leaf in float32: sums are taken in another order."""


def embed(edge, microbatch):
    return edge["table"][microbatch["inputs"]]


def block(weights, x, microbatch, layer):
    h = jnp.tanh(x @ weights["in"] + weights["bias"][None])
    scores = jnp.einsum("btd,bsd->bts", h, h) / np.sqrt(WIDTH)
    mixed = jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores, axis=-1), h)
    return x + mixed @ weights["out"].T


def head_loss(edge, x, microbatch):
    scores = jax.nn.log_softmax((x * edge["scale"][None, None]) @ edge["head"], axis=-1)
    targets = microbatch["targets"]
    known = targets >= 0
    picked = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(known, picked, 0.0)), jnp.sum(known).astype(jnp.float32)


def small_model(layers: int) -> tuple[LayeredModel, Parameters]:
    keys = jax.random.split(jax.random.key(layers), 5)
    model = LayeredModel(embed=embed, block=block, head_loss=head_loss, layers=layers)
    matrix = (layers, WIDTH, WIDTH)
    parameters = Parameters(
        edge={
            "table": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
            "scale": jnp.ones((WIDTH,)),
            "head": 0.3 * jax.random.normal(keys[1], (WIDTH, VOCABULARY)),
        },
        blocks={
            "in": 0.3 * jax.random.normal(keys[2], matrix),
            "out": 0.3 * jax.random.normal(keys[3], matrix),
            "bias": 0.1 * jax.random.normal(keys[4], (layers, 1, WIDTH)),
        },
    )
    return model, parameters


def random_batch(microbatches: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    shape = (microbatches, SEQUENCES, TOKENS)
    return {
        "inputs": jnp.asarray(rng.integers(0, VOCABULARY, shape), jnp.int32),
        "targets": jnp.asarray(rng.integers(-1, VOCABULARY, shape), jnp.int32),  # -1 is masked
    }


@functools.cache
def reference(layers: int, microbatches: int):
    model, parameters = small_model(layers)
    batch = random_batch(microbatches)
    return jax.jit(jax.value_and_grad(functools.partial(reference_loss, model)))(parameters, batch)


def assert_matches_reference(schedule: Schedule, layers: int, *, data: int = 1, **options) -> None:
    model, parameters = small_model(layers)
    mesh = make_mesh(schedule.devices, data, devices=jax.devices()[: schedule.devices * data])
    step = lower(schedule, model, mesh, **options)
    rest = step.to_rest(parameters)
    batch = random_batch(schedule.microbatches * data)
    loss, gradients, *_ = jax.jit(step.loss_and_gradients)(rest, batch)
    wanted_loss, wanted = reference(layers, schedule.microbatches * data)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    found = step.from_rest(gradients)
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        got = functools.reduce(lambda tree, key: tree[key.key], path, found)
        error = np.linalg.norm(got - leaf) / np.linalg.norm(leaf)
        assert error < TOLERANCE, f"{jax.tree_util.keystr(path)}: relative error {error}"


@pytest.mark.parametrize(
    ("schedule", "layers", "data"),
    [
        # A ring in each of two data replicas; chunks of two layers, the last of them empty.
        (interleave(2, 2), 3, 2),
        (data_parallel(2, 2, chunks=3), 4, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (interleave(4, 4), 4, 2),
                (interleave(4, 4), 6, 1),
                (interleave(2, 4), 4, 1),
                (interleave(3, 3), 3, 1),
                (data_parallel(2, 2, chunks=3), 4, 2),
                (data_parallel(1, 3, chunks=2), 4, 1),
            )
        ),
    ],
    ids=lambda value: getattr(value, "name", None) and f"{value.name}-{value.devices}",
)
def test_loss_and_gradients(schedule, layers, data):
    assert_matches_reference(schedule, layers, data=data)


@pytest.mark.parametrize("name", NAMES)
def test_every_named_schedule(name):
    schedule = build(name, devices=2, microbatches=4)
    assert_matches_reference(schedule, schedule.chunks)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_masked_happens_on_every_device(name):
    """Ticks fold together; one in which only some devices receive must keep its mask, and one that
    needs none gets none."""
    schedule = build(name, devices=8, microbatches=16)
    if schedule.placement is Placement.SHARDED:
        pytest.skip("sharded schedules are written out, without tables")
    tables = build_tables(schedule, check(schedule))
    for segment in tables.segments:
        length = len(segment.period)
        for position, signature in enumerate(segment.period):
            ticks = range(
                segment.start + position, segment.start + segment.repeats * length, length
            )

            def valid(name, ticks=ticks):
                return np.asarray(
                    tables.rows[:, ticks, tables.columns[f"{name}.valid"]].all(axis=0)
                )

            tasks = [(task, valid(task.kind)) for task in signature.tasks]
            groups = [(group, valid(group.name)) for group in signature.groups]
            for item, on_all in tasks + groups:
                assert item.everyone == on_all.all(), f"ticks {ticks}, {item}"
            busy = np.array([on_all for _, on_all in tasks] or [[True]]).all(axis=0)
            # No more than a few pay for the masks of their neighbours.
            if not all(len(set(on_all.tolist())) == 1 for _, on_all in tasks + groups):
                assert busy.sum() <= MOST_TICKS_THAT_PAY, ticks


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_every_named_schedule_in_depth(name, devices, recompute, accumulation):
    schedule = build(name, devices=devices, microbatches=2 * devices * accumulation)
    assert_matches_reference(schedule, schedule.chunks, recompute=recompute)


@pytest.mark.parametrize("recompute", RECOMPUTE_POLICIES)
def test_recompute_policies_change_no_value(recompute):
    assert_matches_reference(interleave(2, 2), 4, recompute=recompute, unroll=recompute == "chunk")


def with_late_weight_gradients(schedule: Schedule) -> Schedule:
    """Every B as I where it was, and W after everything else."""
    tasks, late = [], collections.Counter()
    for task in schedule.tasks:
        if task.kind is not TaskKind.BACKWARD:
            tasks.append(task)
            continue
        tasks.append(dataclasses.replace(task, kind=TaskKind.INPUT_GRADIENT))
        tick = schedule.ticks + late[task.device]
        tasks.append(dataclasses.replace(task, kind=TaskKind.WEIGHT_GRADIENT, tick=tick))
        late[task.device] += 1
    return dataclasses.replace(schedule, name="split", tasks=tuple(tasks))


@pytest.mark.parametrize(
    ("layers", "recompute"), [pytest.param(4, "none", marks=pytest.mark.slow), (3, "chunk")]
)
def test_split_backward_changes_no_value(layers, recompute):
    schedule = with_late_weight_gradients(one_f_one_b(2, 4))
    assert_matches_reference(schedule, layers, recompute=recompute)


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("interleave", "1f1b")), "split"]
)
def test_written_out_layers_change_no_value(name):
    """Each adds its gradient to a stacked sum of its own; 1F1B has devices with nothing to add."""
    schedule = {
        "interleave": interleave(2, 4),
        "1f1b": one_f_one_b(2, 4),
        "split": with_late_weight_gradients(one_f_one_b(2, 4)),
    }[name]
    assert_matches_reference(schedule, 4, recompute="none", unroll=True)


def test_written_out_layers_lie_apart_and_are_not_copied_to_their_slots():
    schedule = interleave(2, 4)
    model, parameters = small_model(4)
    text = {}
    for unroll in (False, True):
        step = lower(schedule, model, make_mesh(2), recompute="none", unroll=unroll)
        rest, batch = step.to_rest(parameters), random_batch(4)
        text[unroll] = str(jax.make_jaxpr(step.loss_and_gradients)(rest, batch))
    slots = dict(build_tables(schedule, check(schedule)).slots)
    assert slots[apart.RESIDUALS] == 2
    layer = f"{SEQUENCES},{TOKENS},{WIDTH}]"
    assert f"f32[2,2,{layer}" in text[False]  # slots, and the layers of a chunk
    assert f"f32[2,{layer}" not in text[True]  # nor an array of slots for a layer


def test_slots_lie_apart_where_branches_are_few():
    """A branch for each slot writes a chunk out again: at most twice the model's layers in all."""

    def found(name, devices, microbatches):
        schedule = build(name, devices=devices, microbatches=microbatches)
        slots = build_tables(schedule, check(schedule)).slots
        return apart.lie_apart(slots, schedule.chunks)

    residuals, taps = apart.RESIDUALS, apart.TAPS
    for devices in (2, 4, 8):
        for name in ("weipipe-interleave", "weipipe-keep", "1f1b-overlap", "zb-h2"):
            assert residuals in found(name, devices, 2 * devices), (name, devices)
    assert found("gpipe", 2, 4) == {residuals}
    assert not found("gpipe", 2, 8)  # one for each microbatch
    assert found("weipipe-wzb1", 2, 4) == {residuals, taps}
    assert found("weipipe-wzb1", 4, 8) == {residuals}  # I has both: 4 times 4 of 4 chunks


def test_taps_are_what_products_read():
    """Neither weights nor what a norm's sum reads: of each product x and dy, no more than once."""

    def normed(weights, x, microbatch, layer):
        mean = jnp.mean(x**2, axis=-1, keepdims=True)
        inner = x / jnp.sqrt(1.0 + mean) * weights["scale"][None, None]
        return (
            x + (jax.nn.silu(inner @ weights["gate"]) * (inner @ weights["up"])) @ weights["down"]
        )

    def spec(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    model = LayeredModel(embed=embed, block=normed, head_loss=head_loss, layers=1)
    wide = 3 * WIDTH
    weights = {"gate": spec(WIDTH, wide), "up": spec(WIDTH, wide), "down": spec(wide, WIDTH)}
    weights["scale"] = spec(WIDTH)
    x = spec(SEQUENCES, TOKENS, WIDTH)
    program = block_program(model, weights, x, {}, "none")
    halves = split_backward(program.backward, weights, program.residuals, [x], {}, INDEX)
    kept = sorted(tap.shape for tap in halves.taps)
    assert kept == sorted(
        [(WIDTH,), *[(SEQUENCES, TOKENS, WIDTH)] * 2, *[(SEQUENCES, TOKENS, wide)] * 3]
    )

    random = np.random.default_rng(0)
    values = jax.tree.map(
        lambda s: jnp.asarray(random.normal(size=s.shape), s.dtype), (weights, program.residuals, x)
    )
    arguments = values[0], values[1], [values[2]], {}, jnp.int32(0)
    dw, dx = program.backward(*arguments)
    found_dx, taps = halves.input_gradient(*arguments)
    for got, wanted in zip([*found_dx, *halves.weight_gradient(taps)], [*dx, *dw], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_travel_in_a_dtype_of_their_own():
    """Half as wide on the way, added in float32; schedules that send none refuse it."""
    model, parameters = small_model(2)
    mesh = make_mesh(2, devices=jax.devices()[:2])
    step = lower(interleave(2, 4), model, mesh, travel_dtype=jnp.bfloat16)
    rest, batch = step.to_rest(parameters), random_batch(4)
    lowered = jax.jit(step.loss_and_gradients).lower(rest, batch)
    sent = re.findall(r"collective_permute.*?-> tensor<\S*x(\w+)>", lowered.as_text())
    assert set(sent) == {"f32", "bf16"}
    found = lowered.compile()(rest, batch)
    _, wanted = reference(2, 4)
    for got, leaf in zip(
        jax.tree.leaves(step.from_rest(found.gradients)), jax.tree.leaves(wanted), strict=True
    ):
        assert np.linalg.norm(got - leaf) < 1e-2 * np.linalg.norm(leaf)
    with pytest.raises(UsageError, match="no gradients go around a ring in schedule 1f1b"):
        lower(one_f_one_b(2, 4), model, mesh, travel_dtype=jnp.bfloat16)


def test_a_compiler_option_that_permutes_wrongly_is_not_used(monkeypatch):
    """By values: an option may be taken and bring something else."""
    mesh = make_mesh(2, devices=jax.devices()[:2])
    assert xla.permutes_rightly(mesh, {})
    assert xla.permutes_rightly(mesh, xla.PEER_COPIES)  # a CPU's compiler knows the name
    assert not xla.permutes_rightly(mesh, {"xla_gpu_no_such_option": True})
    monkeypatch.setattr(xla.lax, "ppermute", lambda value, *_: value)
    assert not xla.permutes_rightly(mesh, {})


def test_rest_order_round_trips():
    model, parameters = small_model(6)
    step = lower(interleave(4, 4), model, make_mesh(4, devices=jax.devices()[:4]))
    back = step.from_rest(step.to_rest(parameters))
    jax.tree.map(np.testing.assert_array_equal, back, parameters)


def test_weights_are_not_kept_with_residuals():
    """Without recompute only what depends on the data is kept, never a copy of the weights."""
    model, parameters = small_model(2)
    one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), parameters["blocks"])
    x = jax.ShapeDtypeStruct((SEQUENCES, TOKENS, WIDTH), jnp.float32)
    microbatch = jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape[1:], b.dtype), random_batch(1))
    program = block_program(model, one, x, microbatch, "none")
    assert program.residuals
    assert all(r.shape[0] == SEQUENCES for r in program.residuals)


def test_steady_ticks_are_one_loop():
    model, _ = small_model(2)
    step = lower(interleave(2, 32), model, make_mesh(2, devices=jax.devices()[:2]))
    assert isinstance(step, LoweredStep)
    longest = max(step.tables.segments, key=lambda s: s.repeats * len(s.period))
    assert longest.repeats * len(longest.period) >= 32 - 2 * 2 - 1
    assert len(longest.period) == 1


def test_ticks_that_fill_and_drain_share_bodies():
    """What is compiled grows with the bodies; all its 24 ticks differ but those in the middle."""
    tables = build_tables(interleave(4, 16), check(interleave(4, 16)))
    assert sum(len(segment.period) for segment in tables.segments) <= 8


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_what_every_device_does_is_not_masked(microbatches):
    """A branch would have XLA copy the residuals that it passes on."""
    for devices in (1, 2):
        plan = data_parallel(devices, devices * microbatches)
        tables = build_tables(plan, check(plan))
        tasks = [t for s in tables.segments for tick in s.period for t in tick.tasks]
        assert tasks
        assert all(task.everyone for task in tasks)


def test_many_microbatches_are_laid_out_soon():
    plan = interleave(4, 256)
    found, start = check(plan), time.monotonic()
    segments = build_tables(plan, found).segments
    assert time.monotonic() - start < 30
    few = interleave(4, 32)
    assert [len(s.period) for s in segments] == [
        len(s.period) for s in build_tables(few, check(few)).segments
    ]


def test_refuses_what_does_not_fit():
    model, parameters = small_model(4)
    mesh = make_mesh(4, devices=jax.devices()[:4])
    with pytest.raises(UsageError, match="has 4 devices but schedule weipipe-interleave has 2"):
        lower(interleave(2, 4), model, mesh)
    with pytest.raises(UsageError, match="recompute='all' is not a policy; use one of none"):
        lower(interleave(4, 4), model, mesh, recompute="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="layers=2 cannot fill chunks=4 .* use devices=2 or fewer"):
        lower(interleave(4, 4), small_model(2)[0], mesh)
    plain = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    with pytest.raises(UsageError, match=r"mesh axes are \('x',\)"):
        lower(interleave(4, 4), model, plain)
    step = lower(interleave(4, 4), model, mesh)
    with pytest.raises(UsageError, match="batch has 3 microbatches"):
        jax.eval_shape(step.loss_and_gradients, step.to_rest(parameters), random_batch(3))
    with pytest.raises(UsageError, match=r"expected \[4, ...\]"):
        step.to_rest(small_model(2)[1])
