"""Runs a plan that `jaxsys plan` wrote: what of it is a schedule, and what stands around it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jaxsys.errors import UsageError
from jaxsys.fields import read_fields
from jaxsys.files import read_json, read_text
from jaxsys.lowering import Recompute
from jaxsys.planner.evaluate import POLICY
from jaxsys.planner.files import FORMAT, load_plan
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.runs import why_not
from jaxsys.schedule import Schedule

DTYPES = ("float32", "bfloat16")
"""Of compute and of gradients, as plans name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """What a plan file says of a run."""

    schedule: Schedule
    """Of one replica."""
    recompute: Recompute
    """One policy for all layers; a schedule that shards takes a tuple, one a layer."""
    replicas: int
    microbatch_size: int
    sequence_length: int | None
    """Tokens that it was planned for; None where the file does not say."""
    dtype: str | None
    """Of compute, likewise."""
    gradients: str | None
    """In what gradients are summed and sent, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """All that `to_schedule` reads of a planning problem."""

    layers: int
    batch: int


def is_plan_file(path: str | Path) -> bool:
    """Whether the file holds a plan, rather than a schedule or something else."""
    try:
        value = read_json(path)
    except UsageError:
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def devices_of(path: str | Path, *, replicas: int = 1) -> int | None:
    """How many devices the plan or schedule in a file is for; None if the file holds neither."""
    if is_plan_file(path):
        return load_plan(path).devices
    try:
        return replicas * Schedule.from_json(read_text(path)).devices
    except ValueError:
        return None


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
    asked: Any = _Asked(layers=layers, batch=file.fields("for").integer("batch"))
    schedule = to_schedule(asked, plan)
    policies = tuple(POLICY[path.residual] for path in plan.layers)
    recompute: Any = policies[0] if len(set(policies)) == 1 else policies
    length = dtype = gradients = None
    if "request" in file:
        request = file.fields("request")
        if "sequence_length" in request:
            length = request.integer("sequence_length", least=1)
        dtype = request.choice("dtype", DTYPES, None)
        gradients = request.choice("gradients", DTYPES, None)
    return PlannedRun(
        schedule=schedule,
        recompute=cast(Recompute, recompute),
        replicas=plan.replicas,
        microbatch_size=plan.microbatch_size,
        sequence_length=length,
        dtype=dtype,
        gradients=gradients,
    )
