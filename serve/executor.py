"""Runs planned iterations on a device: compiled steps over a few bucket sizes, dispatched ahead.

`dispatch` returns as soon as the work is queued; sampled tokens stay on the device, in `last`
[slots], as the next step's input, and travel to the host meanwhile; `collect` waits for them.
Where a request follows a grammar, which tokens it may choose is known only with the tokens before:
the batch's logits are computed ahead all the same, and the choice among them is held back until
`release`, which the device does not notice as long as the host is quicker than a step.
`Steps` has what is called, for a few sizes each, compiled before they are needed.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxsys.errors import RunError, UsageError
from jaxsys.model import DecoderConfig
from jaxsys.model.contract import layer_cache
from jaxsys.serve import paged_model
from jaxsys.serve.grammars import Follower, Grammars
from jaxsys.serve.iterations import Iteration, PrefillPiece, SchedulerConfig
from jaxsys.serve.lora import Adapted, AdapterSlots
from jaxsys.serve.paged_attention import choose_kernels
from jaxsys.serve.paged_model import CacheForm, Contents
from jaxsys.serve.prompt_scores import Scores
from jaxsys.serve.requests import Request, RequestState, SamplingParameters
from jaxsys.serve.sampling import (
    MAX_BIASED,
    MAX_STOPS,
    NOTHING,
    History,
    Rules,
    Sample,
    SamplingNeeds,
    empty_history,
    pack_rules,
    set_history,
)
from jaxsys.serve.steps import ADAPTED, COPIES, USUAL, ExecutorConfig, Steps
from jaxsys.serve.verification import Verified
from jaxsys.serve.weights import TENSOR, ServingWeights


class TokenLogprobs(NamedTuple):
    """Log-probabilities beside one chosen token."""

    logprob: float
    top_tokens: list[int]
    top_logprobs: list[float]
    rank: int = 0
    """Place among all tokens by likelihood, from 1; 0 where it was not looked for."""


class Outcome(NamedTuple):
    """What one iteration sampled, in the order of `Iteration.sampling`."""

    tokens: list[int]
    """NOTHING (of `sampling`) for a request whose logits are not finite."""
    logprobs: list[TokenLogprobs | None] | None
    """None where no request of the iteration asked."""
    ended: list[bool] | None = None
    """Whose output ends with its token, or its last of `more`, by its grammar; None where no
    request has one."""
    more: list[list[int]] | None = None
    """Tokens behind each first one: guesses that were right, and one more; None where none was
    guessed."""
    more_logprobs: list[list[TokenLogprobs]] | None = None
    """Beside those, of requests that asked."""


class RequestFault(RunError):
    """One request cannot be computed; nothing has been touched on its behalf."""

    def __init__(self, request: Request, cause: Exception):
        super().__init__(f"the request cannot be computed: {cause}")
        self.request = request


class Executor(Protocol):
    """Something that runs iterations: on a device, or in virtual time."""

    def dispatch(self, iteration: Iteration) -> Any:
        """Queues an iteration; the handle is for `collect`.

        Raises:
            RequestFault: before anything is queued; once that request is ended, the same iteration
                may be dispatched again, and leaves it out.
        """
        ...

    def collect(self, handle: Any) -> Outcome:
        """Waits for a dispatched iteration."""
        ...

    def release(self) -> "list[RequestFault]":
        """Queues what was held back until the tokens of the iteration before were known.

        To be called when they were taken in, before any request changes.

        Returns:
            The requests whose grammars cannot be followed further.
        """
        ...

    def rebuild(self) -> None:
        """After a fault of the device: begins anew with empty pages."""
        ...


class _Pending(NamedTuple):
    """One sampling call in flight, or a piece that samples nothing and is only waited for."""

    sample: Sample
    requests: Sequence[Request | None]
    """Whose tokens they are; empty where there are none."""
    scored: "_Scored | _Pooled | None" = None


class _Guessed(NamedTuple):
    """A step in flight that computed guesses."""

    verified: Verified
    requests: Sequence[Request]


class _Held:
    """A decode step whose tokens are not chosen yet."""

    __slots__ = ("logits", "pending", "requests", "where")

    def __init__(self, requests: tuple[Request, ...], where: jax.Array, logits: jax.Array):
        self.requests = requests
        self.where = where
        self.logits = logits
        self.pending: _Pending | None = None
        """Once they are."""


class _Scored(NamedTuple):
    """What is being found out of a prompt's tokens."""

    request: Request
    start: int
    """Position of the first of them; the token scored first is the next one."""
    tokens: int
    scores: Scores


