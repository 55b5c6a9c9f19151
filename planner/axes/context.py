"""Shared sequences: the devices of a place each have a part of every sequence.

What they send each other within a block, and how long they wait for it, is `planner.sharing`.
"""

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, final

from jaxsys.axes import AXES, CUT, WAYS, parts_of_block
from jaxsys.context import splits_of
from jaxsys.context.split import split_of
from jaxsys.lowering.refusal import why_not_in_turn
from jaxsys.planner.axes.base import Joined, PlannedAxis, Rule, Split
from jaxsys.planner.constraints import Domains, Relation
from jaxsys.planner.sharing import (
    ContextLinks,
    Pass,
    again,
    attention_pass,
)
from jaxsys.schedule.inside import exchanging, why_not_shared

if TYPE_CHECKING:
    from jaxsys.hardware import DeviceSpec
    from jaxsys.planner.cluster import Cluster
    from jaxsys.planner.plans import Plan
    from jaxsys.planner.problem import Problem
    from jaxsys.planner.workload import BlockWork, Workload

SAID = tuple(option.name for option in AXES["context"].more)
LONG = 32_768
"""Tokens of a sequence from which on a comparison has rows of devices that share each."""


@final
class Context(PlannedAxis):
    """Devices that share every sequence."""

    name = "context"
    inside = True

    def domains(self, problem: "Problem", ways: tuple[int, ...]) -> Domains:
        workload = problem.workload(1)
        shared = [way for way in ways if workload.shares(way)]
        exchanged = [way for way in ways if any(way < parts for parts in shared)]
        by, exchange = SAID
        return {
            self.name: ways if workload.sharing is not None else (1,),
            by: WAYS if shared else ("ring",),
            exchange: (None, *(way for way in exchanged if way > 1)),
        }

    def rules(self, problem: "Problem", domains: Domains, rule: Rule) -> Iterable[Relation]:
        workload, sharing = problem.workload(1), problem.workload(1).sharing
        if sharing is None or len(domains[self.name]) == 1:
            return
        legal = [parts for parts in domains[self.name] if parts == 1 or workload.shares(parts)]
        yield rule(
            f"sequences of {sharing.length} tokens shared by {', '.join(map(str, legal))} devices "
            "only",
            (self.name,),
            legal.__contains__,
        )

        @functools.cache
        def allowed(parts: int, by: str, exchange: int | None, *cut: int) -> bool:
            if why_not_shared(by, parts, exchange) is not None:
                return False
            if parts == 1:
                return by == "ring"
            if parts not in legal:  # which the rule above says
                return True
            split = split_of(parts, by, exchange)
            return split is not None and sharing.allows(split, math.prod(cut))

        exchanges = [parts for parts in legal if parts > 1 and allowed(parts, "ulysses", None)]
        yield rule(
            f"{sharing.heads} query and {sharing.key_heads} key/value heads exchanged by "
            f"{', '.join(map(str, exchanges)) or 'no'} devices only, and by as many as leave each "
            "of those that share features whole heads and tokens",
            (self.name, *SAID, *(axis.name for axis in CUT)),
            allowed,
        )
        yield rule(
            "where devices have ticks without a task, sequences are shared by gather or ulysses",
            ("stages", "ring", self.name, *SAID),
            lambda p, w, c, by, u: (
                c == 1 or p * w == 1 or by == "gather" or exchanging(by, c, u) == c
            ),
        )

    def ways_to_share(
        self, workload: "Workload", parts: int
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        sharing = workload.sharing
        if sharing is None or sharing.length < LONG or not workload.shares(parts):
            return
        by, exchange = SAID
        for split in splits_of(parts):
            if sharing.allows(split):
                yield split.by, {self.name: parts, by: split.by, exchange: split.exchange}

    def why_not(self, plan: "Plan") -> str | None:
        return None if plan.owners == 1 else why_not_in_turn(plan.split)

    def link(self, cluster: "Cluster", plan: "Plan", near: int) -> ContextLinks:
        split = plan.split
        assert split is not None
        return ContextLinks(
            whole=cluster.group(split.parts, near),
            hop=cluster.group(split.groups, near * split.exchanging),
            exchange=cluster.group(split.exchanging, near),
        )

    def attention(
        self,
        block: "BlockWork",
        split: Split,
        device: "DeviceSpec",
        attention_s: float,
        *,
        backward: bool,
    ) -> Pass:
        assert block.shared is not None
        return attention_pass(
            block.shared,
            attention_s,
            split.links[self.name],
            cut=parts_of_block(split.parts),
            memory_bytes_per_s=device.memory_bytes_per_s,
            backward=backward,
        )

    def attention_again(self, block: "BlockWork", split: Split) -> Joined:
        assert block.shared is not None
        links, cut = split.links[self.name], parts_of_block(split.parts)
        time_s, size = again(block.shared, links, cut=cut)
        return Joined(time_s=time_s, sent_bytes=size)

    def code(self, plan: "Plan") -> str:
        return f"cp-{plan.context_by}"

    def words(self, plan: "Plan", *, alone: bool) -> str:
        over = f"{plan.context}"
        if plan.context_by == "mixed":
            over += f", {plan.context_exchange} of which exchange heads"
        return f"of {over}" if alone else f"each of {over} ({self.code(plan)})"
