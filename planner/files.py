"""Plan files: a found plan, what was asked, and what is predicted; versioned, never overwritten."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jaxsys
from jaxsys.axes import AROUND, AXES, BATCH
from jaxsys.errors import FileError, UsageError
from jaxsys.fields import Fields
from jaxsys.files import read_json, shown
from jaxsys.hardware import GIB
from jaxsys.model.shapes import PRESETS, find_preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.plans import Plan
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import describe, recognise
from jaxsys.planner.report import limit_gib
from jaxsys.planner.search import Found

FORMAT = "jaxsys-plan-file"
FORMAT_VERSION = 1
MOST_MICROBATCHES = 65_536
"""That a device of a plan in a file may be given in a step."""


def fingerprint(problem: Problem) -> dict[str, Any]:
    """What a plan must agree with to be used: model sizes, cluster, batch."""
    cluster, workload = problem.cluster, problem.workload(1)
    return {
        "layers": workload.layers,
        "parameters": float(workload.parameters),
        "device": cluster.device.name,
        "devices": cluster.devices,
        "link": cluster.link.name,
        "node_devices": cluster.node_devices,
        "node_link": None if cluster.node_link is None else cluster.node_link.name,
        **pods_of(cluster),
        "batch": problem.batch,
    }


def pods_of(cluster: Cluster) -> dict[str, Any]:
    """What a file says of a cluster's pods; nothing where there are none."""
    if cluster.pod_link is None:
        return {}
    return {"pod_devices": cluster.pod_devices, "pod_link": cluster.pod_link.name}


def plan_file(problem: Problem, found: Found, *, request: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON value of a plan file."""
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "jaxsys": jaxsys.__version__,
        "kind": "simulated",
        "name": recognise(found.plan),
        "description": describe(found.plan),
        "for": fingerprint(problem),
        "request": dict(request),
        "predicted": {
            "step_s": found.step_s,
            "compute_s": found.compute_s,
            "peak_gib": found.peak_bytes / GIB,
            "sent_gb": found.sent_bytes / 1e9,
            "memory_limit_gib": limit_gib(problem.memory_bytes),
        },
        "plan": found.plan.to_json(),
    }


def told_apart(value: Any) -> str:
    """In words what a JSON value is that was taken for something else."""
    if isinstance(value, dict) and "tasks" in value and "moves" in value:
        return " but a schedule: `jaxsys train --schedule` takes it, nothing plans from it"
    if isinstance(value, dict) and isinstance(value.get("format"), str):
        return f" but a {shown(value['format'])[1:-1]} file"
    return f": its format must be {FORMAT!r}"


def load_plan(path: str | Path, problem: Problem | None = None) -> Plan:
    """Reads a plan file.

    Args:
        path: the file.
        problem: if given, the plan must have been made for its model, cluster and batch.

    Raises:
        UsageError: if the file cannot be read, is of another version, or is for something else.
    """
    value = read_json(path, what="plan")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UsageError(f"{path} is not a plan file{told_apart(value)}")
    if value.get("version") != FORMAT_VERSION:
        raise UsageError(
            f"plan {path} has version {shown(value.get('version'))}; this jaxsys reads version "
            f"{FORMAT_VERSION}: make the plan again"
        )
    file = Fields(value, name=f"plan {path}", hint="make the plan again")
    if problem is not None:
        made_for = file.fields("for")
        for key, wanted in fingerprint(problem).items():
            if made_for.get(key) != wanted:
                raise UsageError(
                    f"plan {path} is for {key}={shown(made_for.get(key))}, not {wanted!r}: make "
                    "the plan again"
                )
    try:
        plan = Plan.from_json(file.fields("plan").value)
    except UsageError as error:
        raise UsageError(f"plan {path}: {error}") from None
    _check_sizes(path, plan, file.fields("for"))
    if "request" in file:
        _check_request(file.fields("request"), file.fields("for"))
    return plan


def _check_request(request: Fields, made_for: Fields) -> None:
    """Raises UsageError where what was asked is not what the plan is for."""
    if request.integer("devices", made_for.get("devices")) != made_for.get("devices"):
        raise request.fault(
            f"its field 'request.devices' is {request.get('devices')}, but 'for.devices' is "
            f"{made_for.get('devices')}"
        )
    if "microbatches" in request and "microbatch_size" in request:
        count = request.integer("microbatches", least=1)
        size = request.integer("microbatch_size", least=1)
        if count * size != made_for.get("batch"):
            raise request.fault(
                f"its field 'for.batch' is {made_for.get('batch')}, but 'request.microbatches' x "
                f"'request.microbatch_size' is {count} x {size}"
            )
    named = find_preset(request.text("model")) if "model" in request else None
    has = made_for.number("parameters", None, least=1)
    if named is None or has is None:
        return
    count = PRESETS[named].parameter_count()
    if has != count:
        raise request.fault(
            f"its field 'request.model' is {shown(request.get('model'))}, of {count:,.0f} "
            f"parameters, but 'for.parameters' is {has:,.0f}"
        )


def _check_sizes(path: str | Path, plan: Plan, made_for: Fields) -> None:
    """Raises UsageError where a plan's sizes do not make up what it is for."""
    devices = made_for.integer("devices", least=1)
    made_for.integer("layers", least=1)
    batch = made_for.integer("batch", least=1)
    if plan.devices != devices:
        product = " x ".join(f"{name} {getattr(plan, name)}" for name in AXES)
        raise FileError(
            f"plan {path}: {product} is {plan.devices} devices, but its field 'for.devices' is "
            f"{devices}; make the plan again"
        )
    cuts = (*(AROUND[name].name for name in BATCH), "shard", "microbatch_size")
    unit = math.prod(getattr(plan, name) for name in cuts)
    if batch % unit:
        raise FileError(
            f"plan {path}: {' x '.join(f'{name} {getattr(plan, name)}' for name in cuts)} "
            f"does not divide its field 'for.batch', "
            f"{batch}; make the plan again"
        )
    if batch // unit > MOST_MICROBATCHES:
        raise UsageError(
            f"plan {path}: its field 'for.batch', {batch}, is {batch // unit} microbatches a "
            f"device; at most {MOST_MICROBATCHES} are run; make the plan again"
        )
