"""A GPU as a profile measured it: the simulator's body of hardware that was really there.

At the one clock of the profile; what the profile does not hold lies on straight lines between what
it holds:

    decode    t = a[bucket] + c[bucket] * kv_tokens, fitted to each compiled batch
    prefill   t of one piece by its padded length, and by the tokens before it

A server does more between steps than the profiled engine alone: what its HTTP face adds to a decode
step, a share of it per sequence, may be given beside the profile.
"""

import bisect
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.serve.energy.gpu_model import GpuSpec, Load, Outcome, ServedShape, SimulatedGpu
from jaxsys.serve.energy.profile import Profile, Sample


class MeasuredGpu(SimulatedGpu):
    """An instance whose iterations take what the profile says, whatever the clock asked for."""

    def __init__(
        self,
        profile: Profile,
        spec: GpuSpec,
        shape: ServedShape,
        *,
        piece_buckets: Sequence[int],
        idle_w: float,
        kv_capacity_tokens: int,
        face_s: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """
        Args:
            profile: of one clock, with steps of one prompt each.
            piece_buckets: lengths that pieces of prompts are padded to.
            idle_w: power with the model loaded and nothing to do.
            face_s: what serving adds to a decode step, and to it per sequence; the GPU idles then.
        """
        super().__init__(spec, shape)
        self._capacity_tokens = kv_capacity_tokens
        self._idle_w = idle_w
        self._face_s = face_s
        decodes: defaultdict[int, list[Sample]] = defaultdict(list)
        pieces: defaultdict[int, list[Sample]] = defaultdict(list)
        for sample in profile.samples:
            load = sample.load
            if load.batch and not load.prefill_tokens:
                decodes[load.bucket or load.batch].append(sample)
            elif load.prefill_requests == 1 and not load.batch:
                at = bisect.bisect_left(piece_buckets, load.prefill_tokens)
                pieces[piece_buckets[at]].append(sample)
        if not decodes or not pieces:
            raise UsageError("the profile must hold decode steps and prompts of one request")
        self._decodes = {size: _lines(decodes[size], "kv_tokens") for size in sorted(decodes)}
        self._pieces = {size: _lines(pieces[size], "cached_tokens") for size in sorted(pieces)}

    @property
    def kv_capacity_tokens(self) -> int:
        return getattr(self, "_capacity_tokens", 1)

    def run(self, load: Load, clock_mhz: float) -> Outcome:
        time_s = energy_j = 0.0
        if load.prefill_requests:
            each = load.prefill_tokens / load.prefill_requests
            piece_s, power_w = _at(self._pieces, each, load.cached_tokens / load.prefill_requests)
            time_s = piece_s * load.prefill_requests
            energy_j = time_s * power_w
        if load.batch:
            step_s, power_w = _at(self._decodes, load.bucket or load.batch, load.kv_tokens)
            face_s = self._face_s[0] + self._face_s[1] * load.batch
            time_s += step_s + face_s
            energy_j += step_s * power_w + face_s * self._idle_w
        if not time_s:
            return Outcome(0.0, self._idle_w, clock_mhz, False)
        return Outcome(time_s, energy_j / time_s, clock_mhz, False)

    def idle_power_w(self, clock_mhz: float) -> float:
        return self._idle_w


_Lines = tuple[np.ndarray, np.ndarray]
"""Of time and of power: slope and value at zero."""


def _lines(samples: Sequence[Sample], name: str) -> _Lines:
    """Straight lines through the samples, over one field of their loads."""
    lines = []
    for field in ("time_s", "power_w"):
        known = [s for s in samples if getattr(s, field) is not None]
        x = np.array([getattr(s.load, name) for s in known], float)
        y = np.array([getattr(s, field) for s in known], float)
        if not len(y):
            lines.append(np.zeros(2))  # nothing read power: energy comes out as zero
        elif len(set(x)) < 2:
            lines.append(np.array([0.0, y.mean()]))
        else:
            lines.append(np.polyfit(x, y, 1))
    return lines[0], lines[1]


def _at(table: dict[int, _Lines], size: float, x: float) -> tuple[float, float]:
    """Seconds and watts at the least compiled size that holds `size`, the largest beyond."""
    row = table[next((known for known in table if known >= size), max(table))]
    return float(row[0][0] * x + row[0][1]), float(row[1][0] * x + row[1][1])
