"""Finds the best plan of a space: potential descent from plain data parallelism.

The potential is simulated step time with memory overflow as pressure. Three parts, each improving
an anytime best:

1. descent over the common parts (ways, microbatch size, order ...): from data parallelism one
   factor moves from one way to another, all layers on one path, until nothing improves;
2. a sweep of all other common parts, the most promising first, each dropped unseen if compute and
   unavoidable transfers alone are slower than the best plan;
3. descent over layers' paths in the best common parts: moves aimed at the problem first (at the
   tick of peak memory where it overflows, at transfers where it does not), then all single and
   block moves, then annealed restarts and pairs of moves, so that it does not stick.

No strategy is named or special anywhere in it.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.planner.axes import split_of_plan
from jaxsys.planner.costs import BlockCost, block_cost, frame, full_chunks
from jaxsys.planner.estimates import Estimates, microbatches, schedule_link
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.plans import PATHS, Backward, Plan, Residual, State, data_parallel_plan
from jaxsys.planner.space import ORDER, SHARED, WAYS, Space

AIMED = 128
"""Moves tried first, those that relieve the problem most."""
UNTIL_FITTING = 3.0
"""How many times as much is tried while nothing fits the memory."""
BOUND = 300.0
"""Microseconds of a bound."""
BATCH = 4_096
"""Plans evaluated at once; bounds the search's own memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan and what it costs."""

    plan: Plan
    potential: float
    step_s: float
    peak_bytes: float
    sent_bytes: float
    compute_s: float

    @property
    def rank(self) -> tuple[float, float, float]:
        """Lower is better; of equals, but for rounding, what sends and holds least."""
        return float(f"{self.potential:.12g}"), self.sent_bytes, self.peak_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchMoment:
    """A moment of the search."""

    elapsed_s: float
    phase: str
    done: int
    total: int
    evaluated: int
    best: Found


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a search found."""

    best: Found
    by_base: tuple[Found, ...]
    """The best plan of each common part looked at, best first."""
    history: tuple[SearchMoment, ...] = field(repr=False)
    """The moments at which the best plan changed."""
    evaluated: int
    skipped: int
    """Common parts dropped unseen because a bound ruled them out."""
    elapsed_s: float

    @property
    def fits(self) -> bool:
        """Whether the best plan is within the memory limit."""
        return self.best.potential <= self.best.step_s * (1 + 1e-12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How hard to try; the defaults find the optimum of small problems with room to spare."""

    refine: int = 6
    """Common parts whose layers are searched."""
    chains: int = 48
    steps: int = 150
    """Annealing steps of each chain."""
    pairs: int = 40_000
    """The most pairs of moves that are all tried; beyond it a sample of this size is."""
    restarts: int = 2
    """Annealings in a row that must find nothing before a common part is left."""
    work: float = float("inf")
    """Stop improving after this much, counted in about microseconds of a quiet core: what is found
    does not depend on how busy a machine is. The best plan so far is returned. Three times as much
    is tried while nothing fits."""
    descent: bool = True
    """Whether it begins with the descent from data parallelism; a short search is better off with
    what bounds promise most."""
    tolerance: float = 0.0
    """Leave a common part alone where its bound promises less than this relative gain."""


def search(
    space: Space,
    *,
    effort: Effort | None = None,
    seed: int = 0,
    evaluator: Evaluator | None = None,
    known: Sequence[Plan] = (),
    progress: Callable[[SearchMoment], None] | None = None,
) -> Result:
    """Searches the space, starting from plain data parallelism.

    Args:
        space: what is allowed.
        effort: how hard to try.
        seed: of the annealing.
        evaluator: reuses what it has prepared, if given.
        known: plans that are looked at first, where they are in the space: nothing worse than the
            best of them is returned.
        progress: called when the best plan changes and now and then in between.

    Raises:
        Conflict: if the space is empty.
        UsageError: if no plan of it can be evaluated.
    """
    return _Search(
        space, effort or Effort(), seed, evaluator or Evaluator(space.problem), progress
    ).run(known)


