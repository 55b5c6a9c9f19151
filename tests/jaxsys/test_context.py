"""One sequence on many devices: attention over the parts against attention over the whole, and
steps over a context axis against one device's."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxsys.axes import CONTEXT
from jaxsys.context import ContextSplit, Way, attend_over, blocks
from jaxsys.context.split import order_of
from jaxsys.errors import UsageError
from jaxsys.layered import Layer, LayeredModel, Parameters, reference_loss
from jaxsys.lowering import lower
from jaxsys.mesh import make_mesh
from jaxsys.model import BlockKind, Experts, initial_parameters, layered, preset
from jaxsys.schedule import attention_transfers
from jaxsys.strategies import for_layers
from studies.compiled import collective_counts

LENGTH, WIDTH = 48, 8
LLAMA = dataclasses.replace(preset("bench-tiny"), num_layers=2)
WINDOWED = dataclasses.replace(
    LLAMA,
    num_kv_heads=2,
    sinks=True,
    kinds=(BlockKind(name="near", window=9), BlockKind(name="far")),
    pattern=("near", "far"),
)
"""A layer with a window beside one without, and sinks in both."""


def scores_of_whole(q, k, v, sinks, segments, *, window=None, softcap=None):
    """Plain attention over all positions at once, with what it weighs by float32 softmax."""
    length, heads = q.shape[1:3]
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnk,bsnk->bnts", q, k) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    rows, columns = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    seen = columns <= rows
    if window is not None:
        seen &= columns > rows - window
    seen = seen[None, None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])[:, None]
    scores = jnp.where(seen, scores, -1e30)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(scores, axis=-1)[..., :length], v)


def over_devices(split, q, k, v, sinks, segments, **options):
    """The same through `attend_over`, with sequences in plain order outside."""
    mesh = Mesh(np.array(jax.devices()[: split.parts]), (CONTEXT,))
    cut, order = PartitionSpec(None, CONTEXT), np.array(order_of(split, q.shape[1]))

    def part(q, k, v, sinks, segments):
        return attend_over(q, k, v, split=split, sinks=sinks, segments=segments, **options)

    specs = (cut, cut, cut, PartitionSpec(), cut)
    run = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=cut, check_vma=False)
    q, k, v, segments = (x if x is None else x[:, order] for x in (q, k, v, segments))
    return run(q, k, v, sinks, segments)[:, np.argsort(order)]


def ring(parts: int, by: Way = "ring", exchange: int | None = None) -> ContextSplit:
    return ContextSplit(parts=parts, by=by, exchange=exchange)


@pytest.mark.parametrize(
    ("split", "key_heads", "with_sinks", "with_segments", "options"),
    [
        (ring(2), 2, True, False, {}),
        (ring(4), 4, True, False, {"window": 11}),
        (ring(4, "gather"), 8, False, True, {"softcap": 2.0}),
        (ring(4, "mixed", 2), 4, True, True, {"window": 7}),
        *(
            pytest.param(split, heads, sinks, segments, options, marks=pytest.mark.slow)
            for split in (ring(1), ring(3), ring(4), ring(4, "ulysses"), ring(8, "mixed", 4))
            for heads, sinks, segments, options in (
                (8, False, False, {}),
                (2, True, False, {"window": 11}),
                (4, True, True, {"softcap": 2.0, "window": 20}),
            )
            if not (split.parts == 3 and heads == 2 and split.exchanging > 1)
        ),
    ],
)
def test_parts_attend_as_the_whole_does(
    monkeypatch, split, key_heads, with_sinks, with_segments, options
):
    """Output and every gradient, with heads that share keys and values narrower than keys."""
    monkeypatch.setattr(blocks, "BLOCK", 5)  # no piece is a multiple of it
    random = np.random.default_rng(0)
    shapes = ((2, LENGTH, 8, WIDTH), (2, LENGTH, key_heads, WIDTH), (2, LENGTH, key_heads, 4))
    q, k, v = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    weights = random.normal(size=(2, LENGTH, 8, 4)).astype(np.float32)
    sinks = random.normal(size=8).astype(np.float32) if with_sinks else None
    segments = np.sort(random.integers(0, 5, (2, LENGTH)), axis=1) if with_segments else None

    def loss(attend, q, k, v, sinks):
        out = attend(q, k, v, sinks, segments, **options)
        return jnp.sum(out * weights), out

    arguments = (0, 1, 2, 3) if with_sinks else (0, 1, 2)
    found, wanted = (
        jax.jit(jax.grad(functools.partial(loss, attend), arguments, has_aux=True))(q, k, v, sinks)
        for attend in (functools.partial(over_devices, split), scores_of_whole)
    )
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(mine, theirs, atol=3e-6 * scale, rtol=0)


def test_queries_that_see_nothing_weigh_nothing():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, 6, 2, 4)), jnp.float32) for _ in range(3))
    behind = blocks.Seen(jnp.arange(6), jnp.arange(6) + 3)  # the first three see no key
    out, lse = blocks.forward(q, k, v, behind, blocks.Scores(scale=0.5))
    assert np.all(np.asarray(out)[:, :3] == 0) and np.all(np.isneginf(np.asarray(lse)[..., :3]))
    other = blocks.forward(q, k, v, blocks.causal(6), blocks.Scores(scale=0.5))
    merged = blocks.merge((out, lse), other)
    np.testing.assert_allclose(merged[0][:, :3], other[0][:, :3], rtol=1e-6)
    both = blocks.merge((out, lse), (out, lse))
    assert np.all(np.isfinite(both[0])) and np.all(np.asarray(both[0])[:, :3] == 0)
    grads = blocks.backward(q, k, v, out, lse, q, behind, blocks.Scores(scale=0.5))
    assert all(np.all(np.isfinite(g)) for g in grads)
    assert np.all(np.asarray(grads[0])[:, :3] == 0)


def batch_of(config, rows: int, length: int = 32):
    shape = (rows, 2, length + 1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:].copy()}
    batch["targets"][0, 0, :7] = -1  # the devices' counts of tokens differ
    return batch


def parameters_of(config):
    """With scores large enough that attention has something to choose."""
    parameters = initial_parameters(config)
    random = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(random), leaf.shape), parameters
    )


@functools.cache
def reference(config, rows: int):
    run = jax.value_and_grad(lambda p: reference_loss(layered(config), p, batch_of(config, rows)))
    return jax.device_get(jax.jit(run)(parameters_of(config)))


def step_of(config, name, ring_size, data, split, microbatches, recompute):
    lowered = lower(
        for_layers(name, devices=ring_size, microbatches=microbatches, layers=config.num_layers),
        layered(config),
        make_mesh(ring_size, data, context=split.parts),
        recompute=recompute,
        context=split,
    )
    rest, batch = lowered.to_rest(parameters_of(config)), batch_of(config, data * microbatches)
    step = jax.jit(lowered.loss_and_gradients).lower(rest, batch)
    program = step.compile(compiler_options=lowered.compiler_options)
    outcome = program(rest, batch)
    return program, outcome.loss, jax.device_get(lowered.from_rest(outcome.gradients))


def assert_alike(config, rows, loss, gradients):
    wanted_loss, wanted = reference(config, rows)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(wanted), jax.tree.leaves(gradients), strict=True
    ):
        scale = float(np.abs(leaf).max())
        np.testing.assert_allclose(other, leaf, atol=2e-5 * scale, rtol=0, err_msg=str(path))


@pytest.mark.parametrize(
    ("config", "name", "ring_size", "data", "split", "recompute"),
    [
        (WINDOWED, "zero-1", 1, 1, ring(2, "ulysses"), "around-attention"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (WINDOWED, "zero-1", 2, 1, ring(2, "ulysses"), "around-attention"),
                (LLAMA, "zero-3", 1, 1, ring(2), "block"),
                (LLAMA, "zero-1", 2, 2, ring(2), "selective"),
                (LLAMA, "zero-2", 2, 1, ring(4, "gather"), "block"),
                (LLAMA, "zero-3.5", 1, 1, ring(8, "mixed", 2), "none"),
                (LLAMA, "zero-4", 2, 1, ring(4), ("block", "around-attention")),
                (WINDOWED, "zero-3", 1, 2, ring(4), "block"),
                (LLAMA, "dp", 2, 1, ring(2), "block"),
                (LLAMA, "1f1b", 2, 1, ring(2, "gather"), "none"),
                (WINDOWED, "weipipe-interleave", 2, 2, ring(2, "ulysses"), "block"),
            )
        ),
    ],
)
def test_steps_over_a_context_axis_equal_one_devices(
    config, name, ring_size, data, split, recompute
):
    microbatches = 2 * ring_size
    _, loss, gradients = step_of(config, name, ring_size, data, split, microbatches, recompute)
    assert_alike(config, data * microbatches, loss, gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "by", "around"),
    [
        (dataclasses.replace(LLAMA, num_layers=1), "ring", {"tensor": 2}),
        (
            dataclasses.replace(
                LLAMA,
                num_layers=1,
                experts=Experts(count=4, active=2, intermediate_size=32),
                kinds=(BlockKind(experts=True),),
            ),
            "gather",
            {"expert": 2},
        ),
    ],
)
def test_sequences_are_shared_beside_features_and_experts(config, by, around):
    rows = around.get("expert", 1)
    lowered = lower(
        for_layers("zero-1", devices=1, microbatches=1, layers=1),
        layered(config),
        make_mesh(1, context=2, **around),
        context=ring(2, by),
    )
    rest = lowered.to_rest(parameters_of(config))
    run = jax.jit(lowered.loss_and_gradients, compiler_options=lowered.compiler_options)
    outcome = run(rest, batch_of(config, rows))
    gradients = jax.device_get(lowered.from_rest(outcome.gradients))
    assert_alike(config, rows, outcome.loss, gradients)


def counts(split: ContextSplit) -> dict[str, int]:
    """Collectives of a step of one layer, which is right."""
    config = dataclasses.replace(LLAMA, num_layers=1)
    program, *found = step_of(config, "zero-1", 1, 1, split, 1, "none")
    assert_alike(config, 1, *found)
    text = program.as_text()
    assert text is not None
    return collective_counts(text)


def test_compiled_programs_send_what_each_way_says():
    """Of one layer's attention: a ring of P sends keys and values P - 1 hops forward, as often
    again backward, and their gradients P - 1 hops; a gather takes two and sums two; an exchange
    turns queries, keys, values and outputs, and each again backward. The schedule language says
    the same."""
    one, exchanged = counts(ring(2)), counts(ring(2, "ulysses"))
    assert one["collective-permute"] == 3 * 2 * 1 == sent_by(ring(2))["hop"]
    assert exchanged["all-to-all"] == 8 == sent_by(ring(2, "ulysses"))["exchange"]
    assert "collective-permute" not in exchanged


def sent_by(split: ContextSplit) -> Counter:
    """Collectives of arrays that the schedule language says of one attention, both passes."""
    arrays = {"keys and values": 2, "gradients of keys and values": 2, "heads for tokens": 3}
    found: Counter = Counter()
    for backward in (False, True):
        for one in attention_transfers(split.by, split.parts, split.exchange, backward=backward):
            found[str(one.collective)] += arrays.get(str(one.carries), 1)
    return found


@pytest.mark.slow
def test_compiled_programs_of_more_devices_and_gathers_send_what_they_say():
    one, three = counts(ring(2)), counts(ring(4))
    assert three["collective-permute"] == 3 * 2 * 3 == sent_by(ring(4))["hop"]
    gathered, says = counts(ring(2, "gather")), sent_by(ring(2, "gather"))
    assert "collective-permute" not in gathered
    assert gathered["reduce-scatter"] == one["reduce-scatter"] + says["sum"]
    assert gathered["all-gather"] == one["all-gather"] + says["gather"]
    both = ContextSplit(parts=4, by="mixed", exchange=2)
    found, says = counts(both), sent_by(both)
    assert found["collective-permute"] == says["hop"]
    assert found["all-to-all"] == says["exchange"]


def test_what_a_model_draws_for_a_sequence_is_the_same_however_it_is_cut():
    """A model with dropout and no attention, which draws for whole sequences and takes its part."""
    length, width = 16, 4

    def model(split: ContextSplit | None) -> LayeredModel:
        def block(weights, x, microbatch, layer: Layer):
            key = jax.random.fold_in(microbatch["key"], layer.index)
            kept = jax.random.bernoulli(key, 0.5, (x.shape[0], length, width))
            kept = kept if split is None else split.pieces(kept, 1)
            return x + jnp.tanh(x @ weights["w"]) * kept

        return LayeredModel(
            embed=lambda edge, microbatch: microbatch["x"] @ edge["in"],
            block=block,
            head_loss=lambda edge, x, microbatch: (jnp.sum(jnp.square(x)), jnp.float32(x.size)),
            layers=2,
            sequences={"x": 1},
            across=model,
        )

    random = np.random.default_rng(0)
    parameters: Parameters = {
        "edge": {"in": random.normal(size=(width, width)).astype(np.float32)},
        "blocks": {"w": random.normal(size=(2, width, width)).astype(np.float32)},
    }
    batch = {
        "x": random.normal(size=(2, 3, length, width)).astype(np.float32),
        "key": jax.random.key_data(jax.random.split(jax.random.key(0), 2)),
    }
    schedule = for_layers("zero-1", devices=1, microbatches=2, layers=2)
    lowered = lower(schedule, model(None), make_mesh(1, context=4))
    found = jax.jit(lowered.loss_and_gradients)(lowered.to_rest(parameters), batch)
    wanted = reference_loss(model(None), parameters, batch)
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: ring(4).check_length(20), ("cut into 2 x context=4 pieces; use sequence_length=16 "
         "or 24, or context=1, 2, 5 or 10")),
        (lambda: ring(4).check_length(0), "use sequence_length=8"),
        (lambda: ring(0), "context=0 must be at least 1"),
        (lambda: ring(2, "rings"), "not known (did you mean 'ring'?); use one of ring, "),  # pyright: ignore[reportArgumentType]
        (lambda: ring(4, "mixed", 3), ("context_exchange=3, which must divide 4 and leave a ring; "
         "use 2")),
        (lambda: ring(3, "mixed", 3), "use ring or ulysses"),
        (lambda: ring(4, "ring", 2), "context_exchange=2 is of context_by='mixed'"),
        (lambda: ring(8, "ulysses").check_heads(4, 4), "query heads (4) that 8 divides"),
        (lambda: ring(4, "ulysses").check_heads(12, 3), ("1, 3, 6 or 12 device(s) would do, or "
         "context_by='ring'")),
        (lambda: lower(
            for_layers("weipipe-interleave", devices=2, microbatches=4, layers=2), layered(LLAMA),
            make_mesh(2, context=2)), "use context_by='gather' or 'ulysses', or a schedule whose"),
        (lambda: lower(
            for_layers("zero-1", devices=1, microbatches=1, layers=2), layered(LLAMA),
            make_mesh(1, context=2), context=ring(4)), "context=4, but the mesh has 2"),
        (lambda: lower(
            for_layers("zero-1", devices=1, microbatches=1, layers=2),
            dataclasses.replace(layered(LLAMA), across=None), make_mesh(1, context=2)),
         "give LayeredModel sequences= and across="),
        (lambda: layered(dataclasses.replace(
            LLAMA, experts=Experts(count=4, active=2, intermediate_size=8, balance=0.1),
            kinds=(BlockKind(experts=True),))).over(ring(2)), "use balance=0, or context=1"),
        (lambda: jax.eval_shape(lower(
            for_layers("zero-1", devices=1, microbatches=1, layers=2), layered(LLAMA),
            make_mesh(1, context=2)).loss_and_gradients, initial_parameters(LLAMA),
            batch_of(LLAMA, 1, length=30)), "sequence_length=30 cannot be cut into 2 x context=2"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_with_what_can(attempt, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        attempt()
