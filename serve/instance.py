"""One serving instance: a thread that plans, dispatches and completes iterations in turn.

While iteration n runs on the device, the loop plans and dispatches n+1; only then does it wait for
n's tokens. Everything an instance owns (scheduler, executor, governor) is touched by its thread
alone: others `post` a function to be called there between iterations. When the loop ends, however
it does, the governor gives the GPU's clock back.

A fault of the device voids what lay on it: its requests end as lost, to be begun again, and the
instance goes on with empty pages if the device still answers. Any other exception is its end.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.errors import JaxRuntimeError

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.clock import Clock
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.hooks import AnyGovernor
from jaxsys.serve.host_copies import HostCopies
from jaxsys.serve.host_pages import Fetch
from jaxsys.serve.iterations import Completion, Iteration
from jaxsys.serve.member import NOT_FINITE, InstanceLoad, Member, TokenEvent
from jaxsys.serve.outcomes import Executor, RequestFault, Sampled, TokenLogprobs
from jaxsys.serve.requests import FinishReason, Request, RequestState
from jaxsys.serve.sampling import NOTHING
from jaxsys.serve.scheduler import Scheduler
from jaxsys.serve.turns import Transfer, Turns

if TYPE_CHECKING:
    from jaxsys.serve.handover import Message
    from jaxsys.serve.lora import AdapterSlots, Table

logger = logging.getLogger(__name__)

IDLE_LOOK_S = 0.25
"""How often an idle instance looks up, so that idle energy and the idle clock are kept current."""
MAX_FAULTS = 10
"""Faults of the device in a row, without a completed iteration between, that end an instance."""


class Instance(Member):
    """A scheduler, an executor and a governor on a thread of their own."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        executor: Executor,
        *,
        governor: AnyGovernor,
        clock: Clock,
        sink: Callable[[Sequence[TokenEvent]], None],
    ):
        """
        Args:
            sink: receives the events of each iteration, on the instance's thread.
        """
        super().__init__(
            name,
            page_count=scheduler.config.page_count,
            page_size=scheduler.config.page_size,
            energy_method=governor.method,
        )
        self.scheduler = scheduler
        self.executor = executor
        self.governor = governor
        self.clock = clock
        self.sink = sink
        self.turns = Turns(scheduler, governor, clock, self)
        self.requests: dict[str | int, Request] = {}
        """Requests known here that have not ended."""
        self.copies: HostCopies | None = None
        """Moves pages to the host's memory and back, where that keeps some."""
        self._leaving: set[str] = set()
        """Adapters that are unloaded when their last request here has ended: where several fronts
        send requests, one's end may come behind the unloading."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._faults = 0
        self._faults_in_a_row = 0
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    @property
    def transfer(self) -> Transfer | None:
        """Its part in hand-overs; None where it has none."""
        return self.turns.transfer

    @transfer.setter
    def transfer(self, transfer: Transfer) -> None:
        self.turns.transfer = transfer

    # --- from any thread ----------------------------------------------------------------------

    def start(self) -> None:
        """Starts the loop."""
        self._thread.start()

    def post(self, function: Callable[[], None]) -> None:
        """Has `function` called on the instance's thread."""
        self._inbox.put(function)

    def check_fits(self, prompt_length: int, max_tokens: int) -> None:
        self.scheduler.check_fits(prompt_length, max_tokens)

    def submit(self, request: Request) -> None:
        self.post(lambda: self._add(request))

    def abort(self, request_id: str | int, reason: FinishReason = "abort") -> None:
        self.post(lambda: self.abort_now(request_id, reason))

    def take(self, message: "Message") -> None:
        transfer = self.transfer
        if transfer is not None:
            self.post(lambda: transfer.take(message))

    def load_adapter(self, key: str, folder: str, done: Callable[[str | None], None]) -> None:
        def read() -> None:
            try:
                values = self._slots().read(folder)
            except (UsageError, RunError, OSError) as error:
                done(str(error))
            except Exception as error:
                logger.exception("no adapter", extra={"instance": self.name, "reason": folder})
                done(f"{folder} cannot be read: {error}")
            else:
                self.post(lambda: put(values))

        def put(values: "list[Table]") -> None:
            try:
                self._slots().put(key, values)
            except UsageError as error:
                done(str(error))
            else:
                done(None)

        # Apart from the loop, which computes meanwhile.
        threading.Thread(target=read, name=f"{self.name} reads {key}", daemon=True).start()

    def unload_adapter(self, key: str) -> None:
        def drop() -> None:
            self._leaving.add(key)
            self._drop_left()

        self.post(drop)

    def _drop_left(self) -> None:
        """Frees slots of adapters that are to go and that no request here has any more."""
        used = {request.adapter for request in self.requests.values()}
        for key in self._leaving - used:
            self._leaving.discard(key)
            self._slots().drop(key)

    def _slots(self) -> "AdapterSlots":
        executor = self.executor
        if not isinstance(executor, JaxExecutor) or executor.adapters is None:
            raise UsageError("no adapters are served; start with --max-loras")
        return executor.adapters

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the loop after the iterations in flight; True once the thread is gone.

        The clock is given back also where it does not end in time, or never began.
        """
        self.post(self._stop_now)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        self._give_back()
        return not self._thread.is_alive()

    # --- on the instance's thread -------------------------------------------------------------

    def abort_now(
        self,
        request_id: str | int,
        reason: FinishReason = "abort",
        message: str = "",
        *,
        lost: bool = False,
    ) -> None:
        """`abort`, for callers on the instance's thread."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        if self.transfer is not None:
            self.transfer.aborted(request)
        now_s = self.clock.now_s()
        self.scheduler.abort(request, now_s, reason)
        self.sink([TokenEvent(request, None, None, reason, now_s, message, lost)])

    def check_adapter(self, request: Request) -> None:
        """Raises UsageError where the request's adapter is not loaded here."""
        executor = self.executor
        known = isinstance(executor, JaxExecutor) and executor.knows_adapter(request)
        if request.adapter is not None and not known:
            raise UsageError(f"adapter {request.adapter!r} is not loaded at {self.name}")

    def _add(self, request: Request) -> None:
        try:
            self.check_adapter(request)
            self.scheduler.add(request)
        except ValueError as error:
            now_s = self.clock.now_s()
            self.sink([TokenEvent(request, None, None, "error", now_s, str(error))])
            return
        self.requests[request.request_id] = request

    def _stop_now(self) -> None:
        self.turns.stopping = True

    def _main(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            self.failure = error
            logger.exception("instance failed", extra={"instance": self.name})
            self._give_back()
            self._fail_everything(f"instance {self.name} failed: {error}")
        else:
            self._give_back()

    def _give_back(self) -> None:
        if self.copies is not None:
            self.copies.close()
        try:
            self.governor.close()
        except Exception:
            logger.exception("the clock was not given back", extra={"instance": self.name})

    def _loop(self) -> None:
        self.turns.start()
        self.governor.start(self.clock.now_s())
        while True:
            try:
                return self._turns()
            except JaxRuntimeError as error:
                logger.exception("device fault", extra={"instance": self.name})
                reason = str(error)
            self._recover(reason)

    def _turns(self) -> None:
        """Takes turns until the instance is to stop."""
        turns = self.turns
        while True:
            self._read_inbox(wait=turns.stuck)
            if turns.done:
                return
            flight = turns.turn()
            if flight is not None:
                outcome = self.executor.collect(flight.handle)
                self._faults_in_a_row = 0
                turns.end(outcome)
                for fault in self.executor.release():
                    self.abort_now(fault.request.request_id, "error", str(fault))
            self._publish(turns.iteration)

    def _recover(self, reason: str) -> None:
        """Goes on with empty pages; requests that had some are lost, the others still wait.

        Raises:
            JaxRuntimeError: if the device does not answer.
            RunError: if it does, but nothing has come of it for long.
        """
        self._faults_in_a_row += 1
        if self._faults_in_a_row == MAX_FAULTS:
            raise RunError(f"{MAX_FAULTS} faults of the device in a row, the last: {reason}")
        self.executor.rebuild()
        self._faults += 1
        for request in list(self.requests.values()):
            if request.state is not RequestState.WAITING:
                message = f"the device of instance {self.name} failed: {reason}"
                self.abort_now(request.request_id, "error", message, lost=True)
        self.turns.drop()
        self._publish(None)

    # --- of its turns -------------------------------------------------------------------------

    def dispatch(self, iteration: Iteration) -> Any:
        """Dispatches; a request that cannot be computed ends with the reason, and nothing else."""
        saves = iteration.saves
        if saves and self.copies is not None:
            self.copies.save(saves, lambda there: self.scheduler.saved(saves, arrived=there))
        while True:
            try:
                return self.executor.dispatch(iteration)
            except RequestFault as fault:
                if fault.request.state is RequestState.FINISHED:
                    raise
                logger.exception("bad request", extra={"request_id": fault.request.request_id})
                self.abort_now(fault.request.request_id, "error", str(fault))

    def fetch(self, fetch: Fetch) -> None:
        """Has pages filled from the host's memory."""
        assert self.copies is not None
        request, start = fetch.request, self.scheduler.start_fetched
        self.copies.fetch(fetch, lambda there: start(request, arrived=there))

    def ended(
        self, iteration: Iteration, outcome: Sampled | None, latency_s: float, now_s: float
    ) -> None:
        """Ends requests that came to nothing, and tells gauges."""
        if outcome is not None:
            self._end_broken(iteration, outcome.tokens)
        if self.on_latency is not None:
            self.on_latency(latency_s)

    def completed(
        self, iteration: Iteration, outcome: Sampled | None, completion: Completion, now_s: float
    ) -> None:
        """Sends tokens on."""
        if completion.emitted and outcome is not None:
            self._emit(iteration, outcome, completion, now_s)

    def _end_broken(self, iteration: Iteration, tokens: Sequence[int]) -> None:
        """Ends the requests whose logits were not finite; what they leave in pages is cleared."""
        if NOTHING not in tokens:
            return
        for request, token in zip(iteration.sampling, tokens, strict=True):
            if token != NOTHING or request.pending == 0:  # it has ended or was preempted since
                continue
            logger.error("outputs not finite", extra={"request_id": request.request_id})
            pages = self.scheduler.disown(request)
            self.abort_now(request.request_id, "error", NOT_FINITE)
            executor = self.executor
            assert isinstance(executor, JaxExecutor)
            executor.clear(pages)

    def _emit(
        self,
        iteration: Iteration,
        outcome: Sampled,
        completion: Completion,
        now_s: float,
    ) -> None:
        beside: dict[int, list[TokenLogprobs | None]] = {}
        if outcome.logprobs is not None:
            further = outcome.more_logprobs or [[] for _ in outcome.logprobs]
            for request, first, rest in zip(
                iteration.sampling, outcome.logprobs, further, strict=True
            ):
                if first is not None:
                    beside[id(request)] = [first, *rest]
        events = []
        for request, gained in zip(completion.emitted, completion.gained, strict=True):
            scores = beside.get(id(request))
            for place in range(gained):
                last = place == gained - 1
                events.append(
                    TokenEvent(
                        request,
                        request.output_tokens[place - gained],
                        None if scores is None else scores[place],
                        request.finish_reason if last else None,
                        now_s,
                        prompt=request.prompt_logprobs if request.generated == 1 else None,
                        embedding=_embedding(request),
                    )
                )
        for request in completion.finished:
            self.requests.pop(request.request_id, None)
        self.sink(events)

    def _read_inbox(self, *, wait: bool) -> None:
        inbox = self._inbox
        if wait:
            quiet_since_s = self.clock.now_s()
            while True:
                self.governor.idle(self.clock.now_s(), quiet_since_s)
                self._publish(None)
                try:
                    inbox.get(timeout=IDLE_LOOK_S)()
                    break
                except queue.Empty:
                    continue
        while not inbox.empty():
            inbox.get()()

    def _publish(self, iteration: Iteration | None) -> None:
        scheduler = self.scheduler
        if self._leaving:
            self._drop_left()
        reading = self.governor.reading(self.clock.now_s())
        self.load = InstanceLoad(
            batch=len(scheduler.running),
            kv_tokens=scheduler.kv_tokens if iteration is None else iteration.kv_tokens,
            waiting=len(scheduler.waiting) + len(scheduler.incoming),
            waiting_tokens=scheduler.waiting_tokens,
            pages_held=scheduler.allocator.held,
            preemptions=scheduler.preemptions,
            iterations=scheduler.iterations,
            faults=self._faults,
            **_guesses(scheduler),
            **_of_host(scheduler),
            energy_j=reading.energy_j,
            idle_energy_j=reading.idle_j,
            energy_at_max_j=reading.energy_at_max_j,
            power_w=reading.power_w,
            clock_mhz=reading.clock_mhz,
            clock_bounds_mhz=reading.clock_bounds_mhz,
        )

    def _fail_everything(self, message: str) -> None:
        now_s = self.clock.now_s()
        # The loop is gone: whatever arrives later is answered with the failure too.
        while True:
            for request in list(self.requests.values()):
                if self.transfer is not None:
                    self.transfer.aborted(request)
                self.scheduler.abort(request, now_s, "error")
                self.sink([TokenEvent(request, None, None, "error", now_s, message, True)])
            self.requests.clear()
            if self.turns.stopping:
                return
            self._inbox.get()()


def _guesses(scheduler: Scheduler) -> dict[str, Any]:
    """What became of guessed tokens, as `InstanceLoad` has it."""
    speculation = scheduler.speculation
    if speculation is None:
        return {}
    return {
        "drafts": speculation.drafts,
        "guesses_ready": speculation.ready_for(scheduler.config.decode_buckets),
        "draft_tokens": speculation.draft_tokens,
        "accepted_at": tuple(speculation.accepted_at),
    }


def _of_host(scheduler: Scheduler) -> dict[str, Any]:
    """What the host's memory keeps, likewise."""
    host = scheduler.host
    return {} if host is None else {"host_pages": host.held, "host_fetched": host.fetched}


def _embedding(request: Request) -> list[float] | None:
    """A prompt's hidden states, pooled and brought to length 1; None where nobody asked."""
    pooling = request.sampling.pooling
    if pooling is None or request.generated != 1:
        return None
    total, last = request.embedding
    found = last if pooling == "last" else total / request.prompt_length
    length = float(np.linalg.norm(found))
    return (found / length if length else found).tolist()