def exhaustive(space: Space, *, limit: int = 2_000_000) -> Found:
    """The best plan by looking at all of them.

    Raises:
        UsageError: if there are more than `limit`.
    """
    evaluator = Evaluator(space.problem)
    bases = [(base, space.codes_of(base)) for base in space.bases()]
    total = sum(_combinations(base, options) for base, options in bases if options is not None)
    if total > limit:
        raise UsageError(f"the space holds {total} plans, more than the limit of {limit}")
    best: Found | None = None
    for base, options in bases:
        if options is None:
            continue
        for codes in _all_codes(base, options):
            best = _better(best, _best_of(space, evaluator, base, codes))
    if best is None:
        raise UsageError("the space holds no plan")
    return best


class _Search:
    def __init__(
        self,
        space: Space,
        effort: Effort,
        seed: int,
        evaluator: Evaluator,
        progress: Callable[[SearchMoment], None] | None,
    ) -> None:
        self.space, self.effort, self.evaluator = space, effort, evaluator
        self.random = np.random.default_rng(seed)
        self.report = progress
        self.start = time.monotonic()
        self.last_report_s = 0.0
        self.memory_bytes = space.problem.memory_bytes
        self.best: Found | None = None
        self.history: list[SearchMoment] = []
        self.seen: dict[Plan, Found] = {}
        self.slow: set[Plan] = set()
        """Common parts whose time alone ruled them out."""
        self.skipped = 0
        self.work_before, self.bounds = evaluator.work, 0
        self.bound_of: dict[Plan, float] = {}
        self.known: list[Found] = []

    def run(self, known: Sequence[Plan]) -> Result:
        bases = {replace(base, layers=()): base for base in self.space.bases()}
        if not bases:
            _ = self.space.left  # raises the conflict, if that is why
            raise UsageError("the space holds no plan that fits batch and devices")
        for number, plan in enumerate(known):
            if self.space.contains(plan):
                found = _best_of(self.space, self.evaluator, plan, np.array([plan.codes]))
                self.known.append(found)
                self.note(found, "known strategies", number, len(known))
        if self.effort.descent:
            self.descend(bases)
        self.sweep(bases)
        self.refine()
        assert self.best is not None
        return Result(
            best=self.best,
            by_base=tuple(sorted(self.by_base().values(), key=lambda f: f.rank)),
            history=tuple(self.history),
            evaluated=self.evaluator.evaluated,
            skipped=self.skipped,
            elapsed_s=self.elapsed_s,
        )

    def by_base(self) -> dict[Plan, Found]:
        """The best of each common part, what was known before included."""
        best = dict(self.seen)
        for found in self.known:
            base = replace(found.plan, layers=())
            best[base] = _better(best.get(base), found)
        return best

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.start

    @property
    def late(self) -> bool:
        if self.best is None:
            return False
        fits = self.best.potential <= self.best.step_s * (1 + 1e-12)
        return self.work > self.effort.work * (1 if fits else UNTIL_FITTING)

    @property
    def work(self) -> float:
        """What this search has computed, as `Effort.work` counts it."""
        return self.evaluator.work - self.work_before + self.bounds * BOUND

    def note(self, found: Found, phase: str, done: int, total: int) -> None:
        better = self.best is None or found.rank < self.best.rank
        if better:
            self.best = found
        assert self.best is not None
        moment = SearchMoment(
            elapsed_s=self.elapsed_s,
            phase=phase,
            done=done,
            total=total,
            evaluated=self.evaluator.evaluated,
            best=self.best,
        )
        if better:
            self.history.append(moment)
        if self.report and (better or moment.elapsed_s - self.last_report_s > 0.5):
            self.last_report_s = moment.elapsed_s
            self.report(moment)

    # Part 1 and 2: common parts, all layers on one path.

    def descend(self, bases: dict[Plan, Plan]) -> None:
        start = data_parallel_plan(self.space.problem.cluster.devices, self.space.problem.layers)
        key = replace(start, layers=())
        if key not in bases:  # excluded by the user or by the batch: the nearest there is
            key = min(bases, key=lambda base: _distance(base, key))
        at = self.look(bases[key], "descent")
        if at is None:
            return
        while not self.late:
            near = [base for base in bases if _distance(base, key) == 1 and self.is_new(base)]
            bounds = {base: self.bound(bases[base]) for base in near}
            step: Found | None = None
            for base in sorted(near, key=bounds.__getitem__):
                if bounds[base] >= at.potential or self.late:
                    break
                found = self.look(bases[base], "descent")
                if found is not None and found.potential < at.potential * (1 - 1e-9):
                    step = _better(step, found)
            if step is None:
                return
            at, key = step, replace(step.plan, layers=())

    def sweep(self, bases: dict[Plan, Plan]) -> None:
        rest = [base for base in bases if self.is_new(base)]
        bounds = {base: self.bound(bases[base]) for base in rest}
        rest.sort(key=bounds.__getitem__)
        for index, base in enumerate(rest):
            limit = math.inf if self.best is None else self.best.potential
            if bounds[base] >= limit * (1 - self.effort.tolerance) or self.late:
                self.skipped += len(rest) - index
                return
            self.look(bases[base], "sweep", index, len(rest))

    def is_new(self, base: Plan) -> bool:
        """Whether a common part has not been looked at."""
        return base not in self.seen and base not in self.slow

    def look(self, base: Plan, phase: str, done: int = 0, total: int = 0) -> Found | None:
        """The best plan of a common part with all layers on one path; None if it is too slow.

        Layers that rest on owners take a step of their own for every path, and what they hold takes
        longer to find than their time: so that comes first, of what keeps most and is fastest, and
        before it what no step of such a schedule takes less than.
        """
        key = replace(base, layers=())
        options = self.space.codes_of(base)
        assert options is not None
        rows = _uniform(base, options)
        if base.owners > 1:
            first = replace(base, layers=tuple(PATHS[code] for code in rows[0]))
            too_slow = self.best is not None and (
                self.evaluator.least_staged_step_s(first) >= self.best.potential
                or self.evaluator.staged_step_s(first) >= self.best.potential
            )
            if too_slow:
                self.skipped += 1
                self.slow.add(key)
                return None
            found = self.least_recompute(base, rows)
        else:
            found = _best_of(self.space, self.evaluator, base, rows)
        self.seen[key] = found
        self.note(found, phase, done, total)
        return found

    def least_recompute(self, base: Plan, rows: np.ndarray) -> Found:
        """The best of plans that differ in recompute alone.

        What keeps more takes no longer: once one fits, or is too slow, the others are not looked
        at.
        """
        best: Found | None = None
        for row in rows:  # in the order of `Residual`: what keeps most first
            plan = replace(base, layers=tuple(PATHS[code] for code in row))
            limit = self.best.potential if self.best is not None else math.inf
            if best is not None and self.evaluator.staged_step_s(plan) >= limit:
                break
            found = _best_of(self.space, self.evaluator, base, row[None])
            best = _better(best, found)
            if found.peak_bytes <= self.memory_bytes:
                break
        assert best is not None
        return best

    def bound(self, base: Plan) -> float:
        """No plan with this common part has a lower potential."""
        # What order tasks run in, and how far ahead is gathered, makes no difference to it.
        key = replace(base, layers=(), order="", delay=0, lookahead=1)
        if key not in self.bound_of:
            self.bounds += 1
            self.bound_of[key] = self.bound_at(base)
        return self.bound_of[key]

    def bound_at(self, base: Plan) -> float:
        """The same, computed."""
        problem = self.space.problem
        workload = problem.work(base)
        split = split_of_plan(problem.cluster, base)
        # By what they are and not by their value, which takes longer to hash than to cost.
        alike = {id(block): block for block in workload.blocks}
        costs = [
            block_cost(
                block,
                problem.cluster.slowest,
                activation_bytes=workload.activation_bytes,
                precision=problem.precision,
                recompute="none",
                split=split,
                times_alone=True,
            )
            for block in alike.values()
        ]
        times = dict(zip(alike, costs, strict=True))
        once = sum(times[id(b)].forward_s + times[id(b)].backward_s for b in workload.blocks)
        if split.pieces > 1:
            mine = [times[id(block)] for block in workload.blocks]
            once += sum(2 * cost.place_join_s + cost.place_cut_s for cost in mine)
        devices = base.schedule_devices
        around = frame(
            workload,
            problem.cluster.slowest,
            schedule_link(problem, base),
            devices=base.group if base.state is State.SPLIT else devices,
            placement=base.placement,
            precision=problem.precision,
            split=split,
        )
        per_device = microbatches(problem, base) / devices
        fixed = around.before_s + around.after_s + around.update_s
        time_s = per_device * (once + around.head_s + 2 * around.embed_s) + fixed
        if base.stages > 1:
            blocks = [times[id(block)] for block in workload.blocks]
            staged = _staged_bound(blocks, base, microbatches(problem, base), around.head_s)
            time_s = max(time_s, staged + fixed)
        held = np.array([around.rest_bytes + around.edge_bytes + around.edge_sum_bytes])
        bound = Estimates(
            step_s=np.array([time_s]), peak_bytes=held, sent_bytes=held, compute_s=held
        )
        return float(bound.potential(self.memory_bytes)[0])

    # Part 3: layers apart.

    def refine(self) -> None:
        promising = sorted(self.by_base().values(), key=lambda f: f.potential)
        chosen = [f for f in promising if not f.plan.recomputes_alike][: self.effort.refine]
        searches: list[tuple[Found, Iterator[Found]]] = []
        # What a descent finds of each comes first, so that those most is spent on are the best.
        for index, found in enumerate(chosen):
            if self.late or self.ruled_out(found):
                continue
            options = self.space.codes_of(found.plan)
            assert options is not None
            search = _LayerSearch(self, found, options).run()
            for better in itertools.islice(search, 1):
                self.note_layers(better, index, len(chosen))
                searches.append((better, search))
        for index, (found, search) in enumerate(sorted(searches, key=lambda one: one[0].rank)):
            if self.late or self.ruled_out(found):
                continue
            for better in search:
                self.note_layers(better, index, len(searches))

    def ruled_out(self, found: Found) -> bool:
        """Whether nothing that is better enough has its common part."""
        assert self.best is not None
        return self.bound(found.plan) >= self.best.potential * (1 - self.effort.tolerance)

    def note_layers(self, better: Found, done: int, total: int) -> None:
        """Notes a common part's better plan."""
        self.seen[replace(better.plan, layers=())] = better
        self.note(better, "layers", done, total)


