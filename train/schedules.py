"""What a trainer runs: a strategy's name, a Schedule, a plan, or a file that holds one of the two.

A plan is run as planned, whole: its devices and replicas, what each layer computes again, the
dtypes it was reckoned in. What is asked besides and differs is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsys.axes import AROUND, CUT, RING, Axis, joined_so
from jaxsys.context import ContextSplit, agreed_split, with_split
from jaxsys.errors import UsageError, did_you_mean
from jaxsys.files import MIB, read_text
from jaxsys.lowering.refusal import why_not_lowered
from jaxsys.mesh import inner_sizes, make_mesh, request_devices, sizes_around
from jaxsys.schedule import Schedule, ScheduleError, check, why_not_divided
from jaxsys.strategies import STRATEGIES, for_layers
from jaxsys.train.options import Compute
from jaxsys.train.plan_file import PlannedRun, is_plan_file, read_plan, run_of

USUAL = "weipipe-interleave"
"""The strategy where none is named."""
AUTO = "auto"
_BYTES = {"compute_dtype": "weight_bytes", "gradient_dtype": "gradient_bytes"}
"""Field of `Compute` -> what of `jaxsys.planner.Precision` says so of a plan."""
ASKED_AROUND = (*(axis.asked for axis in AROUND.values()), "features_by")
"""What `Trainer` takes by name for the axes around a ring and within its places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What of a step's lay-out is asked for; None leaves it to the plan, or to what is usual."""

    schedule: Any
    """A name, a Schedule, a path, or what `jaxsys.planner.plan` found."""
    mesh: Mesh | None
    devices: int | None
    """Of the ring; with a plan, of all that it plans for."""
    around: Mapping[str, int | None]
    """Mesh axis of `jaxsys.axes.AROUND` -> devices along it."""
    split: ContextSplit | None
    """How each sequence lies over those that share it."""
    microbatches: int | None
    """Of one ring and step; of a ring of nodes, of one member of each."""
    compute: Compute
    named: frozenset[str]
    """Fields of `compute` that are asked for by name, be they what is usual."""
    features_by: str | None = None
    """How devices that share features join them, one of `jaxsys.axes.JOININGS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What is run."""

    schedule: Schedule
    mesh: Mesh
    compute: Compute
    split: ContextSplit | None = None
    """How each sequence lies over devices, where it is said."""


def taken_from(named: dict[str, Any]) -> tuple[dict[str, int | None], ContextSplit | None]:
    """Takes out of options what they say of axes, by the names that `AROUND` has for them."""
    return with_split({name: named.pop(axis.asked, None) for name, axis in AROUND.items()})


def choose(asked: Asked, *, layers: int) -> Chosen:
    """Settles schedule, mesh and numbers for a model of L layers.

    Raises:
        UsageError: if there is no such name or file, it is not run, or it is for something else
            than what is asked.
    """
    planned = _planned(asked.schedule, layers)
    read = asked.schedule
    if planned is not None:
        read = planned.schedule
    elif not isinstance(read, Schedule) and read not in STRATEGIES:
        read = read_schedule(read)
    if isinstance(read, Schedule):
        whole = None if _open(asked.schedule) else f"schedule {read.name}"
        split = agreed_split(asked.split, read, name=read.name, whole=whole)
        asked = replace(asked, split=split)
    if isinstance(asked.schedule, Schedule) and (refused := why_not_lowered(asked.schedule)):
        raise UsageError(refused)
    if planned is not None:
        compute = _as_planned(asked, planned)
    else:
        compute = asked.compute
    mesh = _mesh(asked, read if isinstance(read, Schedule) else None)
    resolved = resolve(
        read, devices=mesh.shape[RING], layers=layers, microbatches=asked.microbatches
    )
    resolved = joined_by(resolved, asked.features_by, mesh.shape)
    return Chosen(schedule=resolved, mesh=mesh, compute=compute, split=asked.split)


def joined_by(schedule: Schedule, by: str | None, sizes: Mapping[str, int]) -> Schedule:
    """The schedule, whose devices join features as is asked for, or as it says.

    Args:
        schedule: of one ring.
        by: what is asked for, one of `jaxsys.axes.JOININGS`; None: nothing.
        sizes: mesh axis -> devices along it.

    Raises:
        UsageError: if it is none, no devices share features, or the schedule says otherwise.
    """
    if by is None:
        return schedule
    asked = joined_so(by, sizes)
    planned = any(getattr(schedule, axis.name) > 1 for axis in CUT)
    if planned and by != schedule.features_by:
        raise UsageError(
            f"features_by={by!r}, but schedule {schedule.name} is planned for "
            f"features_by={schedule.features_by!r}; leave it out, or plan again"
        )
    refused = why_not_divided(asked)
    if refused is not None:
        raise UsageError(refused)
    said = {axis.name: getattr(asked, axis.name) for axis in CUT}
    return replace(schedule, features_by=by, **said)


