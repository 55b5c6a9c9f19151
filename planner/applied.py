"""What a plan for a function of the user's own counts on, and what it then sends and holds.

XLA runs such a plan by its shardings alone, so two things are for the function to do: a layer that
is computed again, and a layer whose weights rest in shards and are gathered for each use, forward
and backward. Both are done by what `wrapped` makes of the layer's function; without it XLA keeps
what it likes, and may gather activations in place of weights. A plan that counts on neither needs
nothing applied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys.errors import UsageError
from jaxsys.planner.function_program import all_but_gathered, resting_bytes
from jaxsys.planner.plans import Plan, Residual, Weights
from jaxsys.planner.problem import Problem
from jaxsys.planner.program import GATHERED
from jaxsys.planner.space import Space


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLeaf:
    """One parameter of a layer."""

    shape: tuple[int, ...]
    """Of one layer's."""
    whole: PartitionSpec
    """As it is used: cut along features at most."""


def wrapped(
    layer: Callable[..., Any],
    leaves: Sequence[LayerLeaf],
    mesh: Mesh | None,
    *,
    gathers: bool,
    again: bool,
    weights: int,
) -> Callable[..., Any]:
    """A function of one layer as a plan counts it.

    Args:
        layer: what a scan runs, or what is called once a layer.
        leaves: of a layer's parameters, in flattening order.
        mesh: on which they rest; needed where they are gathered.
        gathers: whether they rest in shards.
        again: whether the layer is computed again in the backward pass.
        weights: which of its arguments its parameters are.

    Raises:
        UsageError: if there is no mesh to gather on.
    """
    if not gathers:
        return jax.checkpoint(layer) if again else layer
    if mesh is None:
        raise UsageError(
            "the plan splits weights, and a layer gathers its own: give checkpoint the mesh as well"
        )

    def gathered(*arguments: Any) -> Any:
        given = list(arguments)
        given[weights] = _gather(given[weights], leaves, mesh)
        return layer(*given)

    if again:
        return jax.checkpoint(gathered)
    return jax.checkpoint(gathered, policy=all_but_gathered)


def _gather(tree: Any, leaves: Sequence[LayerLeaf], mesh: Mesh) -> Any:
    given, structure = jax.tree.flatten(tree)
    shapes = [tuple(jax.numpy.shape(leaf)) for leaf in given]
    if shapes != [leaf.shape for leaf in leaves]:
        known = ", ".join(str(list(leaf.shape)) for leaf in leaves)
        raise UsageError(
            f"a layer's weights are {known}; the argument of checkpoint(weights=...) has "
            f"{', '.join(str(list(shape)) for shape in shapes) or 'none'}: name the one that has "
            "them"
        )
    return jax.tree.unflatten(
        structure,
        [
            checkpoint_name(
                jax.lax.with_sharding_constraint(array, NamedSharding(mesh, leaf.whole)), GATHERED
            )
            for array, leaf in zip(given, leaves, strict=True)
        ],
    )


def spaces_of(space: Space) -> list[Space]:
    """The part of a space that needs nothing applied, and those that count on wrapped layers."""

    def part(
        residual: str, kept: Callable[[Any], bool], weights: str, rest: Callable[[Any], bool]
    ) -> Space:
        found = space
        for layer in range(space.problem.layers):
            found = found.require(residual, (f"residual[{layer}]",), kept)
            found = found.require(weights, (f"weights[{layer}]",), rest)
        return found

    keeps, again = lambda r: r == Residual.KEEP, lambda r: r != Residual.KEEP
    plain = "recompute is not applied"
    return [
        part(plain, keeps, "weights that layers do not gather stay", lambda w: w == Weights.STAY),
        part(plain, keeps, "layers gather their weights", lambda w: w == Weights.REFETCH),
        part(
            "every layer is computed again",
            again,
            "layers gather their weights or these stay",
            lambda w: w in (Weights.STAY, Weights.REFETCH),
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What one call of `jax.value_and_grad` sends and holds on a device, as a plan counts it."""

    summed_bytes: float
    """Results of all-reduces: gradients, and what split features join."""
    gathered_bytes: float
    """Results of all-gathers: weights, for each use."""
    held_bytes: float
    """Temporaries and results, gradients among them; parameters and batch are arguments."""
    doubts: tuple[str, ...] = ()
    """What of these may be low or high where the program is compiled, each with its cause."""


def promise_of(problem: Problem, plan: Plan, peak_bytes: float) -> Promise:
    """What a plan for a function counts on.

    Args:
        problem: what was planned.
        plan: the plan.
        peak_bytes: what a device holds at its fullest, parameters and state included.

    Raises:
        UsageError: if the problem is a layered model's, whose steps say so themselves.
    """
    if problem.program is None:
        raise UsageError(
            "a promise is of functions that jax.jit partitions; a LayeredModel's plan says what it "
            "sends and holds by itself (found.found.sent_bytes, found.found.peak_bytes)"
        )
    found = problem.program(plan)
    return Promise(
        summed_bytes=found.summed,
        gathered_bytes=found.gathered,
        held_bytes=peak_bytes - resting_bytes(problem, plan),
        doubts=found.doubts,
    )
