"""Simulated GPUs: how long an iteration takes and what it draws, as functions of the SM clock.

Time of one iteration at clock f. Products and attention follow the clock; memory does not until it
starves below `memory_knee_mhz`; the host does not at all:

    device  = hypot(products / rate(f), max(weights / bandwidth, widened / (widened_per_cycle * f)))
              + attention / (attention_share * rate(f))
              + activations / bandwidth + keys and values / min(bandwidth, kv_bytes_per_cycle * f)
              + collectives + layers * layer_s
    t       = max(device, layers * prompt_layer_s where there are prompts)
              + host_s + sequence_s * batch + prompts_s + request_s * prompts

`hypot` joins the two limits of the roofline without a corner. Decode batches are padded, in part,
to the tile of the matrix kernels, which makes the published staircase at multiples of 128.

Power of one GPU, with x = f in GHz, c and m the shares of the time in which the matrix units and
the memory are busy, and V the voltage over its floor, which rises in a line from a clock on:

    V    = 1 + voltage_slope * max(0, x - voltage_floor)
    idle: P = idle + clock * x V**2                                 (model loaded, nothing running)
    busy: P = idle + memory * m + (clock + busy + compute * c) * x V**2

held at the power cap by lowering f. P/f has its minimum at about the voltage floor, which is the
published U-curve. The devices' constants are rows of `jaxsys.hardware.DEVICES`, what an engine
adds is a row of `ENGINES`; each has its source, and docs/energy.md says to how many points it was
fitted and what was held out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.hardware import DEVICES, ClockSpec, DeviceSpec

TILE = 128
"""Rows of a matrix tile: the step of the published decode staircase (VoltanaLLM)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One GPU. Rates are achieved ones, not datasheet peaks."""

    name: str
    min_mhz: int
    max_mhz: int
    step_mhz: int
    sweet_spot_mhz: int
    """Clock of least energy per unit of compute-bound work."""
    hbm_bytes: float
    hbm_bytes_per_s: float
    """Achieved at or above `memory_knee_mhz`."""
    memory_knee_mhz: float
    """Below this SM clock bandwidth falls in proportion."""
    flops_per_cycle: float
    """Achieved bf16 FLOP per SM-clock cycle in large matrix products."""
    power_cap_w: float
    idle_w: float
    clock_w: float
    """A GHz of clock, at the voltage's floor, whether busy or not."""
    busy_w: float
    """Likewise, of kernels that run at all ..."""
    compute_w: float
    """... and of matrix units that are busy all the time."""
    memory_w: float
    """Of memory that is busy all the time."""
    voltage_floor_mhz: float
    voltage_slope: float
    """By what share the voltage rises a GHz above that clock."""
    link_bytes_per_s: float
    """One way, between GPUs of a tensor-parallel instance."""
    extrapolated: bool = False
    """No published clock or power point stands behind this preset."""

    @property
    def available_mhz(self) -> tuple[int, ...]:
        """All clocks, ascending."""
        return tuple(range(self.min_mhz, self.max_mhz + 1, self.step_mhz))

    @property
    def control_mhz(self) -> tuple[int, ...]:
        """The few clocks a governor chooses among: sweet spot to maximum in about five steps."""
        span = self.max_mhz - self.sweet_spot_mhz
        rungs = [self.sweet_spot_mhz + span * k / 4 for k in range(5)]
        listed = self.available_mhz
        return tuple(sorted({min(listed, key=lambda mhz, r=r: abs(mhz - r)) for r in rungs}))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine adds to the device's work, and how it hands requests over."""

    name: str
    host_s: float
    """Per iteration, whatever the clock: the host's share that nothing hides."""
    sequence_s: float
    """Per sequence in a decode batch: sampling and bookkeeping."""
    prompts_s: float
    """Per batch of prompts, beside `host_s` ..."""
    request_s: float
    """... and per prompt of it: tokens in, KV hand-over, first sample."""
    layer_s: float
    """Per layer on the device: kernels that begin and end."""
    prompt_layer_s: float
    """Per layer of a batch of prompts: what the host takes to launch it, where that is longer than
    the device's work. 0 where steps are compiled whole."""
    attention_share: float
    """Of the products' rate, what attention over prompts reaches."""
    kv_bytes_per_cycle: float
    """Keys and values that decoding's attention reads in a cycle, where its kernels are slower than
    the memory; infinite where they are not."""
    activation_values: float
    """Values that a token moves through memory in a layer outside products, in units of the hidden
    size."""
    widened_per_cycle: float = math.inf
    """Weights of less than two bytes that the multiprocessors widen in a cycle."""
    first_token_steps: float | None = None
    """Decode steps from a request's entry to its first token, where that leaves the decode
    instance; None where the prefill instance sends it."""
    reserved_tokens: int = 0
    """Tokens of cache kept free for each request that decodes, before another is let in."""
    source: str = ""


