"""EcoPred: learned latency and power of an iteration, for what-ifs before it runs.

Gradient-boosted trees (XGBoost) on the profile, one set for prefill (tokens, requests, pairs of
new and earlier or cached tokens, clock), one for decode (batch, KV tokens, bucket, clock), each
for log time and for power.
Constraints make time never fall with load nor rise with the clock, and power never fall with the
clock. The trees are tabulated once on a grid and read by multilinear interpolation, which keeps
monotonicity, is smooth where trees are steps, and answers all what-ifs of a decision in one call.

An iteration that mixes both phases takes T_prefill + T_decode - T_floor: what both pay once (the
weights' reading and the launches) is counted once.

Online: each phase has a factor that follows the sliding window of observed / predicted ratios; it
is in force only while drift is significant and only while it would have predicted the window
better than no factor. What a factor cannot mend (drift that depends on load or clock) is mended by
continued boosting on the window (`refit`), adopted only if held-out observations are predicted
better.
"""

import bisect
import itertools
import math
import operator
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import xgboost

from jaxsys.errors import UsageError
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.profile import Fingerprint, Profile, Sample

_PREFILL_AXES = (
    np.array([1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
              6144, 8192, 12288, 16384], float),
    np.array([1, 2, 4, 8, 16, 32, 64, 128, 256], float),
    np.array([0, 1e4, 1e5, 4e5, 1e6, 4e6, 1.6e7, 3.3e7, 6.7e7, 1.4e8, 2.8e8, 8e8, 3e9]),
)  # fmt: skip
_KV_AXIS = np.array(
    [0, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 98304, 131072, 196608, 262144, 393216,
     524288], float,
)  # fmt: skip

FEW = 16
"""Loads of a what-if up to which plain numbers are quicker than arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoPredConfig:
    """Training and adaptation."""

    rounds: int = 400
    depth: int = 5
    learning_rate: float = 0.1
    window: int = 256
    """Observations kept per phase."""
    significance: float = 3.0
    """Drift counts once the window's mean log ratio exceeds this many standard errors."""
    least_drift: float = 0.01
    """... and this much in size: smaller corrections are not worth their noise."""
    refit_every: int = 64
    """Observations between attempts at continued boosting while drift stands; 0 for never."""
    refit_above: float = 0.03
    """Window error below which no refit is tried. A try that gains nothing doubles the wait."""
    refit_rounds: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "depth", "window", "refit_rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")


def _prefill_row(load: Load, clock_mhz: float) -> tuple[float, ...]:
    # Cached tokens cost by what attends to them: the third feature counts pairs of new and earlier
    # tokens. Time rises with each feature, which it does not with requests at a given sum of
    # cached tokens.
    requests = max(1, load.prefill_requests)
    pairs = load.prefill_tokens * (load.prefill_tokens / 2 + load.cached_tokens) / requests
    return load.prefill_tokens, load.prefill_requests, pairs, clock_mhz


def _decode_row(load: Load, clock_mhz: float) -> tuple[float, ...]:
    # A step that guesses computes as many rows as one of a larger batch.
    batch = load.batch + load.drafted
    bucket = batch if load.drafted else load.bucket or batch
    return batch, load.kv_tokens, bucket, clock_mhz


