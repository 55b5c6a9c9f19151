"""Rings of nodes: the step of one device, and each chunk between nodes once, in pieces."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.context import ContextSplit
from jaxsys.errors import UsageError
from jaxsys.layered import reference_loss
from jaxsys.lowering import lower
from jaxsys.lowering.place import devices_of_place
from jaxsys.lowering.xla import CPU_COMPILER_OPTIONS
from jaxsys.mesh import make_mesh
from jaxsys.model import DecoderConfig, layered
from jaxsys.model.decoder import initial_parameters
from jaxsys.model.kinds import BlockKind
from jaxsys.schedule import Costs, Data, Link, MoveKind, Schedule, ScheduleError, simulate
from jaxsys.strategies import build, for_layers
from studies.compiled import executions, groups_of, parse

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LLAMA = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=4,
    num_heads=4, num_kv_heads=2, head_dim=8,
)  # fmt: skip
UNLIKE = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=3,
    num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True,
    kinds=(BlockKind(name="near", window=4), BlockKind(name="far", rotary=False)),
    pattern=("near", "far", "far"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A schedule on a ring of nodes."""

    schedule: str
    ring: int = 2
    member: int = 2
    data: int = 1
    tensor: int = 1
    context: ContextSplit | None = None
    recompute: Any = "block"
    config: DecoderConfig = LLAMA
    compute_dtype: Any = jnp.float32
    unroll: bool = False

    def __str__(self) -> str:
        kinds = "" if self.config is LLAMA else "-unlike"
        sizes = f"{self.data}x{self.ring}x{self.member}x{self.tensor}"
        cut = "-context" if self.context else ""
        return f"{self.schedule}-{sizes}-{self.recompute}{kinds}{cut}"


def lowered(case: Case):
    """The step's program, its parameters at rest and batch, and how to read its gradients."""
    model = layered(case.config, loss_chunk_tokens=8, implementation="xla")
    schedule = for_layers(
        case.schedule,
        devices=case.ring,
        microbatches=2 * case.ring,
        layers=case.config.num_layers,
    )
    parts = case.context.parts if case.context else 1
    mesh = make_mesh(case.ring, case.data, member=case.member, tensor=case.tensor, context=parts)
    step = lower(
        schedule,
        model,
        mesh,
        recompute=case.recompute,
        compute_dtype=case.compute_dtype,
        unroll=case.unroll,
        context=case.context,
    )
    keys = iter(jax.random.split(jax.random.key(2), 100))
    parameters = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape),
        initial_parameters(case.config, seed=1),
    )
    random = np.random.default_rng(0)
    rows = 2 * case.ring * case.data * case.member
    tokens = random.integers(0, 32, (rows, 2, 9)).astype(np.int32)
    targets = np.where(random.random(tokens[..., 1:].shape) < 0.2, -1, tokens[..., 1:])
    batch = {"inputs": tokens[..., :-1], "targets": targets.astype(np.int32)}
    rest = step.to_rest(parameters)
    options: Any = CPU_COMPILER_OPTIONS
    program = jax.jit(step.loss_and_gradients).lower(rest, batch).compile(compiler_options=options)
    return step, program, model, parameters, rest, batch


def check(case: Case, *, tolerance: float = 1e-5):
    """Every leaf of the gradient, against a plain loop over the whole batch."""
    step, program, model, parameters, rest, batch = lowered(case)
    found = program(rest, batch)
    wanted_loss, wanted = jax.jit(
        jax.value_and_grad(lambda p: reference_loss(model, p, batch))
    )(parameters)  # fmt: skip
    np.testing.assert_allclose(found.loss, wanted_loss, rtol=tolerance)
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, atol=tolerance * float(jnp.abs(b).max()), rtol=0, err_msg=str(path)
        ),
        step.from_rest(found.gradients),
        wanted,
    )
    return program, rest


SLOWLY = (
    Case(schedule="weipipe-naive"),
    Case(schedule="weipipe-interleave", recompute="none", unroll=True),
    Case(schedule="weipipe-wzb1", recompute="selective"),
    Case(schedule="weipipe-wzb2", recompute="chunk"),
    Case(schedule="weipipe-keep", ring=4, recompute="none"),
    # What nobody divides is every member's: norms of 16 channels, and three members.
    Case(schedule="weipipe-keep-weights", member=3),
    Case(schedule="weipipe-keep", data=2),
    Case(schedule="weipipe-interleave", tensor=2, recompute="none"),
    Case(schedule="weipipe-keep", context=ContextSplit(parts=2, by="gather")),
    Case(schedule="weipipe-interleave", config=UNLIKE),
    Case(schedule="weipipe-wzb1", config=UNLIKE, member=4, recompute="none"),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOWLY, ids=str)
def test_every_ring_of_nodes_computes_what_one_device_does(case):
    check(case)


