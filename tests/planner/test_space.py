"""What the space holds, what primitives take away, and what it says when nothing is left."""

import itertools
import random
import re
import time
from dataclasses import replace

import pytest

from jaxsys.axes import JOININGS
from jaxsys.errors import UsageError
from jaxsys.hardware import device, link
from jaxsys.model.shapes import preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.constraints import Conflict, Relation, culprits, propagate, satisfiable
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.plans import (
    PATHS,
    Backward,
    Gradient,
    Order,
    Plan,
    Residual,
    State,
    Weights,
    data_parallel_plan,
)
from jaxsys.planner.problem import Problem
from jaxsys.planner.space import Space
from jaxsys.planner.workload import decoder_workload
from jaxsys.schedule import check


def small_problem(devices: int = 8, batch: int = 32, model: str = "byte-llama") -> Problem:
    config = preset(model)
    return Problem(
        workload_of=lambda size: decoder_workload(
            model, config, sequence_length=128, microbatch_size=size
        ),
        cluster=Cluster(device=device("h100"), devices=devices, link=link("nvlink")),
        batch=batch,
        memory_bytes=1e9,
    )


def test_data_parallelism_is_in_the_space():
    space = Space.of(small_problem())
    assert space.contains(data_parallel_plan(8, 8))


def test_every_base_is_a_legal_schedule():
    space = Space.of(small_problem(4, 8), microbatch_sizes=[1, 2])
    bases = list(space.bases())
    assert len(bases) == len(set(bases))
    rng = random.Random(0)
    for base in bases:
        options = space.codes_of(base)
        assert options is not None
        layers = tuple(PATHS[rng.choice(list(codes))] for codes in options)
        if base.recomputes_alike:
            layers = (layers[0],) * len(layers)
        plan = Plan(**{**_fields(base), "layers": layers})
        assert plan.devices == 4
        assert space.contains(plan)
        check(to_schedule(space.problem, plan))


def test_bases_equal_brute_force():
    """Propagation and enumeration lose nothing and add nothing."""
    problem = small_problem(4, 4)
    found = set(Space.of(problem, microbatch_sizes=[1, 2]).bases())
    space = Space.of(problem, microbatch_sizes=[1, 2])
    brute = set()
    ways = (1, 2, 4)
    orders = list(itertools.product(Order, Backward, (0, 1, 2), (1, 2, 4)))
    for r, s, f, p, w in itertools.product(ways, repeat=5):
        if r * s * f * p * w != 4:
            continue
        for b, a, t in itertools.product((1, 2), (1, 2, 4), State):
            for (o, k, d, c), j in itertools.product(orders, JOININGS if f > 1 else ("gather",)):
                plan = Plan(
                    replicas=r, shard=s, features=f, stages=p, ring=w, microbatch_size=b,
                    lookahead=a, state=t, order=o, backward=k, delay=d, chunks=c, layers=(),
                    features_by=j,
                )  # fmt: skip
                if problem.batch % (r * s * b) == 0 and any(
                    _legal(replace(plan, layers=(path,) * 8), problem) for path in PATHS
                ):
                    brute.add(plan)
    assert {Plan(**{**_fields(plan), "layers": ()}) for plan in found} == brute
    assert all(space.contains(plan) for plan in found)


def _legal(plan: Plan, problem: Problem) -> bool:
    """The rules, written again without relations."""
    turns = problem.batch // (plan.replicas * plan.shard * plan.microbatch_size)
    path = plan.layers[0]
    plain = path.weights == Weights.STAY and path.gradient == Gradient.ONCE
    owners = plan.stages * plan.ring
    return (
        plan.features in problem.workload(1).ways["features"]
        and turns % plan.ring == 0
        and sum(n > 1 for n in (plan.shard, plan.stages, plan.ring)) <= 1
        and (plan.replicas == 1 or plan.shard * owners > 1)
        and (
            (plan.state is State.WHOLE and (plan.shard == 1 or plan.replicas == 1))
            or (plan.state is State.SPLIT and plan.shard > 1)
        )
        and _runs(plan, turns)
        and (plan.features_by == "gather" or owners == 1)
        and (plan.lookahead == 1 or (plan.shard > 1 and plan.state is State.SPLIT))
        and (plain or (plan.state is State.SPLIT and plan.shard > 1))
        and (
            turns > 1
            or (path.weights in (Weights.STAY, Weights.REFETCH) and path.gradient == Gradient.ONCE)
        )
    )


KEEPING = (Order.KEPT, Order.KEPT_WEIGHTS)
"""Of rings alone, their backward pass whole."""


def _runs(plan: Plan, turns: int) -> bool:
    """Whether the order suits what it orders."""
    order, whole = plan.order, plan.backward is Backward.WHOLE
    if plan.stages > 1:
        if order in (Order.DEPTH_FIRST, Order.SIDE_BY_SIDE, *KEEPING):
            return False
        late = not whole and order in (Order.EARLIEST_BACKWARD, Order.EAGER_FORWARD)
        cut = plan.chunks == 1 or (
            order is Order.EARLIEST_BACKWARD
            and 8 % (plan.stages * plan.chunks) == 0
            and turns % plan.stages == 0
        )
        return cut and (late or plan.delay == 0)
    if plan.chunks > 1:
        return False
    if plan.ring == 1:
        return order is Order.DEPTH_FIRST and whole and plan.delay == 0
    if order is Order.SIDE_BY_SIDE:
        return plan.delay == 0
    if order in KEEPING:
        return whole and plan.delay == 0
    return order is Order.DEPTH_FIRST and plan.delay <= (0 if whole else 1)


