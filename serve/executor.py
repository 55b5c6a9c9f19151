"""Runs planned iterations on a device: compiled steps over a few bucket sizes, dispatched ahead.

`dispatch` returns as soon as the work is queued; sampled tokens stay on the device, in `last`
[slots], as the next step's input, and travel to the host meanwhile; `collect` waits for them.
Where a request follows a grammar, which tokens it may choose is known only with the tokens before:
the batch's logits are computed ahead all the same, and the choice among them is held back until
`release`, which the device does not notice as long as the host is quicker than a step.
`Steps` has what is called, for a few sizes each, compiled before they are needed.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxsys.model import DecoderConfig
from jaxsys.model.contract import layer_cache
from jaxsys.serve import paged_model
from jaxsys.serve.adapted_rows import AdaptedRows
from jaxsys.serve.flights import (
    NOBODYS,
    Guessed,
    Held,
    Pending,
    Pooled,
    PromptPiece,
    Scored,
    logprobs_of,
    note,
    note_pooled,
    send,
)
from jaxsys.serve.following import Following
from jaxsys.serve.grammars import Grammars
from jaxsys.serve.iterations import Iteration, PrefillPiece, SchedulerConfig
from jaxsys.serve.lora import Adapted, AdapterSlots
from jaxsys.serve.outcomes import RequestFault, Sampled, TokenLogprobs
from jaxsys.serve.paged_attention import choose_kernels
from jaxsys.serve.paged_model import CacheForm, Contents
from jaxsys.serve.request_rules import history_of, rules_of, tokens_of
from jaxsys.serve.requests import Request, RequestState
from jaxsys.serve.sampling import (
    NOTHING,
    History,
    Rules,
    Sample,
    SamplingNeeds,
    empty_history,
    pack_rules,
    set_history,
)
from jaxsys.serve.spare_room import leave_room
from jaxsys.serve.split import AXIS, cut
from jaxsys.serve.steps import ADAPTED, COPIES, USUAL, ExecutorConfig, Steps
from jaxsys.serve.verification import Verified
from jaxsys.serve.weights import ServingWeights


class JaxExecutor:
    """Runs iterations of one instance on one device or, with split weights, on a mesh."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: ServingWeights,
        scheduler: SchedulerConfig,
        *,
        placement: Sharding,
        shapes: ExecutorConfig | None = None,
        cache_form: CacheForm | None = None,
        grammars: Grammars | None = None,
        adapters: AdapterSlots | None = None,
    ):
        """Takes weights that lie on their devices already.

        Args:
            adapters: where requests' adapters lie; without, no request may have one.
            grammars: over the model's vocabulary; without, no request may have one.
            placement: one device's sharding, or a `NamedSharding` that spells out nothing over the
                mesh of `jaxsys.serve.split`; step inputs are whole on every device.
            cache_form: of keys and values in pages; the weights' dtype if None.
        """
        self.cache_form: CacheForm | None = cache_form
        self.config = config
        self.weights = weights
        self.grammars = grammars
        self._following = Following(grammars)
        self.adapters = adapters
        self.shapes = ExecutorConfig.for_scheduler(scheduler) if shapes is None else shapes
        self.page_count, self.page_size = scheduler.page_count, scheduler.page_size
        self.slots = scheduler.max_batch
        self._words = -(-config.vocab_size // 32)
        self._placement = placement
        self._rows = AdaptedRows(adapters, placement)
        mesh = placement.mesh if isinstance(placement, NamedSharding) else None
        self._cache_placement: Sharding = placement
        if isinstance(mesh, Mesh):
            split = layer_cache(config, config.kinds[0]).split
            spec = PartitionSpec() if split is None else cut(2 + split)
            self._cache_placement = NamedSharding(mesh, spec)
        self.kernels = choose_kernels(
            dtype=weights.dtype,
            head_dim=config.head_dim,
            device=next(iter(placement.device_set)),
            mesh=mesh if isinstance(mesh, Mesh) else None,
            axis=AXIS,
        )
        self._groups = len(scheduler.windows)
        width = self.shapes.table_buckets[-1]
        self._tables = np.full((self.slots, self._groups, width), self.page_count, np.int32)
        self._table_owners: list[list[int] | None] = [None] * self.slots
        self._table_lengths = np.zeros(self.slots, np.int32)
        self._make_state()
        self.room: list[jax.Array] = self.leave_room()
        """What parts the free stretches that small buffers take."""
        self.steps = Steps(
            config,
            self.kernels,
            weights,
            self._cache,
            shapes=self.shapes,
            slots=self.slots,
            role=scheduler.role,
            placement=placement,
            tables=None if adapters is None else adapters.tables,
        )

    def _make_state(self) -> None:
        """All that steps change: pages, last tokens, and what goes from step to step."""
        self._cache = paged_model.empty_cache(
            self.config,
            self.page_count,
            self.page_size,
            self.weights.dtype,
            self._cache_placement,
            self.cache_form,
        )
        self._last = jax.device_put(np.zeros(self.slots, np.int32), self._placement)
        self._history: History | None = None
        self._decode_buffers: dict[tuple[int, int], tuple[jax.Array, jax.Array, jax.Array]] = {}
        self._batch: tuple[Request, ...] = ()
        self._batch_rules: tuple[Rules, SamplingNeeds] = (pack_rules([], [], 1), SamplingNeeds())
        self._rows.forget()
        self._held: Held | None = None
        self._following.faults.clear()

    def leave_room(self) -> list[jax.Array]:
        """Leaves room for what comes and goes beside decode steps: their rows, a prompt's logits,
        what grammars admit. The buffers that keep it; none but on GPUs."""
        if next(iter(self._placement.device_set)).platform != "gpu":
            return []
        table = self._groups * self.shapes.table_buckets[-1]
        rows = 4 * self.slots * (2 + table)
        return leave_room(
            (rows, 4 * self.config.vocab_size, 4 * self.slots * self._words), self._placement
        )

    # --- running ------------------------------------------------------------------------------

    def dispatch(self, iteration: Iteration) -> list[Pending | Held | Guessed]:
        """Queues an iteration's steps; returns at once."""
        self._release()
        prepared = [self._prepare(piece) for piece in iteration.prefills]
        pending: list[Pending | Held | Guessed] = []
        for piece, planned in zip(prepared, iteration.prefills, strict=True):
            if piece is None:  # its request has ended: nobody looks at the sample
                if planned.last:
                    pending.append(NOBODYS)
                continue
            if iteration.copies:
                # Not before: what is copied may be computed by a piece ahead of this one.
                held = {page for table in piece.request.tables for page in table}
                self._copy([pair for pair in iteration.copies if pair[1] in held])
            logits, scored = self._prefill(piece)
            if piece.sampling is None:
                pending.append(Pending(Sample(logits, None, None, None), (), scored))
            else:
                request = piece.request
                self._load_history(request.slot, piece.history)
                rules, needs = piece.sampling
                where = np.array([[request.slot, piece.end - 1]], np.int32)
                sampled = self._sample(needs, logits, where, rules, piece.mask)
                pending.append(Pending(sampled, [request], scored))
        if iteration.drafts:
            pending.append(self._guess(iteration))
        elif iteration.decodes:
            pending.append(self._decode(iteration.decodes, iteration.bucket))
        for one in pending:
            if isinstance(one, Pending):
                send(one)
        return pending

    def release(self) -> list[RequestFault]:
        self._release()
        faults, self._following.faults = self._following.faults, []
        return faults

    def collect(self, handle: list[Pending | Held | Guessed]) -> Sampled:
        """Waits for a dispatched iteration, also where it samples nothing."""
        guessed = handle[-1] if handle and isinstance(handle[-1], Guessed) else None
        if guessed is not None:
            return self._with_guesses(self._collect(handle[:-1]), guessed)
        return self._collect(handle)

    def _collect(self, handle: Sequence[Pending | Held | Guessed]) -> Sampled:
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        ended: list[bool] = []
        asked = False
        for one in handle:
            if isinstance(one, Held):
                if one.pending is None:
                    self._release()
                assert one.pending is not None
                one = one.pending
            assert isinstance(one, Pending)
            sampled, requests, scored = one
            if isinstance(scored, Pooled):
                whole = note_pooled(scored)
            else:
                whole = scored is None or note(scored)
            if not requests:
                jax.block_until_ready(sampled.tokens)
                continue
            found = np.asarray(sampled.tokens)[: len(requests)].tolist()
            tokens += found if whole else [NOTHING] * len(found)
            ended += self._following.follow(requests, tokens[len(ended) :])
            if sampled.logprobs is None:
                logprobs += [None] * len(requests)
                continue
            asked = True
            columns = [np.asarray(column) for column in sampled[1:]]
            for row, request in enumerate(requests):
                count = None if request is None else request.sampling.logprobs
                logprobs.append(None if count is None else logprobs_of(columns, row, count))
        return Sampled(tokens, logprobs if asked else None, ended if any(ended) else None)

    def rebuild(self) -> None:
        """After a fault of the device: frees all but weights and compiled steps, begins anew.

        Raises:
            JaxRuntimeError: if the device does not answer.
        """
        old = (self._cache, self._last, self._history, self._decode_buffers)
        for leaf in jax.tree.leaves(old):
            # Other references may live on, in the fault's traceback: there is no room for two.
            if not leaf.is_deleted():  # a step that failed may have had it
                leaf.delete()
        self._make_state()
        if self.adapters is not None:
            self.adapters.rebuild()
        jax.block_until_ready((self._cache, self._last))

    def run_once(self, key: tuple) -> None:
        """Runs a step on nothing, and waits: what a GPU does before a step's first run may take
        it a quarter of a second, which no request should wait for.

        Pages and slots keep what they hold. Only for the thread that dispatches.
        """
        kind, *shape = key
        step = self.steps.get(*key)
        done: object = None
        if kind in ("prefill", "prefill" + ADAPTED):
            size, table, continued = shape
            # A piece without tokens.
            packed = np.zeros(2 + size + table * self._groups, np.int32)
            packed[0] = continued
            adapted = () if kind == "prefill" else (self._rows.of_slots([0], 1, 1),)
            done, self._cache = step(self.weights, self._cache, packed, *adapted)
        elif kind in ("decode", "decode" + ADAPTED):
            batch, table, *used = shape
            adapted = self._rows.of_slots([None], batch, used[0]) if used else None
            done = self._decode_step(batch, table, self._nobody(batch, table), adapted)
        elif kind == "sample" and not shape[1].adjusted:
            batch, needs = shape
            logits = np.zeros((batch, self.config.vocab_size), np.float32)
            nowhere = self._nobody(batch, 0)
            logits, where = jax.device_put((logits, nowhere), self._placement)
            mask = None if not needs.masked else np.full((batch, self._words), -1, np.int32)
            done = self._sample(needs, logits, where, pack_rules([], [], batch), mask)
        elif kind == "several":
            batch, table = shape
            done, self._cache = step(self.weights, self._cache, self._no_guesses(batch, table))
        elif kind == "verify" and not shape[1].adjusted and not shape[1].masked:
            batch, needs = shape
            vocabulary, width = self.config.vocab_size, 1 + self.shapes.guesses
            logits = jax.device_put(
                np.zeros((batch, width, vocabulary), np.float32), self._placement
            )
            packed = self._no_guesses(batch, 0)
            done = self._verify(needs, logits, packed, pack_rules([], [], batch), None)
        elif kind == "copy":
            done = self._copy([(0, self.page_count)])
        elif kind == "extract":
            done = step(self._cache, np.zeros(shape[0], np.int32))
        elif kind == "insert":
            like = self.steps.contents_like(shape[0])
            contents = jax.numpy.zeros(like.shape, like.dtype, device=like.sharding)
            self.insert(contents, [])
        elif kind == "set_last":
            self._last = step(self._last, np.int32(self.slots), np.int32(0))
        jax.block_until_ready((done, self._cache, self._last))

    # --- hand-over ----------------------------------------------------------------------------

    def extract(self, pages: Sequence[int]) -> Contents:
        """The contents of `pages`, padded to a transfer bucket, as an array apart from the cache.

        The pages may be given to others at once: the device works in order.
        """
        size = next(size for size in self.shapes.transfer_buckets if size >= len(pages))
        index = np.full(size, pages[-1], np.int32)
        index[: len(pages)] = pages
        return self.steps.get("extract", len(index))(self._cache, index)

    def insert(self, contents: Contents, pages: Sequence[int]) -> None:
        """Writes extracted contents, which lie where the cache does, into `pages`."""
        width = contents.shape[1]
        index = np.full(width, self.page_count, np.int32)
        index[: len(pages)] = pages
        self._cache = self.steps.get("insert", width)(self._cache, contents, index)

    def resume(self, request: Request) -> None:
        """Prepares the slot of a request whose pages were inserted: its last token is known."""
        step = self.steps.get("set_last")
        self._last = step(self._last, np.int32(request.slot), np.int32(request.output_tokens[-1]))
        self._load_history(request.slot, history_of(request, self.config.vocab_size))

    def clear(self, pages: Sequence[int]) -> None:
        """Writes zeros into pages, which may be given to others at once."""
        for start in range(0, len(pages), COPIES):
            part = pages[start : start + COPIES]
            index = np.full(COPIES, self.page_count, np.int32)
            index[: len(part)] = part
            self._cache = self.steps.get("clear", COPIES)(self._cache, index)

    # --- inside -------------------------------------------------------------------------------

    def _prepare(self, piece: PrefillPiece) -> PromptPiece | None:
        """A piece's arguments; None where its request has ended. Touches nothing on the device."""
        request = piece.request
        if request.state is RequestState.FINISHED:
            return None
        start, length = piece.start, piece.length
        end = start + length
        needed = -(-end // self.page_size)
        continued = self.shapes.distinguish_first and start > 0
        adapted = self._rows.of_piece(request)
        size, table = self.steps.fitting(
            "prefill" if adapted is None else "prefill" + ADAPTED,
            (length, self.shapes.piece_buckets),
            (needed, self.shapes.table_buckets),
            rest=(continued,),
        )
        packed = np.full(2 + size + table * self._groups, self.page_count, np.int32)
        packed[:2] = start, length
        packed[2 : 2 + size] = 0
        sampling = history = following = mask = None
        try:
            packed[2 : 2 + length] = tokens_of(request, start, length)
            for group, pages in enumerate(request.tables):
                place = 2 + size + group * table
                packed[place : place + needed] = pages[:needed]
            if request.sampling.prompt_logprobs is not None and not request.generated:
                following = np.zeros(size, np.int32)
                behind = request.prompt_tokens[start + 1 : end + 1]
                following[: len(behind)] = behind
            if piece.last:
                sampling, history = (
                    rules_of([request], 1),
                    history_of(request, self.config.vocab_size),
                )
                if request.sampling.grammar is not None:
                    mask = np.full((1, self._words), -1, np.int32)
                    self._following.of(request).fill(mask)
        except Exception as error:
            raise RequestFault(request, error) from error
        shape = (size, table, continued)
        beside = (sampling, history, start, following, mask, adapted)
        return PromptPiece(request, end, shape, packed, *beside)

    def _prefill(self, piece: PromptPiece) -> tuple[jax.Array, Scored | Pooled | None]:
        following, request = piece.following, piece.request
        suffix, adapted = ("", ()) if piece.adapted is None else (ADAPTED, (piece.adapted,))
        if request.sampling.pooling is not None and not request.generated:
            step = self.steps.get("pool" + suffix, *piece.shape)
            logits, self._cache, hidden = step(self.weights, self._cache, piece.packed, *adapted)
            return logits, Pooled(request, piece.start, (hidden,))
        if following is None:
            step = self.steps.get("prefill" + suffix, *piece.shape)
            logits, self._cache = step(self.weights, self._cache, piece.packed, *adapted)
            return logits, None
        step = self.steps.get("score" + suffix, *piece.shape)
        packed = np.concatenate([piece.packed, following])
        logits, self._cache, scores = step(self.weights, self._cache, packed, *adapted)
        count = min(piece.end, piece.request.prompt_length - 1) - piece.start
        return logits, Scored(piece.request, piece.start, count, scores)

    def _note_tables(self, requests: Sequence[Request]) -> None:
        """Has `_tables` hold the requests' pages."""
        for request in requests:
            slot, pages = request.slot, request.pages
            if self._table_owners[slot] is not pages or self._table_lengths[slot] != len(pages):
                self._table_owners[slot] = pages
                self._table_lengths[slot] = len(pages)
                for group, own in enumerate(request.tables):
                    self._tables[slot, group, : len(own)] = own

    def _decode(self, requests: tuple[Request, ...], bucket: int) -> Pending | Held:
        shapes = self.shapes
        count = len(requests)
        self._note_tables(requests)
        slots = np.fromiter((request.slot for request in requests), np.int32, count)
        positions = np.fromiter((request.computed for request in requests), np.int32, count) - 1
        needed = int(positions.max()) // self.page_size + 1
        sizes = ((bucket, shapes.decode_buckets), (needed, shapes.table_buckets))
        adapted, used = None, self._rows.slots_of(requests)
        if used is None:
            batch, table = self.steps.fitting("decode", *sizes)
        else:
            distinct = len({slot for slot in used if slot is not None})
            batch, table, width = self.steps.fitting(
                "decode" + ADAPTED, *sizes, (distinct, shapes.adapter_buckets)
            )
            adapted = self._rows.of_batch(requests, used, batch, width)
        packed = self._nobody(batch, table)
        packed[:count, 0] = slots
        packed[:count, 1] = positions
        packed[:count, 2:] = self._tables[slots, :, :table].reshape(count, -1)
        where, logits = self._decode_step(batch, table, packed, adapted)
        held = Held(requests, where, logits)
        # More than this step's sample is pending: the token before is not known yet.
        if any(one.sampling.grammar is not None and one.pending > 1 for one in requests):
            self._held = held
            return held
        return self._choose(held)

    # --- adapters -----------------------------------------------------------------------------

    def knows_adapter(self, request: Request) -> bool:
        """Whether the request's adapter is here, or it has none."""
        if request.adapter is None:
            return True
        return self.adapters is not None and self.adapters.slot(request.adapter) is not None

    def _release(self) -> None:
        """Chooses the tokens that were held back, if some were."""
        held, self._held = self._held, None
        if held is not None:
            held.pending = self._choose(held)
            send(held.pending)

    def _choose(self, held: Held) -> Pending:
        """Queues the choice of a decode step's tokens."""
        requests, batch = held.requests, held.logits.shape[0]
        rules, needs = self._rules_of(requests, batch)
        mask = None
        if needs.masked:
            mask = np.full((batch, self._words), -1, np.int32)
            for row, request in enumerate(requests):
                # Of one that has ended or was preempted nobody looks at the token.
                if request.sampling.grammar is None or not request.pending:
                    continue
                try:
                    self._following.of(request).fill(mask[row : row + 1])
                except Exception as error:  # noqa: BLE001 - whatever becomes of one request
                    self._following.faults.append(RequestFault(request, error))
        return Pending(self._sample(needs, held.logits, held.where, rules, mask), requests)

    def _rules_of(self, requests: tuple[Request, ...], rows: int) -> tuple[Rules, SamplingNeeds]:
        if self._batch != requests or len(self._batch_rules[0].seed) != rows:
            rules, needs = rules_of(requests, rows)
            # The same requests run for many steps: their rules stay on the device.
            self._batch = requests
            self._batch_rules = jax.device_put(rules, self._placement), needs
        return self._batch_rules

    # --- guesses ------------------------------------------------------------------------------

    def can_guess(self, batch: int) -> bool:
        """Whether the step that computes guesses is compiled for a batch."""
        size = next((size for size in self.shapes.guessing_buckets if size >= batch), None)
        has = self.steps.has
        return (
            size is not None
            and any(has("several", size, table) for table in self.shapes.table_buckets)
            and all(has("verify", size, needs) for needs in USUAL)
        )

    def _guess(self, iteration: Iteration) -> Guessed:
        """Queues a decode step with guesses, and the choice of its tokens."""
        shapes, requests = self.shapes, iteration.decodes
        self._note_tables(requests)
        most = max(request.computed for request in requests)
        batch, table = self.steps.fitting(
            "several",
            (iteration.bucket, shapes.guessing_buckets),
            ((most - 1) // self.page_size + 1, shapes.table_buckets),
        )
        width = 1 + shapes.guesses
        packed = self._no_guesses(batch, table)
        for row, (request, draft) in enumerate(zip(requests, iteration.drafts, strict=True)):
            tokens = (request.output_tokens[-1], *draft)
            packed[row, :3] = request.slot, request.computed - len(tokens), len(tokens)
            packed[row, 3 : 3 + len(tokens)] = tokens
            packed[row, 3 + width :] = self._tables[request.slot, :, :table].reshape(-1)
        step = self.steps.get("several", batch, table)
        logits, self._cache = step(self.weights, self._cache, packed)
        rules, needs = self._rules_of(requests, batch)
        where, masks = packed[:, : 3 + width].copy(), None
        if needs.masked:  # found while the step runs
            masks = np.full((width, batch, self._words), -1, np.int32)
            for row, (request, draft) in enumerate(zip(requests, iteration.drafts, strict=True)):
                if request.sampling.grammar is None or not request.pending:
                    continue
                own = np.full((width, self._words), -1, np.int32)
                try:
                    where[row, 2] = 1 + self._following.of(request).fill_along(draft, own)
                except Exception as error:  # noqa: BLE001 - whatever becomes of one request
                    self._following.faults.append(RequestFault(request, error))
                masks[:, row] = own
        verified = self._verify(needs, logits, where, rules, masks)
        for array in (*verified.sample, verified.gained):
            if array is not None:
                array.copy_to_host_async()
        return Guessed(verified, requests)

    def _verify(
        self,
        needs: SamplingNeeds,
        logits: jax.Array,
        where: np.ndarray,
        rules: Rules,
        masks: np.ndarray | None,
    ) -> Verified:
        history = self._history if needs.adjusted else None
        step = self.steps.get("verify", logits.shape[0], needs)
        verified, self._last, history = step(logits, self._last, where, rules, history, masks)
        if needs.adjusted:
            self._history = history
        return verified

    def _no_guesses(self, batch: int, table: int) -> np.ndarray:
        """Rows [batch, 3 + tokens + tables] that belong to no request: slot, position of the first
        token, how many tokens, tokens, pages."""
        width = 1 + self.shapes.guesses
        packed = np.full((batch, 3 + width + table * self._groups), self.page_count, np.int32)
        packed[:, 0] = self.slots
        packed[:, 1], packed[:, 2], packed[:, 3 : 3 + width] = 0, 1, 0
        return packed

    def _with_guesses(self, outcome: Sampled, guessed: Guessed) -> Sampled:
        """An iteration's samples, those of a step with guesses behind the others."""
        sampled, gained = guessed.verified.sample, np.asarray(guessed.verified.gained)
        chosen = np.asarray(sampled.tokens)
        columns = None if sampled.logprobs is None else [np.asarray(c) for c in sampled[1:]]
        tokens, others = list(outcome.tokens), len(outcome.tokens)
        logprobs: list[TokenLogprobs | None] = list(outcome.logprobs or [None] * others)
        ended = outcome.ended or [False] * others
        more: list[list[int]] = [[] for _ in range(others)]
        further: list[list[TokenLogprobs]] = [[] for _ in range(others)]
        for row, request in enumerate(guessed.requests):
            run = chosen[: gained[row], row].tolist()
            if NOTHING in run[1:]:  # it shows again where the next step begins
                run = run[: run.index(NOTHING, 1)]
            run, ends = self._following.follow_run(request, run)
            tokens.append(run[0])
            more.append(run[1:])
            ended.append(ends)
            count = request.sampling.logprobs
            beside: list[TokenLogprobs] = []
            if columns is not None and count is not None:
                beside = [
                    logprobs_of([column[place] for column in columns], row, count)
                    for place in range(len(run))
                ]
            logprobs.append(beside[0] if beside else None)
            further.append(beside[1:])
        return Sampled(
            tokens,
            logprobs if any(one is not None for one in logprobs) else None,
            ended if any(ended) else None,
            more,
            further,
        )

    # --- choosing -----------------------------------------------------------------------------

    def _nobody(self, batch: int, table: int) -> np.ndarray:
        """Rows [batch, 2 + tables] of a decode step that belong to no request: slot, position,
        pages."""
        packed = np.full((batch, 2 + table * self._groups), self.page_count, np.int32)
        packed[:, 0] = self.slots
        packed[:, 1] = 0
        return packed

    def _decode_step(
        self, batch: int, table: int, packed: np.ndarray, adapted: Adapted | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Slots and positions [batch, 2] on the device, and logits [batch, V]."""
        inputs, where, logits = self._buffers(batch, table)
        inputs, where = self.steps.get("inputs", batch, table)(inputs, where, packed)
        state = (self.weights, self._cache, self._last, inputs, logits)
        if adapted is None:
            logits, self._cache = self.steps.get("decode", batch, table)(*state)
        else:
            key = ("decode" + ADAPTED, batch, table, len(adapted.slots))
            logits, self._cache = self.steps.get(*key)(*state, adapted)
        self._decode_buffers[batch, table] = inputs, where, logits
        return where, logits

    def _buffers(self, batch: int, table: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What holds a decode step's inputs, its slots and positions, and its logits."""
        if (batch, table) not in self._decode_buffers:
            inputs = np.zeros((batch, 2 + table * self._groups), np.int32)
            where = np.zeros((batch, 2), np.int32)
            logits = np.zeros((batch, self.config.vocab_size), np.float32)
            self._decode_buffers[batch, table] = jax.device_put(
                (inputs, where, logits), self._placement
            )
        return self._decode_buffers[batch, table]

    def _sample(
        self,
        needs: SamplingNeeds,
        logits: jax.Array,
        where: jax.Array | np.ndarray,
        rules: Rules,
        mask: np.ndarray | None = None,
    ) -> Sample:
        history = self._history if needs.adjusted else None
        step = self.steps.get("sample", logits.shape[0], needs)
        sampled, self._last, history = step(logits, self._last, where, rules, history, mask)
        if needs.adjusted:
            self._history = history
        return sampled

    def _load_history(self, slot: int, history: tuple[np.ndarray, ...] | None) -> None:
        if history is None:
            return
        if self._history is None:
            empty = empty_history(self.slots, self.config.vocab_size)
            self._history = jax.device_put(empty, self._placement)
        self._history = jax.jit(set_history, donate_argnums=0, out_shardings=self._placement)(
            self._history, np.int32(slot), *history
        )

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        for start in range(0, len(copies), COPIES):
            part = copies[start : start + COPIES]
            sources = np.zeros(COPIES, np.int32)
            targets = np.full(COPIES, self.page_count, np.int32)
            sources[: len(part)] = [source for source, _ in part]
            targets[: len(part)] = [target for _, target in part]
            self._cache = self.steps.get("copy", COPIES)(self._cache, sources, targets)
