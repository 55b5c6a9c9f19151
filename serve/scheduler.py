"""Which request computes what in the next iteration: continuous batching in pure Python.

Each iteration holds one decode step for every running request and pieces of waiting prompts up to
a token budget (chunked prefill). Iterations may be dispatched before the results of the one before
are known: `next_iteration` counts what it schedules at once (`computed`, `pending`), `complete`
brings in sampled tokens, and a result that arrives for a request which ended meanwhile is dropped.
At most one iteration may be in flight when the next is planned.

Where tokens are guessed (`speculation`), the guesses are part of an iteration, and how many tokens
a request gains by it is known only when it ends: until then nothing else is planned. What was
computed of guesses that were wrong lies in pages that the request holds, behind `computed`, and is
overwritten.

Groups of layers with a window have tables of pages of their own, and give pages back when they lie
before all that is seen (`cache_groups`). When pages run out the youngest running request gives its
pages up and is computed again later from its prompt and the output so far. Roles: "both" computes
everything; "prefill" hands a request over after its first token; "decode" receives such requests
(and computes preempted ones again itself).
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

from jaxsys.serve.cache_groups import first_seen
from jaxsys.serve.host_pages import Fetch, Save
from jaxsys.serve.iterations import Completion, Iteration, PrefillPiece, SchedulerConfig
from jaxsys.serve.kv_cache import FREED
from jaxsys.serve.request_pages import RequestPages
from jaxsys.serve.requests import FinishReason, Request, RequestState
from jaxsys.serve.speculation import Speculation


class Scheduler:
    """Plans iterations over one page pool. Not thread-safe: one loop owns it."""

    def __init__(self, config: SchedulerConfig, speculation: Speculation | None = None):
        """
        Args:
            speculation: guesses tokens of the requests that run; without, none are guessed.
        """
        self.config = config
        self.speculation = speculation
        self.pages = RequestPages(config)
        self.allocator, self.host = self.pages.allocator, self.pages.host
        self.waiting: deque[Request] = deque()
        """Requests without pages that wait for prefill, oldest first."""
        self.incoming: deque[Request] = deque()
        """Decode role: requests that wait for pages to be received into."""
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self.handing_over: dict[str | int, Request] = {}
        self.receiving: dict[str | int, Request] = {}
        self.fetching: dict[str | int, Fetch] = {}
        """Requests whose pages are being filled from the host's memory."""
        self._new_fetches: list[Fetch] = []
        self.iterations = 0
        self.preemptions = 0
        self._windows = config.windows
        self._in_flight: deque[Iteration] = deque()
        self._free_slots = list(range(config.max_batch - 1, -1, -1))
        self._bucket_of = [0]
        for size in config.decode_buckets:
            self._bucket_of += [size] * (size + 1 - len(self._bucket_of))

    # --- what a router or a gauge reads -------------------------------------------------------

    @property
    def requests(self) -> int:
        """Requests this instance knows that have not ended."""
        return (
            len(self.waiting)
            + len(self.incoming)
            + len(self.prefilling)
            + len(self.running)
            + len(self.handing_over)
            + len(self.receiving)
            + len(self.fetching)
        )

    @property
    def kv_tokens(self) -> int:
        """Tokens computed for the requests that decode."""
        return sum(request.computed for request in self.running)

    @property
    def waiting_tokens(self) -> int:
        """Known tokens that wait to be computed or received."""
        if not (self.waiting or self.incoming or self.prefilling):
            return 0
        return (
            sum(request.total_length for request in self.waiting)
            + sum(request.total_length for request in self.incoming)
            + sum(request.total_length - request.computed for request in self.prefilling)
        )

    # --- requests in and out ------------------------------------------------------------------

    def check_fits(self, prompt_length: int, max_tokens: int) -> None:
        """Raises UsageError where such a request could never be served here."""
        self.config.check_fits(prompt_length, max_tokens)

    def add(self, request: Request) -> None:
        """Queues a new request for prefill."""
        self.check_fits(request.prompt_length, request.sampling.places)
        request.state = RequestState.WAITING
        self.waiting.append(request)

    def add_incoming(self, request: Request) -> None:
        """Decode role: queues a request whose prompt is computed elsewhere."""
        self.check_fits(request.prompt_length, request.sampling.places)
        request.state = RequestState.WAITING
        self.incoming.append(request)

    def reserve_incoming(self) -> list[Request]:
        """Gives pages and slots to as many incoming requests as fit; their copies may begin.

        The first `shared_pages` of a request's pages hold their contents already.

        A running request may need a page each in the next step, so that many stay in reserve.
        """
        reserved = []
        allocator, page_size = self.allocator, self.config.page_size
        # Preempted requests go first.
        while self.incoming and self._free_slots and not self.waiting:
            request = self.incoming[0]
            tables: tuple[list[int], ...] = tuple([] for _ in self._windows)
            if self.config.prefix_caching:
                # Full pages of the prompt only: decoding writes behind them, never into them.
                full = request.prompt_length // page_size
                tables = self.pages.share(self.pages.keys(request)[:full])
            known = len(tables[0])
            position = max(request.total_length - 1, request.prompt_length)
            self.pages.give_back(tables, position)
            for table, window in zip(tables, self._windows, strict=True):
                gone = first_seen(window, position, page_size) - known
                table += [FREED] * max(0, gone)
            blocks = position // page_size + 1
            each = max(1, -(-self.config.reserved_tokens // page_size)) * len(tables)
            reserve = (len(self.running) + len(self.receiving)) * each
            count = sum(blocks - len(table) for table in tables)
            fits = allocator.available - reserve >= count or not (reserve or self.prefilling)
            if not fits or not self.pages.fill(tables, [blocks] * len(tables)):
                self.pages.let_go(tables)
                break
            self.incoming.popleft()
            request.pages, request.other_pages = tables[0], tables[1:]
            request.shared_pages = known
            request.slot = self._free_slots.pop()
            request.state = RequestState.RECEIVING
            self.receiving[request.request_id] = request
            reserved.append(request)
        return reserved

    def start_received(self, request: Request) -> None:
        """The pages of a reserved request are filled (or will be before the next iteration)."""
        del self.receiving[request.request_id]
        request.computed = max(request.total_length - 1, request.prompt_length)
        request.state = RequestState.RUNNING
        self.running.append(request)
        if self.config.prefix_caching:
            self.pages.register(request, request.prompt_length)

    def release_handed_over(self, request: Request) -> None:
        """Prefill role: the decode side has the pages (or the hand-over was given up)."""
        if self.handing_over.pop(request.request_id, None) is not None:
            self._free(request)

    def abort(self, request: Request, now_s: float, reason: FinishReason = "abort") -> None:
        """Ends a request in whatever state it is. Does nothing to one that has ended."""
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.WAITING:
            for queue in (self.waiting, self.incoming):
                if request in queue:
                    queue.remove(request)
        elif request.state is RequestState.FETCHING:
            self._end_fetch(request)
        elif request.state is RequestState.PREFILLING:
            self.prefilling.remove(request)
        elif request.state is RequestState.RUNNING:
            self.running.remove(request)
        elif request.state is RequestState.HANDING_OVER:
            self.handing_over.pop(request.request_id, None)
        elif request.state is RequestState.RECEIVING:
            self.receiving.pop(request.request_id, None)
        self._finish(request, reason, now_s)

    def take_fetches(self) -> list[Fetch]:
        """What the last iteration planned wants fetched; each is told to `start_fetched`."""
        fetches, self._new_fetches = self._new_fetches, []
        return fetches

    def start_fetched(self, request: Request, *, arrived: bool = True) -> None:
        """The pages of a request are filled, or never will be: then they are computed."""
        if request.state is not RequestState.FETCHING:  # it has ended meanwhile
            return
        fetch = self._end_fetch(request)
        if arrived:
            assert self.host is not None
            self.host.fetched += len(fetch.pages)
            self.pages.register(request, request.computed)
        else:
            first = request.pages.index(fetch.pages[0])
            request.computed = request.cached_tokens = first * self.config.page_size
        request.state = RequestState.PREFILLING
        self.prefilling.append(request)

    def saved(self, saves: Sequence[Save], *, arrived: bool = True) -> None:
        """Copies of pages are in the host's memory, or never will be."""
        if self.host is not None:
            for save in saves:
                (self.host.saved if arrived else self.host.drop)(save.key)

    def disown(self, request: Request) -> list[int]:
        """What a request has computed is not to be shared: its pages are no longer found by prefix.

        Returns:
            Those of its pages that no other request holds.
        """
        pages = [page for table in request.tables for page in table if page != FREED]
        if self.host is not None:
            for page in pages:
                key = self.allocator.key_of(page)
                if key is not None:
                    self.host.drop(key)
        self.allocator.unregister(pages)
        return [page for page in pages if self.allocator.holders(page) == 1]

    def travelling(self, request: Request, first: int, end: int) -> list[int]:
        """Pages of a prompt's blocks `first..end-1` that whoever decodes on has need of.

        The same pages, in the same order, for the request and its twin on the other side.
        """
        length, size = request.prompt_length, self.config.page_size
        return [
            table[block]
            for block in range(first, end)
            for table, window in zip(request.tables, self._windows, strict=True)
            if block >= first_seen(window, length, size)
        ]

    def finish(self, request: Request, now_s: float, reason: FinishReason = "stop") -> None:
        """Ends a request early by the owner's judgement, as at a stop string."""
        self.abort(request, now_s, reason)

    def forget(self) -> list[Iteration]:
        """What pages hold is lost, after requests that held some were ended.

        Returns:
            The iterations that were in flight, which will not be completed.
        """
        lost = list(self._in_flight)
        self._in_flight.clear()
        self._new_fetches.clear()
        self.pages.forget()
        return lost

    # --- iterations ---------------------------------------------------------------------------

    def next_iteration(self, now_s: float, max_steps: int = 1) -> Iteration | None:
        """Plans one iteration, or None where there is nothing to compute.

        Args:
            max_steps: allow up to this many decode steps in one iteration, while nothing waits and
                no request can end or need preemption within them.
        """
        if len(self._in_flight) > 1:
            raise ValueError("two iterations are in flight; complete the older one first")
        guesses = self._guesses()
        if self._in_flight and (guesses or self._in_flight[-1].drafts):
            return None  # guesses go on from tokens that are not known yet
        steps = 1
        if max_steps > 1 and not (self.waiting or self.prefilling or self.incoming or guesses):
            steps = self._steady_steps(max_steps)
        preempted = self.preemptions
        saves = self.pages.plan_saves()  # of pages as they are, before others get them
        drafts: list[tuple[int, ...]] = []
        decodes, kv_tokens = self._plan_decodes(steps, drafts if guesses else None)
        pieces: list[PrefillPiece] = []
        copies: list[tuple[int, int]] = []
        # A request preempted just now must sit one iteration out, so that `complete` can tell the
        # sample it still has in flight from the one that a fresh prefill would draw.
        if (self.prefilling or self.waiting) and self.preemptions == preempted:
            self._plan_prefills(pieces, copies, now_s)
        if not decodes and not pieces:
            self.pages.put_off(saves)
            return None
        self.iterations += 1
        prefill_tokens = cached_tokens = 0
        for piece in pieces:
            prefill_tokens += piece.length
            if piece.start == piece.cached_tokens:
                cached_tokens += piece.cached_tokens
        iteration = Iteration(
            self.iterations,
            tuple(pieces),
            tuple(decodes),
            tuple(copies),
            prefill_tokens,
            cached_tokens,
            kv_tokens,
            self._bucket_of[len(decodes)],
            steps,
            *self._guessed(decodes, drafts),
            saves,
        )
        self._in_flight.append(iteration)
        return iteration

    def shorten(self, iteration: Iteration, steps: int) -> Iteration:
        """Cuts the newest iteration in flight to `steps` decode steps, and returns what is left.

        A replay plans many steps at once and cuts them when a newcomer arrives.

        Raises:
            ValueError: if it is not the newest in flight, or has fewer steps.
        """
        if not self._in_flight or self._in_flight[-1] is not iteration:
            raise ValueError(f"iteration {iteration.index} is not the newest one in flight")
        cut = iteration.steps - steps
        if steps < 1 or cut < 0:
            raise ValueError(f"steps={steps} must be from 1 to {iteration.steps}")
        for request in iteration.decodes:
            if request.pending:  # it has not ended since
                request.pending -= cut
                request.computed -= cut
        shorter = dataclasses.replace(iteration, steps=steps)
        self._in_flight[-1] = shorter
        return shorter

    def complete(
        self,
        iteration: Iteration,
        now_s: float,
        tokens: Sequence[int] | None = None,
        ended: Sequence[bool] | None = None,
        more: Sequence[Sequence[int]] | None = None,
    ) -> Completion:
        """Takes in an iteration's samples.

        Args:
            tokens: one token for each of `iteration.sampling`, in that order; None in a replay,
                where requests end by their `max_tokens` alone.
            ended: whether the output ends with its token, or the last of `more`, by its grammar.
            more: for each of `iteration.sampling` the tokens behind its first: guesses that were
                right, and the one after them.
        """
        if not self._in_flight or self._in_flight[0] is not iteration:
            raise ValueError(f"iteration {iteration.index} is not the oldest one in flight")
        self._in_flight.popleft()
        completion = Completion([], [], [])
        position = 0
        for piece in iteration.prefills:
            if not piece.last:
                continue
            request = piece.request
            token = None if tokens is None else [int(tokens[position])]
            ends = ended is not None and ended[position]
            position += 1
            if request.pending == 0:  # ended or preempted since
                continue
            self._take(request, token, 1, now_s, completion, ends)
            if request.state is RequestState.HANDING_OVER:
                completion.handed_over.append(request)
        steps = iteration.steps
        if tokens is None and not iteration.drafts:
            self._take_planned(iteration, now_s, completion)
            return self._without_finished(completion)
        for row, request in enumerate(iteration.decodes):
            run = None if tokens is None else [int(tokens[position])]
            if run is not None and more is not None:
                run += map(int, more[position])
            ends = ended is not None and ended[position]
            position += 1
            if request.pending == 0:
                continue
            drafted = len(iteration.drafts[row]) if iteration.drafts else 0
            self._take(request, run, steps + drafted, now_s, completion, ends)
            if drafted and run is not None and self.speculation is not None:
                self.speculation.verified(drafted, len(run) - 1)
        return self._without_finished(completion)

    def _without_finished(self, completion: Completion) -> Completion:
        """Takes those that ended from who runs."""
        if completion.finished:
            gone = {id(request) for request in completion.finished}
            self.running = [request for request in self.running if id(request) not in gone]
        return completion

    def check(self) -> None:
        """Raises AssertionError unless requests and the allocator agree on every page and slot."""
        self.allocator.check()
        holders = [
            *self.prefilling,
            *self.running,
            *self.handing_over.values(),
            *self.receiving.values(),
            *(fetch.request for fetch in self.fetching.values()),
        ]
        if self.host is not None:
            self.host.check()
        holds: dict[int, int] = {}
        for request in holders:
            for page in (page for table in request.tables for page in table if page != FREED):
                holds[page] = holds.get(page, 0) + 1
        for page, count in enumerate(self.allocator._counts):
            assert holds.get(page, 0) == count, (
                f"page {page}: count {count}, held {holds.get(page)}"
            )
        slots = [request.slot for request in holders]
        assert sorted([*slots, *self._free_slots]) == list(range(self.config.max_batch)), "slots"
        for request in (*self.waiting, *self.incoming):
            assert not request.pages and request.slot == -1, f"{request} holds pages while waiting"
        for request in self.running:
            assert request.computed == request.total_length + request.pending - 1, request
            for table, window in zip(request.tables, self._windows, strict=True):
                assert request.computed <= len(table) * self.config.page_size, request
                seen = first_seen(window, request.computed - 1, self.config.page_size)
                assert FREED not in table[seen:], request

    # --- inside -------------------------------------------------------------------------------

    def _guesses(self) -> bool:
        """Whether the next iteration guesses tokens, if there is something to guess."""
        speculation = self.speculation
        return (
            speculation is not None
            and speculation.wanted(self.running, self._bucket_of[len(self.running)])
            # The step that guesses adds no adapters.
            and not any(request.adapter is not None for request in self.running)
        )

    def _guessed(
        self, decodes: Sequence[Request], drafts: Sequence[tuple[int, ...]]
    ) -> tuple[tuple[tuple[int, ...], ...], float]:
        """What an iteration says of its guesses, and the tokens they gain each request at least."""
        speculation = self.speculation
        if speculation is None or not any(drafts):
            return (), 1.0
        gain = min(
            speculation.gain([request]) if draft else 1.0
            for request, draft in zip(decodes, drafts, strict=True)
        )
        return tuple(drafts), max(1.0, gain)

    def _plan_decodes(
        self, steps: int, drafts: list[tuple[int, ...]] | None = None
    ) -> tuple[list[Request], int]:
        """The requests that decode, and the tokens they attend to.

        Args:
            drafts: where given, filled with what is guessed of each.
        """
        page_size = self.config.page_size
        decodes: list[Request] = []
        kv_tokens = 0
        # Preemption takes from the end of `running`: those are not met any more.
        for request in self.running:
            if request.generated + request.pending >= request.sampling.max_tokens:
                continue  # its last token is in flight
            computed = request.computed + steps
            draft: tuple[int, ...] = ()
            if drafts is not None and self.speculation is not None:
                draft = tuple(self.speculation.draft(request))
                ahead = computed + len(draft)
                # A guess is worth nobody else's pages.
                if ahead > len(request.pages) * page_size and not self.pages.extend(request, ahead):
                    draft = ()
            if computed > len(request.pages) * page_size and not self._grow(request, computed):
                break  # it was preempted itself, and so was everything after it
            if drafts is not None:
                drafts.append(draft)
            computed += len(draft)
            request.computed = computed
            request.pending += steps + len(draft)
            kv_tokens += computed
            decodes.append(request)
        return decodes, kv_tokens - (steps - 1) * len(decodes)

    def _grow(self, request: Request, computed: int) -> bool:
        while True:
            if self.pages.extend(request, computed):
                return True
            victim = self.prefilling[-1] if self.prefilling else self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False

    def _preempt(self, request: Request) -> None:
        (self.prefilling if request.state is RequestState.PREFILLING else self.running).remove(
            request
        )
        self._free(request)
        request.pending = 0  # samples in flight are dropped and drawn again
        request.computed = 0
        request.state = RequestState.WAITING
        request.timing.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _plan_prefills(
        self, pieces: list[PrefillPiece], copies: list[tuple[int, int]], now_s: float
    ) -> None:
        budget = self.config.max_prefill_tokens
        for request in list(self.prefilling):
            if budget <= 0:
                return
            if request.state is not RequestState.PREFILLING:  # given up for one before it
                continue
            if not self._has_room(request, budget):
                return
            budget -= self._add_piece(request, budget, pieces)
        while budget > 0 and self.waiting and self._free_slots:
            request = self.waiting[0]
            if not self._admit(request, copies):
                return
            self.waiting.popleft()
            if request.timing.scheduled_s is None:
                request.timing.scheduled_s = now_s
            if request.state is RequestState.FETCHING:
                continue  # others need not wait for that
            self.prefilling.append(request)
            budget -= self._add_piece(request, budget, pieces)

    def _admit(self, request: Request, copies: list[tuple[int, int]]) -> bool:
        """Gives a waiting request its pages and slot; False (and no change) where none are left."""
        config, allocator = self.config, self.allocator
        page_size = config.page_size
        length = request.total_length
        tables: tuple[list[int], ...] = tuple([] for _ in self._windows)
        places: list[int] = []
        # How likely a prompt's tokens are is known of those only that are computed.
        sampling = request.sampling
        scored = not request.generated and (
            sampling.prompt_logprobs is not None or sampling.pooling is not None
        )
        if config.prefix_caching and not scored:
            keys = self.pages.keys(request)
            if keys:
                tables = self.pages.share(keys[: length // page_size])
                if self.host is not None:  # all but what the last token is in
                    places = self.host.find(keys[len(tables[0]) : (length - 1) // page_size])
        cached = (len(tables[0]) + len(places)) * page_size
        # One token at least must be computed, for its logits. Where the prompt ends with a shared
        # page, that token's page is copied first: others still read the original.
        sources: list[int] = []
        if cached == length:
            sources = [table.pop() for table in tables]
            cached = length - 1
        kept = len(tables[0])
        # Groups with a window have pages for one piece at a time.
        end = min(length, cached + config.max_prefill_tokens) + 1
        blocks = [-(-(length + 1 if w is None else end) // page_size) for w in self._windows]
        needed = sum(wanted - kept for wanted in blocks)
        # Each running request may need a page in the next step; admitting into that reserve would
        # only preempt the newcomer. An empty instance must take whatever fits.
        reserve = len(self.running) * len(tables) if (self.running or self.prefilling) else 0
        if allocator.available - needed < reserve or not self.pages.fill(tables, blocks):
            self.pages.let_go(tables)
            allocator.release(sources)
            if self.host is not None:
                self.host.let_go(places)
            return False
        for source, table in zip(sources, tables, strict=False):
            copies.append((source, table[kept]))
        # Safe at once: the copy is dispatched before anything that could reuse the page.
        allocator.release(sources)
        request.pages, request.other_pages = tables[0], tables[1:]
        request.computed = request.cached_tokens = cached
        request.slot = self._free_slots.pop()
        request.state = RequestState.PREFILLING
        if places:
            pages = tuple(request.pages[kept : kept + len(places)])
            fetch = Fetch(request, pages, tuple(places))
            request.state = RequestState.FETCHING
            self.fetching[request.request_id] = fetch
            self._new_fetches.append(fetch)
        return True

    def _end_fetch(self, request: Request) -> Fetch:
        fetch = self.fetching.pop(request.request_id)
        self._new_fetches = [one for one in self._new_fetches if one is not fetch]
        assert self.host is not None
        self.host.let_go(fetch.places)
        return fetch

    def _has_room(self, request: Request, budget: int) -> bool:
        """Pages for a prompt's next piece, where groups with a window are given them as it goes on.

        Those of younger prompts, if need be; what runs ends some time by itself.
        """
        if self._windows == (None,):
            return True
        end = min(request.total_length, request.computed + budget) + 1
        while not self.pages.extend_windows(request, end):
            youngest = self.prefilling[-1]
            if youngest is request:
                return False
            self._preempt(youngest)
        return True

    def _add_piece(self, request: Request, budget: int, pieces: list[PrefillPiece]) -> int:
        start = request.computed
        length = min(request.total_length - start, budget)
        last = start + length == request.total_length
        pieces.append(PrefillPiece(request, start, length, request.cached_tokens, last))
        request.computed = start + length
        if self.config.prefix_caching:
            self.pages.register(request, min(request.computed, request.prompt_length))
        if last:
            request.pending = 1
            self.prefilling.remove(request)
            if self.config.role == "prefill":
                request.state = RequestState.HANDING_OVER
                self.handing_over[request.request_id] = request
            else:
                request.state = RequestState.RUNNING
                self.running.append(request)
        return length

    def _take(
        self,
        request: Request,
        run: list[int] | None,
        planned: int,
        now_s: float,
        completion: Completion,
        ends: bool,
    ) -> None:
        """Gives a request what it gained.

        Args:
            run: its tokens; None in a replay, where all that were planned count.
            planned: how many it was to gain at most.
        """
        timing, sampling = request.timing, request.sampling
        stops = False
        if run is not None:
            last = next(
                (place for place, token in enumerate(run) if token in sampling.stop_token_ids), None
            )
            if last is not None:  # what was guessed behind it is nothing
                stops = True
                run = run[: last + 1]
        gained = planned if run is None else len(run)
        request.pending -= planned
        request.generated += gained
        request.computed -= planned - gained
        if timing.first_token_s is None:
            timing.first_token_s = now_s
        timing.last_token_s = now_s
        completion.emitted.append(request)
        completion.gained.append(gained)
        reason: FinishReason | None = None
        if request.generated >= sampling.max_tokens:
            reason = "length"
        if run is not None:
            timing.token_times_s += [now_s] * gained
            request.output_tokens += run
            if ends or stops:
                reason = "stop"
            if self.speculation is not None and reason is None and self.config.role != "prefill":
                self.speculation.observe(request, run)
        if reason is not None:
            self.handing_over.pop(request.request_id, None)
            self._finish(request, reason, now_s)
            completion.finished.append(request)

    def _take_planned(self, iteration: Iteration, now_s: float, completion: Completion) -> None:
        """`_take` of all that decode in a replay, where each gains what was planned: most of the
        time that a replay takes goes here."""
        steps, emitted = iteration.steps, completion.emitted
        before = len(emitted)
        for request in iteration.decodes:
            if request.pending == 0:  # ended or preempted since
                continue
            request.pending -= steps
            request.generated = generated = request.generated + steps
            timing = request.timing
            timing.last_token_s = now_s
            if timing.first_token_s is None:
                timing.first_token_s = now_s
            emitted.append(request)
            if generated >= request.sampling.max_tokens:
                self.handing_over.pop(request.request_id, None)
                self._finish(request, "length", now_s)
                completion.finished.append(request)
        completion.gained += [steps] * (len(emitted) - before)

    def _finish(self, request: Request, reason: FinishReason, now_s: float) -> None:
        if (
            self.config.prefix_caching
            and request.output_tokens
            and request.pages
            and reason != "error"  # what went wrong may lie in the pages
        ):
            # The last token's keys may never be written; those of the tokens before are dispatched.
            self.pages.register(request, min(request.computed, request.total_length - 1))
        self._free(request)
        request.pending = 0
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.timing.finished_s = now_s

    def _free(self, request: Request) -> None:
        if request.pages:
            self.pages.let_go(request.tables, request)
            request.pages, request.other_pages = [], ()
        if request.slot >= 0:
            self._free_slots.append(request.slot)
            request.slot = -1

    def _steady_steps(self, max_steps: int) -> int:
        steps = max_steps
        for request in self.running:
            steps = min(steps, request.sampling.max_tokens - request.generated - request.pending)
        if steps <= 1:
            return 1
        per_request = -(-steps // self.config.page_size) * len(self._windows)
        if per_request * len(self.running) > self.allocator.available:
            return 1
        return steps
