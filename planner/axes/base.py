"""What the planner asks of an axis: where it is legal, what joins its devices and what that costs.

`PlannedAxis` answers for an axis that asks for nothing; an axis is a final class in a file of its
own that says what is otherwise with it. Costs add up what the axes of a plan say.

Legend: P devices along an axis.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxsys.axes import AXES, DividedAround
from jaxsys.planner.constraints import Domains, Relation
from jaxsys.schedule import Link

if TYPE_CHECKING:
    from jaxsys.hardware import DeviceSpec
    from jaxsys.planner.cluster import Cluster
    from jaxsys.planner.plans import Plan
    from jaxsys.planner.problem import Problem
    from jaxsys.planner.sharing import Pass
    from jaxsys.planner.workload import BlockWork, Traced, Workload

NO_LINK = Link()
UNSAID = "the model does not say how devices share them (LayeredModel.in_parts would)"
"""Why no devices share a block, of a model that gives no other reason."""

Rule = Callable[[str, tuple[str, ...], Callable[..., bool]], Relation]
"""(label, variables, predicate) -> a relation of the space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """What a pass sends to join what is split, and how long it waits for it."""

    time_s: float = 0.0
    sent_bytes: float = 0.0

    def __add__(self, other: "Joined") -> "Joined":
        return Joined(
            time_s=self.time_s + other.time_s, sent_bytes=self.sent_bytes + other.sent_bytes
        )

    def __rmul__(self, times: int) -> "Joined":
        return Joined(time_s=times * self.time_s, sent_bytes=times * self.sent_bytes)


NOTHING = Joined()


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Devices that have the same of some parameters, whose gradients they add up."""

    count: int = 1
    link: Link = NO_LINK


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a schedule's devices stand in the cluster: what is around them and inside each."""

    parts: DividedAround = DividedAround()  # noqa: RUF009 a value that nothing changes
    axes: tuple["PlannedAxis", ...] = ()
    """Those of more than one part."""
    links: Mapping[str, Any] = field(default_factory=dict)
    """Name of such an axis -> what joins its devices, see `PlannedAxis.link`."""
    copies: Copies = Copies()
    """All that have the same of what is no axis' own: whole rings beside each other, and those of
    a place that share its work where what they compute with is split over none of them."""
    own_copies: Mapping[str, Copies] = field(default_factory=dict)
    """Likewise of what is an axis' own, see `PlannedAxis.own_parameters`."""

    def parts_along(self, axis: "PlannedAxis") -> int:
        """How many devices there are along an axis."""
        return getattr(self.parts, axis.name)

    @property
    def pieces(self) -> int:
        """In how many pieces the devices of a place have what rests and travels there."""
        return math.prod(self.parts_along(axis) for axis in self.axes if axis.joins)

    def gathered(self, size_bytes: float) -> Joined:
        """A layer's pieces to all devices of a place, or the sum of its gradient to each its
        piece."""
        found = Joined()
        for axis in self.axes:
            if axis.joins:
                parts = self.parts_along(axis)
                found += Joined(
                    time_s=self.links[axis.name].collective_s(size_bytes, devices=parts),
                    sent_bytes=(parts - 1) / parts * size_bytes,
                )
        return found

    def parameters_of(self, block: "BlockWork") -> float:
        """What a device has of a block's parameters, cuts of features and pieces left aside."""
        own = {axis: axis.own_parameters(block) for axis in self.axes if axis.owns}
        common = block.parameters - sum(own.values())
        return common + sum(size / self.parts_along(axis) for axis, size in own.items())


