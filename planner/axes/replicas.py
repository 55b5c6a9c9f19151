"""Replicas: copies of everything else, whose gradients are added up once a step (`costs.frame`)."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, final

from jaxsys.axes import SHARERS
from jaxsys.planner.axes.base import PlannedAxis, Rule
from jaxsys.planner.constraints import Domains, Relation
from jaxsys.strategies import State

if TYPE_CHECKING:
    from jaxsys.planner.plans import Plan
    from jaxsys.planner.problem import Problem


@final
class Replicas(PlannedAxis):
    """Whole rings beside each other."""

    name = "replicas"

    def rules(self, problem: "Problem", domains: Domains, rule: Rule) -> Iterable[Relation]:
        del problem, domains
        yield rule(
            "replicas stand around a shard group, stages or a ring",
            ("replicas", "state", "shard", "stages", "ring", *SHARERS),
            lambda r, t, s, p, w, *c: (
                r == 1 or s * p * w > 1 or (math.prod(c) > 1 and t == State.SPLIT)
            ),
        )
        yield rule(
            "state is split over a shard group and those that share its sequences, and by one "
            "that stands inside replicas",
            ("replicas", "state", "shard", "stages", "ring", *SHARERS),
            lambda r, t, s, p, w, *c: (
                s == 1 or r == 1 if t == State.WHOLE else s * math.prod(c) > 1 and p * w == 1
            ),
        )

    def why_not(self, plan: "Plan") -> str | None:
        if plan.state is State.SPLIT and (plan.group == 1 or plan.owners > 1):
            return (
                f"it splits state over {plan.replicas} replicas, and replicas keep all of the "
                "state that a stage or ring keeps"
            )
        return None

    def words(self, plan: "Plan", *, alone: bool) -> str:
        del alone
        return f"{plan.replicas} times"
