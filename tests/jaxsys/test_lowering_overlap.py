"""What the compiled step really sends, and that sending waits for no compute of its tick."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxsys.layered import LayeredModel, Parameters
from jaxsys.lowering import LoweredStep, lower
from jaxsys.mesh import make_mesh
from jaxsys.model import DecoderConfig, abstract_parameters, layered
from jaxsys.schedule import Data
from jaxsys.strategies import build
from studies.compiled import executions, parse, spans

WIDTH, TOKENS, RING, MICROBATCHES = 8, 4, 4, 16


def prepared(name: str, *, chunk_layers: int = 2, **options):
    layers = chunk_layers * RING
    model = LayeredModel(
        embed=lambda edge, microbatch: microbatch @ edge,
        block=lambda w, x, microbatch, layer: x + jnp.tanh(x @ w),
        head_loss=lambda edge, x, microbatch: (jnp.sum(x * x), jnp.float32(x.size)),
        layers=layers,
    )
    parameters = Parameters(edge=jnp.eye(WIDTH), blocks=jnp.ones((layers, WIDTH, WIDTH)) / WIDTH)
    mesh = make_mesh(RING, devices=jax.devices()[:RING])
    schedule = build(name, devices=RING, microbatches=MICROBATCHES)
    step = lower(schedule, model, mesh, **options)
    batch = jnp.ones((MICROBATCHES, TOKENS, WIDTH))
    return step, step.to_rest(parameters), batch


@pytest.fixture(scope="module")
def weipipe():
    step, rest, batch = prepared("weipipe-interleave")
    return parse(compiled_text(jax.jit(step.loss_and_gradients), rest, batch))


def compiled_text(run, *arguments) -> str:
    text = run.lower(*arguments).compile().as_text()
    assert text is not None
    return text


def steady_body(computations):
    """The loop that runs most often among those with permutes."""
    counts = executions(computations)
    bodies = [c for c in computations.values() if any(c.collectives())]
    return max(bodies, key=lambda c: counts.get(c.name, 0)), counts


def test_steady_tick_sends_three_streams_of_one_chunk_each(weipipe):
    body, counts = steady_body(weipipe)
    # Every worker has both kinds of task in M - 2 P + 1 ticks; in the first and the last of them
    # one stream has not filled the ring yet, or no longer does.
    assert counts[body.name] == MICROBATCHES - 2 * RING - 1
    chunk_bytes = 2 * WIDTH * WIDTH * 4
    sent = [i for i in body.collectives()]
    assert {i.operation.removesuffix("-start") for i in sent} == {"collective-permute"}
    assert sum(i.bytes for i in sent) == 3 * chunk_bytes


def test_whole_step_sends_what_its_moves_say(weipipe):
    """One permute a tick and stream, from the first hop to the last, and none twice."""
    schedule = build("weipipe-interleave", devices=RING, microbatches=MICROBATCHES)
    counts = executions(weipipe)
    chunk_bytes = 2 * WIDTH * WIDTH * 4
    sent = sum(
        counts.get(c.name, 0) * i.bytes
        for c in weipipe.values()
        for i in c.collectives()
        if i.operation.startswith("collective-permute")
    )
    streams = {
        (move.start, move.block.data, move.block.lane)
        for move in schedule.moves
        if move.kind == "permute"
    }
    assert sent == len(streams) * chunk_bytes


def test_permutes_wait_for_no_compute_of_their_tick(weipipe):
    body, _ = steady_body(weipipe)
    for instruction in body.collectives():
        assert body.waits_for(instruction) == set(), instruction.text


def test_compute_of_a_tick_waits_for_no_permute_of_it(weipipe):
    """Only what takes an arrival in at the end of the tick may depend on one."""
    body, _ = steady_body(weipipe)
    working = [i for i in body.instructions if i.operation in ("while", "dot", "conditional")]
    assert working
    for instruction in working:
        assert "collective-permute" not in body.waits_for(instruction), instruction.text


def test_gradient_stream_takes_its_own_dtype():
    """Read before XLA's CPU backend widens bfloat16."""
    step, rest, batch = prepared("weipipe-interleave", gradient_dtype=jnp.bfloat16)
    text = jax.jit(step.loss_and_gradients).lower(rest, batch).as_text()
    sent = re.findall(r"collective_permute.*-> tensor<[0-9x]*(f32|bf16)>", text)
    assert isinstance(step, LoweredStep)
    segments = step.tables.segments
    groups = [group for segment in segments for tick in segment.period for group in tick.groups]
    streams = [g.source[0] for g in groups if g.kind == "permute"]
    assert sent.count("bf16") == streams.count(Data.GRADIENT) > 0
    assert sent.count("f32") == streams.count(Data.WEIGHT) > 0


@pytest.mark.parametrize("chunk_layers", [1, 2])
@pytest.mark.parametrize("name", ["weipipe-interleave", "weipipe-wzb1", "1f1b-overlap"])
def test_buffers_are_written_in_place(name, chunk_layers):
    """Where a tick reads one slot and writes another, XLA must see that the read comes first.

    A chunk of one layer is no loop by then, and ticks that only some devices work in are branches.
    """
    step, rest, batch = prepared(name, chunk_layers=chunk_layers, recompute="none")
    run = jax.jit(step.loss_and_gradients, compiler_options=step.compiler_options)
    computations = parse(compiled_text(run, rest, batch))
    counts = executions(computations)
    assert isinstance(step, LoweredStep)
    slots = step.tables.slots
    kept = [slots[key] for key in ((Data.RESIDUAL, ""), (Data.TAP, "")) if key in slots]
    buffers = re.compile(
        "|".join(rf"f32\[{count},{chunk_layers},{TOKENS},{WIDTH}\]" for count in kept)
    )
    of_buffers = [
        instruction
        for computation in computations.values()
        if counts.get(computation.name, 0) > 1  # what runs once may put zeros into their places
        for instruction in computation.instructions
        if buffers.match(instruction.shape)
    ]
    assert any(instruction.operation == "dynamic-update-slice" for instruction in of_buffers)
    assert not [i.text for i in of_buffers if i.operation == "copy"]


@pytest.mark.gpu
def test_gpu_schedule_holds_all_streams_open_over_the_compute():
    """Compiled ahead for two GPUs, of which one need be here: XLA's schedule, not a promise."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("two", "cuda", topology="1x1x2").devices
    mesh = make_mesh(2, devices=list(devices))
    config = DecoderConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_layers=8,
        num_heads=4,
        num_kv_heads=4,
        head_dim=128,
        max_positions=4096,
    )
    schedule = build("weipipe-interleave", devices=2, microbatches=16)
    step = lower(
        schedule,
        layered(config, implementation="cudnn"),
        mesh,
        compute_dtype=jnp.bfloat16,
        recompute="selective",
    )
    shapes = abstract_parameters(config)
    rest = jax.tree.map(_placed, shapes, step.rest_shardings(shapes))
    tokens = jax.ShapeDtypeStruct((16, 1, 2048), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens}
    batch = jax.tree.map(_placed, batch, step.batch_shardings(batch))
    run = jax.jit(step.loss_and_gradients, compiler_options=step.compiler_options)
    body, _ = steady_body(parse(compiled_text(run, rest, batch)))
    flights = spans(body)
    assert len(flights) == 3
    for index, instruction in enumerate(body.instructions):
        if instruction.operation in ("while", "conditional"):
            assert all(start < index < done for start, done in flights.values())


def _placed(shape, sharding):
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
