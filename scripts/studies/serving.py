"""Measures the engine's loop on one device: the same scheduler and executor that serve, no HTTP.

Decode: a batch of requests with full contexts runs through scheduler and executor as an instance's
loop does, one iteration ahead. Latency between tokens is compared with the floor

    (weights a step reads + keys and values it attends to) / rate of a kernel that only reads

of experts those that a batch uses, expected where all are as likely,

and the host's own work is timed apart. Prefill is compared with the measured rate of a large matrix
product. Energy is the device's own counter over the run, where there is one.
"""

import collections
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.errors import RunError
from jaxsys.mesh import Device
from jaxsys.model import (
    DecoderConfig,
    default_model_path,
    load,
    preset,
)
from jaxsys.model.contract import cache_numbers, experts_used
from jaxsys.nvml_gpu import NvmlGpu
from jaxsys.serve.cache_groups import cache_groups
from jaxsys.serve.deployment import adapter_buckets
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.grammars import Grammars
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.lora import AdapterSlots
from jaxsys.serve.paged_model import number_bytes
from jaxsys.serve.processes.gpus import gpu_of
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.sampling import SamplingNeeds
from jaxsys.serve.scheduler import Scheduler
from jaxsys.serve.speculation import Speculation
from jaxsys.serve.steps import ExecutorConfig
from jaxsys.serve.weights import ServingWeights, serving_weights
from studies.random_weights import random_parameters


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What to measure."""

    model: str
    """A preset with random weights, or "default" for the packaged model."""
    packed: bool = False
    """Whether experts are MXFP4."""
    dtype: str
    page_size: int
    pool_tokens: int
    """Tokens the page pool holds."""
    buckets: tuple[int, ...]
    batches: tuple[int, ...]
    """Batches to measure, in buckets or between them."""
    context: int
    """Tokens of each request, where the pool holds them; fewer for the largest batches."""
    prompts: tuple[int, ...]
    piece: int
    """Most prompt tokens an iteration computes, where a prompt is longer."""
    forms: tuple[str, ...] = ()
    """Also measured: "int8", "fp8", "int4", or the like of "fp8+fp8": weights and cache; the dtype
    itself. "@1" behind it: at batch 1 alone."""
    quantised_batches: tuple[int, ...] = ()
    quantised_prompts: tuple[int, ...] = ()
    seconds: float = 1.5
    """Least time of one measurement."""


def _experts_study(model: str, *, packed: bool = False) -> Study:
    return Study(
        model=model,
        packed=packed,
        dtype="bfloat16",
        page_size=64,
        pool_tokens=100_032,
        buckets=(1, 8, 64),
        batches=(1, 8, 64),
        context=1024,
        prompts=(2048,),
        piece=2048,
    )


STUDIES = {
    "gpu": Study(
        model="llama-3-8b",
        dtype="bfloat16",
        page_size=64,
        pool_tokens=300_032,
        buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        batches=(1, 2, 4, 8, 16, 32, 48, 64, 65, 96, 128, 129, 192, 256, 257, 384, 512),
        context=1024,
        prompts=(512, 2048, 8192),
        piece=8192,
        forms=("int8", "fp8"),
        quantised_batches=(1, 64),
    ),
    "gpu_quantised": Study(
        model="llama-3-8b",
        dtype="bfloat16",
        page_size=64,
        pool_tokens=150_016,
        buckets=(1, 64, 128),
        batches=(),
        context=1024,
        prompts=(),
        piece=2048,
        forms=("fp8+fp8", "bfloat16", "fp8", "int8@1", "int4@1"),
        quantised_batches=(1, 64, 128),
        quantised_prompts=(2048,),
        seconds=1.0,
    ),
    "cpu": Study(
        model="default",
        dtype="float32",
        page_size=16,
        pool_tokens=8192,
        buckets=(1, 4, 16),
        batches=(1, 4, 16),
        context=256,
        prompts=(64, 256),
        piece=256,
        seconds=4.0,
    ),
    "qwen3_30b_a3b": _experts_study("Qwen3-30B-A3B"),
    "gpt_oss_20b": _experts_study("gpt-oss-20b", packed=True),
    "tiny_experts": dataclasses.replace(
        _experts_study("bench-tiny-gpt-oss", packed=True),
        dtype="float32",
        page_size=8,
        pool_tokens=2048,
        batches=(1, 8),
        buckets=(1, 8),
        context=64,
        prompts=(32,),
        piece=32,
        seconds=0.2,
    ),
    "tiny": Study(
        model="tiny",
        dtype="float32",
        page_size=8,
        pool_tokens=2048,
        buckets=(1, 4),
        batches=(1, 3, 4),
        context=64,
        prompts=(16, 64),
        piece=32,
        forms=("fp8+fp8", "float32@1", "int4@1"),
        quantised_batches=(1,),
        quantised_prompts=(16,),
        seconds=0.2,
    ),
}

Row = dict[str, Any]


def run(
    study: Study,
    *,
    progress: Callable[[str], None] = print,
    kept: Callable[[list["Row"], dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], list[Row], dict[str, Any]]:
    """Measures a study.

    Args:
        progress: told of each row, as a line.
        kept: given all rows so far and the figures, after each row.

    Returns:
        its configuration, one row a measurement, and the machine's figures they are compared with.
    """
    device = jax.devices()[0]
    figures: dict[str, Any] = {"device": device.device_kind}
    figures["read_bytes_per_s"] = read_rate(device)
    figures["copy_bytes_per_s"] = copy_rate(device)
    figures["matmul_flops_per_s"] = matmul_rate(device, jnp.dtype(study.dtype))
    reads, copies = figures["read_bytes_per_s"], figures["copy_bytes_per_s"]
    memory = ""
    if reads is not None and copies is not None:
        memory = f"reads {reads / 1e9:.0f}, copies {copies / 1e9:.0f} GB/s, "
    progress(
        f"{device.device_kind}: {memory}"
        f"multiplies {figures['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s"
    )
    rows: list[Row] = []

    def note(row: Row) -> None:
        rows.append(row)
        progress(_line(row))
        if kept is not None:
            kept(rows, figures)

    if study.batches or study.prompts:
        _measure_whole(study, figures, note, progress)
    for form in study.forms:
        gc.collect()
        _measure_form(study, form, figures, note, progress)
    return dataclasses.asdict(study), rows, figures


def _measure_whole(
    study: Study,
    figures: dict[str, Any],
    note: Callable[[Row], None],
    progress: Callable[[str], None],
) -> None:
    """Weights and cache in the study's dtype."""
    reads = figures["read_bytes_per_s"]
    started_s = time.perf_counter()
    config, parameters = model_of(study.model, study.dtype, packed=study.packed)
    executor = build_executor(study, config, parameters, None)
    jax.block_until_ready(executor.weights)
    figures["weights_s"] = _round(time.perf_counter() - started_s)
    progress(f"weights made in {figures['weights_s']} s")
    del parameters  # the fused weights are a copy
    figures["attention"] = executor.kernels.reason
    figures["compile_s"] = compile_steps(study, executor, study.batches, study.prompts)
    progress(f"compiled in {figures['compile_s']:.1f} s; attention: {figures['attention']}")
    for batch in study.batches:
        note(measure_decode(study, executor, batch, reads))
    for prompt in study.prompts:
        pieces = {min(prompt, study.piece), min(prompt, max(study.piece // 4, 1))}
        for piece in sorted(pieces, reverse=True):
            rate = figures["matmul_flops_per_s"]
            note(measure_prefill(study, executor, prompt, piece, rate))


def _measure_form(
    study: Study,
    form: str,
    figures: dict[str, Any],
    note: Callable[[Row], None],
    progress: Callable[[str], None],
) -> None:
    """Weights, and perhaps the cache, in a form."""
    form, _, only = form.partition("@")
    batches = (int(only),) if only else study.quantised_batches
    prompts = () if only else study.quantised_prompts
    small = dataclasses.replace(
        study, pool_tokens=max(batches) * 2 * study.context, prompts=prompts or (study.context,)
    )
    config, parameters = model_of(study.model, study.dtype)
    executor = build_executor(small, config, parameters, form)
    del parameters
    progress(f"{form}: compiled in {compile_steps(small, executor, batches, prompts):.1f} s")
    for batch in batches:
        row = measure_decode(small, executor, batch, figures["read_bytes_per_s"])
        note(row | {"weights": form})
    for prompt in prompts:
        rate = figures["matmul_flops_per_s"]
        row = measure_prefill(small, executor, prompt, min(prompt, study.piece), rate)
        note(row | {"weights": form})


def measure_decode(
    study: Study,
    executor: JaxExecutor,
    batch: int,
    read_bytes_per_s: float | None,
    grammars: Sequence[str] = (),
    first: int = 1,
    traced: Callable[[Callable[[], Any]], None] | None = None,
    adapters: Sequence[str | None] = (),
) -> Row:
    """Inter-token latency, host time and energy of one batch.

    Args:
        adapters: of the requests in turn, by the names that they were put into slots with.
        grammars: that the first requests follow, one each; they must not end within the run.
        first: the token that every output has begun with; a model with experts draws its tokens
            instead, since requests that say the same use the same experts and read fewer than
            `expected_bytes` counts.
        traced: given the turn to run a few times under a profiler, after the measurement.
    """
    context = min(study.context, study.pool_tokens // batch - 2 * study.page_size)
    scheduler = scheduler_of(study, executor, role="decode")
    generator = np.random.default_rng(batch)
    vocabulary = executor.config.vocab_size
    # The run passes over the context asked for in its middle.
    before = max(1, context - 3 * study.page_size // 2)
    for index in range(batch):
        grammar = grammars[index] if index < len(grammars) else None
        request = Request(
            index,
            sampling=SamplingParameters(
                max_tokens=3 * study.page_size,
                temperature=0 if executor.config.experts is None else 1,
                seed=index,
                grammar=grammar,
            ),
            arrival_s=0.0,
            prompt_tokens=generator.integers(0, vocabulary, before).tolist(),
            adapter=adapters[index % len(adapters)] if adapters else None,
        )
        if executor.config.experts is not None:
            first = int(generator.integers(vocabulary))
        request.output_tokens, request.generated = [first], 1
        scheduler.add_incoming(request)
    for request in scheduler.reserve_incoming():
        scheduler.start_received(request)
        executor.resume(request)
    if len(scheduler.running) != batch:
        raise RuntimeError(f"only {len(scheduler.running)} of {batch} requests fit the pool")
    loop = _Loop(scheduler, executor)
    loop.run(8)  # warm-up
    meter = _EnergyMeter()
    most = 3 * study.page_size - 12
    started_s = time.perf_counter()
    loop.reset()
    for _ in range(most):
        loop.turn()
        if time.perf_counter() - started_s >= study.seconds and len(loop.latencies_s) >= 20:
            break
    elapsed_s = time.perf_counter() - started_s
    steps = len(loop.latencies_s)
    energy_j = meter.energy_j(elapsed_s)
    if traced is not None:
        traced(loop.turn)
    loop.finish()
    config = executor.config
    kv_tokens = statistics.mean(loop.kv_tokens)
    of_number = number_bytes(config, executor.weights.dtype, executor.cache_form)
    kept_bytes = batch * cache_numbers(config, round(kv_tokens / batch)) * of_number
    read_bytes = expected_bytes(config, executor.weights, batch) + kept_bytes
    floor_s = None if read_bytes_per_s is None else read_bytes / read_bytes_per_s
    itl_s = statistics.median(loop.latencies_s)
    return {
        "study": "decode",
        "weights": study.dtype,
        "batch": batch,
        "bucket": loop.bucket,
        "context": round(kv_tokens / batch),
        "itl_ms": _round(itl_s * 1e3),
        "itl_p99_ms": _round(float(np.quantile(loop.latencies_s, 0.99)) * 1e3),
        "itl_floor_ms": None if floor_s is None else _round(floor_s * 1e3),
        "itl_floor_ratio": None if floor_s is None else _round(itl_s / floor_s),
        "tokens_per_s": _round(batch / itl_s),
        "plan_ms": _round(statistics.median(loop.plan_s) * 1e3),
        "dispatch_ms": _round(statistics.median(loop.dispatch_s) * 1e3),
        "complete_ms": _round(statistics.median(loop.complete_s) * 1e3),
        "energy_j_per_token": None if energy_j is None else _round(energy_j / (steps * batch)),
        "power_w": None if energy_j is None else _round(energy_j / elapsed_s),
    }


def measure_prefill(
    study: Study, executor: JaxExecutor, prompt: int, piece: int, matmul_flops_per_s: float
) -> Row:
    """Prompt tokens a second, for prompts cut into pieces."""
    scheduler = scheduler_of(study, executor, max_prefill_tokens=piece)
    generator = np.random.default_rng(prompt)
    vocabulary = executor.config.vocab_size
    repeats = max(3, min(12, 32768 // prompt))
    for index in range(repeats + 1):
        scheduler.add(
            Request(
                index,
                sampling=SamplingParameters(max_tokens=1, temperature=0),
                arrival_s=0.0,
                prompt_tokens=generator.integers(0, vocabulary, prompt).tolist(),
            )
        )
    loop = _Loop(scheduler, executor)
    loop.run(-(-prompt // piece))  # warm-up: the first prompt
    started_s = time.perf_counter()
    loop.reset()
    while loop.turn():
        pass
    elapsed_s = (time.perf_counter() - started_s) / repeats
    config = executor.config
    per_token = 2 * sum(
        len(config.layers_of(kind)) * config.active_block_parameter_count(kind)
        for kind in config.kinds
    )
    # Scores and sums over the lower triangle: 4 N K operations a pair and layer.
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * prompt**2
    flops = per_token * prompt + attention + 2 * config.vocab_size * config.hidden_size
    return {
        "study": "prefill",
        "weights": study.dtype,
        "prompt": prompt,
        "piece": piece,
        "prefill_ms": _round(elapsed_s * 1e3),
        "tokens_per_s": _round(prompt / elapsed_s),
        "tflops": _round(flops / elapsed_s / 1e12),
        "matmul_rate_share": _round(flops / elapsed_s / matmul_flops_per_s),
    }


READ_BYTES = 4 << 30
"""Far more than a cache holds."""


def read_rate(device: Device) -> float | None:
    """Bytes a second that a kernel reads which writes next to nothing: what a floor divides by.

    A sum of large numbers; a step reads weights and pages likewise and writes little. On an H200
    it is 1.3 times what copies read and write together. None on CPU, whose caches hold the small
    models that are served there.
    """
    if device.platform == "cpu":
        return None
    x = jnp.ones((READ_BYTES // 2,), jnp.bfloat16)
    return READ_BYTES / _seconds(jax.jit(lambda x: x.sum(dtype=jnp.float32)), x)


def copy_rate(device: Device) -> float | None:
    """Bytes a second, read and written, of a large copy; None on CPU."""
    if device.platform == "cpu":
        return None
    x = jnp.ones((READ_BYTES // 4,), jnp.bfloat16)
    return 2 * x.nbytes / _seconds(jax.jit(lambda x: x + 1), x)


def matmul_rate(device: Device, dtype: jnp.dtype) -> float:
    """FLOP a second of a large matrix product."""
    size = 8192 if device.platform != "cpu" else 1024
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32).astype(dtype)
    return 2 * size**3 / _seconds(jax.jit(jnp.dot), left, right)


class _Loop:
    """An instance's loop, one iteration ahead, with its parts timed."""

    def __init__(self, scheduler: Scheduler, executor: JaxExecutor):
        self.scheduler = scheduler
        self.executor = executor
        self.bucket = 0
        self._in_flight: collections.deque = collections.deque()
        self.reset()

    def reset(self) -> None:
        self.latencies_s: list[float] = []
        self.plan_s: list[float] = []
        self.dispatch_s: list[float] = []
        self.complete_s: list[float] = []
        self.kv_tokens: list[int] = []
        self._ended_s = time.perf_counter()

    def turn(self) -> bool:
        """Plans and dispatches one iteration, completes the one before; False when idle."""
        clock = time.perf_counter
        start_s = clock()
        iteration = self.scheduler.next_iteration(start_s)
        planned_s = clock()
        if iteration is not None:
            handle = self.executor.dispatch(iteration)
            self.plan_s.append(planned_s - start_s)
            self.dispatch_s.append(clock() - planned_s)
            self.kv_tokens.append(iteration.kv_tokens)
            self.bucket = iteration.bucket or self.bucket
            self._in_flight.append((iteration, handle))
        if self._in_flight and (iteration is None or len(self._in_flight) == 2):
            done, handle = self._in_flight.popleft()
            outcome = self.executor.collect(handle)
            now_s = clock()
            self.latencies_s.append(now_s - self._ended_s)
            self._ended_s = now_s
            self.scheduler.complete(done, now_s, outcome.tokens, outcome.ended, outcome.more)
            for fault in self.executor.release():
                raise fault
            self.complete_s.append(clock() - now_s)
        return iteration is not None or bool(self._in_flight)

    def run(self, turns: int) -> None:
        for _ in range(turns):
            self.turn()

    def finish(self) -> None:
        """Takes in what is in flight."""
        while self._in_flight:
            done, handle = self._in_flight.popleft()
            self.scheduler.complete(done, 0.0, self.executor.collect(handle).tokens)


class _EnergyMeter:
    """The energy counter of the GPU that JAX computes on, which need not be the machine's first.

    It steps about every 0.1 s, so runs must be longer.
    """

    def __init__(self) -> None:
        device = jax.devices()[0]
        self._gpu: NvmlGpu | None = None
        if device.platform != "cpu":
            try:
                self._gpu = NvmlGpu(gpu_of(device))
            except RunError:  # no driver's library to ask
                pass
        self._start_j = self._read_j()

    def energy_j(self, elapsed_s: float) -> float | None:
        """Joules since the start; None without a counter, or for a run too short for it."""
        now_j = self._read_j()
        if self._gpu is not None:
            self._gpu.close()
        if now_j is None or self._start_j is None or elapsed_s < 0.5:
            return None
        return now_j - self._start_j

    def _read_j(self) -> float | None:
        return None if self._gpu is None else self._gpu.energy_j()


def expected_bytes(config: DecoderConfig, weights: ServingWeights, tokens: int) -> float:
    """Bytes of weights that a step of so many tokens must read: of experts, those they use."""
    held = [layer.experts for layer in weights.layers if layer.experts is not None]
    experts = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    if config.experts is None or not experts:
        return weights.step_bytes
    share = experts_used(config, tokens) / config.experts.count
    return weights.step_bytes - experts * (1.0 - share)


def model_of(name: str, dtype_name: str, *, packed: bool = False) -> tuple[DecoderConfig, Any]:
    """The packaged model if `name` is "default", else a preset with random weights."""
    dtype = jnp.dtype(dtype_name)
    if name == "default":
        model = load(default_model_path(), dtype)
        return model.config, model.parameters
    config = preset(name)
    return config, random_parameters(config, dtype, packed=packed)


def scheduler_of(
    study: Study, executor: JaxExecutor, speculation: Speculation | None = None, **changes: Any
) -> Scheduler:
    """Over the executor's pages."""
    values: dict[str, Any] = {
        "page_count": executor.page_count,
        "page_size": study.page_size,
        "max_batch": study.buckets[-1],
        "max_prefill_tokens": study.piece,
        "max_length": executor.shapes.table_buckets[-1] * study.page_size,
        "decode_buckets": study.buckets,
        "prefix_caching": False,
        "windows": cache_groups(executor.config).windows,
    }
    return Scheduler(SchedulerConfig(**(values | changes)), speculation)


def build_executor(
    study: Study,
    config: DecoderConfig,
    parameters: Any,
    form: str | None,
    grammars: Grammars | None = None,
    loras: tuple[int, int] | None = None,
    guesses: int = 0,
) -> JaxExecutor:
    """An executor of a study's sizes, nothing compiled yet.

    Args:
        loras: how many adapters it has room for, of which rank.
        guesses: most tokens guessed of a request in a step.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kept, _, cached = (form or "").partition("+")
    kept = "" if kept == study.dtype else kept
    quantisation, cache_form = cast(Any, (kept or None, cached or None))
    weights = serving_weights(config, parameters, quantisation=quantisation, placement=place)
    size = study.page_size
    longest = max((*study.prompts, study.context)) + 4 * size
    pieces = {min(p, piece) for p in study.prompts for piece in (study.piece, study.piece // 4)}
    windows = cache_groups(config).windows
    scheduler = SchedulerConfig(
        page_count=study.pool_tokens // size * len(windows),
        windows=windows,
        page_size=size,
        max_batch=study.buckets[-1],
        max_prefill_tokens=study.piece,
        max_length=longest,
        decode_buckets=study.buckets,
        prefix_caching=False,
    )
    shapes = ExecutorConfig(
        decode_buckets=study.buckets,
        piece_buckets=tuple(sorted(pieces)),
        table_buckets=tuple(sorted({2 * study.context // size, -(-longest // size)})),
        transfer_buckets=(1,),
        distinguish_first=jax.default_backend() != "cpu",
        adapter_buckets=() if loras is None else adapter_buckets(loras[0], few=False),
        guesses=guesses,
    )
    slots = None
    if loras is not None:
        count, rank = loras
        slots = AdapterSlots(config, weights.dtype, count=count, rank=rank, placement=place)
    return JaxExecutor(
        config,
        weights,
        scheduler,
        placement=place,
        shapes=shapes,
        cache_form=cache_form,
        grammars=grammars,
        adapters=slots,
    )


def compile_steps(
    study: Study, executor: JaxExecutor, batches: Sequence[int], prompts: Sequence[int]
) -> float:
    """Compiles what the measurements use, several steps at once; returns the seconds it took."""
    started_s = time.perf_counter()
    shapes = executor.shapes
    keys: list[tuple] = [("set_last",), ("sample", 1, SamplingNeeds())]
    for bucket in study.buckets:
        if any(bucket >= batch > bucket // 2 for batch in batches):
            for kind in ("decode", "inputs"):
                keys.append((kind, bucket, shapes.table_buckets[0]))
            keys.append(("sample", bucket, SamplingNeeds()))
    for prompt in prompts:
        table = next(t for t in shapes.table_buckets if t * study.page_size >= prompt)
        for piece in {min(prompt, study.piece), min(prompt, study.piece // 4)}:
            keys.append(("prefill", piece, table, False))
            if piece < prompt and shapes.distinguish_first:
                keys += [
                    ("prefill", piece, t, c) for t in shapes.table_buckets for c in (False, True)
                ]
    workers = 4 if jax.default_backend() != "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(executor.steps.compile, dict.fromkeys(keys)))
    return time.perf_counter() - started_s


def _seconds(function: Callable, *arguments: Any) -> float:
    """Median over five rounds of the seconds a call of ten in a row takes."""
    jax.block_until_ready(function(*arguments))
    samples = []
    for _ in range(5):
        start_s = time.perf_counter()
        result = None
        for _ in range(10):
            result = function(*arguments)
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - start_s) / 10)
    return statistics.median(samples)


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _line(row: Row) -> str:
    return "  ".join(f"{name}={value}" for name, value in row.items())
