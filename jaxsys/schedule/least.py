"""What no step of a schedule takes less than: found in some dozen array operations a tick.

`quick` follows every task and transfer, one after another. Here a tick is one step of sums and
maxima over all devices at once, in which some of the waits are left out and none is added: let h be
when a device reaches the head of a tick, w what it computes in it, s and r the seconds for which it
sends and receives what must have landed a tick later, and c the link's contention. Then it is at
the next head no earlier than

    h + max(w + s c / (1 + c), s, r)            its own tick: s seconds of it lie beside sends
    max(h, h') + x                              each neighbour h' that it exchanges x seconds with

What it leaves out is that sends queue behind those of other devices, and how they lie beside
compute. So it counts the transfers that no compute hides, what others cost beside compute, and the
start and the end of a ring or a pipeline. Where a middle is repeated (`quick`), a turn through it
puts every device off by at least its own ticks. A test holds it below `simulate`, and near it.

What members of a place send each other (`Costs.around`) is waited for beside no compute.
"""

import numpy as np

from .quick import KINDS, QuickSchedule, around_s, sizes_of, work_seconds
from .simulate import Costs, Link


class LeastSchedule:
    """A compiled schedule's ticks as arrays; see `step_s`."""

    def __init__(self, quick: QuickSchedule) -> None:
        self.devices, self.chunks, self.ticks = quick.devices, quick.chunks, len(quick.tasks)
        self.microbatches, self.middle = quick.microbatches, quick.middle
        p, width = quick.devices, quick.chunks + 1
        none = len(KINDS) * self.chunks  # the place of a task that there is not
        work = np.full((self.ticks, len(KINDS), p), none, np.int32)
        for tick, row in enumerate(quick.tasks):
            for device, kind, chunk in row:
                work[tick, kind, device] = kind * self.chunks + chunk
        self.work = work
        sent: list[tuple[int, int, int, int]] = []
        """(tick, source, target, size) of what must have landed a tick later."""
        exposed: list[tuple[int, int, int, int]] = []
        """Likewise of what lands before the tick's tasks."""
        for tick, row in enumerate(quick.moves):
            for data, chunk, source, target, flight in row:
                if flight <= 1:  # what is longer on its way is left out
                    one = tick, source, target, data * width + chunk
                    (sent if flight else exposed).append(one)
        self.sent, self.exposed = _Sends(sent, p), _Sends(exposed, p)

    def step_s(self, costs: Costs, link: Link, *, microbatches: int | None = None) -> float:
        """Seconds that `simulate` does not come below, but for rounding.

        Args:
            costs: of its tasks and blocks.
            link: between neighbours.
            microbatches: its own and a multiple of its middle's more; its own, if not given.
        """
        transfer_s = np.array(
            [
                link.transfer_s(size)
                for row in sizes_of(costs, self.chunks, sent=True)
                for size in row
            ]
        )
        work_s = np.array([*np.array(work_seconds(costs, self.chunks)).ravel(), 0.0])
        computed = alone = work_s[self.work].sum(1)  # [ticks, devices]
        beside = self._per_device(self.sent, transfer_s, self.sent.source)
        received = self._per_device(self.sent, transfer_s, self.sent.target)
        share = link.contention / (1.0 + link.contention)
        waits = around_s(costs, self.chunks)
        if waits is not None:
            joined = np.array([*[before + after for row in waits for before, after, _ in row], 0.0])
            inside = joined[self.work].sum(1)
            alone = computed + inside
            computed = alone + share * np.maximum(0.0, beside - inside)
        else:
            computed = alone + share * beside
        own = np.maximum(computed, np.maximum(beside, received))
        head = np.full(self.devices, costs.before_s)
        more = 0 if microbatches is None else microbatches - self.microbatches
        middle = self.middle
        if more and (middle is None or more % middle.microbatches):
            raise ValueError(f"{microbatches} microbatches are not {self.microbatches} and turns")
        exchanged, waited = self.sent.times(transfer_s), self.exposed.times(transfer_s)
        for tick in range(self.ticks):
            if more and middle is not None and tick == middle.first:
                turn = own[middle.first : middle.first + middle.ticks].sum(0)
                head = head + more // middle.microbatches * turn
            later = head + own[tick]
            if waited.any(tick):  # before its tasks, and perhaps beside what it sends
                later = np.maximum(later, waited.over(tick, head, head.copy()) + alone[tick])
            head = exchanged.over(tick, head, later)
        return float(head.max()) + costs.after_s + costs.update_s

    def _per_device(
        self, sends: "_Sends", transfer_s: np.ndarray, device: np.ndarray
    ) -> np.ndarray:
        """Seconds [ticks, devices] of the sends of each."""
        places = self.ticks * self.devices
        at = sends.tick * self.devices + device
        found = np.bincount(at, weights=transfer_s[sends.size], minlength=places)
        return found.reshape(self.ticks, self.devices)


class _Sends:
    """Sends in order of their ticks, those of one tick between the same two devices together."""

    def __init__(self, rows: list[tuple[int, int, int, int]], devices: int) -> None:
        table = np.array(rows, np.int32).reshape(-1, 4)
        self.tick, self.source, self.target, self.size = table.T.copy()
        pair = (self.tick.astype(np.int64) * devices + self.source) * devices + self.target
        pairs, self.pair = np.unique(pair, return_inverse=True)
        tick, ends = np.divmod(pairs, devices * devices)
        self.ends = np.stack(np.divmod(ends, devices))
        """[2, pairs]: source and target of each."""
        last = int(self.tick.max(initial=-1)) + 2
        self.first = np.searchsorted(tick, np.arange(last + 1)).tolist()
        """Tick -> the first of its pairs."""
        self.apart = [
            all(len(set(side)) == len(side) for side in self.ends[:, low:high].tolist())
            for low, high in zip(self.first, self.first[1:], strict=False)
        ]
        """Whether nothing sends, or receives, twice in a tick."""

    def times(self, transfer_s: np.ndarray) -> "_Times":
        """With seconds for each size."""
        found = np.bincount(self.pair, weights=transfer_s[self.size], minlength=self.ends.shape[1])
        return _Times(self, found)


class _Times:
    """Sends with how long each pair of devices is at it in a tick."""

    def __init__(self, sends: _Sends, time_s: np.ndarray) -> None:
        self.sends, self.time_s = sends, time_s

    def any(self, tick: int) -> bool:
        """Whether anything is sent in a tick."""
        first = self.sends.first
        return tick + 1 < len(first) and first[tick] < first[tick + 1]

    def over(self, tick: int, head: np.ndarray, later: np.ndarray) -> np.ndarray:
        """`later`, or when both ends have what they exchange, if they begin at `head`."""
        if not self.any(tick):
            return later
        low, high = self.sends.first[tick], self.sends.first[tick + 1]
        source, target = self.sends.ends[:, low:high]
        there = np.maximum(head[source], head[target]) + self.time_s[low:high]
        for side in (source, target):
            if self.sends.apart[tick]:
                later[side] = np.maximum(later[side], there)
            else:
                np.maximum.at(later, side, there)
        return later
