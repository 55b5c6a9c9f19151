"""Decoders whose blocks several devices compute together: the same step as one device's."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.axes import EXPERT, TENSOR
from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, inside_parts, part_shapes, parts_of, reference_loss
from jaxsys.lowering import lower
from jaxsys.lowering.xla import CPU_COMPILER_OPTIONS
from jaxsys.mesh import make_mesh
from jaxsys.model import DecoderConfig, layered
from jaxsys.model.decoder import abstract_parameters, initial_parameters
from jaxsys.model.kinds import BlockKind, Experts, Latent
from jaxsys.strategies import for_layers
from studies.compiled import collective_counts

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LLAMA = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=8,
)  # fmt: skip
MIXTURE = replace(
    LLAMA,
    kinds=(BlockKind(experts=True),),
    experts=Experts(
        count=4, active=2, intermediate_size=8, balance=0.05, bias=True, shared_size=8,
        shared_gate=True,
    ),
)  # fmt: skip
DECODERS = {
    "llama": LLAMA,
    # Every place for a bias, a window, sinks, and norms of each head's channels.
    "windows": replace(
        LLAMA,
        kinds=(BlockKind(name="near", window=4), BlockKind(name="far", rotary=False)),
        pattern=("near", "far"),
        qk_norm="head",
        sinks=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    ),
    "tied": replace(
        LLAMA, tie_embeddings=True, embedding_scale=2.0, logit_softcap=5.0, parallel=True
    ),
    "each": replace(LLAMA, qk_norm="each", norm_places="both", norm_plus_one=True),
    "mixture": MIXTURE,
    "shallow": replace(MIXTURE, num_layers=1),
    "latent": replace(
        LLAMA,
        num_kv_heads=4,
        head_dim=12,
        latent=Latent(query_rank=6, rank=8, plain_dim=8, rotary_dim=4, value_dim=8),
    ),
}
SEQUENCES, LENGTH = 2, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A decoder and how its step is divided."""

    decoder: str
    schedule: str
    ring: int = 1
    data: int = 1
    tensor: int = 1
    expert: int = 1
    member: int = 1
    recompute: Any = "none"

    def __str__(self) -> str:
        sizes = f"{self.data}x{self.expert}x{self.ring}x{self.tensor}x{self.member}"
        return f"{self.decoder}-{self.schedule}-{sizes}-{self.recompute}"


def parameters_of(config: DecoderConfig):
    """Fresh ones, moved so that no norm, bias or sink is without effect."""
    keys = iter(jax.random.split(jax.random.key(2), 100))
    fresh = initial_parameters(config, seed=1)
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), fresh)


def batch_of(rows: int) -> dict[str, np.ndarray]:
    """Some targets do not count, unlike many in each part of a sequence."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 32, (rows, SEQUENCES, LENGTH + 1)).astype(np.int32)
    targets = np.where(random.random(tokens[..., 1:].shape) < 0.2, -1, tokens[..., 1:])
    return {"inputs": tokens[..., :-1], "targets": targets.astype(np.int32)}


def run(case: Case):
    """The step's compiled program and outcome, and the parameters and batch it ran on."""
    config = DECODERS[case.decoder]
    model = layered(config, loss_chunk_tokens=8, implementation="xla")
    schedule = for_layers(
        case.schedule, devices=case.ring, microbatches=2 * case.ring, layers=config.num_layers
    )
    mesh = make_mesh(
        case.ring, case.data, tensor=case.tensor, expert=case.expert, member=case.member
    )
    step = lower(schedule, model, mesh, recompute=case.recompute)
    parameters = parameters_of(config)
    batch = batch_of(2 * case.ring * case.data * case.expert * case.member)
    rest = step.to_rest(parameters)
    lowered = jax.jit(step.loss_and_gradients).lower(rest, batch)
    options: Any = CPU_COMPILER_OPTIONS
    program = lowered.compile(compiler_options=options)
    found = program(rest, batch)
    return program, found.loss, step.from_rest(found.gradients), model, parameters, batch


def check(case: Case):
    program, loss, gradients, model, parameters, batch = run(case)
    wanted_loss, wanted = jax.jit(
        jax.value_and_grad(lambda p: reference_loss(model, p, batch))
    )(parameters)  # fmt: skip
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, atol=1e-5 * float(jnp.abs(b).max()), rtol=0, err_msg=str(path)
        ),
        gradients,
        wanted,
    )
    return program


