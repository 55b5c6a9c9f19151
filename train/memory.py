"""What a step will hold on each device, from shapes alone, before anything is compiled.

State at rest, gradients at rest, whole copies of the edge's parameters and their gradient, the most
that the schedule has alive at any tick (its weights, sums, activations, residuals and taps, each
of the size that the lowered block really keeps), and the larger of the head's residuals and what
recompute brings back. Alternatives that would fit are looked for in the same way.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys import strategies
from jaxsys.errors import UsageError
from jaxsys.hardware import GIB
from jaxsys.layered import LayeredModel, Parameters, PyTree
from jaxsys.lowering import Recompute
from jaxsys.lowering.programs import BlockProgram, block_program
from jaxsys.lowering.split import split_backward
from jaxsys.planner.costs import cut
from jaxsys.planner.jaxpr_costs import residual_bytes
from jaxsys.schedule import Costs, Link, Placement, Schedule, TaskKind, simulate

ALTERNATIVES = ("1f1b", "weipipe-interleave", "zero-3")


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step's memory depends on."""

    schedule: Schedule
    model: LayeredModel
    parameters: Parameters
    """Shapes at rest, in layer order."""
    state_bytes: float
    """Masters and optimizer state, of the whole model."""
    microbatch: PyTree
    """Shapes of one."""
    compute_dtype: Any
    gradient_dtype: Any
    recompute: Recompute | tuple[Recompute, ...]

    @property
    def policies(self) -> tuple[Recompute, ...]:
        """What backward computes again, layer by layer."""
        if isinstance(self.recompute, tuple):
            return self.recompute
        return (self.recompute,) * self.model.layers


def step_bytes(step: StepShape) -> float:
    """The most that any device is predicted to hold."""
    schedule, model = step.schedule, step.model
    cast = lambda tree: jax.tree.map(lambda s: _cast(s, step.compute_dtype), tree)  # noqa: E731
    edge = cast(step.parameters["edge"])
    layer = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), cast(step.parameters["blocks"])
    )
    x = jax.eval_shape(model.embed, edge, step.microbatch)

    def program(policy: Recompute) -> BlockProgram:
        inner = "none" if policy == "chunk" else policy
        return block_program(model, layer, x, step.microbatch, inner)

    policies = step.policies
    programs = {policy: program(policy) for policy in dict.fromkeys(policies)}
    programs["none"] = programs.get("none") or program("none")
    kept = {policy: _bytes(found.residuals) for policy, found in programs.items()}
    parts = cut(model.layers, schedule.chunks)
    taps = 0.0
    if any(task.kind is TaskKind.INPUT_GRADIENT for task in schedule.tasks):
        found = programs[policies[0]]
        halves = split_backward(found.backward, layer, found.residuals, x, step.microbatch)
        taps = _bytes(halves.taps)
    residuals = [
        _bytes(x) if policies[part[0]] == "chunk" else sum(kept[policies[i]] for i in part)
        for part in parts
    ]
    again = {"none": 0, "selective": 1, "block": 1, "chunk": max(len(part) for part in parts)}
    work = max(again[policy] * kept["none"] for policy in policies)
    head = residual_bytes(
        lambda given, microbatch: model.head_loss(given[0], given[1], microbatch)[0],
        (edge, x),
        step.microbatch,
    )
    costs = Costs(
        forward_s=0.0,
        backward_s=0.0,
        weight_bytes=[len(part) * _bytes(layer) for part in parts],
        gradient_bytes=[len(part) * _bytes(layer, step.gradient_dtype) for part in parts],
        activation_bytes=_bytes(x),
        residual_bytes=residuals,
        tap_bytes=[len(part) * taps for part in parts],
    )
    share = 1 if schedule.placement is Placement.REPLICATED else schedule.devices
    return (
        (step.state_bytes + _bytes(step.parameters)) / share
        + _bytes(edge)
        + _bytes(edge, step.gradient_dtype)
        + max(simulate(schedule, costs, Link()).peak_bytes)
        + max(head, work)
    )


def check_fits(step: StepShape, limit_bytes: float) -> None:
    """Raises UsageError, which names what would fit, if the step is predicted not to."""
    needed = step_bytes(step)
    if needed <= limit_bytes:
        return
    others = [(step_bytes(other), name) for name, other in _alternatives(step)]
    fitting = [f"{name} ({size / GIB:.3g} GiB)" for size, name in others if size <= limit_bytes]
    if fitting:
        advice = f"what would fit: {', '.join(fitting[:3])}"
    else:
        least, name = min([*others, (needed, "this")])
        advice = (
            f"nothing tried would fit, the least, {name}, needs {least / GIB:.3g} GiB: use more "
            "devices, smaller microbatches or shorter sequences"
        )
    raise UsageError(
        f"a step of {step.schedule.name} is predicted to need {needed / GIB:.3g} GiB a device, of "
        f"{limit_bytes / GIB:.3g} GiB; {advice}; or go on anyway with memory_gib=inf"
    )


def _alternatives(step: StepShape) -> Iterator[tuple[str, StepShape]]:
    """More recompute, other schedules, and half the microbatch."""
    policies: tuple[Recompute, ...] = ("selective", "block")
    for policy in policies:
        if step.recompute != policy:
            yield f"recompute {policy}", replace(step, recompute=policy)
    old = step.schedule
    for name in ALTERNATIVES:
        options = {"chunks": step.model.layers} if name.startswith("zero-") else {}
        try:
            made = strategies.build(
                name, devices=old.devices, microbatches=old.microbatches, **options
            )
            cut(step.model.layers, made.chunks)
        except UsageError:
            continue
        if made.name != old.name:
            yield f"{name} with recompute block", replace(step, schedule=made, recompute="block")
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(step.microbatch)}
    if all(size % 2 == 0 for size in sizes):
        half = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((s.shape[0] // 2, *s.shape[1:]), s.dtype),
            step.microbatch,
        )
        yield "half the microbatch size", replace(step, microbatch=half)


def _cast(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype)


def _bytes(tree: PyTree, dtype: Any = None) -> float:
    return float(
        sum(leaf.size * jnp.dtype(dtype or leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    )
