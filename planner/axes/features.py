"""Split features: every block is computed by P devices, which join what they made twice a pass.

Around attention and around the feed-forward part an all_gather comes before and a reduce_scatter
after, of activations, nothing hidden. Backward gathers both of what the products read once more,
since nobody keeps it whole. Of a block that says its `joins` these are all_reduces instead.

Where pieces go round a ring instead (`features_by`), a product is P products of a piece each,
beside which P - 1 hops travel: of a piece max(product, hop) counts, and once more the product. What
that costs beside is counted too: kernels of few rows, pieces put in order, gradients summed over
pieces.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, final

from jaxsys.axes import AXES, JOININGS
from jaxsys.lowering.refusal import why_not_joined_in_turn
from jaxsys.planner.axes.base import Joined, Rule, SharedBlocks, Split
from jaxsys.planner.constraints import Domains, Relation
from jaxsys.schedule.inside import joining_transfers, timed

if TYPE_CHECKING:
    from jaxsys.hardware import DeviceSpec
    from jaxsys.planner.plans import Plan
    from jaxsys.planner.problem import Problem
    from jaxsys.planner.workload import BesideJoins, BlockWork, Workload

BY = AXES["features"].more[0].name
SPARE_ROWS = 150
"""Rows that a product of few takes the time of beside its own: of [R, 4096] x [4096, 14336] an H200
makes 2,048 rows at 0.94 of the rate of 16,384 (results/device_rates_h200.json)."""
SUM_PASSES = 3
"""Reads and writes of a gradient where a piece's is added."""


@final
class Features(SharedBlocks):
    """Devices that share every block's features, and the sequence between blocks."""

    name = "features"

    said = "features split in {} parts only"

    whole = "features are whole on each device"

    def domains(self, problem: "Problem", ways: tuple[int, ...]) -> Domains:
        workload = problem.workload(1)
        rings = max(self.ways(workload)) > 1 and all(b.beside_joins for b in workload.blocks)
        return {self.name: ways, BY: JOININGS if rings else ("gather",)}

    def rules(self, problem: "Problem", domains: Domains, rule: Rule) -> Iterable[Relation]:
        yield from super().rules(problem, domains, rule)
        if len(domains[BY]) == 1:
            return
        yield rule(
            "features that nobody shares are not joined round a ring",
            (self.name, BY),
            lambda parts, by: parts > 1 or by == "gather",
        )
        yield rule(
            "where devices have ticks without a task, features are joined by gather",
            ("stages", "ring", BY),
            lambda stages, ring, by: stages * ring == 1 or by == "gather",
        )

    def ways_to_share(
        self, workload: "Workload", parts: int
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        rings = all(block.beside_joins for block in workload.blocks)
        for way, shared in super().ways_to_share(workload, parts):
            for by in JOININGS if rings else ("gather",):
                yield way, {**shared, BY: by}

    def options(self, plan: "Plan") -> list[tuple[str, Any]]:
        return [one for one in super().options(plan) if one[1] != "gather"]

    def why_not(self, plan: "Plan") -> str | None:
        return None if plan.owners == 1 else why_not_joined_in_turn(plan)

    def joined(
        self,
        block: "BlockWork",
        split: Split,
        device: "DeviceSpec",
        *,
        activation_bytes: float,
        recompute: str,
    ) -> tuple[Joined, Joined]:
        ways, link, joins = split.parts.features, split.links[self.name], block.joins
        if split.parts.features_by == "ring":
            assert block.beside_joins is not None
            ring = _Ring(block.beside_joins, ways, link, device, activation_bytes)
            again = recompute in ("around-attention", "block")
            return ring.forward(), ring.backward(gathers=not again)
        seen = 1.0 - block.features_hidden
        if joins is None:

            def times(count: int) -> Joined:
                return Joined(
                    time_s=seen * count * link.collective_s(activation_bytes, devices=ways),
                    sent_bytes=count * (ways - 1) / ways * activation_bytes,
                )

            if recompute in ("around-attention", "block"):
                return times(4), times(4)
            return times(4), times(7 if recompute == "selective" and block.selective_join else 6)

        def summed(size_bytes: float, times: float) -> Joined:
            if not times:
                return Joined()
            one_s = link.collective_s(size_bytes / times, devices=ways, rounds=2)
            return Joined(
                time_s=seen * times * one_s,
                sent_bytes=2 * (ways - 1) / ways * size_bytes,
            )

        return (
            summed(joins.forward_bytes, joins.forward_times),
            summed(joins.backward_bytes, joins.backward_times),
        )

    def code(self, plan: "Plan") -> str:
        return "tp-sp" if plan.features_by == "gather" else "tp-ring"

    def words(self, plan: "Plan", *, alone: bool) -> str:
        return f"of {plan.features}" if alone else f"each of {plan.features} ({self.code(plan)})"


@final
class _Ring:
    """A block's joins where pieces of activations go round a ring beside its products."""

    def __init__(
        self,
        beside: "BesideJoins",
        ways: int,
        link: Any,
        device: "DeviceSpec",
        activation_bytes: float,
    ) -> None:
        self._beside, self._ways, self._link, self._device = beside, ways, link, device
        self._bytes = activation_bytes
        # A gather is as many hops of as much, all started at once.
        through_s = link.collective_s(activation_bytes, devices=ways)
        through_s -= link.collective_s(0.0, devices=ways)
        self._hop = (link.transfer_s(0.0) + through_s / (ways - 1), activation_bytes / ways)

    def forward(self) -> Joined:
        """A gather before the products that read, a sum after those that make."""
        found = self._moved(1, self._beside.moved_bytes)
        for reads, made in zip(self._beside.read_flops, self._beside.made_flops, strict=True):
            found += self._join(reads, summed=False) + self._join(made, summed=True)
        return found

    def backward(self, *, gathers: bool) -> Joined:
        """Gradients the other way, that of a sum beside both of its products; and what was read
        once more."""
        summed = (self._ways - 1) * SUM_PASSES * self._beside.matrix_bytes
        found = self._moved(2, self._beside.moved_bytes + summed)
        for reads, made in zip(self._beside.read_flops, self._beside.made_flops, strict=True):
            found += self._join(reads, summed=True) + self._join(2 * made, summed=False)
            if gathers:
                found += self._join(reads, summed=False)
        return found

    def _join(self, flops: float, *, summed: bool) -> Joined:
        """What a join waits for, and slows, beside products of so much."""
        sent = (self._ways - 1) * self._hop[1]
        if not flops:
            time_s = self._link.collective_s(self._bytes, devices=self._ways)
            return Joined(time_s=time_s, sent_bytes=sent)
        one_s = flops / self._ways**2 / self._device.product_flops_per_s
        transfers = joining_transfers(self._ways, summed=summed)
        time_s, _ = timed(
            transfers,
            dict.fromkeys(transfers, self._hop),
            [one_s] * self._ways,
            contention=self._link.contention,
        )
        return Joined(time_s=time_s - self._ways * one_s, sent_bytes=sent)

    def _moved(self, products: int, size_bytes: float) -> Joined:
        """What pieces cost beside what is sent, where each product is made so many times."""
        one = self._beside
        flops = products * (sum(one.read_flops) + sum(one.made_flops))
        rows = (self._ways - 1) * SPARE_ROWS / one.tokens
        time_s = rows * flops / self._device.product_flops_per_s
        return Joined(time_s=(time_s + size_bytes / self._device.memory_bytes_per_s) / self._ways)
