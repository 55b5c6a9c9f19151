"""Split features: every block is computed by P devices, which join what they made twice a pass.

Around attention and around the feed-forward part an all_gather comes before and a reduce_scatter
after, of activations, nothing hidden. Backward gathers both of what the products read once more,
since nobody keeps it whole. Of a block that says its `joins` these are all_reduces instead.
"""

from typing import TYPE_CHECKING, final

from jaxsys.planner.axes.base import Joined, SharedBlocks, Split

if TYPE_CHECKING:
    from jaxsys.hardware import DeviceSpec
    from jaxsys.planner.plans import Plan
    from jaxsys.planner.workload import BlockWork


@final
class Features(SharedBlocks):
    """Devices that share every block's features, and the sequence between blocks."""

    name = "features"

    said = "features split in {} parts only"

    whole = (
        "features are whole on each device, since the model does not say how devices share them, "
        "or its heads, feed-forward, vocabulary and sequence divide by no number"
    )

    def joined(
        self,
        block: "BlockWork",
        split: Split,
        device: "DeviceSpec",
        *,
        activation_bytes: float,
        recompute: str,
    ) -> tuple[Joined, Joined]:
        del device
        ways, link, joins = split.parts.features, split.links[self.name], block.joins
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
        del plan
        return "tp-sp"

    def words(self, plan: "Plan", *, alone: bool) -> str:
        return f"of {plan.features}" if alone else f"each of {plan.features} (tp-sp)"
