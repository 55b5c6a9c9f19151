"""The ZeRO family's compiled steps: what they compute, send and hold."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, Parameters, reference_loss
from jaxsys.lowering.alike import Alike, Held
from jaxsys.lowering.sharded import lower_sharded
from jaxsys.lowering.xla import CPU_COMPILER_OPTIONS
from jaxsys.mesh import make_mesh
from jaxsys.strategies import zero
from jaxsys.strategies.data_parallel import data_parallel
from studies.compiled import collective_counts, parse

DEVICES, TURNS, LAYERS, WIDTH = 4, 2, 3, 16
LOOPED = 5
"""Turns of which some are alike, and so become a loop."""
EDGES = 2  # leaves of embedding and head, each gathered once
STAGES = {
    "zero-1": zero.zero_1,
    "zero-2": zero.zero_2,
    "zero-3": zero.zero_3,
    "zero-3.5": zero.zero_3_5,
    "zero-4": zero.zero_4,
}


def small_model(layers: int = LAYERS) -> LayeredModel:
    """A residual MLP with a nonlinearity that needs its input, and a leaf that nothing divides."""

    def block(weights, x, microbatch, layer):
        h = jnp.tanh(x @ weights["up"] + weights["shift"][None, :].sum(-1, keepdims=True))
        return x + h @ weights["down"]

    def head_loss(edge, x, microbatch):
        error = (x @ edge["head"]).astype(jnp.float32) - microbatch["targets"]
        return jnp.sum(error**2), jnp.float32(error.size)

    return LayeredModel(
        embed=lambda edge, microbatch: (
            microbatch["inputs"].astype(edge["embed"].dtype) @ edge["embed"]
        ),
        block=block,
        head_loss=head_loss,
        layers=layers,
    )


def small_parameters(layers: int = LAYERS, width: int = WIDTH) -> Parameters:
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)

    return Parameters(
        edge={"embed": normal(8, width), "head": normal(width, 8)},
        blocks={
            "up": normal(layers, width, 2 * width),
            "down": normal(layers, 2 * width, width),
            "shift": normal(layers, 3),
        },
    )


def small_batch(count: int, rows: int = 2):
    a, b = jax.random.split(jax.random.key(1))
    return {
        "inputs": jax.random.normal(a, (count, rows, 8)),
        "targets": jax.random.normal(b, (count, rows, 8)),
    }


def compiled_step(step, parameters, batch):
    lowered = jax.jit(step.loss_and_gradients).lower(parameters, batch)
    options: Any = CPU_COMPILER_OPTIONS
    return lowered.compile(compiler_options=options)


def text_of(name: str, turns: int = TURNS) -> str:
    text = stage_step(name, turns)[1].as_text()
    assert text is not None
    return text


@functools.cache
def stage_step(name: str, turns: int = TURNS):
    """(step, its compiled program, loss, gradients) on four devices."""
    schedule = STAGES[name](DEVICES, DEVICES * turns, chunks=LAYERS)
    step = lower_sharded(schedule, small_model(), make_mesh(DEVICES), recompute="none")
    parameters, batch = step.to_rest(small_parameters()), small_batch(DEVICES * turns)
    program = compiled_step(step, parameters, batch)
    return step, program, *program(parameters, batch)[:2]


def assert_gradients(found, wanted) -> None:
    for path, leaf in jax.tree.leaves_with_path(wanted):
        other = functools.reduce(lambda tree, key: tree[key.key], path, found)
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(other, leaf, atol=1e-5 * scale, rtol=0, err_msg=str(path))


def reference(batch, layers: int = LAYERS):
    model = small_model(layers)
    run = jax.value_and_grad(lambda p: reference_loss(model, p, batch))
    return jax.jit(run)(small_parameters(layers))


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        *((name, TURNS) for name in STAGES),
        pytest.param("zero-1", LOOPED, marks=pytest.mark.slow),
        *((name, LOOPED) for name in ("zero-3", "zero-4")),
    ],
)
def test_loss_and_gradients_equal_the_reference(name, turns):
    _, _, loss, gradients = stage_step(name, turns)
    wanted_loss, wanted = reference(small_batch(DEVICES * turns))
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert_gradients(gradients, wanted)


@pytest.mark.parametrize(
    "recompute",
    [
        "none",
        pytest.param("selective", marks=pytest.mark.slow),
        pytest.param("block", marks=pytest.mark.slow),
    ],
)
def test_uneven_chunks_replicas_and_recompute(recompute):
    """Two replicas of two devices; three chunks of five layers; a mixture of lifetimes."""
    layers = 5
    schedule = zero.trajectory(
        2, 4, chunks=3, keep_within=[0], keep_between=[0, 1], defer=[2], lookahead=2
    )
    step = lower_sharded(schedule, small_model(layers), make_mesh(2, 2), recompute=recompute)
    parameters, batch = step.to_rest(small_parameters(layers)), small_batch(8)
    loss, gradients, *_ = jax.jit(step.loss_and_gradients)(parameters, batch)
    wanted_loss, wanted = reference(batch, layers)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert_gradients(step.from_rest(gradients), wanted)


@pytest.mark.parametrize("turns", [TURNS, LOOPED])
def test_compiled_programs_gather_and_reduce_as_often_as_the_schedule(turns):
    """2 M L gathers for ZeRO-3 and (M + 1) L for 3.5 and 4, none merged, none hoisted."""
    gathers = {
        "zero-1": LAYERS,
        "zero-2": LAYERS,
        "zero-3": 2 * turns * LAYERS,
        "zero-3.5": (turns + 1) * LAYERS,
        "zero-4": (turns + 1) * LAYERS,
    }
    for name, count in gathers.items():
        if turns == LOOPED and name in ("zero-1", "zero-2"):
            continue  # whose gathers are all before the loop
        text = text_of(name, turns)
        assert (" while(" in text) == (turns == LOOPED)
        counts = collective_counts(text)
        assert counts["all-gather"] == count + EDGES, name
        reductions = LAYERS if name == "zero-1" else turns * LAYERS
        assert counts["reduce-scatter"] == reductions + EDGES, name


def test_deferred_reductions_stay_in_the_loop_that_defers_them():
    """In the loop's body they come, chunk by chunk, between the forward pass's gathers or uses."""
    loops = [
        [i for i in found.collectives() if "reduce-scatter" in i.operation]
        for name, found in parse(text_of("zero-4", LOOPED)).items()
        if not found.entry
    ]
    (inside,) = [found for found in loops if found]
    slots = [re.search(r"reduce_(\d+)_in_tick_(\d+)/", i.text) for i in inside]
    pairs = sorted((int(s.group(1)), int(s.group(2))) for s in slots if s is not None)
    # The loop begins with the first B that sums of the microbatch before have come home for.
    assert pairs == [(c, zero.forward_tick(LAYERS, 2, c)) for c in range(LAYERS)]


def test_deferred_reductions_are_issued_in_the_forward_pass():
    """In the compiled order a deferred sum comes after the next microbatch has been embedded."""
    text = text_of("zero-4")
    chunk = LAYERS - 1
    start = zero.forward_tick(LAYERS, 1, chunk)
    lines = [line for line in text.splitlines() if f"reduce_{chunk}_in_tick_{start}/" in line]
    assert any(" reduce-scatter" in line for line in lines)
    # And ZeRO-3.5 has it right after the backward pass instead.
    early = zero.backward_tick(LAYERS, 0, chunk) + 1
    assert f"reduce_{chunk}_in_tick_{early}/" in text_of("zero-3.5")
    assert f"reduce_{chunk}_in_tick_{early}/" not in text


def train(name: str, turns: int, *, stale: bool = False, steps: int = 5):
    """Parameters after some steps of Adam, clipped by the global norm."""
    step, program, *_ = stage_step(name, turns)
    parameters: Any = step.to_rest(small_parameters())
    batch = small_batch(DEVICES * turns)
    optimizer = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(1e-2))
    state = optimizer.init(parameters)

    @jax.jit
    def update(gradients, state, parameters: Any):
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state

    read = parameters
    for _ in range(steps):
        gradients = program(read, batch).gradients
        if stale:  # the copy that was kept is from before this update
            read = parameters
        parameters, state = update(gradients, state, parameters)
        if not stale:
            read = parameters
    return parameters


@pytest.mark.parametrize("turns", [pytest.param(TURNS, marks=pytest.mark.slow), LOOPED])
def test_five_clipped_adam_steps_are_bit_equal(turns):
    expected = train("zero-3", turns)
    for name in ("zero-3.5", "zero-4"):
        found = train(name, turns)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
    stale = train("zero-3", turns, stale=True)
    assert not np.array_equal(stale["blocks"]["up"], expected["blocks"]["up"])


def test_one_microbatch_falls_back_to_zero_3():
    plain = collective_counts(text_of("zero-3", 1))
    for name in ("zero-3.5", "zero-4"):
        _, _, loss, gradients = stage_step(name, 1)
        assert collective_counts(text_of(name, 1)) == plain
        assert plain["all-gather"] == 2 * LAYERS + EDGES
        wanted = stage_step("zero-3", 1)
        np.testing.assert_array_equal(loss, wanted[2])
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted[3]), strict=True):
            np.testing.assert_array_equal(a, b)


@functools.cache
def temporary_bytes(stage, *, rows: int, turns: int) -> int:
    layers, width = 4, 256
    schedule = stage(2, 2 * turns, chunks=layers)
    step = lower_sharded(schedule, small_model(layers), make_mesh(2), recompute="none", unroll=True)
    parameters = step.to_rest(small_parameters(layers, width))
    program = compiled_step(step, parameters, small_batch(2 * turns, rows))
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_every_mixture_of_lifetimes_makes_a_loop():
    """What is carried has one structure, whatever each chunk's weights and sums do."""
    random, mesh = np.random.default_rng(1), make_mesh(2, devices=jax.devices()[:2])
    model, parameters = small_model(), small_parameters()
    for _ in range(6):
        within, between, late, once = (
            [c for c in range(LAYERS) if random.random() < 0.5] for _ in range(4)
        )
        turns = int(random.integers(3, 7))
        schedule = zero.trajectory(
            2,
            2 * turns,
            chunks=LAYERS,
            keep_within=within,
            keep_between=between,
            defer=set(late) - set(once),
            accumulate=once,
            lookahead=int(random.integers(1, 5)),
        )
        step = lower_sharded(schedule, model, mesh, recompute="none")
        rest = step.to_rest(parameters)
        gradients = jax.eval_shape(step.loss_and_gradients, rest, small_batch(2 * turns)).gradients
        assert jax.tree.structure(gradients) == jax.tree.structure(rest)


