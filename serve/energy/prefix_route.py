"""Prompts go where their beginning has been computed, as far as that saves more than it costs.

Turns of one session, and requests under one system prompt, begin alike; an instance that still
holds the pages of the beginning need not compute it again. For a prompt of L tokens, of which
instance i holds the first h_i,

    seconds   residual_i + T(waiting_i + L - h_i)   until its first token
    joules    min over clocks of T(L - h_i, h_i) * P(L - h_i, h_i)

T and P from the predictor that chooses clocks too. Of the instances that keep the time to the
first token the one of fewest joules is taken, and among equals the earliest; where none keeps it,
the earliest. So a long queue sends a session elsewhere only when waiting there would be late.

What an instance holds is not asked, it is remembered: which blocks of which prompts were sent
there, by the keys that its page allocator knows them by, as many as it has pages and the latest
first. It forgets like the instance does, so far as both forget what was used longest ago.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.predictors import Predictor
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.hooks import InstanceView
from jaxsys.serve.kv_cache import BlockKey, block_keys, salt_of

if TYPE_CHECKING:
    from jaxsys.serve.requests import Request

EQUAL = 0.01
"""Joules that differ by less than this share are equal."""


class PrefixIndex:
    """Which blocks of tokens each instance was given."""

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[BlockKey, None]] = {}

    def held(self, name: str, keys: Sequence[BlockKey]) -> int:
        """How many blocks of a prompt, from the first, an instance is likely to hold."""
        known = self._blocks.get(name)
        if not known:
            return 0
        # A block is never older than those behind it, so that those known are the first ones.
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) // 2
            if keys[middle] in known:
                low = middle + 1
            else:
                high = middle
        return low

    def note(self, name: str, keys: Sequence[BlockKey], *, most: int) -> None:
        """A prompt goes to an instance that has `most` pages."""
        known = self._blocks.setdefault(name, OrderedDict())
        for key in reversed(keys):
            known[key] = None
            known.move_to_end(key)
        while len(known) > most:
            known.popitem(last=False)

    def keep_only(self, names: Sequence[str]) -> None:
        """Forgets instances that are gone."""
        for name in self._blocks.keys() - set(names):
            del self._blocks[name]


class PrefixRouter:
    """Before instances that compute prompts; remembers what it sends where."""

    def __init__(self, predictor: Predictor, slo: SharedSlo, *, clocks_mhz: Sequence[int]) -> None:
        """
        Args:
            clocks_mhz: the clocks of the instances; seconds are judged at the highest.
        """
        self.predictor = predictor
        self.slo = slo
        self.index = PrefixIndex()
        self._clocks_mhz = tuple(sorted(clocks_mhz))

    def choose(self, instances: Sequence[InstanceView], request: Request) -> int:
        self.index.keep_only([one.name for one in instances])
        keys = self._keys(instances, request)
        held = [
            min(self.index.held(one.name, keys) * one.page_size, request.prompt_length - 1)
            for one in instances
        ]
        chosen = 0 if len(instances) == 1 else self._least(instances, request, held)
        if keys:
            self.index.note(instances[chosen].name, keys, most=instances[chosen].page_count)
        return chosen

    def _keys(self, instances: Sequence[InstanceView], request: Request) -> Sequence[BlockKey]:
        size = instances[0].page_size
        if request.block_hashes is None and request.prompt_tokens and size:
            # Kept with the request, whose instance would make the same.
            salt = salt_of(request.adapter)
            request.block_hashes = list(block_keys(request.prompt_tokens, size, salt=salt))
        keys = request.block_hashes or ()
        return keys[: request.prompt_length // size] if size else ()

    def _least(
        self, instances: Sequence[InstanceView], request: Request, held: Sequence[int]
    ) -> int:
        now_s, length = request.timing.arrival_s, request.prompt_length
        loads, residual_s = [], []
        for one, known in zip(instances, held, strict=True):
            fresh = length - known
            loads.append(Load(fresh, 1, known))
            loads.append(
                Load(
                    one.waiting_tokens + fresh,
                    one.waiting_requests + 1,
                    known,
                    one.batch,
                    one.kv_tokens if one.batch else 0,
                )
            )
            ends_s = one.busy_until_s
            residual_s.append(0.0 if ends_s is None else max(0.0, ends_s - now_s))
        places: dict[Load, int] = {}
        index = [places.setdefault(load, len(places)) for load in loads]
        times, powers = self.predictor.what_if(list(places), self._clocks_mhz)
        times, powers = np.asarray(times)[index], np.asarray(powers)[index]
        waits_s = times[1::2, -1] + np.array(residual_s)
        joules = (times * powers)[0::2].min(axis=1)
        if np.isnan(joules).any():  # where no power was ever read, time stands for it
            joules = times[0::2, -1]
        kept = waits_s <= self.slo.planned_prompt_s
        if not kept.any():
            return int(np.argmin(waits_s))
        joules = np.where(kept, joules, np.inf)
        equal = joules <= joules.min() * (1 + EQUAL)
        return int(np.argmin(np.where(equal, waits_s, np.inf)))
