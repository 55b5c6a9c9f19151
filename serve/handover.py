"""Prefill on one instance, decode on another: how a request and its pages change hands.

    prefill                                   decode
    last piece dispatched   -- offer -->      queue; reserve pages and a slot when there is room
                            <-- grant --      which pages of the prompt it holds already
    first token known and granted:
      gather the others,
      free all                -- deliver -->  write them into the reserved pages, decode on

The offer goes out before the prompt is computed, so a reservation usually waits for the pages and
not the other way round. Pages are gathered into arrays of their own, [W, S, G, K] a layer, and
copied from device to device while both instances go on; the source pages are free at once, since
each device works in order.

Every message is a function posted to the other instance's thread. A request is ended on the
prefill side first, which withdraws its offer; messages about a request that has ended are dropped,
so an abort in any state frees both sides.
"""

import dataclasses
from collections.abc import Callable, Sequence

from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.hooks import Router
from jaxsys.serve.instance import Instance
from jaxsys.serve.paged_model import Cache
from jaxsys.serve.requests import Request
from jaxsys.serve.scheduler import Completion, Iteration


@dataclasses.dataclass(slots=True)
class _Offer:
    """Prefill side: a request on its way out."""

    request: Request
    target: "Receiver"
    granted: bool = False
    skip: int = 0
    """Pages, from the first, that the decode side holds already."""
    computed: bool = False


class Sender:
    """The prefill instance's part."""

    def __init__(
        self,
        instance: Instance,
        targets: "Sequence[Receiver]",
        router: Router,
        *,
        moved: "Callable[[Request, Instance, Instance], None]",
    ):
        """
        Args:
            targets: the decode instances' parts, in the order the router sees them.
            moved: told when a request leaves this instance for another.
        """
        self.instance = instance
        self.targets = targets
        self.router = router
        self.moved = moved
        self._offers: dict[str | int, _Offer] = {}

    def planned(self, iteration: Iteration) -> None:
        for piece in iteration.prefills:
            if not piece.last:
                continue
            request = piece.request
            living = [target for target in self.targets if target.instance.failure is None]
            if not living:
                self.instance.abort_now(request.request_id, "error", "no decode instance is left")
                continue
            views = [target.instance for target in living]
            target = living[self.router.choose(views, request)]
            target.instance.adjust_in_flight(1)
            self._offers[request.request_id] = _Offer(request, target)
            twin = request.handed_over()
            target.instance.post(lambda t=target, twin=twin: t.offered(twin, self))

    def completed(self, completion: Completion) -> None:
        for request in completion.finished:
            self.aborted(request)  # it ended with its first token
        for request in completion.handed_over:
            offer = self._offers[request.request_id]
            offer.computed = True
            if offer.granted:
                self._deliver(offer)

    def between(self) -> None:
        return

    def granted(self, request_id: str | int, skip: int) -> None:
        """The decode side has reserved pages, and has the contents of the first `skip`."""
        offer = self._offers.get(request_id)
        if offer is not None:
            offer.granted, offer.skip = True, skip
            if offer.computed:
                self._deliver(offer)

    def refused(self, request_id: str | int, message: str) -> None:
        """The decode side can never take the request."""
        if request_id in self._offers:
            del self._offers[request_id]
            self.instance.abort_now(request_id, "error", message)

    def aborted(self, request: Request) -> None:
        offer = self._offers.pop(request.request_id, None)
        if offer is not None:
            target = offer.target
            target.instance.adjust_in_flight(-1)
            target.instance.post(lambda: target.withdrawn(request.request_id))

    def _deliver(self, offer: _Offer) -> None:
        request, target = offer.request, offer.target
        del self._offers[request.request_id]
        executor = self.instance.executor
        assert isinstance(executor, JaxExecutor)
        size = self.instance.scheduler.config.page_size
        pages = request.pages[offer.skip : -(-request.computed // size)]
        contents = executor.extract(pages) if pages else None
        self.instance.scheduler.release_handed_over(request)
        self.instance.requests.pop(request.request_id, None)
        self.moved(request, self.instance, target.instance)
        outputs = list(request.output_tokens)
        target.instance.post(lambda: target.delivered(request.request_id, contents, outputs))


class Receiver:
    """The decode instance's part."""

    def __init__(self, instance: Instance):
        self.instance = instance
        self._senders: dict[str | int, Sender] = {}

    def planned(self, iteration: Iteration) -> None:
        return

    def completed(self, completion: Completion) -> None:
        return

    def between(self) -> None:
        for twin in self.instance.scheduler.reserve_incoming():
            sender = self._senders[twin.request_id]
            name, skip = twin.request_id, twin.shared_pages
            sender.instance.post(lambda s=sender, n=name, k=skip: s.granted(n, k))

    def offered(self, twin: Request, sender: Sender) -> None:
        """A prefill instance computes a request that is to decode here."""
        try:
            self.instance.scheduler.add_incoming(twin)
        except ValueError as error:
            message = str(error)
            sender.instance.post(lambda: sender.refused(twin.request_id, message))
            return
        self._senders[twin.request_id] = sender
        self.instance.requests[twin.request_id] = twin

    def withdrawn(self, request_id: str | int) -> None:
        """The request ended on the prefill side, which has said so to its owner."""
        self._senders.pop(request_id, None)
        twin = self.instance.requests.pop(request_id, None)
        if twin is not None:
            self.instance.scheduler.abort(twin, self.instance.clock.now_s())

    def delivered(self, request_id: str | int, contents: Cache | None, outputs: list[int]) -> None:
        """The pages and the first token have come."""
        self._senders.pop(request_id, None)
        twin = self.instance.requests.get(request_id)
        if twin is None:
            return  # aborted meanwhile
        executor = self.instance.executor
        assert isinstance(executor, JaxExecutor)
        twin.output_tokens, twin.generated = outputs, len(outputs)
        if contents is not None:
            executor.insert(contents, twin.pages[twin.shared_pages :])
        self.instance.scheduler.start_received(twin)
        executor.resume(twin)

    def aborted(self, request: Request) -> None:
        self._senders.pop(request.request_id, None)
