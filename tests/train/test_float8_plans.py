"""What travels in float8 is planned so: fewer bytes on their way, a wide copy where it is read."""

import jax
import jax.numpy as jnp
import pytest

from jaxsys.hardware import device, link
from jaxsys.lowering.memory import tree_bytes
from jaxsys.model import DecoderConfig, abstract_parameters, layered
from jaxsys.model.float8_products import Float8
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision, schedule_costs
from jaxsys.planner.named import compare
from jaxsys.planner.workload import decoder_workload
from jaxsys.schedule import Data, MoveKind, simulate
from jaxsys.strategies import for_layers
from jaxsys.train.auto import sent_bytes_each
from jaxsys.train.memory import StepShape, step_bytes

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=64, intermediate_size=192, num_layers=8,
    num_heads=4, num_kv_heads=2, head_dim=16,
)  # fmt: skip
MODEL = layered(CONFIG, float8=Float8(transfers=True))
WIDE, SENT = Precision(), Precision(sent_weight_bytes=1.0)


def test_a_parameter_on_its_way_takes_a_byte_and_a_little():
    each = sent_bytes_each(MODEL, abstract_parameters(CONFIG), jnp.bfloat16)
    attention, feed, norms = 64 * (64 + 32 + 32 + 64), 3 * 64 * 192, 2 * 64
    assert each == (attention + feed + 7 * 4 + 2 * norms) / (attention + feed + norms)
    assert sent_bytes_each(layered(CONFIG), abstract_parameters(CONFIG), jnp.bfloat16) is None


@pytest.mark.parametrize("name", ["zero-3", "weipipe-keep", "weipipe-interleave"])
def test_half_of_what_weights_send_is_saved(name):
    workload = decoder_workload("small", CONFIG, sequence_length=64, microbatch_size=1)
    schedule = for_layers(name, devices=4, microbatches=8, layers=8)
    between = link("ib-400")
    wide, sent = (
        schedule_costs(
            workload, device("h100"), between.link, schedule=schedule, precision=precision,
            recompute="none",
        )
        for precision in (WIDE, SENT)
    )  # fmt: skip
    simulated = [simulate(schedule, costs, between.link) for costs in (wide, sent)]
    collective = {MoveKind.ALL_GATHER: 3 / 4, MoveKind.PERMUTE: 1}
    saved = sum(
        collective[move.kind] * (wide.block_bytes(move.block) / 2)
        for move in schedule.moves
        if move.block.data is Data.WEIGHT and move.kind is not MoveKind.COPY
        and (move.kind is MoveKind.ALL_GATHER or move.source == 0)
    )  # fmt: skip
    assert saved > 0
    before, after = (each.sent_bytes[0] for each in simulated)
    assert before - after == pytest.approx(saved)
    assert simulated[1].step_s < simulated[0].step_s


def test_the_table_of_strategies_knows_it():
    workload = decoder_workload("small", CONFIG, sequence_length=64, microbatch_size=1)
    cluster = Cluster(device=device("h100"), devices=4, link=link("ethernet-10g"))
    rows = [
        {row.strategy: row for row in compare(workload, cluster, microbatches=8, precision=p).rows}
        for p in (WIDE, SENT)
    ]
    wide, sent = rows
    for name in ("zero-3", "weipipe-keep"):
        assert sent[name].step_s < wide[name].step_s
    for name in ("dp", "1f1b"):
        assert sent[name].step_s == wide[name].step_s


def predicted(model, name, **around):
    shapes = abstract_parameters(CONFIG)
    return step_bytes(
        StepShape(
            schedule=for_layers(name, devices=4, microbatches=4, layers=8),
            model=model,
            parameters=shapes,
            state_bytes=3 * tree_bytes(shapes),
            microbatch={
                name: jax.ShapeDtypeStruct((1, 16), jnp.int32) for name in ("inputs", "targets")
            },
            compute_dtype=jnp.bfloat16,
            gradient_dtype=jnp.float32,
            recompute="block",
            sizes=around,
        )
    )


def test_buffers_of_bytes_and_a_copy_that_is_read():
    plain = layered(CONFIG, float8=Float8())
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192
    # Of a chunk of two layers: one wide copy more, and each of the ring's in half.
    few, many = (
        predicted(plain, name) - predicted(MODEL, name)
        for name in ("weipipe-interleave", "weipipe-keep")
    )
    assert many > few and many > 2 * layer
    # Gathers land wide: nothing but what makes a scale differs.
    assert predicted(plain, "zero-3") == pytest.approx(predicted(MODEL, "zero-3"), abs=100)