class PlannedAxis:
    """An axis of `jaxsys.axes.AXES` as the planner sees it."""

    name: str
    owns: bool = False
    """Whether `own_parameters` has any."""
    inside: bool = False
    """Whether its devices send within attention, see `attention`."""
    joins: bool = False
    """Whether its devices have pieces of weights, joined before each pass, and cut the sum of
    their gradient among them after."""

    def domains(self, problem: "Problem", ways: tuple[int, ...]) -> Domains:
        """The values of its variables, before any rule.

        Args:
            problem: what is planned.
            ways: the counts that divide the devices.
        """
        del problem
        return {self.name: ways}

    def rules(self, problem: "Problem", domains: Domains, rule: Rule) -> Iterable[Relation]:
        """What shapes and data dependencies ask for."""
        del problem, domains, rule
        return ()

    def parts_in_rows(self, cluster: "Cluster", *, ring: bool) -> tuple[int, ...]:
        """Over how many devices along it, 2 or more, a comparison shows strategies beside 1.

        Args:
            cluster: what they run on.
            ring: whether weights travel in it.
        """
        del cluster, ring
        return ()

    def options(self, plan: "Plan") -> list[tuple[str, Any]]:
        """Options of `jaxsys train` that ask for a plan's parts along it, and their values; None
        is left out."""
        axis, parts = AXES[self.name], getattr(plan, self.name)
        if parts == 1:
            return []
        said = [(option.name.replace("_", "-"), getattr(plan, option.name)) for option in axis.more]
        return [(axis.asked, parts), *said]

    def why_not(self, plan: "Plan") -> str | None:
        """Why the trainer cannot run a plan that is split along it; None if it can."""
        del plan
        return None

    def ways_to_share(
        self, workload: "Workload", parts: int
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        """What a comparison shows of P devices along it: what a row is for, and fields of its plan.

        Args:
            workload: of a microbatch.
            parts: P, 2 or more.
        """
        del workload, parts
        return ()

    def link(self, cluster: "Cluster", plan: "Plan", near: int) -> Any:
        """What joins its devices, `near` apart."""
        return cluster.group(getattr(plan, self.name), near)

    def joined(
        self,
        block: "BlockWork",
        split: Split,
        device: "DeviceSpec",
        *,
        activation_bytes: float,
        recompute: str,
    ) -> tuple[Joined, Joined]:
        """What a block's devices send each other forward, and backward without what is recomputed.

        Args:
            block: on one microbatch.
            split: of the plan.
            device: what runs it.
            activation_bytes: of the block's input.
            recompute: the policy.
        """
        del block, split, device, activation_bytes, recompute
        return NOTHING, NOTHING

    def attention(
        self,
        block: "BlockWork",
        split: Split,
        device: "DeviceSpec",
        attention_s: float,
        *,
        backward: bool,
    ) -> "Pass":
        """A pass through a block's attention, of which products alone take `attention_s`."""
        raise NotImplementedError

    def attention_again(self, block: "BlockWork", split: Split) -> Joined:
        """What makes queries, keys and values of its backward pass again, beside the products."""
        raise NotImplementedError

    def own_parameters(self, block: "BlockWork") -> float:
        """Parameters of a block that it alone splits: other axes outside a ring have copies."""
        del block
        return 0.0

    def traced(self, block: "BlockWork", parts: int) -> "Traced | None":
        """What a block's programs keep and hold where P devices have it; None: as on one."""
        del block, parts
        return None

    def code(self, plan: "Plan") -> str | None:
        """What a plan is called that is split along it alone; None where that has another name."""
        del plan
        return None

    def words(self, plan: "Plan", *, alone: bool) -> str:
        """How a plan is split along it.

        Args:
            plan: the plan.
            alone: whether the plan is called by its `code`.
        """
        raise NotImplementedError


class SharedBlocks(PlannedAxis):
    """An axis whose devices share every block, as the workload says that they can."""

    said: str
    """Its rule in words, with {} for the numbers of devices."""
    whole: str
    """The same where each device has all of a block."""

    def ways(self, workload: "Workload") -> tuple[int, ...]:
        """Numbers of devices that can share a block."""
        return workload.ways.get(self.name, (1,))

    def rules(self, problem: "Problem", domains: Domains, rule: Rule) -> Iterable[Relation]:
        del domains
        workload = problem.workload(1)
        ways = self.ways(workload)
        said = self.said.format(", ".join(map(str, ways)))
        if ways == (1,):
            said = f"{self.whole}: {workload.unshared.get(self.name, UNSAID)}"
        yield rule(said, (self.name,), ways.__contains__)

    def ways_to_share(
        self, workload: "Workload", parts: int
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        if parts in self.ways(workload):
            yield self.name, {self.name: parts}
