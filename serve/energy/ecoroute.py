"""EcoRoute: which instance a request goes to, so that no clock need rise for it.

A decode instance is a point (batch n, KV tokens k). For each, two what-ifs: the clock it needs
now, and the one it would need with the request added (and its prompt's tokens, and some growth):

    f_now  = lowest f with T(n, k + 2n) <= ITL
    f_next = lowest f with T(n+1, k + L + 50(n+1)) <= ITL

`StateSpaceRouter` follows the published rule (VoltanaLLM, arXiv 2509.04827): instances whose clock
would not rise come first, the most boosted of them foremost, so that boosted ones are filled before
a slow one is disturbed. `EnergyRouter` takes the instance whose predicted energy rises least,
among those that keep the SLO. `QueueRouter` serves prefill: the earliest predicted first token.

Where tokens are late at every instance already, both put it where they are latest: spread evenly, a
little too much makes all of them late. Before, the one goes by the published rule and the other by
the fewest sequences.

All what-ifs of a decision are one batched call.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.serve.energy.gpu_model import TILE, Load
from jaxsys.serve.energy.predictors import Predictor
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.hooks import InstanceView

if TYPE_CHECKING:
    from jaxsys.serve.requests import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoRouteConfig:
    """How far the what-ifs look."""

    now_tokens: int = 2
    """Growth per sequence assumed for the state without the request (published: 2)."""
    next_tokens: int = 50
    """Growth per sequence assumed for the state with it (published: 50)."""
    tile_from: int = TILE
    """Batch below which every instance is under one tile and the simple rule serves."""
    spread_levels: int = 1
    """Difference in clock levels between instances that is let stand; beyond it the slowest gets
    the request."""
    headroom: float = 0.0
    """Share of the planned ITL left free when judging an instance."""
    late_share: float = 0.4
    """A request that no instance can take in time goes to the slowest, so that others stay in time
    or come back to it, unless that one's steps are longer than the ITL by more than this share. 0
    for the published rule."""
    calm_share: float = 0.25
    """Instances are filled one after the other as long as their steps at the lowest clock are
    shorter than the ITL by this share; 0 to fill them up to it."""

    def __post_init__(self) -> None:
        for name in ("now_tokens", "next_tokens", "tile_from", "spread_levels", "late_share"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("headroom", "calm_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be from 0 to below 1")


class RoundRobinRouter:
    """Each instance in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, instances: Sequence[InstanceView], request: "Request") -> int:
        chosen = self._next % len(instances)
        self._next = chosen + 1
        return chosen