@pytest.mark.parametrize("turns", [2, pytest.param(LOOPED, marks=pytest.mark.slow)])
def test_keeping_weights_makes_no_new_peak_where_the_condition_holds(turns):
    """A >= W: residuals of 3 x 256 floats a row against weights of 2 x 2 x 256 x 256."""
    rows = 1024  # A = 1024 * 3 * 256 * 4 bytes = 3 MiB, W = 1 MiB
    plain = temporary_bytes(zero.zero_3, rows=rows, turns=turns)
    assert temporary_bytes(zero.zero_3_5, rows=rows, turns=turns) <= plain


def test_a_loop_over_turns_holds_hardly_more_than_turns_written_out():
    """But for the sums that a loop must carry in and out, 1 / 2 a layer's weights on 2 devices."""
    rows, layers, chunk = 1024, 4, 2**20
    short, looped = (temporary_bytes(zero.zero_3, rows=rows, turns=t) for t in (2, LOOPED))
    assert looped <= short + layers * chunk / 2


@pytest.mark.slow
def test_kept_weights_show_where_there_are_no_residuals_to_hide_behind():
    plain, kept = (temporary_bytes(s, rows=8, turns=2) for s in (zero.zero_3, zero.zero_3_5))
    assert kept - plain > 1.2 * 2**20


