"""Features joined piece by piece round a ring: the same step as with gathers and sums."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.hardware import device, link
from jaxsys.layered import reference_loss
from jaxsys.lowering import lower
from jaxsys.lowering.xla import CPU_COMPILER_OPTIONS
from jaxsys.mesh import make_mesh
from jaxsys.model import DecoderConfig, initial_parameters, layered, preset
from jaxsys.model.kinds import BlockKind, Experts, Latent
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.problem import Problem
from jaxsys.planner.space import Space
from jaxsys.planner.workload import decoder_workload
from jaxsys.schedule import Schedule
from jaxsys.schedule.inside import joining_transfers, timed
from jaxsys.strategies import for_layers
from jaxsys.train import Trainer
from studies.compiled import collective_counts

pytestmark = pytest.mark.usefixtures("quickly_compiled")

# Two query heads to a key/value head, on each of up to four devices.
LLAMA = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2,
    num_heads=8, num_kv_heads=4, head_dim=4,
)  # fmt: skip
DECODERS = {
    "llama": LLAMA,
    "biases": replace(
        LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm="head", sinks=True,
        kinds=(BlockKind(name="near", window=4), BlockKind(name="far", rotary=False)),
        pattern=("near", "far"),
    ),
    "ungated": replace(LLAMA, gated=False, parallel=True, norm_places="both"),
    "mixture": replace(
        LLAMA,
        kinds=(BlockKind(experts=True),),
        experts=Experts(
            count=4, active=2, intermediate_size=8, balance=0.05, bias=True, shared_size=8
        ),
    ),
    "latent": replace(
        LLAMA, num_heads=4, head_dim=12,
        latent=Latent(query_rank=6, rank=8, plain_dim=8, rotary_dim=4, value_dim=8),
    ),
}  # fmt: skip
SEQUENCES, LENGTH = 2, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A decoder and how its step is divided."""

    decoder: str
    schedule: str = "dp"
    ring: int = 1
    tensor: int = 2
    data: int = 1
    expert: int = 1
    context: int = 1
    recompute: Any = "none"

    def __str__(self) -> str:
        sizes = f"{self.data}x{self.expert}x{self.ring}x{self.context}x{self.tensor}"
        return f"{self.decoder}-{self.schedule}-{sizes}-{self.recompute}"


def check(case: Case) -> Any:
    """Compares loss and every gradient leaf with one device's; the compiled program."""
    config = DECODERS[case.decoder]
    model = layered(config, loss_chunk_tokens=8, implementation="xla")
    rows = 2 * case.ring
    schedule = for_layers(
        case.schedule, devices=case.ring, microbatches=rows, layers=config.num_layers
    )
    mesh = make_mesh(
        case.ring, case.data, tensor=case.tensor, expert=case.expert, context=case.context
    )
    schedule = replace(schedule, features=case.tensor, features_by="ring")
    step = lower(schedule, model, mesh, recompute=case.recompute)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    parameters = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape),
        initial_parameters(config, seed=1),
    )
    tokens = np.random.default_rng(0).integers(
        0, 32, (rows * case.data * case.expert, SEQUENCES, LENGTH + 1)
    )
    batch = {"inputs": tokens[..., :-1].astype(np.int32), "targets": tokens[..., 1:].astype("i4")}
    rest = step.to_rest(parameters)
    options: Any = CPU_COMPILER_OPTIONS
    lowered = jax.jit(step.loss_and_gradients).lower(rest, batch)
    program = lowered.compile(compiler_options=options)
    found = program(rest, batch)
    wanted_loss, wanted = jax.jit(
        jax.value_and_grad(lambda p: reference_loss(model, p, batch))
    )(parameters)  # fmt: skip
    np.testing.assert_allclose(found.loss, wanted_loss, rtol=1e-5)
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, atol=1e-5 * float(jnp.abs(b).max()), rtol=0, err_msg=str(path)
        ),
        step.from_rest(found.gradients),
        wanted,
    )
    return program


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(decoder="biases", schedule="zero-3", ring=2, tensor=4),
        Case(decoder="ungated", tensor=4),
        Case(decoder="mixture", schedule="zero-1", ring=2, expert=2),
        Case(decoder="latent", schedule="zero-2", ring=2),
        *(
            Case(decoder="llama", schedule=name, ring=2, data=2)
            for name in ("dp", "zero-1", "zero-2", "zero-3", "zero-3.5", "zero-4")
        ),
        *(
            Case(decoder="biases", tensor=4, recompute=policy)
            for policy in ("selective", "around-attention", "block", "chunk")
        ),
        Case(decoder="llama", schedule="zero-3", ring=1, context=2),
        Case(decoder="llama", schedule="zero-3", ring=2, recompute=("none", "block")),
        # One stage of a pipeline, one place of a ring: devices of it all have every task.
        Case(decoder="llama", schedule="1f1b", recompute="block"),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(case):
    check(case)


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_gather_and_a_sum_are_as_many_hops_as_there_are_other_devices(tensor):
    """Of each block and microbatch two gathers and two sums forward, the same on the way back, and
    backward gathers again what its products read: no second time what a row product's sum sends
    back, which both of its products read."""
    counts = collective_counts(check(Case(decoder="llama", tensor=tensor)).as_text() or "")
    microbatches, layers = 2, 2
    hops = tensor - 1
    assert counts["collective-permute"] == (2 + 2 + 2 + 2 + 2) * hops * microbatches * layers
    # What is left: embedding and head, as where features are gathered.
    assert counts["all-gather"] == 2 * microbatches
    assert counts["reduce-scatter"] == 2 * microbatches