def _fields(plan: Plan) -> dict:
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


def test_primitives_narrow():
    space = Space.of(small_problem())
    narrow = (
        space.split("features", 2)
        .copy("between", layers=range(4))
        .reduce("deferred", layers=[0])
        .redirect(layers=[7])
        .domain("shard", 4)
    )
    bases = list(narrow.bases())
    assert bases
    for base in bases:
        assert (base.features, base.shard, base.state) == (2, 4, State.SPLIT)
        options = narrow.codes_of(base)
        assert options is not None
        assert {PATHS[c].weights for c in options[0]} == {Weights.BETWEEN}
        assert {PATHS[c].gradient for c in options[0]} == {Gradient.DEFERRED}
        assert {PATHS[c].residual for c in options[7]} == {Residual.RECOMPUTE}
        assert len({PATHS[c].weights for c in options[5]}) == 4
    staged = space.assign("layers", 4, travels="activations").order("spaced")
    assert {(b.stages, b.order) for b in staged.bases()} == {(4, Order.SPACED)}
    ring = space.assign("layers", 8, travels="weights")
    assert {b.ring for b in ring.bases()} == {8}
    without = space.not_("order", *[o for o in Order if o is not Order.DEPTH_FIRST])
    assert {b.stages for b in without.bases()} == {1}
    late = space.split("backward", 2).order("eager-forward", delay=2)
    assert {(b.backward, b.delay, b.ring) for b in late.bases()} == {(Backward.SPLIT, 2, 1)}
    linked = space.require("twice", ("shard", "features"), lambda s, f: s == 2 * f)
    assert all(b.shard == 2 * b.features for b in linked.bases())


def test_groups_of_like_layers():
    space = Space.of(small_problem())
    assert space.groups() == [list(range(8))]
    apart = space.copy("refetch", layers=[0, 1])
    # Only what may still differ tells layers apart.
    assert [0, 1] in apart.groups()


@pytest.mark.parametrize(
    ("narrow", "parts"),
    [
        (lambda s: s.split("features", 8), ["split features into 8", "features split in 1, 2"]),
        (
            lambda s: s.copy("between", layers=[3]).domain("state", State.WHOLE),
            ["copy weights of layers 3: between", "domain state: whole"],
        ),
        (
            lambda s: s.assign("layers", 8, travels="activations").reduce("each"),
            ["assign layers to 8 devices", "reduce gradient: each"],
        ),
        (
            lambda s: s.domain("turns", 1).reduce("deferred", layers=[0, 1, 2]),
            ["domain turns: 1", "reduce gradient of layers 0-2: deferred", "one microbatch"],
        ),
    ],
)
def test_conflicts_name_their_culprits(narrow, parts):
    space = narrow(Space.of(small_problem()).not_("lookahead", 4))
    with pytest.raises(Conflict) as caught:
        _ = space.left
    for part in parts:
        assert part in str(caught.value)
    assert "lookahead: 4" not in str(caught.value)  # has nothing to do with it
    relations = [r for r in space.relations if r.label in caught.value.culprits]
    assert not satisfiable(space.domains, relations)
    for label in caught.value.culprits:  # and none is superfluous
        assert satisfiable(space.domains, [r for r in relations if r.label != label])


def test_a_conflict_that_propagation_alone_cannot_see():
    odd = frozenset({(0, 1), (1, 0)})
    pairs = [("a", "b"), ("b", "c"), ("c", "a")]
    relations = [Relation(label=f"{p}", variables=p, allowed=odd) for p in pairs]
    domains = {name: (0, 1) for name in "abc"}
    assert propagate(domains, relations) is not None
    assert not satisfiable(domains, relations)
    assert len(culprits(domains, relations)) == 3


def test_misspelt_primitives_list_what_there_is():
    space = Space.of(small_problem())
    with pytest.raises(UsageError, match="stay, within, between, refetch"):
        space.copy("forever")
    with pytest.raises(UsageError, match="is not a variable"):
        space.domain("colour", 1)
    with pytest.raises(UsageError, match="split batch, sequences, replicas, experts, .*, state or"):
        space.split("heads", 2)
    with pytest.raises(UsageError, match="layers=\\[99\\]"):
        space.redirect(layers=[99])
    with pytest.raises(UsageError, match="not told apart by layers"):
        space.domain("shard", 2, layers=[1])


def test_a_large_space_is_pruned_in_seconds():
    problem = small_problem(64, 512, "llama-3-70b")
    start = time.monotonic()
    bases = list(Space.of(problem).bases())
    assert len(bases) > 500
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("changed", "length", "what", "why"),
    [
        ({}, 128, "experts", "expert=2, but llama has no experts"),
        (
            {"vocab_size": 257},
            128,
            "features",
            "tensor=2 does not divide num_kv_heads=2, vocab_size=257 and intermediate_size=384",
        ),
        ({"qk_norm": "all"}, 128, "features", "tensor=2 splits heads, and llama normalises .*"),
        ({}, 127, "features", "2 does not divide sequence_length=127"),
    ],
)
def test_what_no_devices_share_has_one_cause(changed, length, what, why):
    config = replace(preset("byte-llama"), **changed)
    problem = replace(
        small_problem(),
        workload_of=lambda size: decoder_workload(
            "m", config, sequence_length=length, microbatch_size=size
        ),
    )
    with pytest.raises(Conflict) as caught:
        _ = Space.of(problem).split(what, 2).left
    said = f"rule: {what} are whole on each device: {why}"
    assert re.fullmatch(said, caught.value.culprits[0])
    assert str(caught.value).endswith("Drop (2)")