@pytest.mark.slow
def test_sums_over_members_are_wider_than_what_is_computed():
    case = Case(schedule="weipipe-keep", recompute="none", member=4, compute_dtype=jnp.bfloat16)
    check(case, tolerance=3e-2)


def sent(program) -> Counter[str]:
    """Bytes that a step's collectives bring a device: between nodes, inside them, or over all."""
    found: Counter[str] = Counter()
    computations = parse(program.as_text())
    for name, times in executions(computations).items():
        for one in computations[name].collectives():
            nodes = [{device // 2 for device in group} for group in groups_of(one)]
            members = [{device % 2 for device in group} for group in groups_of(one)]
            inside, between = all(len(n) == 1 for n in nodes), all(len(m) == 1 for m in members)
            place = "inside" if inside else "between" if between else "all"
            found[f"{one.operation.removesuffix('-start')} {place}"] += times * one.bytes
    return found


def test_a_chunk_goes_between_nodes_once_in_pieces():
    """By the compiled program of one more microbatch than a ring has: what a hop carries."""
    program, rest = check(Case(schedule="weipipe-keep"))
    alone = lowered(Case(schedule="weipipe-keep", member=1))[1]
    found, whole = sent(program), sent(alone)
    hops = found["collective-permute between"]
    assert set(found) <= {
        "collective-permute between",
        "all-gather between", "all-gather inside",
        "reduce-scatter between", "reduce-scatter inside",
        "all-reduce all",  # of three numbers: loss and weight
    }  # fmt: skip
    # The devices of `alone` send whole chunks.
    assert 2 * hops == sum(n for name, n in whole.items() if name.startswith("collective-permute"))
    # Embedding, norm and head: whole inside, of which half came from the other node.
    edge = sum(leaf.nbytes for leaf in jax.tree.leaves(rest["edge"]))
    assert found["all-gather between"] == edge / 2
    assert found["reduce-scatter between"] == edge / 4
    assert found["all-reduce all"] < 100


def test_what_rests_is_cut_over_nodes_and_members():
    step, _, _, _, rest, _ = lowered(Case(schedule="weipipe-interleave"))
    for path, leaf in jax.tree.leaves_with_path(rest):
        assert leaf.addressable_shards[0].data.size * 4 == leaf.size, path
    assert devices_of_place(step.mesh) == 2


def test_the_simulator_tells_links_apart():
    """Over 4 nodes of 2, the link between them carries each chunk once for the node."""
    nodes, members, weights, sums = 4, 2, 8.0, 16.0
    schedule = build("weipipe-keep", devices=nodes, microbatches=16)
    pieces = Costs(
        forward_s=1.0,
        backward_s=2.0,
        weight_bytes=weights / members,
        gradient_bytes=sums / members,
        join_s=0.25,
        join_bytes=weights * (members - 1) / members,
        cut_s=0.5,
        cut_bytes=sums * (members - 1) / members,
    )
    found = simulate(schedule, pieces, Link(bytes_per_s=1e9))
    hops = [move for move in schedule.moves if move.kind is MoveKind.PERMUTE]
    carried = sum(weights if m.block.data is Data.WEIGHT else sums for m in hops)
    assert members * sum(found.sent_bytes) == pytest.approx(carried)
    # Each device runs 16 tasks of both kinds, and joins weights for each of them.
    assert found.inside_bytes == (16 * (2 * weights + sums) / 2,) * nodes
    inside = [event for event in found.events if event.stream == "inside"]
    assert sum(e.end_s - e.start_s for e in inside) == pytest.approx(nodes * 16 * (0.5 + 0.5))
    assert found.busy_s == (48.0,) * nodes
    whole = simulate(schedule, Costs(forward_s=1.25, backward_s=2.75), Link())
    assert found.step_s == pytest.approx(whole.step_s, rel=1e-6)


def test_schedules_say_how_many_share_a_place():
    schedule = build("weipipe-keep", devices=2, microbatches=4)
    planned = Schedule.from_json(schedule.to_json().replace('"members":1', '"members":4'))
    assert planned.members == 4
    model = layered(LLAMA)
    with pytest.raises(UsageError, match=r"members over 4 devices, the mesh\s+has member=2"):
        lower(planned, model, make_mesh(2, member=2))
    with pytest.raises(ScheduleError, match="members.* is 0, and must be a whole number from 1"):
        Schedule.from_json(schedule.to_json().replace('"members":1', '"members":0'))


@pytest.mark.parametrize("name", ["dp", "zero-3", "1f1b"])
def test_only_what_travels_in_a_ring_is_shared(name):
    schedule = for_layers(name, devices=2, microbatches=4, layers=4)
    with pytest.raises(UsageError, match="sends no weights from place to place"):
        lower(schedule, layered(LLAMA), make_mesh(2, member=2))
