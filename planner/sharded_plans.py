"""Step time and memory of many plans at once whose devices all do the same.

One device stands for all; a batch of plans that differ in their layers' paths runs through one pass
over the ticks. It is the same max-plus recursion as `jaxsys.schedule.simulate`, vectorised over
plans, and a test holds the two equal. Turns that repeat themselves are multiplied.

Legend: B plans, L layers, K microbatches a device, T ticks.
"""

from collections import defaultdict
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np

from jaxsys.axes import parts_of_batch, parts_of_block
from jaxsys.lowering.memory import Around, tabled_bytes
from jaxsys.lowering.tables import Buffers, buffers_of
from jaxsys.planner.axes import Split, split_of_plan
from jaxsys.planner.costs import BlockCost, block_cost, frame, head_held_bytes
from jaxsys.planner.estimates import POLICY, Estimates, microbatches, schedule_link
from jaxsys.planner.function_program import resting_bytes
from jaxsys.planner.plans import PATHS, Gradient, Plan, Residual, State, Weights
from jaxsys.planner.problem import Problem
from jaxsys.schedule import Data, Placement, Schedule, trace
from jaxsys.strategies import for_layers

TICK, TICK_OF_PLAN = 15.0, 0.2
"""Microseconds that a tick takes, and each plan in it."""
COMPILED = 8
"""Schedules that are kept."""
STEADY_TURNS, MOST_TURNS = 4, 64
"""Microbatches that are followed one by one, and of those whose turns do not repeat by then; what
lies between is multiplied."""
SUMS_BESIDE = 0.01
"""Of all gradients, what sums beside them must be to be counted: a loss's own is not."""
STEADY = 1e-11
"""By what share of a turn two may differ that are called the same."""

_WEIGHTS = list(Weights)
_GRADIENTS = list(Gradient)
_RESIDUALS = list(Residual)
_PATH_WEIGHTS = np.array([_WEIGHTS.index(p.weights) for p in PATHS])
_PATH_GRADIENTS = np.array([_GRADIENTS.index(p.gradient) for p in PATHS])
_PATH_RESIDUALS = np.array([_RESIDUALS.index(p.residual) for p in PATHS])
CHOICES = len(_WEIGHTS) + len(_GRADIENTS) + len(_RESIDUALS)
"""What a layer may choose, each apart from the others."""
_STAY, _WITHIN, _BETWEEN, _REFETCH = range(4)
_ONCE, _EACH, _DEFERRED = range(3)


@lru_cache(maxsize=COMPILED)
def _replicated(devices: int, turns: int, layers: int) -> tuple[Schedule, Buffers]:
    """Data parallelism's schedule, without its tasks and moves, and its buffers."""
    schedule = for_layers("dp", devices=devices, microbatches=devices * turns, layers=layers)
    return replace(schedule, tasks=(), moves=(), starts=()), buffers_of(schedule, trace(schedule))


