"""Simulated GPUs: how long an iteration takes and what it draws, as functions of the SM clock.

Time of one iteration at clock f (memory does not follow the SM clock until it starves):

    t = t_host + t_sequence * batch + (t_turn + t_request * prompts, where there are prompts)
        + hypot(weight_bytes / bandwidth(f), flops / rate(f)) + kv_bytes / bandwidth(f)

`hypot` joins the two limits of the roofline without a corner. Decode batches are padded, in part,
to the tile of the matrix kernels, which makes the published staircase at multiples of 128.

Power of one GPU, with x = f in GHz, c and m the shares of the time in which the matrix units and
the memory are busy:

    busy: P = active + memory * m + (base + compute * c) * x**g, held at the power cap by lowering f
    idle: P = idle + idle_clock * x**3.17   (model loaded, nothing running)

Below the clock where the voltage reaches its floor, x**g goes on as a straight line through zero.
P/f has its minimum at a middle clock, which is the published U-curve. The devices' constants are
rows of `jaxsys.hardware.DEVICES`, each with its source; docs/energy.md measures them against
published points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.hardware import DEVICES, ClockSpec, DeviceSpec

IDLE_EXPONENT = 3.17
"""Fit of loaded-idle power against clock on H100 (DualScale's table, TP4 rows)."""

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
    active_w: float
    memory_w: float
    base_w: float
    compute_w: float
    power_exponent: float
    idle_w: float
    idle_clock_w: float
    voltage_floor_mhz: float = 0.0
    """Clock below which lower clocks save no voltage, so dynamic power is linear; 0 for none."""
    host_s: float = 0.0012
    """Per iteration, whatever the clock: launches and the host's share that is not hidden."""
    sequence_s: float = 25e-6
    """Per sequence in a decode batch: sampling and bookkeeping. Fit to ML.ENERGY's H100 ITL."""
    turn_s: float = 0.0
    """Per batch of prompts: what the engine does between one and the next."""
    request_s: float = 0.001
    """Per prompt: tokens in, KV hand-over, first sample."""
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
    active_parameters: float | None = None
    """What a token is multiplied with, where that is not all of them: experts are chosen. All of
    them are read in an iteration: many tokens choose many."""

    @property
    def used_parameters(self) -> float:
        return self.parameters if self.active_parameters is None else self.active_parameters

    @property
    def weight_bytes(self) -> float:
        return self.parameters * self.weight_bytes_per_parameter

    def kv_bytes(self, tokens: Any, requests: Any = 1) -> Any:
        """What is read to attend to `tokens` of so many requests of like length."""
        total = tokens * self.kv_bytes_per_token
        for window, each in self.kv_windows:
            total = total + np.minimum(tokens, window * requests) * each
        return total


def shape_from_sizes(
    *,
    name: str,
    parameters: float,
    layers: int,
    hidden: int,
    kv_heads: int,
    head_dim: int,
    tensor_parallel: int = 1,
    bytes_per_value: float = 2.0,
) -> ServedShape:
    """The shape of any decoder with grouped-query attention."""
    return ServedShape(
        name=name,
        parameters=parameters,
        layers=layers,
        hidden=hidden,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * bytes_per_value,
        weight_bytes_per_parameter=bytes_per_value,
        tensor_parallel=tensor_parallel,
    )


SHAPES: dict[str, ServedShape] = {
    "llama-3-8b": shape_from_sizes(
        name="llama-3-8b", parameters=8.03e9, layers=32, hidden=4096, kv_heads=8, head_dim=128
    ),
    "llama-3-70b": shape_from_sizes(
        name="llama-3-70b",
        parameters=70.6e9,
        layers=80,
        hidden=8192,
        kv_heads=8,
        head_dim=128,
        tensor_parallel=4,
    ),
    "qwen3-32b": shape_from_sizes(
        name="qwen3-32b",
        parameters=32.8e9,
        layers=64,
        hidden=5120,
        kv_heads=8,
        head_dim=128,
        tensor_parallel=2,
    ),
    "smollm2-135m": shape_from_sizes(
        name="smollm2-135m", parameters=134.5e6, layers=30, hidden=576, kv_heads=3, head_dim=64
    ),
}

_ENGINES: dict[str, dict[str, float]] = {
    # Fitted to VoltanaLLM's published static runs, which were SGLang 0.4.7 with prefill and decode
    # apart (serve/simulation/calibration.py says how well they meet it).
    "a100-80g": {"host_s": 0.0031, "sequence_s": 9.7e-6, "turn_s": 0.1625, "request_s": 0.0052},
    # Host and sequence times: fit to ML.ENERGY v3's ITL of Llama-3.1-8B, the defaults above.
    "h100": {},
    "h200": {},
    "gh200": {},
}
"""What an engine takes beside the device's work, by device."""


def _modelled(device: DeviceSpec, engine: Mapping[str, Any]) -> GpuSpec:
    """A row of the hardware table under an engine."""
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
        **engine,
    )


_SAME = frozenset(ClockSpec.__slots__) & frozenset(GpuSpec.__slots__)

