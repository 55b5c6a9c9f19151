"""Runs a plan that `jaxsys plan` wrote: what of it is a schedule, and what stands around it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsys.axes import parts_around
from jaxsys.errors import UsageError
from jaxsys.fields import read_fields
from jaxsys.files import read_json, read_text
from jaxsys.lowering import Recompute
from jaxsys.planner.api import Planned
from jaxsys.planner.estimates import POLICY
from jaxsys.planner.files import FORMAT, load_plan
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.plans import Plan
from jaxsys.planner.runs import why_not
from jaxsys.schedule import Schedule

DTYPES = ("float32", "bfloat16")
"""Of compute and of gradients, as plans name them."""
_BY_BYTES = {4.0: "float32", 2.0: "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """What a plan file says of a run."""

    schedule: Schedule
    """Of one replica."""
    recompute: Recompute | tuple[Recompute, ...]
    """One policy for all layers; a schedule that shards takes a tuple, one a layer."""
    microbatch_size: int
    sequence_length: int | None
    """Tokens that it was planned for; None where the file does not say."""
    dtype: str | None
    """Of compute, likewise."""
    gradients: str | None
    """In what gradients are summed and sent, likewise."""
    parameters: float | None
    """How many the model has that it was planned for, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Of a run, as `jaxsys.planner.problem.Sizes`."""

    layers: int
    batch: int


def is_plan_file(path: str | Path) -> bool:
    """Whether the file holds a plan, rather than a schedule or something else."""
    try:
        value = read_json(path)
    except UsageError:
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def devices_of(path: str | Path) -> int | None:
    """How many devices the plan or schedule in a file is for; None if the file holds neither."""
    if is_plan_file(path):
        return load_plan(path).devices
    try:
        schedule = Schedule.from_json(read_text(path))
        return schedule.devices * math.prod(parts_around(schedule).values())
    except ValueError:
        return None


def run_of(found: Planned, *, layers: int) -> PlannedRun:
    """What `jaxsys.planner.plan` found for a `LayeredModel`, as a run of a model of L layers.

    Raises:
        UsageError: if it is no such plan, is for another number of layers, or is not run, see
            `jaxsys.planner.runs.why_not`.
    """
    if not isinstance(found, Planned):
        raise UsageError(
            f"{type(found).__name__} is no plan; use what `jaxsys.planner.plan` returned, or the "
            "path of a file that `jaxsys plan` wrote"
        )
    if not found.problem.lowered:
        raise UsageError(
            "the plan is of a loss function, which XLA runs by its shardings; plan with the "
            "LayeredModel to train it here"
        )
    refused = why_not(found.plan)
    if refused is not None:
        raise UsageError(f"the plan is not run: {refused}; narrow the space, and plan again")
    precision = found.problem.precision
    return PlannedRun(
        schedule=to_schedule(_Sizes(layers=layers, batch=found.problem.batch), found.plan),
        recompute=_recompute(found.plan),
        microbatch_size=found.plan.microbatch_size,
        sequence_length=None,
        dtype=_dtype("weight_bytes", precision.weight_bytes),
        gradients=_dtype("gradient_bytes", precision.gradient_bytes),
        parameters=None,
    )


def _recompute(plan: Plan) -> Any:
    policies = tuple(POLICY[path.residual] for path in plan.layers)
    return policies[0] if len(set(policies)) == 1 else policies


def _dtype(name: str, size: float) -> str:
    if size not in _BY_BYTES:
        raise UsageError(
            f"the plan is reckoned with {name}={size:g}, which no dtype of a step has; plan with "
            "2 (bfloat16) or 4 (float32)"
        )
    return _BY_BYTES[size]


def read_plan(path: str | Path, *, layers: int) -> PlannedRun:
    """Reads a plan file for a model of L layers.

    Raises:
        UsageError: if it is for another number of layers, or holds what is not run, see
            `jaxsys.planner.runs.why_not`.
    """
    plan = load_plan(path)
    file = read_fields(path, what="plan", hint="make the plan again")
    refused = why_not(plan)
    if refused is not None:
        raise UsageError(
            f"plan {path} is not run: {refused}; `jaxsys plan --plan` writes plans that are"
        )
    sizes = _Sizes(layers=layers, batch=file.fields("for").integer("batch"))
    schedule = to_schedule(sizes, plan)
    length = dtype = gradients = None
    if "request" in file:
        request = file.fields("request")
        if "sequence_length" in request:
            length = request.integer("sequence_length", least=1)
        dtype = request.choice("dtype", DTYPES, None)
        gradients = request.choice("gradients", DTYPES, None)
    return PlannedRun(
        schedule=schedule,
        recompute=_recompute(plan),
        microbatch_size=plan.microbatch_size,
        sequence_length=length,
        dtype=dtype,
        gradients=gradients,
        parameters=file.fields("for").number("parameters", None),
    )