class _Pooled(NamedTuple):
    """Hidden states of a prompt's piece."""

    request: Request
    start: int
    scores: tuple[jax.Array]
    """float32 [2, D]: their sum, and the last."""


_NOBODYS = _Pending(Sample(cast(Any, np.zeros(1, np.int32)), None, None, None), [None])
"""Stands in for the sample of a request that has ended."""


class _Piece(NamedTuple):
    """A prompt's piece as the device takes it."""

    request: Request
    end: int
    shape: tuple[int, int, bool]
    packed: np.ndarray
    sampling: tuple[Rules, SamplingNeeds] | None
    """For the last piece."""
    history: tuple[np.ndarray, ...] | None
    start: int = 0
    following: np.ndarray | None = None
    """The token behind each of the piece's, where how likely they are is asked for."""
    mask: np.ndarray | None = None
    """For the last piece: the tokens that its grammar admits."""
    adapted: Adapted | None = None


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
                mesh whose axis `TENSOR` splits the weights; step inputs are whole on every device.
            cache_form: of keys and values in pages; the weights' dtype if None.
        """
        self.cache_form: CacheForm | None = cache_form
        self.config = config
        self.weights = weights
        self.grammars = grammars
        self.adapters = adapters
        self.shapes = ExecutorConfig.for_scheduler(scheduler) if shapes is None else shapes
        self.page_count, self.page_size = scheduler.page_count, scheduler.page_size
        self.slots = scheduler.max_batch
        self._words = -(-config.vocab_size // 32)
        self._placement = placement
        mesh = placement.mesh if isinstance(placement, NamedSharding) else None
        self._cache_placement: Sharding = placement
        if isinstance(mesh, Mesh):
            split = layer_cache(config, config.kinds[0]).split
            axes = () if split is None else (None, None, *(None,) * split, TENSOR)
            self._cache_placement = NamedSharding(mesh, PartitionSpec(*axes))
        self.kernels = choose_kernels(
            dtype=weights.dtype,
            head_dim=config.head_dim,
            device=next(iter(placement.device_set)),
            mesh=mesh if isinstance(mesh, Mesh) else None,
            axis=TENSOR,
        )
        self._groups = len(scheduler.windows)
        width = self.shapes.table_buckets[-1]
        self._tables = np.full((self.slots, self._groups, width), self.page_count, np.int32)
        self._table_owners: list[list[int] | None] = [None] * self.slots
        self._table_lengths = np.zeros(self.slots, np.int32)
        self._make_state()
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
        self._adapted_batch: tuple[tuple[Request, ...], int, int] = ((), 0, 0)
        self._adapted_rows: tuple[jax.Array, jax.Array] | None = None
        self._held: _Held | None = None
        self._faults: list[RequestFault] = []

    # --- running ------------------------------------------------------------------------------

    def dispatch(self, iteration: Iteration) -> list[_Pending | _Held | _Guessed]:
        """Queues an iteration's steps; returns at once."""
        self._release()
        prepared = [self._prepare(piece) for piece in iteration.prefills]
        pending: list[_Pending | _Held | _Guessed] = []
        for piece, planned in zip(prepared, iteration.prefills, strict=True):
            if piece is None:  # its request has ended: nobody looks at the sample
                if planned.last:
                    pending.append(_NOBODYS)
                continue
            if iteration.copies:
                # Not before: what is copied may be computed by a piece ahead of this one.
                held = {page for table in piece.request.tables for page in table}
                self._copy([pair for pair in iteration.copies if pair[1] in held])
            logits, scored = self._prefill(piece)
            if piece.sampling is None:
                pending.append(_Pending(Sample(logits, None, None, None), (), scored))
            else:
                request = piece.request
                self._load_history(request.slot, piece.history)
                rules, needs = piece.sampling
                where = np.array([[request.slot, piece.end - 1]], np.int32)
                sampled = self._sample(needs, logits, where, rules, piece.mask)
                pending.append(_Pending(sampled, [request], scored))
        if iteration.drafts:
            pending.append(self._guess(iteration))
        elif iteration.decodes:
            pending.append(self._decode(iteration.decodes, iteration.bucket))
        for one in pending:
            if isinstance(one, _Pending):
                _send(one)
        return pending

    def release(self) -> list[RequestFault]:
        self._release()
        faults, self._faults = self._faults, []
        return faults

    def collect(self, handle: list[_Pending | _Held | _Guessed]) -> Outcome:
        """Waits for a dispatched iteration, also where it samples nothing."""
        guessed = handle[-1] if handle and isinstance(handle[-1], _Guessed) else None
        if guessed is not None:
            return self._with_guesses(self._collect(handle[:-1]), guessed)
        return self._collect(handle)

    def _collect(self, handle: Sequence[_Pending | _Held | _Guessed]) -> Outcome:
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        ended: list[bool] = []
        asked = False
        for one in handle:
            if isinstance(one, _Held):
                if one.pending is None:
                    self._release()
                assert one.pending is not None
                one = one.pending
            assert isinstance(one, _Pending)
            sampled, requests, scored = one
            if isinstance(scored, _Pooled):
                whole = _note_pooled(scored)
            else:
                whole = scored is None or _note(scored)
            if not requests:
                jax.block_until_ready(sampled.tokens)
                continue
            found = np.asarray(sampled.tokens)[: len(requests)].tolist()
            tokens += found if whole else [NOTHING] * len(found)
            ended += self._follow(requests, tokens[len(ended) :])
            if sampled.logprobs is None:
                logprobs += [None] * len(requests)
                continue
            asked = True
            columns = [np.asarray(column) for column in sampled[1:]]
            for row, request in enumerate(requests):
                count = None if request is None else request.sampling.logprobs
                logprobs.append(None if count is None else _beside(columns, row, count))
        return Outcome(tokens, logprobs if asked else None, ended if any(ended) else None)

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
            adapted = () if kind == "prefill" else (self._adapted([0], 1, 1),)
            done, self._cache = step(self.weights, self._cache, packed, *adapted)
        elif kind in ("decode", "decode" + ADAPTED):
            batch, table, *used = shape
            adapted = self._adapted([None], batch, used[0]) if used else None
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
        self._load_history(request.slot, self._history_of(request))

    def clear(self, pages: Sequence[int]) -> None:
        """Writes zeros into pages, which may be given to others at once."""
        for start in range(0, len(pages), COPIES):
            part = pages[start : start + COPIES]
            index = np.full(COPIES, self.page_count, np.int32)
            index[: len(part)] = part
            self._cache = self.steps.get("clear", COPIES)(self._cache, index)

    # --- inside -------------------------------------------------------------------------------

    def _prepare(self, piece: PrefillPiece) -> _Piece | None:
        """A piece's arguments; None where its request has ended. Touches nothing on the device."""
        request = piece.request
        if request.state is RequestState.FINISHED:
            return None
        start, length = piece.start, piece.length
        end = start + length
        needed = -(-end // self.page_size)
        continued = self.shapes.distinguish_first and start > 0
        adapted = self._adapted_piece(request)
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
            packed[2 : 2 + length] = _tokens(request, start, length)
            for group, pages in enumerate(request.tables):
                place = 2 + size + group * table
                packed[place : place + needed] = pages[:needed]
            if request.sampling.prompt_logprobs is not None and not request.generated:
                following = np.zeros(size, np.int32)
                behind = request.prompt_tokens[start + 1 : end + 1]
                following[: len(behind)] = behind
            if piece.last:
                sampling, history = self._rules([request], 1), self._history_of(request)
                if request.sampling.grammar is not None:
                    mask = np.full((1, self._words), -1, np.int32)
                    self._follower(request).fill(mask)
        except Exception as error:
            raise RequestFault(request, error) from error
        shape = (size, table, continued)
        beside = (sampling, history, start, following, mask, adapted)
        return _Piece(request, end, shape, packed, *beside)

    def _prefill(self, piece: _Piece) -> tuple[jax.Array, _Scored | _Pooled | None]:
        following, request = piece.following, piece.request
        suffix, adapted = ("", ()) if piece.adapted is None else (ADAPTED, (piece.adapted,))
        if request.sampling.pooling is not None and not request.generated:
            step = self.steps.get("pool" + suffix, *piece.shape)
            logits, self._cache, hidden = step(self.weights, self._cache, piece.packed, *adapted)
            return logits, _Pooled(request, piece.start, (hidden,))
        if following is None:
            step = self.steps.get("prefill" + suffix, *piece.shape)
            logits, self._cache = step(self.weights, self._cache, piece.packed, *adapted)
            return logits, None
        step = self.steps.get("score" + suffix, *piece.shape)
        packed = np.concatenate([piece.packed, following])
        logits, self._cache, scores = step(self.weights, self._cache, packed, *adapted)
        count = min(piece.end, piece.request.prompt_length - 1) - piece.start
        return logits, _Scored(piece.request, piece.start, count, scores)

    def _note_tables(self, requests: Sequence[Request]) -> None:
        """Has `_tables` hold the requests' pages."""
        for request in requests:
            slot, pages = request.slot, request.pages
            if self._table_owners[slot] is not pages or self._table_lengths[slot] != len(pages):
                self._table_owners[slot] = pages
                self._table_lengths[slot] = len(pages)
                for group, own in enumerate(request.tables):
                    self._tables[slot, group, : len(own)] = own

    def _decode(self, requests: tuple[Request, ...], bucket: int) -> _Pending | _Held:
        shapes = self.shapes
        count = len(requests)
        self._note_tables(requests)
        slots = np.fromiter((request.slot for request in requests), np.int32, count)
        positions = np.fromiter((request.computed for request in requests), np.int32, count) - 1
        needed = int(positions.max()) // self.page_size + 1
        sizes = ((bucket, shapes.decode_buckets), (needed, shapes.table_buckets))
        adapted, used = None, self._slots_of(requests)
        if used is None:
            batch, table = self.steps.fitting("decode", *sizes)
        else:
            distinct = len({slot for slot in used if slot is not None})
            batch, table, width = self.steps.fitting(
                "decode" + ADAPTED, *sizes, (distinct, shapes.adapter_buckets)
            )
            adapted = self._adapted_batch_of(requests, used, batch, width)
        packed = self._nobody(batch, table)
        packed[:count, 0] = slots
        packed[:count, 1] = positions
        packed[:count, 2:] = self._tables[slots, :, :table].reshape(count, -1)
        where, logits = self._decode_step(batch, table, packed, adapted)
        held = _Held(requests, where, logits)
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

    def _adapted_piece(self, request: Request) -> Adapted | None:
        if request.adapter is None:
            return None
        slot = None if self.adapters is None else self.adapters.slot(request.adapter)
        if slot is None:
            unknown = UsageError(f"adapter {request.adapter!r} is not loaded here")
            raise RequestFault(request, unknown)
        return self._adapted([slot], 1, 1)

    def _slots_of(self, requests: Sequence[Request]) -> list[int | None] | None:
        """Of each request; None where nobody has an adapter."""
        if self.adapters is None or all(request.adapter is None for request in requests):
            return None
        # Of one that has ended, an adapter may be gone: nobody looks at its token.
        return [self.adapters.slot(request.adapter) for request in requests]

    def _adapted_batch_of(
        self, requests: tuple[Request, ...], slots: list[int | None], batch: int, width: int
    ) -> Adapted:
        assert self.adapters is not None
        of = (requests, batch, width)
        if self._adapted_batch != of or self._adapted_rows is None:
            # The same requests run for many steps: who has which adapter stays on the device.
            found = self._adapted(slots, batch, width)
            self._adapted_rows = jax.device_put(found[1:], self._placement)
            self._adapted_batch = of
        return Adapted(self.adapters.tables, *self._adapted_rows)

    def _adapted(self, slots: Sequence[int | None], batch: int, width: int) -> Adapted:
        """What `batch` rows, the first of which have `slots`, take of `width` of them at most."""
        assert self.adapters is not None
        every = self.adapters.count
        used = list(dict.fromkeys(slot for slot in slots if slot is not None))
        if width == every:
            used = list(range(every))
        places = {slot: place for place, slot in enumerate(used)}
        rows = np.full(batch, -1, np.int32)
        rows[: len(slots)] = [-1 if slot is None else places[slot] for slot in slots]
        padded = np.zeros(width, np.int32)
        padded[: len(used)] = used
        return Adapted(self.adapters.tables, cast(Any, padded), cast(Any, rows))

    def _release(self) -> None:
        """Chooses the tokens that were held back, if some were."""
        held, self._held = self._held, None
        if held is not None:
            held.pending = self._choose(held)
            _send(held.pending)

    def _choose(self, held: _Held) -> _Pending:
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
                    self._follower(request).fill(mask[row : row + 1])
                except Exception as error:  # noqa: BLE001 - whatever becomes of one request
                    self._faults.append(RequestFault(request, error))
        return _Pending(self._sample(needs, held.logits, held.where, rules, mask), requests)

    def _rules_of(self, requests: tuple[Request, ...], rows: int) -> tuple[Rules, SamplingNeeds]:
        if self._batch != requests or len(self._batch_rules[0].seed) != rows:
            rules, needs = self._rules(requests, rows)
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

    def _guess(self, iteration: Iteration) -> _Guessed:
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
                    where[row, 2] = 1 + self._follower(request).fill_along(draft, own)
                except Exception as error:  # noqa: BLE001 - whatever becomes of one request
                    self._faults.append(RequestFault(request, error))
                masks[:, row] = own
        verified = self._verify(needs, logits, where, rules, masks)
        for array in (*verified.sample, verified.gained):
            if array is not None:
                array.copy_to_host_async()
        return _Guessed(verified, requests)

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

    def _with_guesses(self, outcome: Outcome, guessed: _Guessed) -> Outcome:
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
            run, ends = self._follow_run(request, run)
            tokens.append(run[0])
            more.append(run[1:])
            ended.append(ends)
            count = request.sampling.logprobs
            beside: list[TokenLogprobs] = []
            if columns is not None and count is not None:
                beside = [
                    _beside([column[place] for column in columns], row, count)
                    for place in range(len(run))
                ]
            logprobs.append(beside[0] if beside else None)
            further.append(beside[1:])
        return Outcome(
            tokens,
            logprobs if any(one is not None for one in logprobs) else None,
            ended if any(ended) else None,
            more,
            further,
        )

    def _follow_run(self, request: Request, run: list[int]) -> tuple[list[int], bool]:
        """What of a run its grammar admits, taken in, and whether the output ends with it."""
        if request.sampling.grammar is None or not request.pending or run[0] == NOTHING:
            return run, False
        try:
            follower = self._follower(request)
            for place in range(len(run)):
                follower.follow([*request.output_tokens, *run[: place + 1]])
                if follower.ended:
                    return run[: place + 1], True
        except Exception as error:  # noqa: BLE001 - whatever becomes of one request
            self._faults.append(RequestFault(request, error))
        return run, False

    # --- choosing -----------------------------------------------------------------------------

    def _follower(self, request: Request) -> Follower:
        """Where a request's output stands in its grammar, with all its tokens."""
        grammar = request.sampling.grammar
        assert grammar is not None
        if self.grammars is None:
            raise UsageError("this instance knows no vocabulary that a grammar could be about")
        if request.follower is None or request.follower.count > len(request.output_tokens):
            request.follower = self.grammars.begin(grammar)
        request.follower.follow(request.output_tokens)
        return request.follower

    def _follow(self, requests: Sequence[Request | None], tokens: Sequence[int]) -> list[bool]:
        """Takes chosen tokens in where there is a grammar; whose output ends with its token."""
        ended = [False] * len(tokens)
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            if request is None or request.sampling.grammar is None or token == NOTHING:
                continue
            if not request.pending:  # it has ended, or was preempted and draws again
                continue
            try:
                follower = self._follower(request)
                follower.follow([*request.output_tokens, token])
                ended[row] = follower.ended
            except Exception as error:  # noqa: BLE001 - whatever becomes of one request
                self._faults.append(RequestFault(request, error))
        return ended

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

    def _rules(self, requests: Sequence[Request], rows: int) -> tuple[Rules, SamplingNeeds]:
        parameters = [request.sampling for request in requests]
        needs = SamplingNeeds()
        for rule in parameters:
            needs |= SamplingNeeds.of(rule)
        if needs.masked and needs.random:
            needs = dataclasses.replace(needs, cut=True)  # one step fewer to compile
        seeds = [seed_of(request) for request in requests]
        rules = pack_rules(parameters, seeds, rows, [one.prompt_length for one in requests])
        return rules, needs

    def _history_of(self, request: Request) -> tuple[np.ndarray, ...] | None:
        """What adjusting remembers of a request: prompt, output so far, bias; None without it."""
        sampling = request.sampling
        if not SamplingNeeds.of(sampling).adjusted:
            return None
        vocabulary = self.config.vocab_size
        prompt = np.zeros(vocabulary, bool)
        prompt[np.asarray(request.prompt_tokens, np.int64)] = True
        counts = np.bincount(request.output_tokens, minlength=vocabulary).astype(np.int32)
        bias_tokens = np.full(MAX_BIASED, vocabulary, np.int32)
        bias_values = np.zeros(MAX_BIASED, np.float32)
        for entry, (token, value) in enumerate(sampling.logit_bias.items()):
            bias_tokens[entry], bias_values[entry] = token, value
        stop_tokens = np.full(MAX_STOPS, vocabulary, np.int32)
        if sampling.min_tokens:
            stop_tokens[: len(sampling.stop_token_ids)] = sorted(sampling.stop_token_ids)
        return prompt, counts, bias_tokens, bias_values, stop_tokens

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


def _beside(columns: Sequence[np.ndarray], row: int, count: int) -> TokenLogprobs:
    """What a sample's columns of log-probabilities say of a row."""
    chosen, top_tokens, top_logprobs = columns
    return TokenLogprobs(
        float(chosen[row]), top_tokens[row, :count].tolist(), top_logprobs[row, :count].tolist()
    )


def _send(pending: _Pending) -> None:
    """Has what the host asks for travel there."""
    sampled, requests, scored = pending
    for array in (*(sampled if requests else ()), *(scored.scores if scored else ())):
        if isinstance(array, jax.Array):
            array.copy_to_host_async()


def check_sampling(parameters: SamplingParameters, vocabulary: int) -> None:
    """Raises UsageError for what the device cannot take: too many biases, unknown tokens."""
    if len(parameters.logit_bias) > MAX_BIASED:
        raise UsageError(
            f"logit_bias has {len(parameters.logit_bias)} entries; at most {MAX_BIASED} are taken"
        )
    for token in parameters.logit_bias:
        if not 0 <= token < vocabulary:
            raise UsageError(f"logit_bias token {token} is none of 0..{vocabulary - 1}")
    if parameters.min_tokens and len(parameters.stop_token_ids) > MAX_STOPS:
        raise UsageError(
            f"min_tokens={parameters.min_tokens} beside {len(parameters.stop_token_ids)} tokens "
            f"that end the output, the model's own among them; at most {MAX_STOPS} are taken"
        )


def seed_of(request: Request) -> int:
    """The request's seed; without one, a hash of what differs between requests.

    Not of its whole name: after `~` that counts attempts, which must draw the same.
    """
    if request.sampling.seed is not None:
        return request.sampling.seed
    name = str(request.request_id).partition("~")[0]
    return zlib.crc32(repr((name, request.timing.arrival_s)).encode())


def _note_pooled(pooled: _Pooled) -> bool:
    """Puts down with the request what its prompt's pieces give; whether all of it is finite."""
    request = pooled.request
    hidden = np.asarray(pooled.scores[0], np.float64)
    if pooled.start:  # pieces come in order
        hidden[0] += request.embedding[0]
    request.embedding = hidden
    return bool(np.isfinite(hidden).all())


def _note(scored: _Scored) -> bool:
    """Puts down with the request what was found out of its prompt; whether all of it is finite."""
    request, count = scored.request, scored.tokens
    alternatives = request.sampling.prompt_logprobs
    logprobs, ranks, top_tokens, top_logprobs = (
        np.asarray(column)[:count] for column in scored.scores
    )
    if request.prompt_logprobs is None:
        request.prompt_logprobs = [None] * request.prompt_length
    for row, (logprob, rank) in enumerate(zip(logprobs.tolist(), ranks.tolist(), strict=True)):
        request.prompt_logprobs[scored.start + 1 + row] = TokenLogprobs(
            logprob,
            top_tokens[row, :alternatives].tolist(),
            top_logprobs[row, :alternatives].tolist(),
            rank,
        )
    return bool(np.isfinite(logprobs).all())


def _tokens(request: Request, start: int, length: int) -> Sequence[int]:
    prompt = request.prompt_length
    if start + length <= prompt:
        return request.prompt_tokens[start : start + length]
    return request.known_tokens()[start : start + length]