class RandomRouter:
    """Any instance, each as likely as the others, as simple balancers do."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def choose(self, instances: Sequence[InstanceView], request: "Request") -> int:
        return self._random.randrange(len(instances))


_State = tuple[int, int, int, int, int]
"""The fields of a `Load` but for its bucket: plain numbers compare faster than records."""


def _what_if(
    predictor: Predictor, states: Sequence[_State], clocks_mhz: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """One batched call in which equal states (idle instances, mostly) are asked once."""
    places: dict[_State, int] = {}
    index = [places.setdefault(state, len(places)) for state in states]
    times, powers = predictor.what_if([Load(*state) for state in places], clocks_mhz)
    return np.asarray(times)[index], np.asarray(powers)[index]


def _without_and_with(
    instances: Sequence[InstanceView],
    counts: Sequence[int],
    request: "Request",
    config: EcoRouteConfig,
) -> list[_State]:
    """For each decode instance in turn, its state and the one with the request added."""
    states: list[_State] = []
    now, after, prompt = config.now_tokens, config.next_tokens, request.prompt_length
    for instance, count in zip(instances, counts, strict=True):
        kv = instance.kv_tokens
        states.append((0, 0, 0, count, kv + now * count))
        states.append((0, 0, 0, count + 1, kv + prompt + after * (count + 1)))
    return states


def _sequences(instance: InstanceView) -> int:
    """Sequences the instance decodes or has been promised."""
    return max(instance.in_flight, instance.batch)


def _slowest_within(late: Sequence[float], most: float) -> int | None:
    """Place of the largest of those not over `most`; None where all are over."""
    return max((i for i in range(len(late)) if late[i] <= most), key=late.__getitem__, default=None)


class StateSpaceRouter:
    """The published rule, with its fallback and tie-breaks; what is late stays together."""

    def __init__(
        self,
        predictor: Predictor,
        slo: SharedSlo,
        *,
        clocks_mhz: Sequence[int],
        config: EcoRouteConfig | None = None,
    ) -> None:
        self.predictor = predictor
        self.slo = slo
        self.config = config or EcoRouteConfig()
        self._clocks_mhz = tuple(sorted(clocks_mhz))

    def choose(self, instances: Sequence[InstanceView], request: "Request") -> int:
        counts = [_sequences(instance) for instance in instances]
        if max(counts) < self.config.tile_from:
            return min(
                range(len(instances)),
                key=lambda i: (instances[i].clock_mhz or 0.0, counts[i]),
            )
        now, after, late, are_late = self._levels(instances, counts, request)
        places = list(range(len(counts)))
        if self.config.late_share and not all(late):
            places = [i for i in places if not late[i]]
        elif self.config.late_share and are_late:
            slowest = _slowest_within(late, self.config.late_share)
            if slowest is not None:
                return slowest
        chosen = self._published_choice(*([row[i] for i in places] for row in (counts, now, after)))
        return places[chosen]

    def _levels(
        self, instances: Sequence[InstanceView], counts: list[int], request: "Request"
    ) -> tuple[list[int], list[int], list[float], bool]:
        """Clock levels each instance needs without and with the request, by what share it then
        exceeds the ITL at the top, and whether all exceed it without: what is looked ahead for may
        never come."""
        config = self.config
        states = _without_and_with(instances, counts, request, config)
        times, _ = _what_if(self.predictor, states, self._clocks_mhz)
        bound_s = self.slo.current.planned_itl_s * (1 - config.headroom)
        # argmax finds the first clock that keeps the bound; the top where none does.
        keeps = times <= bound_s
        keeps[:, -1] = True
        levels = np.argmax(keeps, axis=1)
        late = np.maximum(0.0, times[1::2, -1] / bound_s - 1)
        are_late = bool(times[0::2, -1].min() > self.slo.current.itl_s)
        return levels[0::2].tolist(), levels[1::2].tolist(), late.tolist(), are_late

    def _published_choice(self, counts: list[int], now: list[int], after: list[int]) -> int:
        top = len(self._clocks_mhz) - 1
        # Positive: the clock would rise (or is at the top), value the resulting level.
        # Negative: it would not; the present level, so that the most boosted sorts first.
        signed = [
            after[i] + 1 if after[i] > now[i] or after[i] == top else -(now[i] + 1)
            for i in range(len(counts))
        ]
        tiles = [-(-count // TILE) for count in counts]
        order = sorted(
            range(len(counts)),
            key=lambda i: (abs(signed[i]), signed[i], tiles[i], -counts[i]),
        )
        if abs(signed[order[-1]]) - abs(signed[order[0]]) > self.config.spread_levels:
            return order[0]
        return min(order, key=lambda i: (signed[i], tiles[i], -counts[i]))


class EnergyRouter:
    """Least increase in predicted energy while filling needs no clock; then an even spread.

    Each iteration gives the request one token, so the energy it adds per token is
    E(n+1, k+L, f_next) - E(n, k, f_now) of one iteration, each at the clock of least energy that
    keeps the bound. That fills an instance before it wakes the next one, which is right as long as
    the fuller one keeps the ITL at its lowest clock with room to spare (`calm_share`). Beyond that
    energy rises faster than the load, and batches that fluctuate need the room: the instance with
    the fewest sequences is taken.

    An instance that cannot keep the SLO with the request counts only where none can. As long as one
    keeps it without, and what is looked ahead for may not come, that is the one of the fewest
    sequences again; where all are late, the slowest, or beyond `late_share` the one with the
    shortest step.
    """

    def __init__(
        self,
        predictor: Predictor,
        slo: SharedSlo,
        *,
        clocks_mhz: Sequence[int],
        idle_power_w: float,
        config: EcoRouteConfig | None = None,
    ) -> None:
        """
        Args:
            idle_power_w: what an empty instance draws: the cost of waking one.
        """
        self.predictor = predictor
        self.slo = slo
        self.config = config or EcoRouteConfig()
        self.idle_power_w = idle_power_w
        self._clocks_mhz = tuple(sorted(clocks_mhz))

    def choose(self, instances: Sequence[InstanceView], request: "Request") -> int:
        config = self.config
        counts = [_sequences(instance) for instance in instances]
        states = _without_and_with(instances, counts, request, config)
        times, powers = _what_if(self.predictor, states, self._clocks_mhz)
        bound_s = self.slo.current.planned_itl_s * (1 - config.headroom)
        keeps = times <= bound_s
        feasible = keeps[1::2].any(axis=1)
        keeps[:, -1] = True
        # The governor takes the clock of least energy among those that keep the bound.
        energies = np.where(keeps, times * powers, np.inf)
        rows = np.arange(len(times))
        chosen = np.argmin(energies, axis=1)
        if not feasible.any():
            if times[0::2, -1].min() <= self.slo.current.itl_s:  # not late yet, and may never be
                return int(np.argmin(counts))
            slowest = _slowest_within((times[1::2, -1] / bound_s - 1).tolist(), config.late_share)
            return int(np.argmin(times[1::2, -1])) if slowest is None else slowest
        calm = feasible & (times[1::2, 0] <= bound_s * (1 - config.calm_share))
        if config.calm_share and not calm.any():
            return int(np.argmin(np.where(feasible, counts, np.inf)))
        if config.calm_share:
            feasible = calm
        energy_j = energies[rows, chosen]
        after_j = energy_j[1::2]
        # An empty instance would have idled for as long.
        empty = np.array([count == 0 for count in counts])
        idle_j = self.idle_power_w * times[rows, chosen][1::2]
        before_j = np.where(empty, idle_j, energy_j[0::2])
        return int(np.argmin(np.where(feasible, after_j - before_j, np.inf)))


GATHER_GAIN = 0.25
"""Of a prompt's time alone, what one that shares its batch must save to be worth waiting for."""


