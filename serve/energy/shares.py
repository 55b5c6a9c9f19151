"""Whose energy it was: an iteration's joules apportioned to the requests that caused them.

Batching makes any attribution a convention. This one takes what each request adds to the iteration,
in seconds at the rates of the device: the products of its tokens, the attention of its pieces and
the keys and values read for it. Reading the weights is shared by tokens. With T tokens in all,

    piece of n tokens after s others    n (c + W / T) + a n (s + n / 2) + k (s + n)
    decode step at length l             c + W / T + k l

where c, a and k are the times of a token's products, of a pair's attention and of reading a
token's keys and values (of a layer with a window: of the tokens in it), and W that of reading the
weights. The parts sum to the whole. What an iteration computes for a request that ended before it
was over, by its last token in the one before or because its client left, is borne by those beside
it: that one's answer is out, and its energy said.
"""

import math
from typing import TYPE_CHECKING

from jaxsys.serve.energy.gpu_model import ENGINES, GpuSpec, ServedShape

if TYPE_CHECKING:
    from jaxsys.serve.iterations import Iteration
    from jaxsys.serve.requests import Request


ATTENTION_SHARE = ENGINES["jaxsys"].attention_share


class Shares:
    """Weighs what requests cause on one device with one model."""

    def __init__(self, spec: GpuSpec, shape: ServedShape) -> None:
        rate = spec.flops_per_cycle * spec.max_mhz * 1e6
        self._token_s = 2.0 * shape.used_parameters / rate
        self._weights_s = shape.read_bytes / spec.hbm_bytes_per_s
        self._pair_s = 4.0 * shape.layers * shape.width / rate / ATTENTION_SHARE
        self._shape, self._hbm_bytes_per_s = shape, spec.hbm_bytes_per_s

    def _kv_s(self, length: int) -> float:
        """Time of reading the keys and values that one query at this length sees."""
        shape = self._shape
        kept = length * shape.kv_bytes_per_token
        for window, each in shape.kv_windows:
            kept += min(length, window) * each
        return kept / self._hbm_bytes_per_s

    def give(self, iteration: "Iteration", energy_j: float, ended_s: float = -math.inf) -> None:
        """Adds to each request its part of `energy_j`.

        Args:
            ended_s: when the iteration ended. Who ended before has no part, unless all did.
        """
        steps = max(1, iteration.steps)
        pieces, decodes = iteration.prefills, iteration.decodes
        drafts = iteration.drafts or ((),) * len(decodes)
        tokens = iteration.prefill_tokens + len(decodes) * steps + iteration.drafted
        if not tokens:
            return
        each_s = self._token_s + self._weights_s / tokens
        pair_s = self._pair_s
        weights = [
            p.length * each_s
            + pair_s * p.length * (p.start + p.length / 2)
            + self._kv_s(p.start + p.length)
            for p in pieces
        ]
        step_s = each_s * steps
        weights += [
            step_s + each_s * len(draft) + steps * self._kv_s(r.prompt_length + r.generated)
            for r, draft in zip(decodes, drafts, strict=True)
        ]
        requests = [*(piece.request for piece in pieces), *decodes]
        late = [_ended_before(request, ended_s) for request in requests]
        if any(late) and not all(late):
            weights = [0.0 if gone else w for gone, w in zip(late, weights, strict=True)]
        unit_j = energy_j / sum(weights)
        for place, (request, weight) in enumerate(zip(requests, weights, strict=True)):
            timing = request.timing
            timing.energy_j = (timing.energy_j or 0.0) + unit_j * weight
            if place < len(pieces):
                timing.prefill_energy_j = (timing.prefill_energy_j or 0.0) + unit_j * weight


def _ended_before(request: "Request", moment_s: float) -> bool:
    finished_s = request.timing.finished_s
    return finished_s is not None and finished_s < moment_s
