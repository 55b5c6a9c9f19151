"""The command that runs a plan: options of `jaxsys train`, where they can say all of it."""

from jaxsys.planner.axes import PLANNED
from jaxsys.planner.estimates import POLICY
from jaxsys.planner.plans import Plan
from jaxsys.strategies import STRATEGIES, called


def train_command(
    plan: Plan, *, model: str, sequence_length: int, microbatches: int, gradients: str
) -> str | None:
    """A plan as `jaxsys train` is asked for it; None where only a plan's file says all of it.

    Args:
        plan: what is to be run.
        model: a preset's name.
        sequence_length: T.
        microbatches: of its schedule, see `jaxsys.planner.estimates.microbatches`.
        gradients: the dtype in which gradients are summed and sent.
    """
    name = called(plan.choices)
    strategy = None if name is None else STRATEGIES.get(name)
    alike = len(set(plan.layers)) == 1 and plan.lookahead == 1
    if strategy is None or strategy.place is None or not strategy.place.covers(plan.choices):
        return None
    if not alike:
        return None
    options = [("model", model), ("schedule", name), ("devices", plan.devices)]
    options += [option for axis in PLANNED.values() for option in axis.options(plan)]
    options += [
        ("microbatches", microbatches),
        ("microbatch-size", plan.microbatch_size),
        ("sequence-length", sequence_length),
        ("recompute", POLICY[plan.layers[0].residual]),
        ("dtype", "bfloat16"),
        ("gradients", None if gradients == "float32" else gradients),
    ]
    said = (f"--{option} {value}" for option, value in options if value is not None)
    return f"jaxsys train {' '.join(said)}"