class _Grid:
    """Where points lie among the nodes of a grid; tables over it are [node, clock].

    Load beyond the profile still costs: what lies beyond an axis adds its share of the usual rise
    over that axis's last segment. The usual one, because with the rise at the point itself, load
    added along one axis could lower the rise along another, and so the sum.
    """

    def __init__(self, axes: Sequence[np.ndarray]) -> None:
        self.axes = tuple(axes)
        self.shape = tuple(len(axis) for axis in axes)
        self._inner = [axis[1:-1].copy() for axis in axes]
        self._per_width = [1.0 / np.diff(axis) for axis in axes]
        strides = np.cumprod([1, *self.shape[:0:-1]])[::-1]
        self._strides = [int(stride) for stride in strides]
        self._corners = np.array(
            [
                sum(stride * (corner >> k & 1) for k, stride in enumerate(self._strides))
                for corner in range(1 << len(axes))
            ]
        )
        self._nodes = [axis.tolist() for axis in axes]

    def rises(self, table: np.ndarray) -> np.ndarray:
        """Usual rise over each axis's last segment, [axis, clock].

        The upper quartile: where the profile holds no samples, trees do not rise at all.
        """
        nodes = table.reshape(*self.shape, -1)
        rises = []
        for axis in range(len(self.shape)):
            rise = nodes.take(-1, axis) - nodes.take(-2, axis)
            rises.append(np.quantile(rise.reshape(-1, table.shape[-1]), 0.75, axis=0))
        return np.maximum(rises, 0.0)

    def read(self, table: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """The table at points, [axis, point].

        Returns:
            Rows [point, column], which end at the table's edge, and how far beyond it each point
            lies along each axis, in lengths of that axis's last segment.
        """
        first: np.ndarray | int = 0
        weights = np.ones((1, 1))
        beyond = []
        for value, axis, inner, per_width, stride in zip(
            points, self.axes, self._inner, self._per_width, self._strides, strict=True
        ):
            at = inner.searchsorted(value, side="right")
            share = np.maximum((value - axis[at]) * per_width[at], 0.0)
            within = np.minimum(share, 1.0)
            weights = np.concatenate([weights * (1.0 - within), weights * within])
            beyond.append(share - within)
            first = first + at * stride
        rows = table[first + self._corners[:, None]]
        return np.einsum("kp,kpc->pc", weights, rows), beyond

    def read_one(
        self, rows: Sequence[Sequence[float]], point: Sequence[float]
    ) -> tuple[list[float], list[float]]:
        """`read` for one point and a table of lists.

        Without arrays' overhead, and without numpy's searches, which let another thread take over
        and may wait long to go on.
        """
        first, corners, beyond = 0, [(1.0, 0)], []
        for value, nodes, stride in zip(point, self._nodes, self._strides, strict=False):
            at = min(max(bisect.bisect_right(nodes, value) - 1, 0), len(nodes) - 2)
            share = max(0.0, (value - nodes[at]) / (nodes[at + 1] - nodes[at]))
            inner = min(share, 1.0)
            first += at * stride
            if inner == 1.0:
                first += stride
            elif inner:
                upper = [(weight * inner, place + stride) for weight, place in corners]
                corners = [(w * (1.0 - inner), place) for w, place in corners] + upper
            beyond.append(share - inner)
        weights = [weight for weight, _ in corners]
        columns = zip(*(rows[first + place] for _, place in corners), strict=True)
        values = [sum(map(operator.mul, weights, column), 0.0) for column in columns]
        return values, beyond


_Known = dict[tuple[float, ...], tuple[list[float], list[float]]]
"""Seconds and watts at each clock asked for, by feature row."""

_Boosted = tuple[xgboost.Booster, np.ndarray]
"""Trees, and their table of times."""


@dataclass(slots=True)
class _Phase:
    """One phase's trees, tables and adaptation."""

    cells: _Grid
    trees: xgboost.Booster
    power_trees: xgboost.Booster | None
    grid: np.ndarray
    """Feature rows of the whole grid."""
    table_s: np.ndarray
    table_w: np.ndarray | None
    table: np.ndarray = field(init=False)
    """Both tables side by side, to be read at once."""
    rows: list[list[float]] = field(init=False)
    """The same as lists, for few points."""
    floor_s: np.ndarray = field(init=False)
    """Time of the smallest load at each clock."""
    rises_s: np.ndarray = field(init=False)
    """Usual rise over each axis's last segment, [axis, clock]."""
    rises: list[list[float]] = field(init=False)
    """The same as lists."""
    log_factor: float = 0.0
    """Correction in force, as a logarithm."""
    ratios: deque[float] = field(default_factory=deque)
    """Log of observed over uncorrected prediction, newest last."""
    seen: deque[tuple[tuple[float, ...], float]] = field(default_factory=deque)
    """Feature row and observed seconds."""
    since_refit: int = 0
    waits: int = 1
    """Multiple of `refit_every` to wait before the next try."""
    refits: int = 0
    boosting: "Future[_Boosted | None] | None" = None

    def __post_init__(self) -> None:
        self.tabulate(self.table_s)

    def tabulate(self, table_s: np.ndarray) -> None:
        """Puts another table of times in force."""
        self.table_s = table_s
        tables = [table_s] if self.table_w is None else [table_s, self.table_w]
        self.table = np.concatenate(tables, axis=1)
        self.rows = self.table.tolist()
        self.floor_s = table_s[0]
        self.rises_s = self.cells.rises(table_s)
        self.rises = self.rises_s.tolist()


class EcoPred:
    """A predictor trained on a profile and kept right by what it observes. Not thread-safe."""

    def __init__(
        self,
        profile: Profile,
        *,
        expected: Fingerprint | None = None,
        clocks_mhz: Sequence[int] | None = None,
        config: EcoPredConfig | None = None,
        background: bool = False,
    ) -> None:
        """
        Args:
            background: boost in a thread of its own, as a live server must; in virtual time the
                result would depend on the machine.
            expected: what the predictor is for; a profile of other origin is refused.
            clocks_mhz: the clocks to tabulate; those of the profile where None.
        """
        if expected is not None:
            expected.check(profile.fingerprint)
        self.config = config or EcoPredConfig()
        self.profile = profile
        self._threads = ThreadPoolExecutor(1, "ecopred") if background else None
        clocks = sorted(clocks_mhz or profile.clocks_mhz)
        if not clocks:
            raise UsageError("the profile holds no samples; take one with `jaxsys profile serving`")
        self._clocks = np.array(clocks, float)
        self._known_mhz = clocks
        self._column = {mhz: column for column, mhz in enumerate(clocks)}
        self._columns_of: dict[tuple[int, ...], list[int]] = {}
        prefill = [s for s in profile.samples if s.load.prefill_tokens and not s.load.batch]
        decode = [s for s in profile.samples if s.load.batch and not s.load.prefill_tokens]
        if len(prefill) < 8 or len(decode) < 8:
            raise UsageError(
                f"the profile holds {len(prefill)} prefill and {len(decode)} decode samples; "
                f"8 of each are the least"
            )
        batches = sorted({s.load.batch for s in decode})
        self._bucket_of = _bucket_table(profile.buckets, max(batches))
        edges = sorted(set(batches) | {b + 1 for b in profile.buckets if b < max(batches)})
        batch_axis = np.array(edges, float)
        if len(batch_axis) < 2:
            raise UsageError("the profile holds one decode batch size; two are the least")
        rows = np.array([_prefill_row(s.load, 0)[:3] for s in prefill])
        prefill_axes = tuple(_axis_within(axis, rows[:, k]) for k, axis in enumerate(_PREFILL_AXES))
        kv_axis = _axis_within(_KV_AXIS, np.array([s.load.kv_tokens for s in decode]))
        self._prefill = self._fit(
            prefill, _prefill_row, prefill_axes, self._prefill_grid(prefill_axes)
        )
        self._decode = self._fit(
            decode, _decode_row, (batch_axis, kv_axis), self._decode_grid(batch_axis, kv_axis)
        )

    # --- predictions --------------------------------------------------------------------------

    def what_if(
        self, loads: Sequence[Load], clocks_mhz: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and watts of every load at every clock, [load, clock], in one evaluation."""
        columns = self._columns(clocks_mhz)
        if len(loads) <= FEW:
            prompts: _Known = {}  # loads of one decision often differ in their decode batch alone
            answers = [self._one(load, columns, prompts) for load in loads]
            time_s, power_w = np.array(answers).reshape(-1, 2, len(columns)).swapaxes(0, 1)
            return time_s, power_w
        return self._many(loads, columns)

    def _one(
        self, load: Load, columns: Sequence[int], prompts: _Known
    ) -> tuple[list[float], list[float]]:
        """Seconds and watts of one load, in plain numbers.

        Args:
            prompts: what the prompts of loads before are known to take; added to.
        """
        if not load.prefill_tokens:
            time_d, power_d = self._phase_one(self._decode, _decode_row(load, 0), columns)
            return (time_d if load.batch else [0.0] * len(time_d)), power_d
        row = _prefill_row(load, 0)
        if row not in prompts:
            prompts[row] = self._phase_one(self._prefill, row, columns)
        time_p, power_p = prompts[row]
        if not load.batch:
            return time_p, power_p
        time_d, power_d = self._phase_one(self._decode, _decode_row(load, 0), columns)
        floors_s = [min(self._prefill.rows[0][c], self._decode.rows[0][c]) for c in columns]
        both_s = [
            max(p + d - floor, p, d) for p, d, floor in zip(time_p, time_d, floors_s, strict=True)
        ]
        both_w = [
            (p * p_w + d * d_w) / (p + d)
            for p, d, p_w, d_w in zip(time_p, time_d, power_p, power_d, strict=True)
        ]
        return both_s, both_w

    def _phase_one(
        self, phase: _Phase, row: Sequence[float], columns: Sequence[int]
    ) -> tuple[list[float], list[float]]:
        """`_phase` for one point."""
        values, beyond = phase.cells.read_one(phase.rows, row)
        times = self._extended(phase, values, beyond)
        factor = math.exp(phase.log_factor)
        time_s = [times[column] * factor for column in columns]
        if phase.table_w is None:
            return time_s, [math.nan] * len(time_s)
        count = len(self._clocks)
        return time_s, [values[count + column] for column in columns]

    def _extended(
        self, phase: _Phase, values: Sequence[float], beyond: Sequence[float]
    ) -> list[float]:
        """Times at every clock, with what lies beyond the table."""
        times = values[: len(self._clocks)]
        if any(beyond):
            for length, rises in zip(beyond, phase.rises, strict=True):
                times = [t + length * rise for t, rise in zip(times, rises, strict=True)]
        # Within the table a no-op; beyond it, the rises of two clocks may cross.
        return list(itertools.accumulate(times, min))

    def _many(self, loads: Sequence[Load], columns: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """`_one` for many loads, as arrays [load, clock]."""
        values = np.array(
            [(x.prefill_tokens, x.prefill_requests, x.cached_tokens, x.batch, x.kv_tokens)
             for x in loads], float
        ).reshape(-1, 5)  # fmt: skip
        has_prefill, has_decode = values[:, 0] > 0, values[:, 3] > 0
        values[:, 2] = (
            values[:, 0] * (values[:, 0] / 2 + values[:, 2]) / np.maximum(values[:, 1], 1.0)
        )
        if not has_prefill.any():
            time_s, power_w = self._phase(self._decode, values[:, 3:].T, columns)
            return time_s * has_decode[:, None], power_w
        if not has_decode.any():
            time_s, power_w = self._phase(self._prefill, values[:, :3].T, columns)
            return time_s * has_prefill[:, None], power_w
        time_p, power_p = self._phase(self._prefill, values[:, :3].T, columns)
        time_d, power_d = self._phase(self._decode, values[:, 3:].T, columns)
        p, d = has_prefill[:, None], has_decode[:, None]
        floor_s = np.minimum(self._prefill.floor_s, self._decode.floor_s)[columns]
        both_s = np.maximum(time_p + time_d - floor_s, np.maximum(time_p, time_d))
        both_w = (time_p * power_p + time_d * power_d) / (time_p + time_d)
        time_s = np.where(p & d, both_s, np.where(p, time_p, np.where(d, time_d, 0.0)))
        power_w = np.where(p & d, both_w, np.where(p, power_p, power_d))
        return time_s, power_w

    def energy_j(self, loads: Sequence[Load], clocks_mhz: Sequence[int]) -> np.ndarray:
        """Predicted joules of one iteration, [load, clock]."""
        time_s, power_w = self.what_if(loads, clocks_mhz)
        return time_s * power_w

    def _columns(self, clocks_mhz: Sequence[int]) -> list[int]:
        key = tuple(clocks_mhz)
        found = self._columns_of.get(key)
        if found is not None:
            return found
        try:
            self._columns_of[key] = columns = [self._column[mhz] for mhz in key]
            return columns
        except KeyError as missing:
            known = ", ".join(str(int(mhz)) for mhz in self._clocks)
            raise UsageError(
                f"clock_mhz={missing} is not tabulated; this predictor knows {known}"
            ) from None

    def _phase(
        self, phase: _Phase, points: np.ndarray, columns: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        values, beyond = phase.cells.read(phase.table, points)
        count = len(self._clocks)
        time_s = values[:, :count]
        for lengths, rise in zip(beyond, phase.rises_s, strict=True):
            if lengths.any():
                time_s = time_s + lengths[:, None] * rise
        # Within the table a no-op; beyond it, the rises of two clocks may cross.
        time_s = np.minimum.accumulate(time_s, axis=1)[:, columns] * math.exp(phase.log_factor)
        if phase.table_w is None:
            return time_s, np.full_like(time_s, np.nan)
        # Power does not go on rising beyond the profile as time does.
        return time_s, values[:, count:][:, columns]

    # --- learning online ----------------------------------------------------------------------

    def observe(self, load: Load, clock_mhz: float, time_s: float, power_w: float | None) -> None:
        """Takes in what an iteration really took. Mixed iterations teach nothing separable."""
        if time_s <= 0 or (load.prefill_tokens > 0) == (load.batch > 0):
            return
        if load.prefill_tokens:
            phase, row = self._prefill, _prefill_row(load, clock_mhz)
        else:
            phase, row = self._decode, _decode_row(load, clock_mhz)
        predicted_s = self._at_clock(phase, row, clock_mhz)
        config = self.config
        phase.ratios.append(math.log(time_s / predicted_s))
        phase.seen.append((row, time_s))
        if len(phase.ratios) > config.window:
            phase.ratios.popleft()
            phase.seen.popleft()
        phase.since_refit += 1
        if phase.since_refit % 4 == 0:
            phase.log_factor = self._correction(phase)
        if phase.boosting is not None:
            if phase.boosting.done():
                self._install(phase, phase.boosting.result())
                phase.boosting = None
        elif config.refit_every and phase.since_refit >= config.refit_every * phase.waits:
            phase.since_refit = 0
            if _window_error(phase) <= config.refit_above:
                return
            if self._threads is None:
                self.refit(load.prefill_tokens > 0)
            else:
                phase.boosting = self._threads.submit(self._boost, phase, *self._snapshot(phase))

    def close(self) -> None:
        """Ends the thread that boosts; what it is at is not waited for."""
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None

    def correction(self, prefill: bool) -> float:
        """The factor in force for a phase; 1 where no drift stands."""
        return math.exp((self._prefill if prefill else self._decode).log_factor)

    def refits(self, prefill: bool) -> int:
        """How often boosted trees were adopted for a phase."""
        return (self._prefill if prefill else self._decode).refits

    def _at_clock(self, phase: _Phase, row: tuple[float, ...], clock_mhz: float) -> float:
        """Uncorrected prediction at any clock: linear between the tabulated ones."""
        values, beyond = phase.cells.read_one(phase.rows, row)
        return _between(clock_mhz, self._known_mhz, self._extended(phase, values, beyond))

    def _correction(self, phase: _Phase) -> float:
        """The factor that the newer half of the window asks for, if it is real and helps."""
        count = max(16, len(phase.ratios) // 4)
        recent = np.array(list(itertools.islice(reversed(phase.ratios), count)))
        if len(recent) < 8:
            return 0.0
        # The median: single stalls must not move the predictor.
        drift = statistics.median(recent.tolist())
        # Spread without the drift itself; 1.4826 makes the deviation a normal's sigma.
        spread = 1.4826 * statistics.median(np.abs(recent - drift).tolist())
        error = max(spread, 1e-4) / math.sqrt(len(recent))
        if abs(drift) < max(self.config.significance * error, self.config.least_drift):
            return 0.0
        with_it = float(np.mean(np.abs(recent - drift)))
        without = float(np.mean(np.abs(recent)))
        return drift if with_it < without else 0.0

    def refit(self, prefill: bool) -> bool:
        """Boosts on the window, and adopts the result if it predicts better; True if it did.

        Tens of milliseconds. `observe` asks for it by itself, in a thread where `background`.
        """
        phase = self._prefill if prefill else self._decode
        return self._install(phase, self._boost(phase, *self._snapshot(phase)))

    @staticmethod
    def _snapshot(phase: _Phase) -> tuple[np.ndarray, np.ndarray, float]:
        rows = np.array([row for row, _ in phase.seen])
        return rows, np.log([seconds for _, seconds in phase.seen]), phase.log_factor

    def _boost(
        self, phase: _Phase, rows: np.ndarray, logs: np.ndarray, drift: float
    ) -> _Boosted | None:
        """More rounds on the window less its drift; None unless a held-out quarter gains."""
        if len(rows) < 32:
            return None
        trees = phase.trees
        # Every fourth observation judges, so that both parts see the same traffic.
        held = np.arange(len(rows)) % 4 == 3
        boosted = xgboost.train(
            self._parameters() | {"eta": 0.3},
            xgboost.DMatrix(rows[~held], label=logs[~held] - drift),
            num_boost_round=self.config.refit_rounds,
            xgb_model=trees,
        )
        truth = logs[held] - drift
        before = np.mean(np.abs(trees.inplace_predict(rows[held]) - truth))
        after = np.mean(np.abs(boosted.inplace_predict(rows[held]) - truth))
        if after >= 0.9 * before:
            return None
        return boosted, self._tabulate(boosted, phase.grid, phase.table_s.shape, True)

    def _install(self, phase: _Phase, boosted: _Boosted | None) -> bool:
        """Puts boosted trees in force if the whole window is predicted better with them."""
        if boosted is None:
            phase.waits = min(2 * phase.waits, 32)
            return False
        old_table, old_trees, old_error = phase.table_s, phase.trees, _window_error(phase)
        phase.trees, table_s = boosted
        phase.tabulate(table_s)
        self._restate(phase)
        if _window_error(phase) >= old_error:
            phase.trees = old_trees
            phase.tabulate(old_table)
            self._restate(phase)
            phase.waits = min(2 * phase.waits, 32)
            return False
        phase.waits = 1
        phase.refits += 1
        return True

    def _restate(self, phase: _Phase) -> None:
        """Recomputes the window's ratios against the present table."""
        phase.ratios = deque(
            math.log(seconds / self._at_clock(phase, row, row[-1])) for row, seconds in phase.seen
        )
        phase.log_factor = self._correction(phase)

    # --- training -----------------------------------------------------------------------------

    def _parameters(self, power: bool = False) -> dict[str, object]:
        clock = 1 if power else -1
        load = 0 if power else 1
        return {
            "max_depth": self.config.depth,
            "eta": self.config.learning_rate,
            "min_child_weight": 1,
            "lambda": 0.1,
            "tree_method": "hist",
            "max_bin": 512,
            "nthread": 1,
            "seed": self.config.seed,
            "monotone_constraints": (load, load, load, clock),
        }

    def _fit(
        self,
        samples: Sequence[Sample],
        row_of: Callable[[Load, float], tuple[float, ...]],
        axes: tuple[np.ndarray, ...],
        grid: np.ndarray,
    ) -> _Phase:
        rows = np.array([row_of(s.load, s.clock_mhz) for s in samples], float)
        logs = np.log([s.time_s for s in samples])
        rounds = self.config.rounds
        trees = xgboost.train(
            self._parameters(), xgboost.DMatrix(rows, label=logs), num_boost_round=rounds
        )
        shape = (-1, len(self._clocks))
        powered = [i for i, s in enumerate(samples) if s.power_w is not None]
        power_trees = table_w = None
        if len(powered) >= 8:
            watts = np.array([samples[i].power_w for i in powered], float)
            power_trees = xgboost.train(
                self._parameters(power=True),
                xgboost.DMatrix(rows[powered], label=watts),
                num_boost_round=rounds // 2,
            )
            table_w = self._tabulate(power_trees, grid, shape, False)
        table_s = self._tabulate(trees, grid, shape, True)
        return _Phase(
            cells=_Grid(axes),
            trees=trees,
            power_trees=power_trees,
            grid=grid,
            table_s=table_s,
            table_w=table_w,
        )

    @staticmethod
    def _tabulate(
        trees: xgboost.Booster, grid: np.ndarray, shape: tuple[int, ...], logarithmic: bool
    ) -> np.ndarray:
        values = np.asarray(trees.inplace_predict(grid), float)
        return (np.exp(values) if logarithmic else values).reshape(shape)

    def _prefill_grid(self, axes: tuple[np.ndarray, ...]) -> np.ndarray:
        mesh = np.meshgrid(*axes, self._clocks, indexing="ij")
        return np.stack([axis.ravel() for axis in mesh], axis=1)

    def _decode_grid(self, batch_axis: np.ndarray, kv_axis: np.ndarray) -> np.ndarray:
        batch, kv, clock = np.meshgrid(batch_axis, kv_axis, self._clocks, indexing="ij")
        bucket = self._bucket_of[batch.astype(int)]
        return np.stack([axis.ravel() for axis in (batch, kv, bucket, clock)], axis=1)


def _between(x: float, nodes: Sequence[float], values: Sequence[float]) -> float:
    """Linear between nodes, level beyond them."""
    at = bisect.bisect_right(nodes, x)
    if at in (0, len(nodes)):
        return values[0 if at == 0 else -1]
    share = (x - nodes[at - 1]) / (nodes[at] - nodes[at - 1])
    return values[at - 1] * (1.0 - share) + values[at] * share


def _axis_within(axis: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The axis up to the largest value profiled: beyond it trees are flat, and the grid's last
    segment, along which load is extrapolated, must not be."""
    top = max(float(seen.max()), float(axis[1]))
    kept = axis[axis < top]
    # A sliver of a last segment would extrapolate the trees' noise.
    if len(kept) > 2 and top - kept[-1] < 0.2 * top:
        kept = kept[:-1]
    return np.append(kept, top)


def _window_error(phase: _Phase) -> float:
    """Mean absolute relative error over the window, the correction in force included."""
    if not phase.ratios:
        return 0.0
    return float(np.mean(np.abs(np.expm1(phase.log_factor - np.array(phase.ratios)))))


def _bucket_table(buckets: Sequence[int], largest: int) -> np.ndarray:
    """Bucket of each batch size 0..largest; the batch itself where steps are not padded."""
    table = np.arange(largest + 2)
    for size in sorted(buckets, reverse=True):
        table[: min(size, largest + 1) + 1] = size
    return table