CASES = (
    Case(decoder="windows", schedule="zero-3", ring=2, tensor=2),
    Case(decoder="mixture", schedule="dp", tensor=2, expert=2),
    *(
        Case(decoder="llama", schedule=name, ring=2, data=2, tensor=2)
        for name in ("dp", "zero-1", "zero-2", "zero-3.5", "zero-4")
    ),
    Case(decoder="llama", schedule="zero-1", ring=2, tensor=2, recompute=("none", "block")),
    Case(decoder="llama", schedule="zero-3", ring=2, tensor=2, recompute="selective"),
    *(
        Case(decoder=name, schedule="zero-1", ring=2, tensor=2)
        for name in ("tied", "each", "mixture")
    ),
    Case(decoder="latent", schedule="dp", tensor=4),
    # Devices of a ring and a pipeline run unlike tasks in a tick; those of a place run the same.
    *(
        Case(decoder="windows", schedule=name, ring=2, data=2, tensor=2, recompute="block")
        for name in ("weipipe-interleave", "weipipe-wzb1", "1f1b-overlap", "zb-h1")
    ),
    Case(decoder="mixture", schedule="zero-1", ring=2, expert=4),
    Case(decoder="mixture", schedule="zero-4", ring=2, data=2, expert=2, recompute="block"),
    Case(decoder="mixture", schedule="zero-3", ring=2, tensor=2, expert=2),
    Case(decoder="mixture", schedule="weipipe-interleave", ring=2, expert=2, recompute="block"),
    Case(decoder="mixture", schedule="gpipe", ring=2, tensor=2, expert=2),
    # Members of a ring's places have pieces of what these devices have parts of.
    Case(decoder="mixture", schedule="weipipe-keep", ring=2, expert=2, member=2),
    Case(decoder="windows", schedule="weipipe-wzb1", ring=2, tensor=2, member=2),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(case):
    check(case)


def test_collectives_are_those_of_column_and_row_products():
    """Of each block and microbatch two gathers and two sums forward, the same on the way back, and
    backward gathers again what its products read."""
    case = Case(decoder="llama", schedule="dp", tensor=2)
    counts = collective_counts(check(case).as_text() or "")
    microbatches, layers = 2, 2
    blocks = microbatches * layers
    # Embedding: a sum forward, a gather back. Head: a gather forward, a sum back.
    assert counts["all-gather"] == (2 + 2 + 2) * blocks + 2 * microbatches
    assert counts["reduce-scatter"] == (2 + 2) * blocks + 2 * microbatches
    assert "all-to-all" not in counts


def test_rows_go_to_experts_and_come_back_by_all_to_all():
    case = Case(decoder="shallow", schedule="dp", expert=2)
    counts = collective_counts(check(case).as_text() or "")
    # Forward rows, their counts, and what comes back; backward both ways of the rows.
    microbatches = 2
    assert counts["all-to-all"] == (3 + 2) * microbatches
    assert "all-gather" not in counts


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        ({}, {TENSOR: 4}, "tensor=4 does not divide num_kv_heads=2, vocab_size=32 .*; use 1, 2$"),
        ({"vocab_size": 31}, {TENSOR: 2}, "use 1$"),
        ({"qk_norm": "all"}, {TENSOR: 2}, "normalises queries and keys over all"),
        ({}, {EXPERT: 2}, "expert=2, but llama has no experts; use 1"),
        ({"experts": MIXTURE.experts, "kinds": MIXTURE.kinds}, {EXPERT: 3},
         "expert=3 does not divide experts count=4; use 1, 2, 4"),
    ],
)  # fmt: skip
def test_what_devices_do_not_divide_is_refused(change, sizes, message):
    with pytest.raises(UsageError, match=message):
        parts_of(layered(replace(LLAMA, **change)), sizes)


def test_sequences_that_devices_do_not_divide_are_refused():
    sizes, model = {TENSOR: 2}, layered(LLAMA)
    parts = parts_of(model, sizes)
    assert parts is not None
    edge = part_shapes(abstract_parameters(LLAMA), parts, sizes)["edge"]
    tokens = {"inputs": jax.ShapeDtypeStruct((1, 9), jnp.int32)}
    with pytest.raises(UsageError, match="sequences of 9 tokens; use 1, or sequence_length=8"):
        inside_parts(sizes, lambda: jax.eval_shape(parts.model.embed, edge, tokens))


def test_models_that_say_nothing_of_parts_or_say_it_of_others_are_refused():
    model = layered(LLAMA)
    silent = LayeredModel(embed=model.embed, block=model.block, head_loss=model.head_loss, layers=2)
    with pytest.raises(UsageError, match="does not say how its blocks are split"):
        parts_of(silent, {TENSOR: 2})

    def doubled(weights, x, microbatch, layer):
        return jax.tree.map(lambda leaf: 2 * leaf, x)

    changed = replace(model, block=doubled)
    with pytest.raises(UsageError, match="the model's `block` is not the one whose parts"):
        parts_of(changed, {TENSOR: 2})


def test_parameters_rest_in_parts():
    """Each device holds no more than its part of what is cut."""
    model = layered(LLAMA)
    schedule = for_layers("zero-3", devices=2, microbatches=2, layers=2)
    step = lower(schedule, model, make_mesh(2, tensor=2))
    rest = step.to_rest(parameters_of(LLAMA))
    for path, leaf in jax.tree.leaves_with_path(rest):
        share = leaf.addressable_shards[0].data.size / leaf.size
        assert share == (0.5 if "norm" in str(path) else 0.25), path