class ShardedEvaluator:
    """Plans whose devices all do the same: one schedule of `trajectory` or `data_parallel` each."""

    def __init__(self, problem: Problem, base: Plan) -> None:
        workload = problem.work(base)
        self.layers = workload.layers
        self.devices = base.shard if base.state is State.WHOLE else base.group
        """Over which gradients are summed, and what is split lies."""
        self.whole = base.state is State.WHOLE
        self.lookahead = base.lookahead
        self.turns = microbatches(problem, base) // base.shard
        self.work = 0.0
        """See `Evaluator.work`."""
        split = split_of_plan(problem.cluster, base)
        link = schedule_link(problem, base)
        # Of a policy that the workload knows nothing of the space holds no plan.
        known = [r for r in _RESIDUALS if POLICY[r] in workload.recompute_policies]
        by_residual = {r: self._block_costs(problem, base, split, r) for r in known}
        keep = by_residual[Residual.KEEP]
        costs = [by_residual.get(residual, keep) for residual in _RESIDUALS]
        self.forward_s = np.array([c.forward_s for c in keep])
        self.backward_s = np.array([[c.backward_s for c in row] for row in costs])  # [residuals, L]
        self.weight_bytes = np.array([c.weight_bytes for c in keep])
        self.sent_weight_bytes = np.array([c.sent_weight_bytes for c in keep])
        self.gradient_bytes = np.array([c.gradient_bytes for c in keep])
        self.residual_bytes = np.array([[c.residual_bytes for c in row] for row in costs])
        self.work_bytes = np.array([[c.work_bytes for c in row] for row in costs])
        self.freeing_bytes = np.array([[c.freeing_bytes for c in row] for row in costs])
        self.forward_bytes = np.array([[c.forward_bytes for c in row] for row in costs])
        self.joined_bytes = np.array([[c.sent_bytes for c in row] for row in costs])
        self.join_s = np.array([[c.join_s for c in row] for row in costs])
        between = parts_of_block(base) if workload.splits_between else 1
        self.activation_bytes = workload.activation_bytes / between
        self.contention = link.contention
        alone, group = self.devices == 1, self.devices
        rounds = 2 if self.whole else 1
        self.gather_s = np.array(
            [0.0 if alone else link.collective_s(b, devices=group) for b in self.sent_weight_bytes]
        )
        self.reduce_s = np.array(
            [
                0.0 if alone else link.collective_s(b, devices=group, rounds=rounds)
                for b in self.gradient_bytes
            ]
        )
        self.frame = frame(
            workload,
            problem.cluster.slowest,
            link,
            devices=group,
            placement=Placement.REPLICATED if self.whole else Placement.SHARDED,
            precision=problem.precision,
            split=split,
        )
        self.workspace_bytes = head_held_bytes(workload, between)
        self.problem, self.base = problem, base
        # A CPU, which has no such kernel, runs loops that have all reduced sums from the start.
        written_out = problem.lowered and problem.cluster.slowest.fused_attention
        self.growing = written_out and not self.whole and self.turns == 1
        """Whether shards of sums come one after another, each once: see `_single_turn` of
        `jaxsys.lowering.memory`."""
        self.tabled = problem.lowered and self.whole
        if self.tabled:  # slots are each device's own: two stand for any number
            some = min(base.shard, 2)
            self.schedule, self.buffers = _replicated(some, min(self.turns, 3), self.layers)

    @staticmethod
    def _block_costs(
        problem: Problem, base: Plan, split: Split, residual: Residual
    ) -> list[BlockCost]:
        workload = problem.work(base)
        return [
            block_cost(
                block,
                problem.cluster.slowest,
                activation_bytes=workload.activation_bytes,
                precision=problem.precision,
                recompute=POLICY[residual],
                split=split,
            )
            for block in workload.blocks
        ]

    def evaluate(self, codes: np.ndarray) -> Estimates:
        """codes int [B, L] -> estimates [B]."""
        weights = _PATH_WEIGHTS[codes]
        gradients = _PATH_GRADIENTS[codes]
        residuals = _PATH_RESIDUALS[codes]
        index = np.arange(self.layers)
        backward = self.backward_s[residuals, index]
        sent = self._sent(weights, gradients, residuals)
        step = self._time(weights, gradients, backward)
        if self.problem.program is not None:
            again_s, again_bytes = self._sent_again(codes)
            step, sent = step + again_s, sent + again_bytes
        joins = self.join_s[residuals, index].sum(1)
        passes = self.forward_s.sum() + backward.sum(1) - joins
        compute = self.turns * (passes + 2 * self.frame.embed_s + self.frame.head_s)
        return Estimates(
            step_s=step,
            peak_bytes=self._peak(codes),
            sent_bytes=sent,
            compute_s=compute,
        )

    def _time(self, weights: np.ndarray, gradients: np.ndarray, backward: np.ndarray) -> np.ndarray:
        """Seconds of a step: turns are followed until they repeat, and then multiplied."""
        turns = min(self.turns, STEADY_TURNS)
        step, steady = self._followed(weights, gradients, backward, turns)
        while turns < min(self.turns, MOST_TURNS) and not steady.all():
            turns = min(self.turns, 2 * turns)
            late = np.flatnonzero(~steady)
            again = weights[late], gradients[late], backward[late]
            step[late], steady[late] = self._followed(*again, turns)
        return step

    def _followed(
        self, weights: np.ndarray, gradients: np.ndarray, backward: np.ndarray, turns: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a step, so many turns of it followed, and whether further ones are known.

        They are if a turn begins as the one before did, but for a constant: then all do.
        """
        layers, ahead = self.layers, self.lookahead
        self.work += 2 * layers * turns * (TICK + TICK_OF_PLAN * len(weights))
        plans = len(weights)
        # Columns are read once a tick: layer-major and contiguous.
        refetch_forward: np.ndarray = np.ascontiguousarray(
            ((weights == _REFETCH) | (weights == _WITHIN)).T
        )
        refetch_backward = np.ascontiguousarray(((weights == _REFETCH) | (weights == _BETWEEN)).T)
        every_turn = np.ascontiguousarray((gradients == _EACH).T)
        deferred = np.ascontiguousarray((gradients == _DEFERRED).T)
        backward = np.ascontiguousarray(backward.T)
        masks = np.stack([refetch_forward, refetch_backward, every_turn, deferred])
        some = np.any(masks, axis=2).tolist()  # [4][L]
        always = np.ones(plans, bool)
        head = np.full(plans, self.frame.before_s)
        free = np.zeros(plans)
        landing: dict[int, list[np.ndarray]] = defaultdict(list)
        # Tick -> (use, layer, mask) in the order in which a schedule lists its moves.
        gathers: dict[int, list[tuple[int, int, np.ndarray]]] = defaultdict(list)
        sums: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
        for turn in range(turns):
            base = 2 * layers * turn
            for layer in range(layers):
                use = base + layer
                if turn == 0 and not self.whole:
                    gathers[max(0, use - ahead)].append((use, layer, always))
                elif turn and some[0][layer]:
                    gathers[max(0, use - ahead)].append((use, layer, refetch_forward[layer]))
            for layer in reversed(range(layers)):
                use = base + 2 * layers - 1 - layer
                if some[1][layer]:
                    gathers[max(0, use - ahead)].append((use, layer, refetch_backward[layer]))
                if turn == turns - 1:
                    sums[use + 1].append((layer, always))
                    continue
                if some[2][layer]:
                    sums[use + 1].append((layer, every_turn[layer]))
                if some[3][layer]:
                    sums[base + 2 * layers + layer].append((layer, deferred[layer]))
        starts: list[np.ndarray] = []
        waits: list[list[np.ndarray]] = []
        for tick in range(2 * layers * turns + 1):
            if tick % (2 * layers) == 0:
                starts.append(head)
                ends = [end for at in sorted(landing) for end in landing[at]]
                waits.append([np.maximum(0.0, end - head) for end in (free, *ends)])
            for end in landing.pop(tick, ()):
                head = np.maximum(head, end)
            for use, layer, mask in gathers.get(tick, ()):
                end, free = _transfer(head, free, mask, always, self.gather_s[layer])
                if use == tick:
                    head = np.maximum(head, end)
                else:
                    landing[use].append(end)
            for layer, mask in sums.get(tick, ()):
                end, free = _transfer(head, free, mask, always, self.reduce_s[layer])
                landing[tick + ahead].append(end)
            if tick == 2 * layers * turns:
                break
            position = tick % (2 * layers)
            layer = position if position < layers else 2 * layers - 1 - position
            work = self.forward_s[layer] if position < layers else backward[layer]
            if layer == 0:
                work = work + self.frame.embed_s
            if layer == layers - 1 and position >= layers:
                work = work + self.frame.head_s
            if self.contention:
                sending = np.maximum(0.0, free - head)  # one stream, in order, without a pause
                share = self.contention
                work = work + np.minimum(share * work, sending * share / (1.0 + share))
            head = head + work
        for ends in landing.values():
            for end in ends:
                head = np.maximum(head, end)
        steady = np.ones(plans, bool)
        if self.turns > turns:
            turn_s = starts[turns - 1] - starts[turns - 2]
            head = head + (self.turns - turns) * turn_s
            last, before = waits[turns - 1], waits[turns - 2]
            steady &= len(last) == len(before)
            for new, old in zip(last, before, strict=False):
                steady &= np.abs(new - old) <= STEADY * turn_s
        return head + self.frame.after_s + self.frame.update_s, steady

    def _sent(
        self, weights: np.ndarray, gradients: np.ndarray, residuals: np.ndarray
    ) -> np.ndarray:
        turns, ring = self.turns, (self.devices - 1) / self.devices
        index = np.arange(self.layers)
        joined = turns * self.joined_bytes[residuals, index].sum(1)
        if self.whole:
            blocks = np.full(len(weights), 2 * ring * self.gradient_bytes.sum())
            return blocks + joined + self.frame.sent_bytes
        forward = np.where((weights == _REFETCH) | (weights == _WITHIN), turns, 1)
        backward = np.where((weights == _REFETCH) | (weights == _BETWEEN), turns, 0)
        reductions = np.where(gradients == _ONCE, 1, turns)
        gathered = ((forward + backward) * self.sent_weight_bytes).sum(1)
        reduced = (reductions * self.gradient_bytes).sum(1)
        return ring * (gathered + reduced) + joined + self.frame.sent_bytes

    def peak_tick(self, codes: np.ndarray, memory_bytes: float) -> tuple[int, float]:
        """The tick at which one plan, codes [L], holds most, and by how much it overflows."""
        row = codes[None]
        peak = self.evaluate(row).peak_bytes[0]
        held = (self._choices(row) @ self.occupancy)[0] + self.beside
        return int(held.argmax()), peak - memory_bytes

    def live_at(self, codes: np.ndarray, tick: int) -> np.ndarray:
        """MiB [B] that plans' layers hold in one tick."""
        return self._choices(codes) @ self.occupancy[:, tick]

    def busy_s(self, codes: np.ndarray) -> np.ndarray:
        """Seconds [B] of a microbatch's transfers and compute, none of it hidden."""
        weights, gradients = _PATH_WEIGHTS[codes], _PATH_GRADIENTS[codes]
        index = np.arange(self.layers)
        gathers = np.array([0, 1, 1, 2])[weights]
        sums = np.array([0, 1, 1])[gradients]
        backward = self.backward_s[_PATH_RESIDUALS[codes], index]
        return (gathers * self.gather_s + sums * self.reduce_s + backward).sum(1)

    def _choices(self, codes: np.ndarray) -> np.ndarray:
        """float64 [B, L * CHOICES]: one for what each layer chooses."""
        plans, layers = codes.shape
        choices = np.zeros((plans, layers, CHOICES), np.float64)
        rows, columns = np.arange(plans)[:, None], np.arange(layers)[None, :]
        choices[rows, columns, _PATH_WEIGHTS[codes]] = 1
        choices[rows, columns, 4 + _PATH_GRADIENTS[codes]] = 1
        choices[rows, columns, 7 + _PATH_RESIDUALS[codes]] = 1
        return choices.reshape(plans, -1)

    def _peak(self, codes: np.ndarray) -> np.ndarray:
        plans = len(codes)
        weights, gradients = _PATH_WEIGHTS[codes], _PATH_GRADIENTS[codes]
        residuals = _PATH_RESIDUALS[codes]
        work = self.work_bytes[residuals, np.arange(self.layers)].max(1)
        if self.tabled:
            return self._tabled_peak(residuals, work)
        if self.problem.program is not None:
            of = self.problem.program
            rows = [
                (resting_bytes(self.problem, plan), of(plan).held) for plan in self._plans(codes)
            ]
            return np.array(rows).sum(1)
        # One product gives the live bytes of every plan at every tick, in units of 2**20.
        moving = (self._choices(codes) @ self.occupancy + self.beside).max(1) * 2**20
        frame = self.frame
        task = frame.edge_bytes + frame.edge_sum_bytes + np.maximum(self.workspace_bytes, work)
        held = np.zeros(plans)
        if not self.whole:
            again = (weights != _STAY) & ((self.turns > 1) | (weights != _WITHIN))
            held += (again * self.weight_bytes).sum(1) / self.devices
            if not self.growing:
                every = (gradients != _ONCE) | (self.turns == 1)
                held += (every * self.gradient_bytes).sum(1) / self.devices
        return frame.rest_bytes + held + moving + (0.0 if self.growing else task)

    def _plans(self, codes: np.ndarray) -> list[Plan]:
        return [replace(self.base, layers=tuple(PATHS[code] for code in row)) for row in codes]

    def _sent_again(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and bytes of sums beside one of each gradient and those that features join.

        Of weights that are used in several places, or in every turn of a loop over time, gradients
        are added up for each use; examples that see each other add up what they share.
        """
        assert self.problem.program is not None
        time_s, sent = np.zeros(len(codes)), np.zeros(len(codes))
        workload = self.problem.work(self.base)
        copies = parts_of_batch(self.base) * self.base.shard
        if copies == 1:
            return time_s, sent
        ways = parts_of_block(self.base)
        once = self.problem.precision.gradient_bytes * workload.parameters
        once = once if ways == 1 else once - self.gradient_bytes.sum() * (ways - 1)
        for index, plan in enumerate(self._plans(codes)):
            joined = 0.0
            for block, path in zip(workload.blocks, plan.layers, strict=True):
                if ways > 1 and block.joins is not None:
                    passes = 2 if path.residual is Residual.RECOMPUTE else 1
                    joined += passes * block.joins.forward_bytes + block.joins.backward_bytes
            beside = self.problem.program(plan).summed - once - joined
            if beside > SUMS_BESIDE * once:
                link = self.problem.cluster.group(copies, ways)
                time_s[index] = link.collective_s(beside, devices=copies, rounds=2)
                sent[index] = 2 * (copies - 1) / copies * beside
        return time_s, sent

    def _tabled_peak(self, residuals: np.ndarray, work: np.ndarray) -> np.ndarray:
        """What programs with buffers allocate, whose parameters are whole on every device."""
        kept = self.residual_bytes[residuals, np.arange(self.layers)]
        whole = self.schedule.chunks == 1  # all layers are the one chunk

        def chunk(sizes: np.ndarray) -> np.ndarray:
            return sizes.sum(-1) if whole else sizes.max(-1)

        size = {
            Data.WEIGHT: chunk(self.weight_bytes),
            Data.GRADIENT: chunk(self.gradient_bytes),
            Data.ACTIVATION: self.activation_bytes,
            Data.COTANGENT: self.activation_bytes,
            Data.RESIDUAL: chunk(kept),
        }
        around = Around(
            rest=self.frame.rest_bytes,
            edge=self.frame.edge_bytes,
            edge_sums=self.frame.edge_sum_bytes,
            block=work,
            head=self.workspace_bytes,
        )
        return tabled_bytes(self.schedule, self.buffers, size, around)

    def forget_table(self) -> None:
        """Lets `occupancy` go, which is made again when it is asked for."""
        self.__dict__.pop("occupancy", None)

    @cached_property
    def occupancy(self) -> np.ndarray:
        """float64 [L * CHOICES, T]: MiB that each choice of each layer holds in each tick.

        Memory repeats itself from the second microbatch on, so three stand for all. Of a single
        microbatch what tasks hold is in it, and three ticks are added: the loss, and what is there
        after the last F and the last B.
        """
        layers, ahead = self.layers, self.lookahead
        turns = min(self.turns, 3)
        ticks = 2 * layers * turns + ahead
        # By how much each tick holds more than the one before, all layers at once.
        change = np.zeros((layers, CHOICES, ticks + 3))
        layer = np.arange(layers)

        def hold(choice: int, first: np.ndarray | int, last: np.ndarray, size: np.ndarray) -> None:
            start = np.minimum(np.maximum(0, first), ticks + 2)
            stop = np.maximum(start, np.minimum(last, ticks) + 1)
            change[layer, choice, start] += size
            change[layer, choice, stop] -= size

        weight, gradient = self.weight_bytes, self.gradient_bytes
        passed = np.full(layers, self.activation_bytes)
        last_backward = 2 * layers * turns - 1 - layer
        hold(_STAY, 0 if self.whole else layer - ahead, last_backward, weight)
        # Of a single microbatch it is among what its task holds in the tick in which it is made.
        late = int(self.growing)
        hold(4 + _ONCE, 2 * layers - 1 - layer + late, last_backward + ahead, gradient)
        for turn in range(turns):
            forward = 2 * layers * turn + layer
            backward = 2 * layers * (turn + 1) - 1 - layer
            following = 2 * layers * (turn + 1) + layer
            last = turn == turns - 1
            hold(_WITHIN, forward - ahead, backward, weight)
            hold(_REFETCH, forward - ahead, forward, weight)
            hold(_REFETCH, backward - ahead, backward, weight)
            if turn == 0:
                hold(_BETWEEN, forward - ahead, forward, weight)
            hold(_BETWEEN, backward - ahead, backward if last else following, weight)
            hold(4 + _EACH, backward + late, backward + ahead, gradient)
            until = backward + ahead if last else following + ahead - 1
            hold(4 + _DEFERRED, backward + late, until, gradient)
            for choice in (_ONCE, _EACH, _DEFERRED) if self.growing else ():
                hold(4 + choice, backward + 1, np.full(layers, ticks), gradient / self.devices)
            for choice in range(len(_RESIDUALS)):
                hold(7 + choice, forward, backward, self.residual_bytes[choice])
                # What passes on to the next layer and back, whatever is chosen.
                hold(7 + choice, forward, forward + 1, passed)
                hold(7 + choice, backward + late, backward + 1, np.where(layer > 0, passed, 0.0))
        live = np.cumsum(change, axis=2)[:, :, :ticks]
        if self.growing:
            last, end = layers - 1, 2 * layers - 1
            made = np.zeros((layers, CHOICES))  # by the very last task
            made[0, 4 : 4 + len(_GRADIENTS)] = gradient[0]
            more = np.stack([live[:, :, layers], live[:, :, last], live[:, :, end] + made], axis=2)
            results = gradient + np.where(layer > 0, passed, 0.0)
            for choice in range(len(_RESIDUALS)):
                live[layer, 7 + choice, layer] += self.forward_bytes[choice]
                task = np.maximum(self.freeing_bytes[choice], results)
                live[layer, 7 + choice, end - layer] += task
            live = np.concatenate([live, more], axis=2)
        return (live / 2**20).reshape(layers * CHOICES, -1)

    @cached_property
    def beside(self) -> np.ndarray:
        """MiB [T] beside that of every plan: of a single microbatch the edge's, in the end none."""
        if not self.growing:
            return np.zeros(self.occupancy.shape[1])
        frame, layers = self.frame, self.layers
        held = np.full(self.occupancy.shape[1], frame.head_sum_bytes)
        held[:layers] = frame.edge_bytes
        held[2 * layers : -3] = 0.0
        held[-3] = frame.edge_bytes + self.workspace_bytes
        held[-2] = frame.edge_bytes
        held[-1] = frame.edge_sum_bytes
        return held / 2**20


def _transfer(
    head: np.ndarray, free: np.ndarray, mask: np.ndarray, always: np.ndarray, time_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Runs a transfer on the one communication stream, in the plans where there is one."""
    end = np.maximum(head, free) + time_s
    if mask is always:
        return end, end
    return np.where(mask, end, -np.inf), np.where(mask, end, free)
