"""How `jaxsys train` lays a run out: axes of its mesh, schedule, microbatches, recompute."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsys.axes import AROUND, BATCH, parts_around
from jaxsys.context import ContextSplit, agreed_split
from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel
from jaxsys.lowering import Recompute
from jaxsys.mesh import make_mesh
from jaxsys.model import DecoderConfig, abstract_parameters
from jaxsys.planner.workload import decoder_workload
from jaxsys.schedule import Placement, Schedule
from jaxsys.strategies import STRATEGIES
from jaxsys.train import auto, plan_file, schedules

MICROBATCH_SIZE = 4
"""Sequences, where neither the user nor a plan says."""

SEQUENCE_LENGTH = 128
"""Tokens, likewise."""

DTYPE = "float32"
"""Of compute and of gradients, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where and in what pieces a step runs."""

    mesh: Mesh
    schedule: Schedule
    recompute: Recompute | tuple[Recompute, ...]
    microbatch_size: int
    sequence_length: int
    dtype: str
    """Of compute."""
    gradient_dtype: str
    """In which gradients are summed and sent."""
    rows: int
    """Microbatches of a step, over all replicas."""
    split: ContextSplit | None
    """How each sequence lies over devices; None: it is whole on one."""
    reason: str | None
    """What the planner chose and why, or how the run differs from its plan, where it does."""

    @property
    def named(self) -> dict[str, Any]:
        """What a `Trainer` is asked for by name beside the mesh."""
        return {} if self.split is None else {AROUND[self.split.axis].asked: self.split}


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedLayout:
    """What of a layout is asked for; None leaves it to a plan file, or to what is usual."""

    schedule: str | None = None
    """A name, "auto" or a file."""
    sequence_length: int | None = None
    """Tokens."""
    around: Mapping[str, int | None] = field(default_factory=dict)
    """Mesh axis of `jaxsys.axes.AROUND` -> devices along it, of those that are asked for."""
    microbatches: int | None = None
    """Of one ring and step."""
    microbatch_size: int | None = None
    """Sequences."""
    recompute: Recompute | tuple[Recompute, ...] | None = None
    """What backward computes again."""
    memory_gib: float | None = None
    """The limit per device, for "auto"."""
    dtype: str | None = None
    """Of compute."""
    gradient_dtype: str | None = None
    """In which gradients are summed and sent."""
    model: LayeredModel | None = None
    """What is trained, of which "auto" asks what travels."""
    split: ContextSplit | None = None
    """How each sequence lies over devices."""
    features_by: str | None = None
    """How devices that share features join them."""


def lay_out(config: DecoderConfig, devices: list[Any], asked: AskedLayout) -> Layout:
    """Fills in what was not asked for; a plan file's own sizes win over defaults, never over asks.

    Args:
        config: the model.
        devices: all of the run.
        asked: what is asked for.

    Raises:
        UsageError: if the devices, the batch and the schedule do not fit together.
    """
    schedule, microbatches, split = asked.schedule, asked.microbatches, asked.split
    sequence_length, microbatch_size = asked.sequence_length, asked.microbatch_size
    recompute, dtype, gradient_dtype = asked.recompute, asked.dtype, asked.gradient_dtype
    around = {name: asked.around.get(name) for name in AROUND}
    reason, of_ring = None, None
    if schedule is not None and plan_file.is_plan_file(schedule):
        planned = plan_file.read_plan(schedule, layers=config.num_layers)
        if planned.parameters not in (None, config.parameter_count()):
            raise UsageError(
                f"the plan {schedule} is for a model of {planned.parameters:,.0f} parameters, and "
                f"this one has {config.parameter_count():,.0f}; train that one, or plan for this"
            )
        says, read = parts_around(planned.schedule), planned.schedule
        split = agreed_split(split, read, name=read.name, whole=f"the plan {schedule}")
        for name, mine, has in (
            *((AROUND[name].asked, mine, says[name]) for name, mine in around.items()),
            ("microbatch_size", microbatch_size, planned.microbatch_size),
            ("sequence_length", sequence_length, planned.sequence_length),
        ):
            if None not in (mine, has) and mine != has:
                raise UsageError(
                    f"{name}={mine}, but the plan {schedule} is for {name}={has}; leave it out, "
                    "or plan again"
                )
        around, microbatch_size = {**says}, planned.microbatch_size
        recompute = recompute or planned.recompute
        sequence_length = planned.sequence_length or sequence_length
        dtype = dtype or planned.dtype
        differs = []
        if recompute != planned.recompute:
            differs.append(f"planned with recompute {planned.recompute}, running {recompute}")
        if dtype != planned.dtype and planned.dtype is not None:
            differs.append(f"planned in {planned.dtype}, running {dtype}")
        gradient_dtype = gradient_dtype or planned.gradients
        if planned.gradients not in (gradient_dtype, None):
            differs.append(
                f"planned with gradients in {planned.gradients}, running {gradient_dtype}"
            )
        reason = "; ".join(differs) or None
    elif schedule is not None and schedule not in (*STRATEGIES, schedules.AUTO):
        read = schedules.read_schedule(schedule)
        split = agreed_split(split, read, name=read.name, whole=f"the schedule {schedule}")
        around = {
            name: schedules.agreed(around[name], AROUND[name], read, free=False) for name in around
        }
        of_ring = read.devices
    dtype, gradient_dtype = dtype or DTYPE, gradient_dtype or DTYPE
    size = MICROBATCH_SIZE if microbatch_size is None else microbatch_size
    length = SEQUENCE_LENGTH if sequence_length is None else sequence_length
    if length > config.max_positions:
        raise UsageError(
            f"sequence_length={length} is past the model's max_positions={config.max_positions}"
        )
    if split is not None:
        around[split.axis] = split.parts
    sizes = {name: 1 if count is None else count for name, count in around.items()}
    for name, count in sizes.items():
        if count < 1:
            raise UsageError(f"{AROUND[name].asked}={count} must be at least 1")
    if split is not None:
        split.check_length(length)
    of_each = math.prod(sizes.values())
    if len(devices) % of_each:
        raise UsageError(f"{_said(sizes)} does not divide devices={len(devices)}")
    ring = len(devices) // of_each
    if of_ring is not None and ring != of_ring:
        raise UsageError(
            f"devices={len(devices)}, but schedule {str(schedule)!r} is for {of_ring * of_each}; "
            f"use devices={of_ring * of_each}"
        )
    sharded = split is not None or asked.features_by == "ring"
    usual = "zero-3" if sharded else "weipipe-interleave" if ring > 1 else "dp"
    chosen: str | Schedule = schedule or usual
    known = STRATEGIES.get(chosen) if isinstance(chosen, str) else None
    if ring == 1 and of_each > 1 and known is not None and known.placement is Placement.OWNER:
        raise UsageError(
            f"{len(devices)} devices over {_said(sizes)} leave 1, and {chosen} goes from device to "
            f"device; use at least {2 * of_each}, or a schedule such as zero-3"
        )
    more = _said({name: count for name, count in sizes.items() if not AROUND[name].copies})
    if chosen == "auto" and more:
        raise UsageError(
            "schedule 'auto' chooses for devices that each compute whole blocks; name a schedule "
            f"beside {more}, or have `jaxsys plan --plan FILE` split features"
        )
    if chosen == "auto":
        workload = decoder_workload(
            "the model",
            config,
            sequence_length=length,
            microbatch_size=size,
            fused_attention=devices[0].platform != "cpu",
            dtype=dtype,
        )
        choice = auto.choose(
            workload,
            devices[:ring],
            microbatches=microbatches or 2 * ring,
            memory_gib=asked.memory_gib,
            weight_bytes=jnp.dtype(dtype).itemsize,
            sent_weight_bytes=None
            if asked.model is None
            else auto.sent_bytes_each(asked.model, abstract_parameters(config), dtype),
            gradient_bytes=jnp.dtype(gradient_dtype).itemsize,
            recompute=recompute if isinstance(recompute, str) else None,
        )
        chosen, recompute = choice.schedule, recompute or choice.recompute
        reason = choice.reason
        # What was asked of one ring is shared by the devices of each of its places.
        sizes, microbatches = {**sizes, **choice.around}, None
        ring //= math.prod(choice.around.values())
    resolved = schedules.resolve(
        chosen, devices=ring, layers=config.num_layers, microbatches=microbatches
    )
    resolved = schedules.joined_by(resolved, asked.features_by, sizes)
    return Layout(
        mesh=make_mesh(ring, **sizes, devices=devices),
        schedule=resolved,
        recompute=recompute or "block",
        microbatch_size=size,
        sequence_length=length,
        dtype=dtype,
        gradient_dtype=gradient_dtype,
        rows=math.prod(sizes[name] for name in BATCH) * resolved.microbatches,
        reason=reason,
        split=split,
    )


def _said(sizes: Mapping[str, int]) -> str:
    """Parts as they are asked for, those of one left out."""
    return " x ".join(f"{AROUND[name].asked}={n}" for name, n in sizes.items() if n > 1)
