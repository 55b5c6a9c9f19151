"""Prefill on one instance, decode on another: how a request and its pages change hands.

    prefill                                   decode
    first piece dispatched  -- Offer -->      queue; reserve pages and a slot when there is room
                            <-- Grant --      which pages of the prompt it holds already
    each piece dispatched,
    once granted: gather
    its full pages          -- Delivery -->   take them into the reserved pages when they are there
    first token known:
      gather what is left,
      free all              -- Delivery -->   the same, and decode on
                            <-- Receipt --    all have arrived, or never will

Pages are gathered into an array of their own, of all layers, right behind the piece that fills
them: each device works in order, so they leave while the next piece is computed, and the source
pages are free at once. The decode side writes pages only when they have arrived: its device never
waits for them. Within a process a `Delivery` holds the array (`SameProcess`), between processes a
`Ticket` by which the decode side pulls it (`page_transfer`).

Messages are plain data and name no addressee: the `Exchange` knows the two sides of each request.
A request is ended on the prefill side first, which withdraws its offer; messages about a request
that has ended are dropped, so an abort in any state frees both sides.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax

from jaxsys.serve.arrivals import Arrivals
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.instance import Instance
from jaxsys.serve.iterations import Completion, Iteration
from jaxsys.serve.paged_model import Contents
from jaxsys.serve.requests import Request, RequestState

RequestId = str | int

FETCH_S = 60.0
"""Longest time that pages may take from device to device."""


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
    """Prefill to decode: pages that the decode side lacks; the last one has the first token."""

    request_id: RequestId
    pages: Contents | Ticket | None
    first: int
    """Number of the first of their blocks."""
    count: int
    """Of blocks."""
    outputs: list[int] | None
    """None before the last delivery."""


@dataclasses.dataclass(frozen=True, slots=True)
class Receipt:
    """Decode to prefill: what became of the pages, after the last delivery."""

    request_id: RequestId
    pulled: bool


Message = Offer | Withdrawal | Grant | Refusal | Delivery | Receipt


class PageTransfer(Protocol):
    """Moves page contents to where they are decoded from."""

    def publish(self, request_id: RequestId, contents: Contents) -> Contents | Ticket:
        """Holds contents until they are fetched or released."""
        ...

    def release(self, request_id: RequestId, *, pulled: bool) -> None:
        """Lets go of all that was published for a request."""
        ...

    def fetch(
        self,
        pages: Contents | Ticket,
        like: jax.ShapeDtypeStruct,
        then: Callable[[Contents | Exception], None],
    ) -> None:
        """Brings what was published into the form and place of `like`.

        `then` is called when it is there, or will not come, on whatever thread.
        """
        ...


class SameProcess:
    """`PageTransfer` between devices of this process."""

    def __init__(self) -> None:
        self._arrivals = Arrivals()

    def publish(self, request_id: RequestId, contents: Contents) -> Contents:
        return contents

    def release(self, request_id: RequestId, *, pulled: bool) -> None:
        return

    def fetch(
        self,
        pages: Contents | Ticket,
        like: jax.ShapeDtypeStruct,
        then: Callable[[Contents | Exception], None],
    ) -> None:
        assert not isinstance(pages, Ticket)
        placed = jax.device_put(pages, like.sharding)
        self._arrivals.expect(placed, FETCH_S, then)


@dataclasses.dataclass(slots=True)
class _Outgoing:
    """Prefill side: a request on its way out."""

    request: Request
    granted: bool = False
    sent: int = 0
    """Pages, from the first, that the decode side has or is sent."""
    computed: bool = False


class Sender:
    """The prefill instance's part."""

    def __init__(self, instance: Instance, send: Callable[[Message], None], pages: PageTransfer):
        """
        Args:
            send: takes messages to the other side.
            pages: how contents travel.
        """
        self.instance = instance
        self.send = send
        self.pages = pages
        self._outgoing: dict[RequestId, _Outgoing] = {}

    def planned(self, iteration: Iteration) -> None:
        for piece in iteration.prefills:
            request = piece.request
            if request.state is RequestState.FINISHED:  # at dispatch
                continue
            outgoing = self._outgoing.get(request.request_id)
            if outgoing is None:
                self._outgoing[request.request_id] = _Outgoing(request)
                self.send(Offer(request.handed_over()))
            else:
                self._deliver(outgoing)

    def completed(self, completion: Completion) -> None:
        for request in completion.finished:
            self.aborted(request)  # it ended with its first token
        for request in completion.handed_over:
            outgoing = self._outgoing.get(request.request_id)
            if outgoing is not None:
                outgoing.computed = True
                self._deliver(outgoing)

    def between(self) -> None:
        return

    def take(self, message: Message) -> None:
        if isinstance(message, Receipt):
            self.pages.release(message.request_id, pulled=message.pulled)
            return
        outgoing = self._outgoing.get(message.request_id)
        if outgoing is None:
            return  # it has ended
        if isinstance(message, Grant):
            outgoing.granted, outgoing.sent = True, message.skip
            self._deliver(outgoing)
        elif isinstance(message, Refusal):
            del self._outgoing[message.request_id]
            self.instance.abort_now(message.request_id, "error", message.message, lost=message.lost)

    def aborted(self, request: Request) -> None:
        if self._outgoing.pop(request.request_id, None) is not None:
            self.pages.release(request.request_id, pulled=False)
            self.send(Withdrawal(request.request_id))

    def _deliver(self, outgoing: _Outgoing) -> None:
        """Sends the pages that are computed and not sent yet; with the last, the request itself."""
        if not outgoing.granted:
            return
        request, first = outgoing.request, outgoing.sent
        name = request.request_id
        size = self.instance.scheduler.config.page_size
        end = request.computed // size
        if request.state is RequestState.HANDING_OVER:  # its last page too is as full as it gets
            end = -(-request.computed // size)
        pages: Contents | Ticket | None = None
        if end > first:
            outgoing.sent = end
            held = self.instance.scheduler.travelling(request, first, end)
            if held:  # else no layer sees them any more
                executor = self.instance.executor
                assert isinstance(executor, JaxExecutor)
                pages = self.pages.publish(name, executor.extract(held))
        count = max(0, end - first)
        if outgoing.computed:
            del self._outgoing[name]
            self.instance.scheduler.release_handed_over(request)
            self.instance.requests.pop(name, None)
            self.send(Delivery(name, pages, first, count, list(request.output_tokens)))
        elif pages is not None:
            self.send(Delivery(name, pages, first, count, None))


@dataclasses.dataclass(slots=True)
class _Incoming:
    """Decode side: a request whose pages come in."""

    twin: Request
    arriving: int = 0
    """Deliveries under way."""
    failure: Exception | None = None
    outputs: list[int] | None = None


class Receiver:
    """The decode instance's part."""

    def __init__(self, instance: Instance, send: Callable[[Message], None], pages: PageTransfer):
        """As `Sender`'s."""
        self.instance = instance
        self.send = send
        self.pages = pages
        self._incoming: dict[RequestId, _Incoming] = {}

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
            self._incoming.pop(message.request_id, None)  # nobody waits for a receipt
            twin = self.instance.requests.pop(message.request_id, None)
            if twin is not None:
                self.instance.scheduler.abort(twin, self.instance.clock.now_s())
        elif isinstance(message, Delivery):
            self._delivered(message)

    def aborted(self, request: Request) -> None:
        incoming = self._incoming.pop(request.request_id, None)
        if incoming is not None and incoming.outputs is not None:
            self.send(Receipt(request.request_id, pulled=False))

    def _offered(self, twin: Request) -> None:
        try:
            self.instance.check_adapter(twin)
            self.instance.scheduler.add_incoming(twin)
        except ValueError as error:
            self.send(Refusal(twin.request_id, str(error)))
        else:
            self.instance.requests[twin.request_id] = twin

    def _delivered(self, message: Delivery) -> None:
        name = message.request_id
        incoming = self._incoming.get(name)
        if incoming is None:
            twin = self.instance.requests.get(name)
            if twin is None:  # it has ended here meanwhile
                if message.outputs is not None:
                    self.send(Receipt(name, pulled=False))
                return
            incoming = self._incoming[name] = _Incoming(twin)
        incoming.outputs = message.outputs
        pages = message.pages
        if pages is not None:
            incoming.arriving += 1
            executor = self.instance.executor
            assert isinstance(executor, JaxExecutor)

            def arrived(result: Contents | Exception) -> None:
                self.instance.post(lambda: self._arrived(incoming, message, result))

            width = pages.width if isinstance(pages, Ticket) else pages.shape[1]
            self.pages.fetch(pages, executor.steps.contents_like(width), arrived)
        self._settle(incoming)

    def _arrived(
        self, incoming: _Incoming, message: Delivery, result: Contents | Exception
    ) -> None:
        if self._incoming.get(message.request_id) is not incoming:
            return  # ended meanwhile
        incoming.arriving -= 1
        if isinstance(result, Exception):
            incoming.failure = result
        else:
            executor = self.instance.executor
            assert isinstance(executor, JaxExecutor)
            end = message.first + message.count
            twin = incoming.twin
            pages = self.instance.scheduler.travelling(twin, message.first, end)
            executor.insert(result, pages)
        self._settle(incoming)

    def _settle(self, incoming: _Incoming) -> None:
        """Decodes on, once everything is there."""
        twin, outputs, failure = incoming.twin, incoming.outputs, incoming.failure
        if incoming.arriving or outputs is None:
            return
        name = twin.request_id
        del self._incoming[name]
        self.send(Receipt(name, pulled=failure is None))
        if failure is not None:
            message = f"the pages of the request did not arrive: {failure}"
            self.instance.abort_now(name, "error", message, lost=True)
            return
        executor = self.instance.executor
        assert isinstance(executor, JaxExecutor)
        twin.output_tokens, twin.generated = outputs, len(outputs)
        self.instance.scheduler.start_received(twin)
        executor.resume(twin)