def test_refusals():
    mesh = make_mesh(DEVICES)
    with pytest.raises(UsageError, match="rests replicated"):
        lower_sharded(data_parallel(4, 4), small_model(), mesh)
    with pytest.raises(UsageError, match="has 4 devices but schedule zero-3 has 2"):
        lower_sharded(zero.zero_3(2, 2, chunks=2), small_model(), mesh)
    with pytest.raises(UsageError, match="at most 3 chunks"):
        lower_sharded(zero.zero_3(4, 4, chunks=9), small_model(), mesh)
    with pytest.raises(UsageError, match="recompute='chunk'"):
        lower_sharded(zero.zero_3(4, 4, chunks=2), small_model(), mesh, recompute="chunk")
    step = lower_sharded(zero.zero_3(4, 8, chunks=2), small_model(), mesh)
    with pytest.raises(UsageError, match="8 on each of 1 data replicas"):
        step.loss_and_gradients(step.to_rest(small_parameters()), small_batch(4))


# On CPU devices chunks that are alike are loops.

RING = 2


def step_of(schedule, layers: int, *, unroll: bool = False):
    mesh = make_mesh(RING, devices=jax.devices()[:RING])
    return lower_sharded(schedule, small_model(layers), mesh, recompute="none", unroll=unroll)


@pytest.mark.parametrize("name", STAGES)
def test_programs_do_not_grow_with_the_layers(name):
    def lines(layers: int) -> int:
        step = step_of(STAGES[name](RING, 4 * RING, chunks=layers), layers)
        arguments = jax.eval_shape(lambda: (small_parameters(layers), small_batch(4 * RING)))
        return len(jax.jit(step.loss_and_gradients).lower(*arguments).as_text().splitlines())

    assert lines(40) <= 1.02 * lines(10)


