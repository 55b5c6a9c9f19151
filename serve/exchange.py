"""Passes hand-over messages between prefill and decode instances, and knows who has what.

Each request that changes hands is a `Passage` from its offer until its pages are in the decode
instance's hands. The exchange chooses the decode instance, counts requests in flight there, gives
up passages that take too long, and cleans up behind an instance that is gone.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Literal

from jaxsys.errors import UsageError
from jaxsys.serve.clock import Clock
from jaxsys.serve.handover import (
    Delivery,
    Grant,
    Message,
    Offer,
    Receipt,
    Refusal,
    RequestId,
    Withdrawal,
)
from jaxsys.serve.hooks import Router
from jaxsys.serve.member import Member

Stage = Literal["offered", "granted", "delivered"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandoverLimits:
    """Longest stay in each stage, in seconds; what exceeds it is begun again elsewhere."""

    offered_s: float = 300.0
    """Until the decode side has room; as long as a full one may take to get some."""
    granted_s: float = 120.0
    """Until the prompt is computed."""
    delivered_s: float = 60.0
    """Until all pages have arrived."""

    def __post_init__(self) -> None:
        for name in ("offered_s", "granted_s", "delivered_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)} must be over 0 seconds")

    def of(self, stage: Stage) -> float:
        """The limit of one stage."""
        return {
            "offered": self.offered_s,
            "granted": self.granted_s,
            "delivered": self.delivered_s,
        }[stage]


@dataclasses.dataclass(slots=True)
class Passage:
    """A request between two instances."""

    source: Member
    target: Member
    stage: Stage
    since_s: float


class Exchange:
    """Messages may come from any thread; decisions are made under one lock."""

    def __init__(
        self,
        router: Router,
        *,
        clock: Clock,
        moved: Callable[[RequestId, Member, Member], None],
        limits: HandoverLimits | None = None,
    ):
        """
        Args:
            moved: told, under the lock, when a request leaves its prefill instance for another.
        """
        self.router = router
        self.clock = clock
        self.moved = moved
        self.limits = limits or HandoverLimits()
        self.decoders: Sequence[Member] = ()
        self.lock = threading.RLock()
        """Held while `moved` runs; an owner that reads where requests are holds it too."""
        self._passages: dict[RequestId, Passage] = {}

    def __len__(self) -> int:
        return len(self._passages)

    def passage(self, request_id: RequestId) -> Passage | None:
        """Where a request stands, if it is changing hands."""
        return self._passages.get(request_id)

    def forward(self, source: Member, message: Message) -> None:
        """Takes a message from `source` to whom it concerns."""
        with self.lock:
            if isinstance(message, Offer):
                self._offer(source, message)
                return
            name = message.request_id
            passage = self._passages.get(name)
            if passage is None:
                if isinstance(message, Delivery) and message.outputs is not None:
                    source.take(Receipt(name, pulled=False))  # given up meanwhile
                return
            if isinstance(message, Grant):
                self._enter(passage, "granted")
                passage.source.take(message)
            elif isinstance(message, Delivery):
                if message.outputs is not None:
                    self.moved(name, passage.source, passage.target)
                    self._enter(passage, "delivered")
                passage.target.take(message)
            elif isinstance(message, Receipt):
                del self._passages[name]
                passage.source.take(message)
            else:
                del self._passages[name]
                passage.target.adjust_in_flight(-1)
                withdrawn = isinstance(message, Withdrawal)
                (passage.target if withdrawn else passage.source).take(message)

    def late(self) -> list[tuple[RequestId, str]]:
        """Requests that have been in one stage for too long, and what is to be said of them."""
        now_s = self.clock.now_s()
        with self.lock:
            return [
                (name, self._lateness(passage))
                for name, passage in self._passages.items()
                if now_s - passage.since_s > self.limits.of(passage.stage)
            ]

    def give_up(self, request_id: RequestId) -> None:
        """Frees both sides of a passage."""
        with self.lock:
            passage = self._passages.pop(request_id, None)
            if passage is None:
                return
            if passage.stage == "delivered":  # it is counted and aborted where it is at home
                passage.source.take(Receipt(request_id, pulled=False))
            else:
                passage.target.adjust_in_flight(-1)
                passage.target.take(Withdrawal(request_id))

    def gone(self, member: Member) -> list[RequestId]:
        """An instance has failed: nothing will come from it any more.

        Returns:
            The requests that it leaves undecided, which must be begun again.
        """
        undecided = []
        with self.lock:
            for name, passage in list(self._passages.items()):
                if member in (passage.source, passage.target):
                    if passage.stage != "delivered":
                        undecided.append(name)
                    self.give_up(name)
        return undecided

    def _offer(self, source: Member, message: Offer) -> None:
        living = [one for one in self.decoders if one.open]
        if not living:
            reason = "no decode instance is left"
            source.take(Refusal(message.request_id, reason, lost=True))
            return
        target = living[self.router.choose(living, message.request)]
        target.adjust_in_flight(1)
        now_s = self.clock.now_s()
        self._passages[message.request_id] = Passage(source, target, "offered", now_s)
        target.take(message)

    def _lateness(self, passage: Passage) -> str:
        return (
            f"hand-over from {passage.source.name} to {passage.target.name}: still "
            f"{passage.stage} after {self.limits.of(passage.stage):g} s"
        )

    def _enter(self, passage: Passage, stage: Stage) -> None:
        passage.stage, passage.since_s = stage, self.clock.now_s()