def mesh_of(asked: Asked) -> Mesh:
    """The mesh where a schedule is still to be chosen: as given, or one ring."""
    if asked.features_by is not None:
        raise UsageError(
            f"schedule 'auto' chooses for devices that each compute whole blocks, not with "
            f"features_by={asked.features_by!r}; leave it out, or name a schedule"
        )
    mesh = _mesh(asked, None)
    for axis, count in sizes_around(mesh).items():
        said = f"{AROUND[axis].asked}={count}"
        if AROUND[axis].shares:
            raise UsageError(
                f"schedule 'auto' chooses for whole sequences, not for {said}; name a schedule "
                "such as zero-3"
            )
        if AROUND[axis].within and AROUND[axis].batch:
            raise UsageError(
                f"schedule 'auto' finds by itself which devices share a place of a ring; leave "
                f"{said} out, or name a schedule such as weipipe-keep"
            )
    if inner := inner_sizes(mesh):
        said = ", ".join(f"{name}={count}" for name, count in inner.items())
        raise UsageError(
            f"schedule 'auto' chooses for devices that each compute whole blocks, not with {said}; "
            "name a schedule, or give a plan: `jaxsys plan --plan FILE` splits features by itself"
        )
    return mesh


def resolve(
    schedule: str | Path | Schedule,
    *,
    devices: int,
    layers: int,
    microbatches: int | None = None,
) -> Schedule:
    """Makes or reads the schedule of one ring.

    Args:
        schedule: a name of `jaxsys.strategies.STRATEGIES`, a Schedule, or the path of a `.json`
            file: a plan from `jaxsys plan`, or what `Schedule.to_json` returned.
        devices: P, how many devices the ring has.
        layers: L, of the model.
        microbatches: M over the ring; 2 P unless the schedule says.

    Raises:
        UsageError: if there is no such name or file, or the schedule is for other sizes.
    """
    if isinstance(schedule, str) and schedule in STRATEGIES:
        return for_layers(
            schedule,
            devices=devices,
            microbatches=2 * devices if microbatches is None else microbatches,
            layers=layers,
        )
    if not isinstance(schedule, Schedule):
        if is_plan_file(schedule):
            schedule = read_plan(schedule, layers=layers).schedule
        else:
            schedule = read_schedule(schedule)
    if schedule.devices != devices:
        raise UsageError(
            f"schedule {schedule.name} is for {schedule.devices} devices, the ring has {devices}; "
            f"use devices={schedule.devices}"
        )
    if microbatches not in (None, schedule.microbatches):
        raise UsageError(
            f"schedule {schedule.name} takes {schedule.microbatches} microbatches, "
            f"not microbatches={microbatches}; leave it out, or plan again"
        )
    return schedule


def _planned(schedule: Any, layers: int) -> PlannedRun | None:
    if isinstance(schedule, Schedule):
        return None
    if isinstance(schedule, str | Path):
        known = isinstance(schedule, str) and schedule in STRATEGIES
        return read_plan(schedule, layers=layers) if not known and is_plan_file(schedule) else None
    return run_of(schedule, layers=layers)


