"""The axes around a schedule's devices and within each, as the planner sees them: a file an axis.

`PLANNED` has one for each of `jaxsys.axes.AROUND`; the space, costs and names of plans ask it.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from jaxsys.axes import AROUND, parts_within
from jaxsys.planner.axes.base import NO_LINK, Copies, Joined, PlannedAxis, Split
from jaxsys.planner.axes.context import Context
from jaxsys.planner.axes.experts import Experts
from jaxsys.planner.axes.features import Features
from jaxsys.planner.axes.members import Members
from jaxsys.planner.axes.replicas import Replicas

if TYPE_CHECKING:
    from jaxsys.planner.cluster import Cluster
    from jaxsys.planner.plans import Plan

__all__ = ["NO_LINK", "PLANNED", "Joined", "PlannedAxis", "Split", "split_of_plan"]

_OF_NAME = {axis.name: axis for axis in (Replicas(), Experts(), Context(), Members(), Features())}

PLANNED: Mapping[str, PlannedAxis] = MappingProxyType(
    {axis.name: _OF_NAME[axis.name] for axis in AROUND.values()}
)
"""Name -> axis, from the outermost in."""


def split_of_plan(cluster: "Cluster", plan: "Plan") -> Split:
    """How a plan's axes stand in a cluster: those within a place nearest, then the schedule's
    devices, then whole rings, each axis' devices as far apart as all nearer ones are many.

    Args:
        cluster: what it runs on.
        plan: the plan.
    """
    sharers = plan.sharers
    inner = parts_within(plan) * plan.schedule_devices
    outer = [axis.name for axis in AROUND.values() if not axis.within]
    rings = math.prod(getattr(plan, name) for name in outer)

    def copies(count: int, near: int) -> Copies:
        if count * sharers == 1:
            return Copies()
        # Where no ring stands beside, those of a place alone add up.
        near = parts_within(plan, shards=False) if count == 1 else near // sharers
        return Copies(count=count * sharers, link=cluster.group(count * sharers, near))

    axes: list[PlannedAxis] = []
    links, own = {}, {}
    near = 1
    for axis in reversed(tuple(AROUND.values())):
        if not axis.within and near < inner:
            near = inner
        parts = getattr(plan, axis.name)
        if parts == 1:
            continue
        planned = PLANNED[axis.name]
        axes.append(planned)
        links[axis.name] = planned.link(cluster, plan, near)
        near *= parts
        if planned.owns:
            own[axis.name] = copies(rings // parts, near)
    return Split(
        parts=plan, axes=tuple(axes), links=links, copies=copies(rings, inner), own_copies=own
    )