ENGINES: dict[str, EngineSpec] = {
    "jaxsys": EngineSpec(
        name="jaxsys",
        host_s=0.0,
        sequence_s=4.9e-6,
        prompts_s=0.0,
        request_s=0.0,
        layer_s=29e-6,
        prompt_layer_s=0.0,
        attention_share=0.34,
        kv_bytes_per_cycle=math.inf,
        activation_values=35.0,
        widened_per_cycle=1150.0,
        source="fitted with the H100 and H200 rows to this project's profiles of both "
        "(results/energy_live_h100.json, energy_live_h200.json): steps compiled whole, the host "
        "hidden behind the step in flight",
    ),
    "sglang-0.4.7": EngineSpec(
        name="sglang-0.4.7",
        host_s=0.012,
        sequence_s=0.0,
        prompts_s=0.0,
        request_s=0.0014,
        layer_s=29e-6,
        prompt_layer_s=350e-6,
        attention_share=0.34,
        kv_bytes_per_cycle=715.0,
        activation_values=8.35,
        first_token_steps=2.28,
        reserved_tokens=512,
        source="host_s, request_s, kv_bytes_per_cycle, activation_values, first_token_steps: "
        "fitted to VoltanaLLM's two Llama-3.1-8B lines (scripts/studies/calibration.py); "
        "prompt_layer_s: assumed, eager launches; reserved_tokens: the code's default; layer_s and "
        "attention_share: this project's",
    ),
}
"""By name. `reserved_tokens` and that a first token passes through the decode instance's loop are
read off SGLang's code; "fitted" is said in `source`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedShape:
    """What of a model the cost of serving it depends on."""

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_bytes_per_token: float
    """What layers keep that see all tokens."""
    kv_windows: tuple[tuple[int, float], ...] = ()
    """Tokens that other layers see, and what these keep of each."""
    weight_bytes_per_parameter: float = 2.0
    tensor_parallel: int = 1
    embedding_parameters: float = 0.0
    """Of `parameters`, a table that is looked up and neither read through nor multiplied with."""
    attention_width: int | None = None
    """Heads times their width; the hidden size where None."""
    active_parameters: float | None = None
    """What a token is multiplied with, where that is not all of them: experts are chosen. All of
    them are read in an iteration: many tokens choose many."""
    max_positions: int | None = None
    """Tokens of the longest request that the model takes; None where nothing is said of it."""

    @property
    def used_parameters(self) -> float:
        """What one token is multiplied with."""
        used = self.parameters if self.active_parameters is None else self.active_parameters
        return used - self.embedding_parameters

    @property
    def weight_bytes(self) -> float:
        return self.parameters * self.weight_bytes_per_parameter

    @property
    def read_bytes(self) -> float:
        """What an iteration reads of the weights."""
        return (self.parameters - self.embedding_parameters) * self.weight_bytes_per_parameter

    def kv_bytes(self, tokens: Any, requests: Any = 1) -> Any:
        """What is read to attend to `tokens` of so many requests of like length."""
        total = tokens * self.kv_bytes_per_token
        for window, each in self.kv_windows:
            total = total + np.minimum(tokens, window * requests) * each
        return total

    @property
    def width(self) -> int:
        return self.hidden if self.attention_width is None else self.attention_width


def shape_from_sizes(
    *,
    name: str,
    parameters: float,
    layers: int,
    hidden: int,
    kv_heads: int,
    head_dim: int,
    heads: int | None = None,
    vocabulary: int = 0,
    tensor_parallel: int = 1,
    bytes_per_value: float = 2.0,
    max_positions: int | None = None,
) -> ServedShape:
    """The shape of any decoder with grouped-query attention.

    Args:
        heads: of queries, where they are not `hidden` wide together.
        vocabulary: rows of an embedding table beside the head's; 0 where the two are one.
    """
    return ServedShape(
        name=name,
        parameters=parameters,
        layers=layers,
        hidden=hidden,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * bytes_per_value,
        weight_bytes_per_parameter=bytes_per_value,
        tensor_parallel=tensor_parallel,
        embedding_parameters=float(vocabulary * hidden),
        attention_width=None if heads is None else heads * head_dim,
        max_positions=max_positions,
    )


SHAPES: dict[str, ServedShape] = {
    shape.name: shape
    for shape in (
        shape_from_sizes(
            name="llama-3-8b",
            max_positions=8192,
            parameters=8.03e9,
            layers=32,
            hidden=4096,
            kv_heads=8,
            head_dim=128,
            vocabulary=128_256,
        ),
        shape_from_sizes(
            name="llama-3-70b",
            max_positions=8192,
            parameters=70.6e9,
            layers=80,
            hidden=8192,
            kv_heads=8,
            head_dim=128,
            vocabulary=128_256,
            tensor_parallel=4,
        ),
        # 14 layers: what VoltanaLLM's cache of 1,210,369 tokens beside its weights leaves.
        shape_from_sizes(
            name="ministral-3b",
            max_positions=131_072,
            parameters=3.32e9,
            layers=14,
            hidden=4096,
            kv_heads=8,
            head_dim=128,
            vocabulary=32_768,
        ),
        shape_from_sizes(
            name="qwen3-32b",
            max_positions=40_960,
            parameters=32.8e9,
            layers=64,
            hidden=5120,
            kv_heads=8,
            head_dim=128,
            heads=64,
            vocabulary=151_936,
            tensor_parallel=2,
        ),
        shape_from_sizes(
            name="smollm2-135m",
            max_positions=8192,
            parameters=134.5e6,
            layers=30,
            hidden=576,
            kv_heads=3,
            head_dim=64,
        ),
    )
}


def _modelled(device: DeviceSpec) -> GpuSpec:
    """A row of the hardware table."""
    clocks = device.clocks
    assert clocks is not None
    own: dict[str, Any] = {
        name: getattr(clocks, name) for name in ClockSpec.__slots__ if name in _SAME
    }
    return GpuSpec(
        name=clocks.product,
        hbm_bytes=clocks.high_bandwidth_bytes,
        hbm_bytes_per_s=clocks.achieved_bytes_per_s,
        flops_per_cycle=clocks.product_flops_per_cycle,
        **own,
    )


_SAME = frozenset(ClockSpec.__slots__) & frozenset(GpuSpec.__slots__)

GPUS: dict[str, GpuSpec] = {
    name: _modelled(device) for name, device in DEVICES.items() if device.clocks is not None
}


def engine_spec(name: str) -> EngineSpec:
    """The engine called `name`."""
    if name not in ENGINES:
        near = did_you_mean(name, ENGINES)
        raise UsageError(
            f"engine={name!r} is not known here{near}; use one of {', '.join(ENGINES)}"
        )
    return ENGINES[name]


def gpu_spec(name: str) -> GpuSpec:
    """The preset called `name`."""
    if name not in GPUS:
        near = did_you_mean(name, GPUS)
        raise UsageError(f"gpu={name!r} is not simulated{near}; use one of {', '.join(GPUS)}")
    return GPUS[name]


def served_shape(name: str) -> ServedShape:
    """The model shape called `name`."""
    if name not in SHAPES:
        near = did_you_mean(name, SHAPES)
        raise UsageError(f"model={name!r} is not known here{near}; use one of {', '.join(SHAPES)}")
    return SHAPES[name]


@dataclass(frozen=True, slots=True)
class Load:
    """What one iteration works on."""

    prefill_tokens: int = 0
    """Prompt tokens computed now (cached ones excluded)."""
    prefill_requests: int = 0
    cached_tokens: int = 0
    """Earlier tokens of those prompts, already in the cache, which attention reads."""
    batch: int = 0
    """Sequences that decode one token each."""
    kv_tokens: int = 0
    """Tokens whose keys and values those sequences read."""
    bucket: int = 0
    """Rows the compiled decode step really computes; 0 where the batch is not padded."""
    drafted: int = 0
    """Tokens guessed ahead that are computed besides, each a row too."""
    gain: float = 1.0
    """Tokens that each of those sequences is expected to gain at least."""

    @property
    def is_idle(self) -> bool:
        return self.prefill_tokens == 0 and self.batch == 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the simulated GPU did: `power_w` is of all the instance's GPUs together."""

    time_s: float
    power_w: float
    clock_mhz: float
    """The clock really run at: below the asked one where the power cap binds."""
    power_capped: bool

    @property
    def energy_j(self) -> float:
        return self.time_s * self.power_w


