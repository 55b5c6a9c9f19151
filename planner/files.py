"""Plan files: a found plan, what was asked, and what is predicted; versioned, never overwritten."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jaxsys
from jaxsys.errors import UsageError
from jaxsys.hardware import GIB
from jaxsys.planner.plans import Plan
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import describe, recognise
from jaxsys.planner.report import limit_gib
from jaxsys.planner.search import Found

FORMAT = "jaxsys-plan-file"
FORMAT_VERSION = 1


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
        "batch": problem.batch,
    }


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
        return f" but a {value['format']} file"
    return f": its format must be {FORMAT!r}"


def load_plan(path: str | Path, problem: Problem | None = None) -> Plan:
    """Reads a plan file.

    Args:
        path: the file.
        problem: if given, the plan must have been made for its model, cluster and batch.

    Raises:
        UsageError: if the file cannot be read, is of another version, or is for something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"plan {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"plan {path} is not JSON: {error}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UsageError(f"{path} is not a plan file{told_apart(value)}")
    if value.get("version") != FORMAT_VERSION:
        raise UsageError(
            f"plan {path} has version {value.get('version')!r}; this jaxsys reads version "
            f"{FORMAT_VERSION}: make the plan again"
        )
    if problem is not None:
        made_for = value.get("for", {})
        for key, wanted in fingerprint(problem).items():
            if made_for.get(key) != wanted:
                raise UsageError(
                    f"plan {path} is for {key}={made_for.get(key)!r}, not {wanted!r}: make the "
                    "plan again"
                )
    try:
        plan = Plan.from_json(value.get("plan", {}))
    except UsageError as error:
        raise UsageError(f"plan {path}: {error}") from None
    _check_sizes(path, plan, value.get("for", {}))
    return plan


def _check_sizes(path: str | Path, plan: Plan, made_for: Any) -> None:
    """Raises UsageError where a plan's sizes are no sizes, or do not make up what it is for."""
    ways = ("replicas", "shard", "features", "stages", "ring")
    for name in (*ways, "microbatch_size", "lookahead", "chunks", "delay"):
        size, least = getattr(plan, name), 0 if name == "delay" else 1
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise UsageError(
                f"plan {path}: its field {name!r} is {size!r}, and must be a whole number of at "
                f"least {least}; make the plan again"
            )
    if not isinstance(made_for, dict):
        raise UsageError(f"plan {path}: its field 'for' is {made_for!r}; make the plan again")
    for name in ("devices", "layers", "batch"):
        size = made_for.get(name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UsageError(
                f"plan {path}: its field 'for.{name}' is {size!r}, and must be a whole number of "
                "at least 1; make the plan again"
            )
    if plan.devices != made_for["devices"]:
        product = " x ".join(f"{name} {getattr(plan, name)}" for name in ways)
        raise UsageError(
            f"plan {path}: {product} is {plan.devices} devices, but its field 'for.devices' is "
            f"{made_for['devices']}; make the plan again"
        )
    unit = plan.replicas * plan.shard * plan.microbatch_size
    if made_for["batch"] % unit:
        raise UsageError(
            f"plan {path}: replicas {plan.replicas} x shard {plan.shard} x microbatch_size "
            f"{plan.microbatch_size} does not divide its field 'for.batch', {made_for['batch']}; "
            "make the plan again"
        )