GPUS: dict[str, GpuSpec] = {
    name: _modelled(DEVICES[name], engine) for name, engine in _ENGINES.items()
}


def gpu_spec(name: str) -> GpuSpec:
    """The preset called `name`."""
    if name not in GPUS:
        raise UsageError(f"gpu={name!r} is not simulated; use one of {', '.join(GPUS)}")
    return GPUS[name]


def served_shape(name: str) -> ServedShape:
    """The model shape called `name`."""
    if name not in SHAPES:
        raise UsageError(f"model={name!r} is not known here; use one of {', '.join(SHAPES)}")
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
    """One serving instance (one GPU, or a tensor-parallel group) of a given model shape."""

    STAIR_SHARE = 0.5
    """Share of a padded tile that costs real time. The published staircase has no figures; this
    is an assumption, which docs/energy.md varies."""

    MEMORY_FOR_CACHE = 0.88
    """Share of HBM for weights and KV: gives VoltanaLLM's 457,600 tokens for Llama-3.1-8B."""

    def __init__(self, spec: GpuSpec, shape: ServedShape) -> None:
        self.spec = spec
        self.shape = shape
        self.gpus = shape.tensor_parallel
        self._weight_share_bytes = shape.weight_bytes / self.gpus
        whole = shape.kv_bytes_per_token + sum(each for _, each in shape.kv_windows)
        self._kv_share_bytes = whole / self.gpus
        self._flops_per_token = 2.0 * shape.used_parameters / self.gpus
        self._attention_flops = 4.0 * shape.layers * shape.hidden / self.gpus
        # Two all-reduces a layer; about 8 us each at small sizes over NVLink (assumption).
        self.collective_s = 2 * shape.layers * 8e-6 if self.gpus > 1 else 0.0
        if self.kv_capacity_tokens < 1:
            raise UsageError(
                f"{shape.name} ({shape.weight_bytes / 1e9:.0f} GB) does not fit {self.gpus} x "
                f"{spec.name} ({spec.hbm_bytes / 1e9:.0f} GB each); use more GPUs an instance"
            )

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of KV cache that fit beside the weights, of requests within all windows."""
        room = self.spec.hbm_bytes * self.MEMORY_FOR_CACHE - self._weight_share_bytes
        return int(room / self._kv_share_bytes)

    def run(self, load: Load, clock_mhz: float) -> Outcome:
        """Time, power and real clock of one iteration asked to run at `clock_mhz`."""
        if load.is_idle:
            return Outcome(0.0, self.idle_power_w(clock_mhz), clock_mhz, False)
        spec = self.spec
        time_s, compute, memory = self._time(load, clock_mhz)
        steady = spec.active_w + spec.memory_w * memory
        per_cycle = spec.base_w + spec.compute_w * compute
        power_w = steady + per_cycle * self._dynamic(clock_mhz)
        if power_w <= spec.power_cap_w:
            return Outcome(time_s, power_w * self.gpus, clock_mhz, False)
        # The driver lowers the clock until the cap holds; the busy shares rise a little as it
        # does, so this is the first step of a fixed point, and power is then the cap itself.
        real_mhz = self._clock_of((spec.power_cap_w - steady) / per_cycle)
        real_mhz = min(clock_mhz, max(real_mhz, spec.min_mhz))
        time_s, _, _ = self._time(load, real_mhz)
        return Outcome(time_s, spec.power_cap_w * self.gpus, real_mhz, True)

    def idle_power_w(self, clock_mhz: float) -> float:
        """Power of the whole instance with the model loaded and nothing to do."""
        spec = self.spec
        per_gpu = spec.idle_w + spec.idle_clock_w * (clock_mhz / 1000.0) ** IDLE_EXPONENT
        return per_gpu * self.gpus

    def _dynamic(self, clock_mhz: float) -> float:
        """x**g, or its straight continuation below the voltage floor."""
        spec = self.spec
        if clock_mhz >= spec.voltage_floor_mhz:
            return (clock_mhz / 1000.0) ** spec.power_exponent
        at_floor = (spec.voltage_floor_mhz / 1000.0) ** spec.power_exponent
        return at_floor * clock_mhz / spec.voltage_floor_mhz

    def _clock_of(self, dynamic: float) -> float:
        """The clock whose `_dynamic` is `dynamic`."""
        spec = self.spec
        at_floor = (spec.voltage_floor_mhz / 1000.0) ** spec.power_exponent
        if dynamic >= at_floor:
            return 1000.0 * dynamic ** (1 / spec.power_exponent)
        return spec.voltage_floor_mhz * dynamic / at_floor

    def _time(self, load: Load, clock_mhz: float) -> tuple[float, float, float]:
        """Seconds, and the shares of them in which matrix units and memory are busy."""
        spec = self.spec
        bandwidth = spec.hbm_bytes_per_s * min(1.0, clock_mhz / spec.memory_knee_mhz)
        rate = spec.flops_per_cycle * clock_mhz * 1e6
        rows = load.bucket or (
            load.batch + self.STAIR_SHARE * (padded_batch(load.batch) - load.batch)
        )
        flops = self._flops_per_token * (rows + load.prefill_tokens)
        kv_bytes = self.shape.kv_bytes(load.kv_tokens, load.batch)
        kv_bytes += self.shape.kv_bytes(load.cached_tokens, load.prefill_requests)
        if load.prefill_tokens:
            mean_length = load.prefill_tokens / max(1, load.prefill_requests)
            mean_cached = load.cached_tokens / max(1, load.prefill_requests)
            flops += self._attention_flops * load.prefill_tokens * (mean_length / 2 + mean_cached)
        weight_s = self._weight_share_bytes / bandwidth
        kv_s = kv_bytes / self.gpus / bandwidth
        matrix_s = flops / rate
        prompts_s = 0.0
        if load.prefill_requests:
            prompts_s = spec.turn_s + spec.request_s * load.prefill_requests
        time_s = (
            spec.host_s
            + self.collective_s
            + prompts_s
            + spec.sequence_s * load.batch
            + math.hypot(weight_s, matrix_s)
            + kv_s
        )
        return time_s, matrix_s / time_s, (weight_s + kv_s) / time_s


def run_many(
    gpu: SimulatedGpu, loads: Sequence[Load], clocks_mhz: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """`SimulatedGpu.run` for every load at every clock at once.

    Returns:
        Seconds and watts, each of shape [len(loads), len(clocks_mhz)].
    """
    spec, shape = gpu.spec, gpu.shape
    columns = np.array(
        [
            (
                load.prefill_tokens,
                load.prefill_requests,
                load.cached_tokens,
                load.batch,
                load.kv_tokens,
                load.bucket,
            )
            for load in loads
        ],
        dtype=float,
    ).reshape(-1, 6)[:, :, None]
    prompt, prompts, cached, batch, kv, bucket = (columns[:, k] for k in range(6))
    mhz = np.asarray(clocks_mhz, dtype=float)[None, :]
    small = np.maximum(16.0, 2.0 ** np.ceil(np.log2(np.maximum(batch, 1.0))))
    padded = np.where(batch <= TILE, np.where(batch > 0, small, 0.0), TILE * np.ceil(batch / TILE))
    rows = np.where(bucket > 0, bucket, batch + gpu.STAIR_SHARE * (padded - batch))
    per_prompt = np.maximum(prompts, 1.0)
    attention = prompt * (prompt / per_prompt / 2 + cached / per_prompt)
    flops = (
        2.0 * shape.used_parameters * (rows + prompt)
        + 4.0 * shape.layers * shape.hidden * attention
    ) / gpu.gpus
    weight_bytes = shape.weight_bytes / gpu.gpus
    kv_bytes = (shape.kv_bytes(kv, batch) + shape.kv_bytes(cached, prompts)) / gpu.gpus
    fixed_s = (
        spec.host_s
        + gpu.collective_s
        + np.where(prompts > 0, spec.turn_s + spec.request_s * prompts, 0.0)
        + spec.sequence_s * batch
    )

    def times(clock: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        bandwidth = spec.hbm_bytes_per_s * np.minimum(1.0, clock / spec.memory_knee_mhz)
        matrix_s = flops / (spec.flops_per_cycle * clock * 1e6)
        weight_s, kv_s = weight_bytes / bandwidth, kv_bytes / bandwidth
        time_s = fixed_s + np.hypot(weight_s, matrix_s) + kv_s
        return time_s, matrix_s / time_s, (weight_s + kv_s) / time_s

    time_s, compute, memory = times(mhz)
    floor = spec.voltage_floor_mhz
    at_floor = (floor / 1000.0) ** spec.power_exponent
    dynamic = np.where(
        mhz >= floor, (mhz / 1000.0) ** spec.power_exponent, at_floor * mhz / max(floor, 1.0)
    )
    steady = spec.active_w + spec.memory_w * memory
    per_cycle = spec.base_w + spec.compute_w * compute
    power_w = steady + per_cycle * dynamic
    capped = power_w > spec.power_cap_w
    if capped.any():
        room = (spec.power_cap_w - steady) / per_cycle
        real = np.where(
            room >= at_floor,
            1000.0 * room ** (1 / spec.power_exponent),
            floor * room / max(at_floor, 1e-12),
        )
        real = np.minimum(mhz, np.maximum(real, spec.min_mhz))
        time_s = np.where(capped, times(real)[0], time_s)
        power_w = np.where(capped, spec.power_cap_w, power_w)
    empty = (prompt == 0) & (batch == 0)
    if empty.any():
        idle = spec.idle_w + spec.idle_clock_w * (mhz / 1000.0) ** IDLE_EXPONENT
        time_s, power_w = np.where(empty, 0.0, time_s), np.where(empty, idle, power_w)
    return time_s, power_w * gpu.gpus


def simulated_gpu(gpu: str, model: str) -> SimulatedGpu:
    """The instance of preset `gpu` serving model shape `model`."""
    return SimulatedGpu(gpu_spec(gpu), served_shape(model))
