"""Prefill on one instance, decode on another: how a request and its pages change hands.

    prefill                                   decode
    last piece dispatched   -- Offer -->      queue; reserve pages and a slot when there is room
                            <-- Grant --      which pages of the prompt it holds already
    first token known and granted:
      gather the others,
      free all                -- Delivery --> take them into the reserved pages, decode on
                            <-- Receipt --    they were pulled, or never will be

The offer goes out before the prompt is computed, so a reservation usually waits for the pages and
not the other way round. Pages are gathered into arrays of their own, [W, S, G, K] a layer, so the
source pages are free at once: each device works in order. Within a process a `Delivery` holds
those arrays, which are copied from device to device; between processes it holds a `Ticket` by
which the decode side pulls them (`page_transfer`), and a `Receipt` answers it. Either way both
instances go on meanwhile.

Messages are plain data and name no addressee: the `Exchange` knows the two sides of each request.
A request is ended on the prefill side first, which withdraws its offer; messages about a request
that has ended are dropped, so an abort in any state frees both sides.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.instance import Instance
from jaxsys.serve.paged_model import Cache
from jaxsys.serve.requests import Request, RequestState
from jaxsys.serve.scheduler import Completion, Iteration

RequestId = str | int


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """Prefill to decode: the request is being computed and is to decode there."""

    request: Request
    """The twin that the decode side works on."""

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id


@dataclasses.dataclass(frozen=True, slots=True)
class Withdrawal:
    """Prefill to decode: the request has ended, which its owner knows."""

    request_id: RequestId


@dataclasses.dataclass(frozen=True, slots=True)
class Grant:
    """Decode to prefill: pages and a slot are reserved."""

    request_id: RequestId
    skip: int
    """Pages, from the first, that the decode side holds already."""


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Decode to prefill: the request can never be taken."""

    request_id: RequestId
    message: str
    lost: bool = False
    """Whether another attempt may go better: see `TokenEvent.lost`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ticket:
    """Where pages lie until they are pulled."""

    address: str
    number: int
    width: int
    """Pages, padding included."""


@dataclasses.dataclass(frozen=True, slots=True)
class Delivery:
    """Prefill to decode: the first token, and the pages that the decode side lacks."""

    request_id: RequestId
    contents: Cache | Ticket | None
    outputs: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Receipt:
    """Decode to prefill: what became of a ticket."""

    request_id: RequestId
    pulled: bool


Message = Offer | Withdrawal | Grant | Refusal | Delivery | Receipt


class PageTransfer(Protocol):
    """Moves page contents between processes."""

    def publish(self, request_id: RequestId, contents: Cache, width: int) -> Ticket:
        """Holds contents until they are pulled or released."""
        ...

    def release(self, request_id: RequestId, *, pulled: bool) -> None:
        """Lets go of what was published for a request."""
        ...

    def fetch(self, ticket: Ticket, like: Cache, then: Callable[[Cache | Exception], None]) -> None:
        """Pulls contents of the form of `like`; `then` is called on a thread of the transfer's."""
        ...


@dataclasses.dataclass(slots=True)
class _Outgoing:
    """Prefill side: a request on its way out."""

    request: Request
    granted: bool = False
    skip: int = 0
    computed: bool = False


