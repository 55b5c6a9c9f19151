"""Members of a place: a ring's node, whose devices each hold and send a piece of what is there.

A layer's pieces are joined among them before each pass, and the sum of its gradient cut among them
after: `Split.gathered` says what either takes.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, final

from jaxsys.axes import CUT, SHARERS
from jaxsys.planner.axes.base import PlannedAxis, Rule
from jaxsys.planner.constraints import Domains, Relation

if TYPE_CHECKING:
    from jaxsys.planner.cluster import Cluster
    from jaxsys.planner.plans import Plan
    from jaxsys.planner.problem import Problem


@final
class Members(PlannedAxis):
    """Devices that share each place of a ring."""

    name = "members"
    joins = True

    def domains(self, problem: "Problem", ways: tuple[int, ...]) -> Domains:
        """Those of a node that is not alone."""
        del ways
        node, alone = problem.cluster.node_devices or 1, problem.cluster.nodes == 1
        return {self.name: (1,) if alone else tuple(n for n in range(1, node + 1) if node % n == 0)}

    def parts_in_rows(self, cluster: "Cluster", *, ring: bool) -> tuple[int, ...]:
        """A node's: on nodes, rings stand in one and in many."""
        node = cluster.node_devices or 1
        return (node,) if ring and node > 1 and cluster.nodes > 1 else ()

    def rules(self, problem: "Problem", domains: Domains, rule: Rule) -> Iterable[Relation]:
        del domains
        node = problem.cluster.node_devices or 1
        yield rule(
            "members share the places of a ring", ("members", "ring"), lambda m, w: m == 1 or w > 1
        )
        yield rule(
            f"members and the devices of their features are of one node of {node}",
            ("members", *(axis.name for axis in CUT)),
            lambda m, *f: m == 1 or node % (m * math.prod(f)) == 0,
        )
        yield rule(
            "members of a place have whole sequences of their own",
            ("members", *SHARERS),
            lambda m, *c: m == 1 or set(c) == {1},
        )

    def why_not(self, plan: "Plan") -> str | None:
        if plan.members == 1:
            return None
        if plan.ring == 1:
            return f"it has {plan.members} members share the places of a ring, and has no ring"
        if plan.split is not None:
            return f"it has both {plan.members} members of a place and context={plan.split.parts}"
        return None

    def words(self, plan: "Plan", *, alone: bool) -> str:
        del alone
        return f"each a node of {plan.members}"
