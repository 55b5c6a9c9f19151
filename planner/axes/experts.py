"""Experts shared by rings: rows go to the device that has their expert, and back.

In each pass every device sends room for all rows that could go to each other one, twice: there and
back. Its experts' gradients are complete once rows are back; those of everything else it adds up
with the rings beside it.
"""

from typing import TYPE_CHECKING, final

from jaxsys.axes import EXPERT
from jaxsys.planner.axes.base import NOTHING, Joined, SharedBlocks, Split

if TYPE_CHECKING:
    from jaxsys.hardware import DeviceSpec
    from jaxsys.planner.plans import Plan
    from jaxsys.planner.workload import BlockWork, Traced


@final
class Experts(SharedBlocks):
    """Rings that share the experts of every block."""

    name = "experts"
    owns = True

    said = "experts shared by {} devices only"

    whole = "experts are whole on each device"

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
        return None if block.experts is None else block.experts.traced({EXPERT: parts})

    def code(self, plan: "Plan") -> str:
        del plan
        return "ep"

    def words(self, plan: "Plan", *, alone: bool) -> str:
        return f"of {plan.experts}" if alone else f"experts over {plan.experts} (ep)"
