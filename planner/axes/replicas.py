"""Replicas: copies of everything else, whose gradients are added up once a step (`costs.frame`)."""

from typing import TYPE_CHECKING, final

from jaxsys.planner.axes.base import PlannedAxis

if TYPE_CHECKING:
    from jaxsys.planner.plans import Plan


@final
class Replicas(PlannedAxis):
    """Whole rings beside each other."""

    name = "replicas"

    def words(self, plan: "Plan", *, alone: bool) -> str:
        del alone
        return f"{plan.replicas} times"

    def beyond(self, plan: "Plan") -> str:
        return f"{plan.replicas} replicas of its schedule"
