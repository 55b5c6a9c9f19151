"""What a decode instance is asked for: requests that join, and how much each will write.

The batch of today says little of the batch to come: after a quiet time it grows for as long as the
longest answers last. What it grows to follows from the tokens a second that are asked for, and
those from the requests that join and the lengths of answers. Lengths are not known until answers
end, and the long ones end last, so that the mean of those that have ended is too short. So the
survival curve is estimated with those at work as what they are, longer than they are now (Kaplan
and Meier, 1958); what outlasts all that was seen lasts as long again, as a tail of index two does.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxsys.serve.requests import Request

MOST = 5000
"""Requests remembered."""
JOINS_S = 30.0
"""Time over which those that join are counted."""
FEWEST = 20
"""Requests below which nothing is said."""
EVERY_S = 2.0
"""Time after which lengths are estimated anew."""


class Offered:
    """Of one instance; told of every decode batch."""

    def __init__(self) -> None:
        self._members: dict[int, tuple[Request, int]] = {}
        """Those at work, with their places in the rings below."""
        self._joined = 0
        self._wrote = np.zeros(MOST)
        self._ended = np.zeros(MOST, dtype=bool)
        self._prompts = np.zeros(MOST)
        self._joins_s: deque[float] = deque(maxlen=8 * MOST)
        self._first_s = math.inf
        self._last: Request | None = None
        self._estimated_s = -math.inf
        self._each = self._context = 0.0

    def see(self, decodes: "Sequence[Request]", now_s: float) -> None:
        """Takes in the requests of a batch, in the order in which they joined."""
        last = decodes[-1] if decodes else None
        if last is self._last and len(decodes) == len(self._members):
            return
        self._last = last
        members = {id(request): request for request in decodes}
        for key in self._members.keys() - members.keys():
            request, number = self._members.pop(key)
            if number >= self._joined - MOST:
                # Whoever was preempted counts as one that ended there; it joins anew.
                self._wrote[number % MOST], self._ended[number % MOST] = request.generated, True
        for key in members.keys() - self._members.keys():
            request, place = members[key], self._joined % MOST
            self._members[key] = request, self._joined
            self._ended[place], self._prompts[place] = False, request.prompt_length
            self._joined += 1
            self._joins_s.append(now_s)
            self._first_s = min(self._first_s, now_s)

    def joins_per_s(self, now_s: float) -> float:
        """Requests that joined a second, of late."""
        while self._joins_s and self._joins_s[0] < now_s - JOINS_S:
            self._joins_s.popleft()
        over_s = min(JOINS_S, now_s - self._first_s)
        return len(self._joins_s) / over_s if over_s > 0 else 0.0

    def estimate(self, now_s: float) -> tuple[float, float] | None:
        """Tokens a second that are asked for, and the context of a sequence among those that write
        them; None where too few were seen."""
        if self._joined < FEWEST:
            return None
        if now_s - self._estimated_s >= EVERY_S:
            self._estimated_s = now_s
            self._each, self._context = self._lengths()
        return self.joins_per_s(now_s) * self._each, self._context

    def _lengths(self) -> tuple[float, float]:
        """Mean tokens that a request writes, and the mean context while it does."""
        for request, number in self._members.values():
            if number >= self._joined - MOST:
                self._wrote[number % MOST] = request.generated
        count = min(self._joined, MOST)
        ended, wrote = self._ended[:count], self._wrote[:count]
        order = np.argsort(wrote, kind="stable")
        ended, wrote = ended[order], np.maximum(wrote[order], 1.0)
        at_risk = np.arange(len(wrote), 0, -1)
        after = np.cumprod(1 - ended / at_risk)
        before = np.concatenate(([1.0], after[:-1]))
        steps = np.diff(wrote, prepend=0.0)
        tail = after[-1] * wrote[-1]
        mean = float((before * steps).sum() + tail)
        # A sequence met at random is so many tokens old.
        ages = float((before * steps * (wrote - steps / 2)).sum() + tail * wrote[-1])
        return mean, float(self._prompts[:count].mean()) + ages / mean