class _LayerSearch:
    """Descent over the paths of layers, one common part given."""

    def __init__(self, outer: _Search, start: Found, options: list[np.ndarray]) -> None:
        self.outer = outer
        self.base = start.plan
        self.options = options
        self.start = np.array(start.plan.codes)
        self.layers = len(options)
        self.widest = max(len(o) for o in options)
        self.legal = np.zeros((self.layers, len(PATHS)), bool)
        for layer, codes in enumerate(options):
            self.legal[layer, codes] = True

    def run(self) -> Iterator[Found]:
        if self.widest == 1:
            return
        best = self.descend(self.start)
        yield self.found(best)
        uniform = _uniform(self.base, self.options)
        values = self.potential(uniform)
        for index in np.argsort(values)[1:4]:
            code = self.descend(uniform[index])
            if self.potential(code[None])[0] < self.potential(best[None])[0]:
                best = code
                yield self.found(best)
        fruitless = 0
        while fruitless < self.outer.effort.restarts and not self.outer.late:
            before = self.potential(best[None])[0]
            for code in self.anneal(best):
                code = self.pairs(self.descend(code))
                if self.potential(code[None])[0] < self.potential(best[None])[0] * (1 - 1e-12):
                    best = code
                    yield self.found(best)
            gained = self.potential(best[None])[0] < before * (1 - 1e-12)
            fruitless = 0 if gained else fruitless + 1

    def found(self, codes: np.ndarray) -> Found:
        return _best_of(self.outer.space, self.outer.evaluator, self.base, codes[None])

    def potential(self, codes: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [
                self.outer.evaluator.evaluate(self.base, codes[low : low + BATCH]).potential(
                    self.outer.memory_bytes
                )
                for low in range(0, len(codes), BATCH)
            ]
        )

    def descend(self, codes: np.ndarray) -> np.ndarray:
        """Follows the best aimed move, or where none helps the best of all, to a local minimum."""
        value = self.potential(codes[None])[0]
        while not self.outer.late:
            moves = self.moves(codes)
            aim = self.aim(codes, moves)
            for part in (moves[aim[:AIMED]], moves[aim[AIMED:]]):
                if len(part) == 0:
                    continue
                values = self.potential(part)
                best = int(values.argmin())
                if values[best] < value * (1 - 1e-12):
                    codes, value = part[best], values[best]
                    break
            else:
                return codes
        return codes

    def moves(self, codes: np.ndarray) -> np.ndarray:
        """int [moves, L]: one layer, or all from or up to one layer, on another path."""
        rows = []
        for layer, options in enumerate(self.options):
            for code in options:
                if code != codes[layer]:
                    rows.append(codes.copy())
                    rows[-1][layer] = code
                for part in (slice(0, layer + 1), slice(layer, None)):
                    legal = self.legal[part, code]
                    if len(legal) > 1 and legal.all():
                        rows.append(codes.copy())
                        rows[-1][part] = code
        if not rows:
            return np.empty((0, self.layers), int)
        table = np.array(rows)
        # As strings of bytes, which sort as their rows do, and in a tenth of the time.
        as_text = table.astype(np.uint8).view(f"S{self.layers}").ravel()
        return table[np.unique(as_text, return_index=True)[1]]

    def aim(self, codes: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """Moves in order of how much they relieve the problem, by its first-order estimate."""
        sharded = self.outer.evaluator.sharded(self.base)
        tick, overflow = sharded.peak_tick(codes, self.outer.memory_bytes)
        if overflow > 0:
            relief = sharded.live_at(moves, tick)
        else:
            relief = sharded.busy_s(moves)
        return np.argsort(relief, kind="stable")

    def anneal(self, codes: np.ndarray) -> list[np.ndarray]:
        """A few good plans that chains reach which may climb, from this plan and random ones."""
        effort, random = self.outer.effort, self.outer.random
        chains = np.repeat(codes[None], effort.chains, axis=0)
        for chain in chains[effort.chains // 2 :]:
            chain[:] = [random.choice(options) for options in self.options]
        values = self.potential(chains)
        best, best_values = chains.copy(), values.copy()
        hot, cold = 0.05, 1e-4
        for step in range(effort.steps):
            if self.outer.late:
                break
            heat = hot * (cold / hot) ** (step / max(1, effort.steps - 1))
            tried = chains.copy()
            for chain in tried:
                layer = int(random.integers(self.layers))
                code = random.choice(self.options[layer])
                length = 1 if random.random() < 0.6 else int(random.integers(1, self.layers + 1))
                part = chain[layer : layer + length]
                part[self.legal[layer : layer + length, code]] = code
            new = self.potential(tried)
            climb = (new - values) / np.maximum(values, 1e-300)
            take = random.random(len(new)) < np.exp(-np.maximum(climb, 0) / heat)
            chains[take], values[take] = tried[take], new[take]
            gain = values < best_values
            best[gain], best_values[gain] = chains[gain], values[gain]
        order = np.argsort(best_values)
        _, first = np.unique(best[order], axis=0, return_index=True)
        return [best[order][i] for i in sorted(first)[:3]]

    def pairs(self, codes: np.ndarray) -> np.ndarray:
        """Improves by changing two layers at once, for as long as that helps."""
        value = self.potential(codes[None])[0]
        while not self.outer.late:
            single = [
                (layer, code)
                for layer, options in enumerate(self.options)
                for code in options
                if code != codes[layer]
            ]
            first, second = np.triu_indices(len(single), 1)
            limit = self.outer.effort.pairs
            if len(first) > limit:
                chosen = self.outer.random.choice(len(first), limit, replace=False)
                first, second = first[chosen], second[chosen]
            table = np.array(single)
            rows = np.repeat(codes[None], len(first), axis=0)
            index = np.arange(len(first))
            for half in (first, second):
                rows[index, table[half, 0]] = table[half, 1]
            if len(rows) == 0:
                return codes
            values = self.potential(rows)
            best = int(values.argmin())
            if values[best] >= value * (1 - 1e-12):
                return codes
            codes = self.descend(rows[best])
            value = self.potential(codes[None])[0]
        return codes


def _staged_bound(
    blocks: Sequence[BlockCost], base: Plan, microbatches: int, head_s: float
) -> float:
    """Seconds that no pipeline can do its work in.

    A stage's own work comes after the first microbatch has come down to it and before the last one
    has gone back up; of a split backward pass, dL/dw may be done while it goes.
    """
    split = base.backward is Backward.SPLIT
    chunks = full_chunks(len(blocks), base.stages * base.chunks)
    bound = down_s = up_s = 0.0
    for stage in range(base.stages):
        own = [blocks[i] for part in chunks[stage :: base.stages] for i in part]
        head = head_s if stage == base.stages - 1 else 0.0
        first = microbatches * (sum(c.forward_s + c.input_gradient_s for c in own) + head)
        later = microbatches * sum(c.weight_gradient_s for c in own)
        if split:
            bound = max(bound, down_s + first + max(later, up_s))
        else:
            bound = max(bound, down_s + first + later + up_s)
        down_s += sum(blocks[i].forward_s for i in chunks[stage])
        up_s += sum(
            blocks[i].input_gradient_s if split else blocks[i].backward_s for i in chunks[stage]
        )
    return bound


def _best_of(space: Space, evaluator: Evaluator, base: Plan, codes: np.ndarray) -> Found:
    estimates = evaluator.evaluate(base, codes)
    potential = estimates.potential(space.problem.memory_bytes)
    # Of equals the one that sends and holds least.
    index = int(np.lexsort((estimates.peak_bytes, estimates.sent_bytes, potential))[0])
    return Found(
        plan=replace(base, layers=tuple(PATHS[c] for c in codes[index])),
        potential=float(potential[index]),
        step_s=float(estimates.step_s[index]),
        peak_bytes=float(estimates.peak_bytes[index]),
        sent_bytes=float(estimates.sent_bytes[index]),
        compute_s=float(estimates.compute_s[index]),
    )


def _better(a: Found | None, b: Found) -> Found:
    return b if a is None or b.rank < a.rank else a


def _distance(a: Plan, b: Plan) -> int:
    """Moves between common parts: one factor between two ways, or one other choice.

    Order, state and lookahead follow a change of ways: they are repaired, not counted.
    """
    ways = [(getattr(a, name), getattr(b, name)) for name in WAYS]
    changed = [(x, y) for x, y in ways if x != y]
    size = a.microbatch_size != b.microbatch_size
    if changed:
        up = [y // x for x, y in changed if y % x == 0]
        down = [x // y for x, y in changed if x % y == 0]
        one_factor = len(up) == 1 and len(down) == 1 and len(changed) == 2 and up == down
        return (1 if one_factor else 2 + len(changed)) + size
    others = sum(
        getattr(a, name) != getattr(b, name)
        for name in ("microbatch_size", "lookahead", "state", *SHARED, *ORDER)
    )
    return others


def _uniform(base: Plan, options: list[np.ndarray]) -> np.ndarray:
    """int [codes, L]: all layers on one path, as near as each layer's options allow."""
    rows = []
    legal = {id(layer): {int(code) for code in layer} for layer in options}
    for code in sorted(set().union(*legal.values())):
        row = [code if code in legal[id(layer)] else int(layer[0]) for layer in options]
        if not base.recomputes_alike or len({PATHS[c].residual for c in row}) == 1:
            rows.append(row)
    if not rows:  # stages whose layers are bound to different residuals: one by one is all there is
        rows.append([int(layer[0]) for layer in options])
    return np.unique(np.array(rows), axis=0)


def _combinations(base: Plan, options: list[np.ndarray]) -> int:
    if base.recomputes_alike:
        return len(Residual)
    total = 1
    for layer in options:
        total *= len(layer)
    return total


def _all_codes(base: Plan, options: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Batches of all code rows."""
    if base.recomputes_alike:
        yield _uniform(base, options)
        return
    sizes = [len(layer) for layer in options]
    total = _combinations(base, options)
    for low in range(0, total, BATCH):
        numbers = np.arange(low, min(low + BATCH, total))
        digits = np.unravel_index(numbers, sizes)
        yield np.stack([layer[d] for layer, d in zip(options, digits, strict=True)], axis=1)
