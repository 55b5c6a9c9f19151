"""What devices that share every sequence send each other within a block, and how long they wait.

Each of P devices has a part of every sequence, an early and a late piece, so that under a causal
mask all have the same work: a P-th of attention's products, cut in R works of one length, its own
pieces and a visit for every other group. What travels beside them is
`jaxsys.schedule.attention_transfers`; `timed` gives it a clock. Keys and values of t tokens are

    2 bytes x t x G (K + V)

and their gradients twice that, in float32. A device sends, forward: of a ring or a gather (P - 1)
times as much; of heads for tokens (U - 1)/U of its queries, keys, values and outputs.

Legend: P devices share a sequence, U of them exchange heads, R = P / U groups; t = T / P tokens of
a device, N query heads, G key/value heads, K and V their widths.
"""

from dataclasses import dataclass

from jaxsys.context import ContextSplit
from jaxsys.schedule import Inside, Link, attention_transfers
from jaxsys.schedule.inside import Carried, Collective, Transfer, timed

MERGE_PASSES = 14
"""Bytes through memory for each value of a visit's queries, forward: a copy of both pieces, what
its products made, and the float32 sums that it joins, read and written."""
MERGE_PASSES_BACKWARD = 30
"""Likewise backward: copies of queries, outputs and their gradients, and the sum of dq."""
SUMS_OF_KEYS = 16
"""For each value of keys and values, backward: what a visit found joins the sum that travels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSequences:
    """One attention on a device's part of a microbatch's sequences."""

    split: ContextSplit
    query_values: float
    """t N K."""
    key_values: float
    """t G (K + V), of the heads that there are."""
    out_values: float
    """t N V."""
    heads: int
    key_heads: int
    itemsize: float
    """Bytes of a value in compute."""

    def repeated(self, cut: int) -> float:
        """How often a key/value head is sent where more devices exchange than there are heads."""
        ways, heads = self.split.exchanging, max(1, self.key_heads // cut)
        return ways / heads if heads % ways else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A pass through attention."""

    time_s: float
    waits_s: float
    """What of it no work fills."""
    sent_bytes: float
    inside: tuple[Inside, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextLinks:
    """What joins devices that share sequences."""

    whole: Link
    """All P, for a gather."""
    hop: Link
    """Neighbours in the ring of groups."""
    exchange: Link
    """Those that exchange heads."""


def attention_pass(
    shared: SharedSequences,
    attention_s: float,
    links: ContextLinks,
    *,
    cut: int,
    memory_bytes_per_s: float,
    backward: bool,
) -> Pass:
    """One pass through attention on a device.

    Args:
        shared: its part.
        attention_s: of its products alone.
        links: to the others.
        cut: devices that share its heads, each a part of them.
        memory_bytes_per_s: of its memory.
        backward: which pass.
    """
    split = shared.split
    groups = split.groups
    transfers = attention_transfers(split.by, split.parts, split.exchange, backward=backward)
    sizes = {one: sent(shared, one, links, cut=cut) for one in dict.fromkeys(transfers)}
    keys = shared.key_values * shared.repeated(cut) / cut
    queries = shared.query_values / cut
    merged = MERGE_PASSES_BACKWARD * queries + SUMS_OF_KEYS * keys
    if not backward:
        merged = MERGE_PASSES * queries
    own = attention_s / groups
    work = [own, *[own + merged / memory_bytes_per_s] * (groups - 1)]
    time_s, inside = timed(transfers, sizes, work, contention=links.whole.contention)
    return Pass(
        time_s=time_s,
        waits_s=max(0.0, time_s - sum(work)),
        sent_bytes=sum(one.sent_bytes for one in inside),
        inside=inside,
    )


def again(shared: SharedSequences, links: ContextLinks, *, cut: int) -> tuple[float, float]:
    """(seconds, bytes) to make the queries, keys and values of attention's backward pass again."""
    transfers = attention_transfers(
        shared.split.by, shared.split.parts, shared.split.exchange, backward=False
    )
    heads = [one for one in transfers if one.carries is Carried.HEADS]
    found = [sent(shared, one, links, cut=cut) for one in heads]
    return sum(time_s for time_s, _ in found), sum(size for _, size in found)


def sent(
    shared: SharedSequences, transfer: Transfer, links: ContextLinks, *, cut: int
) -> tuple[float, float]:
    """(seconds, bytes that a device sends) of one transfer."""
    split = shared.split
    keys = shared.key_values * shared.repeated(cut)
    values, arrays = {
        Carried.KEYS: (keys, 2),
        Carried.KEY_GRADIENTS: (keys, 2),
        Carried.HEADS: (shared.query_values + keys, 3),
        Carried.TOKENS: (shared.out_values, 1),
    }[transfer.carries]
    itemsize = 4.0 if transfer.carries is Carried.KEY_GRADIENTS else shared.itemsize
    size = values * itemsize / cut
    if transfer.collective is Collective.HOP:
        more = (arrays - 1) * links.hop.transfer_s(0.0)
        return links.hop.transfer_s(size) + more, size
    if transfer.collective is Collective.EXCHANGE:
        ways, link = split.exchanging, links.exchange
    else:
        ways, link, size = split.parts, links.whole, split.parts * size
    time_s = link.collective_s(size, devices=ways)
    more = (arrays - 1) * link.collective_s(0.0, devices=ways)
    return time_s + more, (ways - 1) / ways * size