class QueueRouter:
    """Prefill: the instance whose first token for this prompt is predicted earliest, or, as long as
    there is time, the one that is busy anyway.

    A prompt waits for the iteration in flight and is then computed with all that wait before it.
    What a batch takes besides its tokens, its weights' reading and its launch, is shared by its
    prompts: so the longest queue is taken whose first token is still to come within `gather_share`
    of the time there is, and the others idle. Long prompts fill the device alone; where the second
    of two would save less than `GATHER_GAIN` of its time, it is not kept waiting for nothing. Where
    instances decode what they read, sequences would gather too: there prompts are spread.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        clocks_mhz: Sequence[int],
        slo: SharedSlo | None = None,
        gather_share: float = 0.0,
    ) -> None:
        """
        Args:
            clocks_mhz: of the instances: where prompts gather is judged at the lowest, else the
                highest counts.
            slo: where given, a prompt that no instance can serve in time goes to the longest queue:
                it is late anyway, and must not make others late too.
            gather_share: 0 for the earliest first token always.
        """
        if not 0 <= gather_share < 1:
            raise UsageError(f"gather_share={gather_share} must be from 0 to below 1")
        self.slo = slo
        self.predictor = predictor
        self.gather_share = gather_share
        self._clocks_mhz = (min(clocks_mhz), max(clocks_mhz))

    def choose(self, instances: Sequence[InstanceView], request: "Request") -> int:
        now_s = request.timing.arrival_s
        length = request.prompt_length
        states: list[_State] = [(length, 1, 0, 0, 0), (2 * length, 2, 0, 0, 0)]
        residual_s: list[float] = []
        for instance in instances:
            tokens, batch = instance.waiting_tokens + length, instance.batch
            kv_tokens = instance.kv_tokens if batch else 0
            states.append((tokens, instance.waiting_requests + 1, 0, batch, kv_tokens))
            ends_s = instance.busy_until_s
            residual_s.append(0.0 if ends_s is None else max(0.0, ends_s - now_s))
        times, _ = _what_if(self.predictor, states, self._clocks_mhz)
        slow, fast = (
            [time_s + left for time_s, left in zip(times[2:, k].tolist(), residual_s, strict=True)]
            for k in (0, 1)
        )
        least = min(fast)
        if self.slo is not None:
            if least > self.slo.current.ttft_s - self.slo.after_s:
                return max(range(len(fast)), key=lambda i: (fast[i], -i))
            within_s = self.gather_share * self.slo.planned_prompt_s
            gathers = [i for i, wait_s in enumerate(slow) if wait_s <= within_s]
            pays = times[1, 0] <= (2 - GATHER_GAIN) * times[0, 0]
            if gathers and pays and not any(instance.batch for instance in instances):
                return max(gathers, key=lambda i: (slow[i], -i))
        return min(range(len(fast)), key=lambda i: (fast[i], i))