def padded_batch(batch: int) -> int:
    """Rows the matrix kernels compute for `batch` sequences: small tiles below 128, then whole
    ones."""
    if batch <= TILE:
        return max(16, 1 << max(0, batch - 1).bit_length()) if batch else 0
    return TILE * -(-batch // TILE)


class SimulatedGpu:
    """One serving instance (one GPU, or a tensor-parallel group) of a model shape and an engine."""

    STAIR_SHARE = 0.5
    """Share of a padded tile that costs real time. The published staircase has no figures; this
    is an assumption."""

    MEMORY_FOR_CACHE = 0.88
    """Share of HBM for weights and KV: gives VoltanaLLM's 457,600 tokens for Llama-3.1-8B, and
    1,210,369 and 325,037 for its other two models."""

    COLLECTIVE_S = 8e-6
    """Latency of one all-reduce over NVLink at small sizes (assumption, as `jaxsys.hardware`'s)."""

    def __init__(
        self, spec: GpuSpec, shape: ServedShape, engine: EngineSpec = ENGINES["jaxsys"]
    ) -> None:
        self.spec = spec
        self.shape = shape
        self.engine = engine
        self.gpus = ways = shape.tensor_parallel
        # Of one GPU: what one row, one pair of tokens that attend and one token of cache take.
        self._row_flops = 2.0 * shape.used_parameters / ways
        pair_flops = 4.0 * shape.layers * shape.width / ways
        self._pair_flops = pair_flops / engine.attention_share
        self._read_bytes = shape.read_bytes / ways
        row_bytes = 2.0 * shape.layers * engine.activation_values * shape.hidden / ways
        self._row_bytes = row_bytes
        self._kv_rate = engine.kv_bytes_per_cycle * 1e6
        self._fixed_s = shape.layers * engine.layer_s
        narrow = shape.weight_bytes_per_parameter < 2
        parameters = shape.parameters - shape.embedding_parameters
        # Cycles in millions, so that they go over MHz.
        self._widen = parameters / ways / engine.widened_per_cycle / 1e6 if narrow else 0.0
        self._row_s = 0.0
        if ways > 1:  # two all-reduces a layer, each over the rows' hidden values
            sent = 2.0 * shape.hidden * 2 * (ways - 1) / ways
            self._fixed_s += 2 * shape.layers * self.COLLECTIVE_S
            self._row_s = 2 * shape.layers * sent / spec.link_bytes_per_s
        self._launch_s = shape.layers * engine.prompt_layer_s
        if self.kv_capacity_tokens < 1:
            raise UsageError(
                f"{shape.name} ({shape.weight_bytes / 1e9:.0f} GB) does not fit {self.gpus} x "
                f"{spec.name} ({spec.hbm_bytes / 1e9:.0f} GB each); use more GPUs an instance"
            )

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of KV cache that fit beside the weights, of requests within all windows."""
        room = self.spec.hbm_bytes * self.MEMORY_FOR_CACHE - self.shape.weight_bytes / self.gpus
        return int(room * self.gpus / self.shape.kv_bytes(1))

    @property
    def pair_cost(self) -> float:
        """What attending to one token takes, in what a token's products take."""
        return self._pair_flops / self._row_flops

    def run(self, load: Load, clock_mhz: float) -> Outcome:
        """Time, power and real clock of one iteration asked to run at `clock_mhz`."""
        if load.is_idle:
            return Outcome(0.0, self.idle_power_w(clock_mhz), clock_mhz, False)
        work = self._work(load)
        time_s, power_w = self._at(work, clock_mhz)
        cap_w = self.spec.power_cap_w
        if power_w <= cap_w:
            return Outcome(time_s, power_w * self.gpus, clock_mhz, False)
        # The driver lowers the clock until the cap holds.
        real_mhz = min(clock_mhz, self._capped_mhz(work))
        time_s, power_w = self._at(work, real_mhz)
        return Outcome(time_s, min(power_w, cap_w) * self.gpus, real_mhz, True)

    def idle_power_w(self, clock_mhz: float) -> float:
        """Power of the whole instance with the model loaded and nothing to do."""
        spec = self.spec
        return (spec.idle_w + spec.clock_w * self._dynamic(clock_mhz)) * self.gpus

    @property
    def asleep_power_w(self) -> float:
        """Power of the whole instance with no process on its GPUs: what is drawn beside clocks.

        An H100's row has 79 W here; H200s without a process were read at 74 W on average (31
        regions of one provider, conservemode.com), so this is rather too much than too little.
        """
        return self.spec.idle_w * self.gpus

    def _dynamic(self, clock_mhz: Any, maths: "_Maths | None" = None) -> Any:
        """x V**2."""
        spec = self.spec
        above = (maths or SCALARS).most(0.0, clock_mhz - spec.voltage_floor_mhz) / 1000.0
        return clock_mhz / 1000.0 * (1 + spec.voltage_slope * above) ** 2

    def _work(self, load: Load) -> "_Work":
        """What an iteration takes, apart from the clock."""
        rows = load.bucket or (
            load.batch + self.STAIR_SHARE * (padded_batch(load.batch) - load.batch)
        )
        rows += load.prefill_tokens + load.drafted
        pairs = least_s = prompts_s = 0.0
        if load.prefill_tokens:
            prompts = max(1, load.prefill_requests)
            pairs = (load.prefill_tokens / 2 + load.cached_tokens) * load.prefill_tokens / prompts
            least_s = self._launch_s
        if load.prefill_requests:
            prompts_s = self.engine.prompts_s + self.engine.request_s * load.prefill_requests
        return _Work(
            rows * self._row_flops,
            pairs * self._pair_flops,
            rows * self._row_bytes,
            self._kv_bytes(load.kv_tokens, load.batch, load.cached_tokens, load.prefill_requests),
            self._fixed_s + rows * self._row_s,
            least_s,
            self.engine.host_s + self.engine.sequence_s * load.batch + prompts_s,
        )

    def _kv_bytes(self, kv_tokens: Any, batch: Any, cached: Any, prompts: Any) -> Any:
        """Of one GPU."""
        shape = self.shape
        return (shape.kv_bytes(kv_tokens, batch) + shape.kv_bytes(cached, prompts)) / self.gpus

    def _at(self, work: "_Work", clock_mhz: Any, maths: "_Maths | None" = None) -> tuple[Any, Any]:
        """Seconds, and watts of one GPU, with no cap; of arrays with `ARRAYS`."""
        spec, maths = self.spec, maths or SCALARS
        bandwidth = spec.hbm_bytes_per_s * maths.least(1.0, clock_mhz / spec.memory_knee_mhz)
        rate = spec.flops_per_cycle * clock_mhz * 1e6
        matrix_s, attention_s = work.product_flops / rate, work.attention_flops / rate
        weights_s = maths.most(self._read_bytes / bandwidth, self._widen / clock_mhz)
        moved_s = work.moved_bytes / bandwidth
        moved_s = moved_s + work.kv_bytes / maths.least(bandwidth, self._kv_rate * clock_mhz)
        device_s = maths.hypot(matrix_s, weights_s) + attention_s + moved_s + work.fixed_s
        time_s = maths.most(device_s, work.least_s) + work.host_s
        busy = spec.busy_w * device_s + spec.compute_w * (matrix_s + attention_s)
        power_w = (
            spec.idle_w
            + spec.memory_w * (weights_s + moved_s) / time_s
            + (spec.clock_w + busy / time_s) * self._dynamic(clock_mhz, maths)
        )
        return time_s, power_w

    def _capped_mhz(self, work: "_Work") -> float:
        """The clock at which power is the cap, by the regula falsi (Illinois); the lowest one where
        even that draws more."""
        cap_w, low, high = self.spec.power_cap_w, float(self.spec.min_mhz), float(self.spec.max_mhz)
        below, above = self._at(work, low)[1] - cap_w, self._at(work, high)[1] - cap_w
        if below >= 0:
            return low
        mhz, side = low, 0
        for _ in range(60):
            mhz = (low * above - high * below) / (above - below)
            over = self._at(work, mhz)[1] - cap_w
            if abs(over) < 1e-9 * cap_w:
                break
            if over > 0:
                high, above = mhz, over
                below *= 0.5 if side > 0 else 1.0
                side = 1
            else:
                low, below = mhz, over
                above *= 0.5 if side < 0 else 1.0
                side = -1
        return mhz


class _Work(NamedTuple):
    """An iteration, apart from the clock: numbers, or arrays of them."""

    product_flops: Any
    attention_flops: Any
    """Weighed by how much longer than products they take."""
    moved_bytes: Any
    """Activations."""
    kv_bytes: Any
    fixed_s: Any
    """On the device, whatever the clock."""
    least_s: Any
    """What the host takes to launch it meanwhile."""
    host_s: Any


class _Maths(NamedTuple):
    """What numbers and arrays of them have by different names."""

    least: Callable[[Any, Any], Any]
    most: Callable[[Any, Any], Any]
    hypot: Callable[[Any, Any], Any]


SCALARS = _Maths(min, max, math.hypot)
ARRAYS = _Maths(np.minimum, np.maximum, np.hypot)


def run_many(
    gpu: SimulatedGpu, loads: Sequence[Load], clocks_mhz: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """`SimulatedGpu.run` for every load at every clock at once.

    Returns:
        Seconds and watts, each of shape [len(loads), len(clocks_mhz)].
    """
    spec = gpu.spec
    work = _work_of(gpu, loads)
    mhz = np.broadcast_to(np.asarray(clocks_mhz, dtype=float), (len(loads), len(clocks_mhz)))
    time_s, power_w = gpu._at(work, mhz, ARRAYS)
    capped = power_w > spec.power_cap_w
    if capped.any():
        rows = np.flatnonzero(capped.any(axis=1))
        real = mhz.copy()
        some = _Work(*(field if np.ndim(field) == 0 else field[rows] for field in work))
        real[rows] = np.minimum(mhz[rows], _arrays_capped_mhz(gpu, some, len(rows)))
        again_s, again_w = gpu._at(work, real, ARRAYS)
        time_s = np.where(capped, again_s, time_s)
        power_w = np.where(capped, np.minimum(again_w, spec.power_cap_w), power_w)
    empty = np.array([load.is_idle for load in loads])
    if empty.any():
        idle = np.array([gpu.idle_power_w(clock) / gpu.gpus for clock in clocks_mhz])
        time_s[empty], power_w[empty] = 0.0, idle
    return time_s, power_w * gpu.gpus


def _work_of(gpu: SimulatedGpu, loads: Sequence[Load]) -> _Work:
    """`SimulatedGpu._work` of many, each field of shape [len(loads), 1]."""
    columns = np.array(
        [
            (
                load.prefill_tokens,
                load.prefill_requests,
                load.cached_tokens,
                load.batch,
                load.kv_tokens,
                load.bucket,
                load.drafted,
            )
            for load in loads
        ],
        dtype=float,
    ).reshape(-1, 7)[:, :, None]
    prompt, prompts, cached, batch, kv, bucket, drafted = (columns[:, k] for k in range(7))
    small = np.maximum(16.0, 2.0 ** np.ceil(np.log2(np.maximum(batch, 1.0))))
    padded = np.where(batch <= TILE, np.where(batch > 0, small, 0.0), TILE * np.ceil(batch / TILE))
    rows = np.where(bucket > 0, bucket, batch + gpu.STAIR_SHARE * (padded - batch))
    rows = rows + prompt + drafted
    engine = gpu.engine
    return _Work(
        rows * gpu._row_flops,
        (prompt / 2 + cached) * prompt / np.maximum(prompts, 1.0) * gpu._pair_flops,
        rows * gpu._row_bytes,
        gpu._kv_bytes(kv, batch, cached, prompts),
        gpu._fixed_s + rows * gpu._row_s,
        np.where(prompt > 0, gpu._launch_s, 0.0),
        engine.host_s
        + engine.sequence_s * batch
        + np.where(prompts > 0, engine.prompts_s + engine.request_s * prompts, 0.0),
    )


def _arrays_capped_mhz(gpu: SimulatedGpu, work: _Work, count: int) -> np.ndarray:
    """`SimulatedGpu._capped_mhz` of many, [count, 1], by secants: power is smooth in the clock."""
    spec = gpu.spec
    cap_w, least = spec.power_cap_w, float(spec.min_mhz)
    here = np.full((count, 1), float(spec.max_mhz))
    before = here * 0.8
    over, over_before = (gpu._at(work, mhz, ARRAYS)[1] - cap_w for mhz in (here, before))
    for _ in range(6):
        slope = (over - over_before) / np.where(here == before, 1.0, here - before)
        moved = here - over / np.where(slope > 0, slope, np.inf)
        before, over_before = here, over
        here = np.clip(moved, least, spec.max_mhz)
        over = gpu._at(work, here, ARRAYS)[1] - cap_w
        if np.abs(over).max() < 1e-6 * cap_w:
            break
    return here


def simulated_gpu(gpu: str, model: str, engine: str = "jaxsys") -> SimulatedGpu:
    """The instance of preset `gpu` serving model shape `model` under `engine`."""
    return SimulatedGpu(gpu_spec(gpu), served_shape(model), engine_spec(engine))