def _mesh(asked: Asked, schedule: Schedule | None) -> Mesh:
    """The mesh given, or one as asked; refused where it is not as the schedule says."""
    mesh, devices = asked.mesh, asked.devices
    free = _open(asked.schedule)
    wanted = {
        name: agreed(asked.around.get(name), axis, schedule, free=free)
        for name, axis in AROUND.items()
    }
    around = math.prod(wanted.values())
    if mesh is None:
        if schedule is not None:
            ring = schedule.devices
            if devices is not None and devices != ring * around:
                rings = f"{ring}" if around == 1 else _said(ring, wanted)
                raise UsageError(
                    f"devices={devices}, but schedule {schedule.name} is for {rings} devices; "
                    f"use devices={ring * around}, or plan again"
                )
        else:
            ring = max(1, len(jax.devices()) // around) if devices is None else devices
        return make_mesh(ring, **wanted, devices=request_devices(ring * around))
    if devices is not None and devices not in (mesh.shape[RING], mesh.size):
        raise UsageError(f"devices={devices} but the mesh's ring has {mesh.shape[RING]}")
    for axis, count in wanted.items():
        have = mesh.shape.get(axis, 1)
        said = count > 1 or (schedule is not None and not free)
        if said and have != count:
            if AROUND[axis].copies and schedule is not None:
                raise UsageError(
                    f"the mesh has {have} rings, but schedule {schedule.name} is planned for "
                    f"{count} side by side; use make_mesh({schedule.devices}, {count}), or plan "
                    "again"
                )
            raise UsageError(
                f"{AROUND[axis].asked}={count}, but the mesh's axis {axis!r} has {have}; leave one "
                "of them out"
            )
    return mesh


def _said(ring: int, wanted: Mapping[str, int]) -> str:
    """How devices are divided, in words."""
    beside = {name: count for name, count in wanted.items() if AROUND[name].copies and count > 1}
    parts = "".join(f"{count} {AROUND[name].name} of " for name, count in beside.items())
    parts += f"{ring}"
    each = math.prod(count for name, count in wanted.items() if AROUND[name].within)
    return f"{parts}, each of {each}" if each > 1 else parts


def _open(schedule: Any) -> bool:
    """Whether more may stand around what is given than it says: it is a name or a `Schedule`, of
    one ring. A file or a plan says how many devices there are in all."""
    return isinstance(schedule, Schedule) or (
        isinstance(schedule, str) and schedule in (*STRATEGIES, AUTO)
    )


def agreed(count: int | None, axis: Axis, schedule: Schedule | None, *, free: bool) -> int:
    """How many are asked for, which what a schedule says may not contradict.

    Args:
        count: what is asked for.
        axis: along what.
        schedule: what says so too, if anything does.
        free: whether it leaves those open that it does not split.
    """
    says = getattr(schedule, axis.name, 1)
    if count is None:
        return says
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"{axis.asked}={count!r} must be a whole number of at least 1")
    if schedule is not None and says != count and not (free and says == 1):
        raise UsageError(
            f"{axis.asked}={count}, but schedule {schedule.name} is planned for {says}; leave it "
            "out, or plan again"
        )
    return count


def _as_planned(asked: Asked, planned: PlannedRun) -> Compute:
    """The numbers of the plan, which what is asked for besides may not contradict."""
    usual, compute = Compute(), asked.compute
    says = {
        "compute_dtype": planned.dtype,
        "gradient_dtype": planned.gradients,
        "recompute": planned.recompute,
    }
    for field in fields(Compute):
        name, value = field.name, says.get(field.name)
        if value is None:
            continue
        have = getattr(compute, name)
        if name != "recompute":
            value, have = jnp.dtype(value), jnp.dtype(have)
        named = name in asked.named or have != getattr(usual, name)
        if named and have != value:
            again = "plan again"
            if name in _BYTES:  # what a search does not choose
                size = f"{_BYTES[name]}={jnp.dtype(have).itemsize}"
                again = f"plan with precision=planner.Precision({size})"
            raise UsageError(
                f"{name}={have}, but the plan is for {name}={value}; leave it out, or {again}"
            )
        compute = replace(compute, **{name: value})
    return compute


def read_schedule(path: Any) -> Schedule:
    """The schedule in a file.

    Raises:
        UsageError: if there is no such file, or no schedule in it.
    """
    if not isinstance(path, str | Path):
        raise UsageError(
            f"schedule={path!r} is none; use a name, a Schedule, a plan or the path of a file"
        )
    file = Path(path)
    if file.suffix != ".json":
        names = ", ".join(STRATEGIES)
        is_what = "is no .json file" if file.exists() else "is not known"
        is_what += did_you_mean(str(path), STRATEGIES)
        raise UsageError(
            f"schedule {str(path)!r} {is_what}; use {names}, or a file that `jaxsys plan` wrote"
        )
    text = read_text(file, what="schedule", most_bytes=64 * MIB)
    try:
        schedule = Schedule.from_json(text)
    except ValueError as error:
        raise UsageError(
            f"schedule {str(path)!r} is neither a plan nor a schedule that `jaxsys plan` wrote: "
            f"{error}"
        ) from None
    try:
        check(schedule)
    except ScheduleError as error:
        raise UsageError(
            f"schedule {str(path)!r} breaks a rule: {error}; have `jaxsys plan` write it anew"
        ) from None
    return schedule