class Sender:
    """The prefill instance's part."""

    def __init__(
        self,
        instance: Instance,
        send: Callable[[Message], None],
        pages: PageTransfer | None = None,
    ):
        """
        Args:
            send: takes messages to the other side.
            pages: how contents travel to another process; None hands over the arrays themselves.
        """
        self.instance = instance
        self.send = send
        self.pages = pages
        self._outgoing: dict[RequestId, _Outgoing] = {}

    def planned(self, iteration: Iteration) -> None:
        for piece in iteration.prefills:
            if piece.request.state is RequestState.HANDING_OVER:  # it may have ended at dispatch
                self._outgoing[piece.request.request_id] = _Outgoing(piece.request)
                self.send(Offer(piece.request.handed_over()))

    def completed(self, completion: Completion) -> None:
        for request in completion.finished:
            self.aborted(request)  # it ended with its first token
        for request in completion.handed_over:
            outgoing = self._outgoing.get(request.request_id)
            if outgoing is not None:
                outgoing.computed = True
                if outgoing.granted:
                    self._deliver(outgoing)

    def between(self) -> None:
        return

    def take(self, message: Message) -> None:
        if isinstance(message, Receipt):
            if self.pages is not None:
                self.pages.release(message.request_id, pulled=message.pulled)
            return
        outgoing = self._outgoing.get(message.request_id)
        if outgoing is None:
            return  # it has ended
        if isinstance(message, Grant):
            outgoing.granted, outgoing.skip = True, message.skip
            if outgoing.computed:
                self._deliver(outgoing)
        elif isinstance(message, Refusal):
            del self._outgoing[message.request_id]
            self.instance.abort_now(message.request_id, "error", message.message, lost=message.lost)

    def aborted(self, request: Request) -> None:
        if self._outgoing.pop(request.request_id, None) is not None:
            self.send(Withdrawal(request.request_id))

    def _deliver(self, outgoing: _Outgoing) -> None:
        request = outgoing.request
        name = request.request_id
        executor = self.instance.executor
        assert isinstance(executor, JaxExecutor)
        size = self.instance.scheduler.config.page_size
        pages = request.pages[outgoing.skip : -(-request.computed // size)]
        contents: Cache | Ticket | None = None
        if pages:
            contents = executor.extract(pages)
            if self.pages is not None:
                contents = self.pages.publish(name, contents, contents[0].keys.shape[0])
        del self._outgoing[name]
        self.instance.scheduler.release_handed_over(request)
        self.instance.requests.pop(name, None)
        self.send(Delivery(name, contents, list(request.output_tokens)))


class Receiver:
    """The decode instance's part."""

    def __init__(
        self,
        instance: Instance,
        send: Callable[[Message], None],
        pages: PageTransfer | None = None,
    ):
        """As `Sender`'s."""
        self.instance = instance
        self.send = send
        self.pages = pages

    def planned(self, iteration: Iteration) -> None:
        return

    def completed(self, completion: Completion) -> None:
        return

    def between(self) -> None:
        for twin in self.instance.scheduler.reserve_incoming():
            self.send(Grant(twin.request_id, twin.shared_pages))

    def take(self, message: Message) -> None:
        if isinstance(message, Offer):
            self._offered(message.request)
        elif isinstance(message, Withdrawal):
            twin = self.instance.requests.pop(message.request_id, None)
            if twin is not None:
                self.instance.scheduler.abort(twin, self.instance.clock.now_s())
        elif isinstance(message, Delivery):
            self._delivered(message)

    def aborted(self, request: Request) -> None:
        return

    def _offered(self, twin: Request) -> None:
        try:
            self.instance.scheduler.add_incoming(twin)
        except ValueError as error:
            self.send(Refusal(twin.request_id, str(error)))
        else:
            self.instance.requests[twin.request_id] = twin

    def _delivered(self, message: Delivery) -> None:
        twin = self.instance.requests.get(message.request_id)
        contents = message.contents
        if not isinstance(contents, Ticket):
            if twin is not None:  # not aborted meanwhile
                self._resume(twin, contents, message.outputs)
        elif twin is None or self.pages is None:
            self.send(Receipt(message.request_id, pulled=False))
        else:
            executor = self.instance.executor
            assert isinstance(executor, JaxExecutor)

            def fetched(result: Cache | Exception) -> None:
                self.instance.post(lambda: self._fetched(twin, result, message.outputs))

            self.pages.fetch(contents, executor.contents_like(contents.width), fetched)

    def _fetched(self, twin: Request, result: Cache | Exception, outputs: list[int]) -> None:
        name = twin.request_id
        failed = isinstance(result, Exception)
        self.send(Receipt(name, pulled=not failed))
        if self.instance.requests.get(name) is not twin:
            return  # aborted meanwhile
        if failed:
            message = f"the pages of the request did not arrive: {result}"
            self.instance.abort_now(name, "error", message, lost=True)
        else:
            self._resume(twin, result, outputs)

    def _resume(self, twin: Request, contents: Cache | None, outputs: list[int]) -> None:
        executor = self.instance.executor
        assert isinstance(executor, JaxExecutor)
        twin.output_tokens, twin.generated = outputs, len(outputs)
        if contents is not None:
            executor.insert(contents, twin.pages[twin.shared_pages :])
        self.instance.scheduler.start_received(twin)
        executor.resume(twin)