def test_a_step_joined_round_a_ring_is_asked_for_by_one_option():
    model, parameters = layered(LLAMA), initial_parameters(LLAMA)
    trainer = Trainer(
        model,
        parameters,
        optax.sgd(0.1),
        schedule="zero-1",
        devices=2,
        tensor=2,
        features_by="ring",
    )
    assert (trainer.schedule.features, trainer.schedule.features_by) == (2, "ring")
    assert Schedule.from_json(trainer.schedule.to_json()) == trainer.schedule
    plain: Any = {"schedule": "zero-1", "devices": 2, "tensor": 2}
    assert Trainer(model, parameters, optax.sgd(0.1), **plain).schedule.features_by == "gather"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"schedule": "zero-1"}, "is of devices that share features, and features=1; leave it out"),
        (
            {"schedule": "1f1b", "tensor": 2},
            "1f1b has devices without a task in some ticks, and feat",
        ),
        (
            {"schedule": "weipipe-interleave", "tensor": 2},
            "use features_by='gather', or a schedule ",
        ),
        ({"schedule": "zero-1", "tensor": 2, "features_by": "rings"}, "use one of gather, ring"),
        ({"schedule": "auto", "tensor": 2}, "'auto' chooses for devices that each compute whole"),
    ],
)
def test_what_is_not_joined_so_is_refused(named, message):
    model, parameters = layered(LLAMA), initial_parameters(LLAMA)
    named = {"devices": 2, "features_by": "ring", **named}
    with pytest.raises(UsageError, match=message):
        Trainer(model, parameters, optax.sgd(0.1), **named)


def test_a_schedule_that_says_otherwise_and_a_model_that_cannot_are_refused():
    model, parameters = layered(LLAMA), initial_parameters(LLAMA)
    made = for_layers("zero-1", devices=2, microbatches=2, layers=2)
    made = replace(made, features=2, features_by="gather")
    with pytest.raises(UsageError, match="planned for features_by='gather'; leave it out"):
        Trainer(model, parameters, optax.sgd(0.1), schedule=made, tensor=2, features_by="ring")
    one_way = replace(model, in_parts_by={})
    with pytest.raises(UsageError, match="does not say how its parts join features so; decoders"):
        Trainer(
            one_way, parameters, optax.sgd(0.1), schedule="dp", devices=1, tensor=2,
            features_by="ring",
        )  # fmt: skip
    # A block of the user's own is never passed over for the decoder's.
    changed = replace(model, block=lambda weights, x, microbatch, layer: x)
    with pytest.raises(UsageError, match="the model's `block` is not the one whose parts"):
        Trainer(
            changed, parameters, optax.sgd(0.1), schedule="dp", devices=1, tensor=2,
            features_by="ring",
        )  # fmt: skip


def test_the_planner_takes_a_ring_where_it_pays():
    """Long pieces over few devices, whose products cover a hop; not short ones, or many."""

    def best(length: int, devices: int) -> str:
        workload = decoder_workload(
            "8b", replace(preset("llama-3.1-8b"), num_layers=2), sequence_length=length,
            microbatch_size=1,
        )  # fmt: skip
        problem = Problem(
            workload_of=lambda size: workload,
            cluster=Cluster(device=device("h200"), devices=devices, link=link("nvlink")),
            batch=1,
            memory_bytes=1e15,
            lowered=True,
        )
        space = Space.of(problem, microbatch_sizes=[1]).split("features", devices)
        found = {}
        for base in space.bases():
            layers = space.codes_of(base)
            assert layers is not None
            codes = np.array([[options[0] for options in layers]])
            step_s = Evaluator(problem).evaluate(base, codes).step_s[0]
            found[base.features_by] = min(step_s, found.get(base.features_by, np.inf))
        assert found.keys() == {"gather", "ring"}
        return min(found, key=found.__getitem__)

    assert best(8192, 2) == "ring"
    assert best(512, 2) == "gather"
    assert best(8192, 8) == "gather"


def test_a_ring_costs_the_longer_of_product_and_hop_for_every_piece():
    for summed in (False, True):
        for product_s, hop_s in ((3.0, 1.0), (1.0, 3.0)):
            transfers = joining_transfers(4, summed=summed)
            step_s, inside = timed(
                transfers, dict.fromkeys(transfers, (hop_s, 1.0)), [product_s] * 4
            )
            assert step_s == product_s + 3 * max(product_s, hop_s)
            assert len(inside) == 3