@pytest.mark.slow
def test_what_is_optimised_is_a_fraction_of_what_is_written_out():
    """The time to compile goes with its lines."""

    def lines(*, unroll: bool) -> int:
        step = step_of(zero.zero_3(RING, 4, chunks=16), 16, unroll=unroll)
        program = compiled_step(step, step.to_rest(small_parameters(16)), small_batch(4))
        return len((program.as_text() or "").splitlines())

    looped, written_out = lines(unroll=False), lines(unroll=True)
    assert 0 < looped <= 0.5 * written_out


def assert_like_the_reference(step, layers: int, batch, model: LayeredModel) -> None:
    parameters = step.to_rest(small_parameters(layers))
    loss, gradients, *_ = compiled_step(step, parameters, batch)(parameters, batch)
    run = jax.value_and_grad(lambda p: reference_loss(model, p, batch))
    wanted_loss, wanted = jax.jit(run)(small_parameters(layers))
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert_gradients(gradients, wanted)


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("zero-4", 5),
        *(pytest.param(name, 4, marks=pytest.mark.slow) for name in list(STAGES)[:-1]),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in STAGES),
    ],
)
def test_looped_chunks_equal_the_reference(name, turns):
    layers = 6
    step = step_of(STAGES[name](RING, RING * turns, chunks=layers), layers)
    assert_like_the_reference(step, layers, small_batch(RING * turns), small_model(layers))


@pytest.mark.parametrize(
    "sets",
    [
        # Two groups: the lower one keeps weights where its residuals were, the upper one does not.
        {"keep_between": range(5), "defer": range(5), "lookahead": 1},
        pytest.param(
            {"keep_within": range(4), "accumulate": range(3, 9), "lookahead": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param({"keep_between": range(2, 9), "lookahead": 3}, marks=pytest.mark.slow),
    ],
)
def test_looped_chunks_of_mixed_lifetimes(sets):
    """Of 9 chunks of 10 layers the first is longer."""
    layers, turns = 10, 3
    schedule = zero.trajectory(RING, RING * turns, chunks=9, **sets)
    step = step_of(schedule, layers)
    assert_like_the_reference(step, layers, small_batch(RING * turns), small_model(layers))


def test_looped_layers_know_their_numbers():
    """A block that weighs what it adds by its index."""
    layers = 6
    plain = small_model(layers)
    (run,) = plain.kinds.values()

    def block(weights, x, microbatch, layer):
        added = run(weights, x, microbatch, layer) - x
        return x + added * (1 + layer.index).astype(x.dtype) / layers

    model = LayeredModel(embed=plain.embed, block=block, head_loss=plain.head_loss, layers=layers)
    mesh = make_mesh(RING, devices=jax.devices()[:RING])
    step = lower_sharded(zero.zero_3(RING, 4, chunks=layers), model, mesh)
    assert_like_the_reference(step, layers, small_batch(4), model)


def test_chunks_that_keep_their_weights_and_sums_are_told_apart():
    alike = Alike(zero.zero_4(2, 6, chunks=6, keep=[0, 1, 2, 3]), ["same"] * 6, looped=True)
    assert [(group.chunks, group.weights, group.sums) for group in alike.groups] == [
        (range(4), Held.BETWEEN, True),
        (range(4, 5), Held.PASSING, True),
        (range(5, 6), Held.PASSING, True),
    ]
    written_out = Alike(zero.zero_1(2, 4, chunks=6), ["same"] * 6, looped=False)
    assert [group.chunks for group in written_out.groups] == [range(c, c + 1) for c in range(6)]
    assert not any(group.shelved for group in written_out.groups)


@pytest.mark.slow
def test_loops_hold_hardly_more_than_what_is_written_out():
    """A chunk's residuals and weights are copied out of their rows, and weights into them."""
    rows, layers, width = 256, 8, 128
    chunk = (3 * rows * width + 2 * 2 * width * width) * 4

    def held(name: str, *, unroll: bool) -> int:
        step = step_of(STAGES[name](RING, 2 * RING, chunks=layers), layers, unroll=unroll)
        parameters = step.to_rest(small_parameters(layers, width))
        program = compiled_step(step, parameters, small_batch(2 * RING, rows))
        analysis = program.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    for name in ("zero-3", "zero-3.5"):
        assert held(name, unroll=False) <= held(name, unroll=True) + 2 * chunk
