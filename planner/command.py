"""The command that runs a plan: options of `jaxsys train`, where they can say all of it."""

from jaxsys.axes import AROUND, CONTEXT
from jaxsys.planner.evaluate import POLICY
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
        microbatches: of its schedule, see `jaxsys.planner.evaluate.microbatches`.
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
    around = [axis for axis in AROUND.values() if axis.mesh != CONTEXT]
    options += [(axis.asked, getattr(plan, axis.name)) for axis in around]
    if plan.split is not None:
        options += [("context", plan.context), ("context-by", plan.context_by)]
        options += [("context-exchange", plan.context_exchange)]
    options += [
        ("microbatches", microbatches),
        ("microbatch-size", plan.microbatch_size),
        ("sequence-length", sequence_length),
        ("recompute", POLICY[plan.layers[0].residual]),
        ("dtype", "bfloat16"),
        ("gradients", None if gradients == "float32" else gradients),
    ]
    left_out = {axis.asked: 1 for axis in around} | {"context-exchange": None, "gradients": None}
    said = (
        f"--{option} {value}"
        for option, value in options
        if option not in left_out or value != left_out[option]
    )
    return f"jaxsys train {' '.join(said)}"
