"""Experts shared by rings: rows go to the device that has their expert, and back.

In each pass every device sends room for all rows that could go to each other one, twice: there and
back. Its experts' gradients are complete once rows are back; those of everything else it adds up
with the rings beside it.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, final

from jaxsys.planner.axes.base import NOTHING, Joined, PlannedAxis, Rule, Split
from jaxsys.planner.constraints import Domains, Relation

if TYPE_CHECKING:
    from jaxsys.hardware import DeviceSpec
    from jaxsys.planner.plans import Plan
    from jaxsys.planner.problem import Problem
    from jaxsys.planner.workload import BlockWork, Traced, Workload


@final
class Experts(PlannedAxis):
    """Rings that share the experts of every block."""

    name = "experts"
    owns = True

    def rules(self, problem: "Problem", domains: Domains, rule: Rule) -> Iterable[Relation]:
        del domains
        shares = problem.workload(1).expert_ways
        said = ", ".join(map(str, shares))
        yield rule(f"experts shared by {said} devices only", (self.name,), shares.__contains__)

    def ways_to_share(
        self, workload: "Workload", parts: int
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        if parts in workload.expert_ways:
            yield self.name, {self.name: parts}

    def joined(
        self,
        block: "BlockWork",
        split: Split,
        device: "DeviceSpec",
        *,
        activation_bytes: float,
        recompute: str,
    ) -> tuple[Joined, Joined]:
        """A pass's rows to their experts and back, put in their places before and after."""
        del activation_bytes, recompute
        if block.experts is None:
            return NOTHING, NOTHING
        parts = split.parts.experts
        size = block.experts.exchanged_bytes(parts)
        there = split.links[self.name].collective_s(size, devices=parts)
        placed = 4 * size / device.memory_bytes_per_s
        rows = Joined(time_s=2 * there + placed, sent_bytes=2 * (parts - 1) / parts * size)
        return rows, rows

    def own_parameters(self, block: "BlockWork") -> float:
        return 0.0 if block.experts is None else block.experts.parameters

    def traced(self, block: "BlockWork", parts: int) -> "Traced | None":
        return None if block.experts is None else block.experts.traced(parts)

    def code(self, plan: "Plan") -> str:
        del plan
        return "ep"

    def words(self, plan: "Plan", *, alone: bool) -> str:
        return f"of {plan.experts}" if alone else f"experts over {plan.experts} (ep)"

    def beyond(self, plan: "Plan") -> str:
        return f"experts shared by {plan.experts} devices"
