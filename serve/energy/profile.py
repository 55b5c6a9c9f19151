"""Profiles: measured iterations from which EcoPred is trained, and where they were measured.

A profile is refused where its fingerprint (GPU, the model's sizes and heads, form of the weights,
GPUs an instance, engine) differs from what it is asked to predict: latencies do not carry over
between them.
"""

import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from jaxsys import __version__
from jaxsys.errors import UsageError
from jaxsys.fields import Fields
from jaxsys.files import read_json
from jaxsys.model import DecoderConfig
from jaxsys.serve.energy.dispatch_times import KINDS, DispatchTimes
from jaxsys.serve.energy.gpu_model import Load, SimulatedGpu

FORM = "jaxsys-profile-2"
EARLIER_FORM = "jaxsys-profile-1"
"""Its prompts' later pieces were timed with the pieces before them, so they are not read."""
MEASURED = ["clock_mhz", "time_s", "power_w"]
"""The last columns of a file."""
PROFILED = [
    "prefill_tokens",
    "prefill_requests",
    "cached_tokens",
    "batch",
    "kv_tokens",
    "bucket",
]
"""The others: of a `Load`, but for tokens that are guessed, which sweeps do not."""
MOST_SAMPLES = 200_000
"""Of a file; a sweep takes some 10,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Where a profile comes from."""

    gpu: str
    model: str
    """Its sizes, heads among them."""
    engine: str
    """What ran the iterations, e.g. "simulated" or "jaxsys 0.1.0, jax 0.10.2"."""
    weights: str = "not recorded"
    """Form of the matrices: a dtype or a quantisation."""
    tensor_parallel: int = 0
    """GPUs an instance; 0 where an earlier release did not record it."""

    def check(self, other: "Fingerprint", where: str = "profile") -> None:
        """Refuses a profile of other origin, naming what differs."""
        mine, theirs = asdict(self), asdict(other)
        different = [
            f"{k}={theirs[k]!r} instead of {mine[k]!r}" for k in mine if mine[k] != theirs[k]
        ]
        if different:
            raise UsageError(
                f"{where} was taken with {', '.join(different)}; take one here with "
                f"`jaxsys profile serving`"
            )


def fingerprint_here(
    gpu: str, model: DecoderConfig, weights: str, tensor_parallel: int = 1
) -> Fingerprint:
    """The fingerprint of what this installation measures.

    Args:
        gpu: what JAX calls the device's kind.
        weights: form of the matrices: a dtype or a quantisation.
    """
    jax_version = importlib.metadata.version("jax")
    return Fingerprint(
        gpu=gpu,
        model=_sizes(model),
        engine=f"jaxsys {__version__}, jax {jax_version}, {platform.machine()}",
        weights=weights,
        tensor_parallel=tensor_parallel,
    )


def _sizes(model: DecoderConfig) -> str:
    """What of a model the cost of an iteration depends on, in words."""
    words = [
        f"{model.num_layers} layers of {model.hidden_size}",
        f"{model.num_heads} heads and {model.num_kv_heads} of keys and values of {model.head_dim}",
        f"feed-forward {model.intermediate_size}",
        f"vocabulary {model.vocab_size}",
    ]
    experts, latent = model.experts, model.latent
    if not model.gated:
        words.append("two matrices of feed-forward")
    if experts is not None:
        shared = f" and one of {experts.shared_size} for all" if experts.shared_size else ""
        some = sum(len(model.layers_of(kind)) for kind in model.kinds if kind.experts)
        where = "" if some == model.num_layers else f" in {some} layers"
        words.append(
            f"{experts.active} of {experts.count} experts of {experts.intermediate_size}{shared}"
            f"{where}"
        )
    if latent is not None:
        words.append(
            f"latent vectors of {latent.rank} and {latent.rotary_dim}, queries of "
            f"{latent.query_rank}, heads of {latent.plain_dim} and {latent.value_dim}"
        )
    windows = {kind.window: len(model.layers_of(kind)) for kind in model.kinds if kind.window}
    words += [f"windows of {window} in {layers}" for window, layers in sorted(windows.items())]
    return ", ".join(words)


def simulated_fingerprint(gpu: SimulatedGpu) -> Fingerprint:
    """The fingerprint of a sweep of this simulated GPU."""
    shape = gpu.shape
    return Fingerprint(
        gpu=gpu.spec.name,
        model=f"{shape.layers} layers of {shape.hidden}, {shape.kv_bytes(1):.0f} bytes of "
        f"keys and values a token, {shape.parameters:.2g} parameters",
        engine="simulated",
        weights=f"{shape.weight_bytes_per_parameter:g} bytes a parameter",
        tensor_parallel=shape.tensor_parallel,
    )


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured iteration."""

    load: Load
    clock_mhz: int
    time_s: float
    power_w: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Samples of one origin."""

    fingerprint: Fingerprint
    samples: Sequence[Sample]
    buckets: tuple[int, ...] = ()
    """Batch sizes that decode steps were compiled for; empty where batches are not padded."""
    notes: Sequence[str] = field(default_factory=tuple)
    dispatch: DispatchTimes | None = None
    """What the host took for each; None where it was not noted."""

    @property
    def clocks_mhz(self) -> tuple[int, ...]:
        """The clocks profiled, ascending."""
        return tuple(sorted({sample.clock_mhz for sample in self.samples}))

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        names = list(PROFILED)
        record = {
            "form": FORM,
            "fingerprint": asdict(self.fingerprint),
            "buckets": list(self.buckets),
            "notes": list(self.notes),
            "columns": [*names, *MEASURED],
            "samples": [
                [*(getattr(s.load, n) for n in names), s.clock_mhz, s.time_s, s.power_w]
                for s in self.samples
            ],
            "dispatch_s": None if self.dispatch is None else asdict(self.dispatch),
        }
        Path(path).write_text(json.dumps(record))


def load_profile(path: str | Path) -> Profile:
    """Reads what `Profile.save` wrote.

    Raises:
        UsageError: if the file is missing, of another form or damaged.
    """
    if not Path(path).exists():
        raise UsageError(f"profile {path} does not exist; take one with `jaxsys profile serving`")
    value = read_json(path, what="profile", most_containers=MOST_SAMPLES)
    form = value.get("form") if isinstance(value, Mapping) else None
    if form not in (FORM, EARLIER_FORM):
        raise UsageError(f"profile {path} is not of form {FORM}; take a new one")
    file = Fields(value, name=f"profile {path} is damaged", hint="take a new one")
    columns = file.array("columns", of=str)
    if columns[-3:] != MEASURED or not set(columns[:-3]) <= set(PROFILED):
        raise file.wrong("columns", f"loads and {', '.join(MEASURED)}", columns)
    samples = [_sample(file, index, columns) for index in range(len(file.array("samples")))]
    notes = tuple(file.array("notes", of=str))
    if form == EARLIER_FORM:
        kept = [sample for sample in samples if not sample.load.cached_tokens]
        notes += (f"{len(samples) - len(kept)} pieces timed with those before them left out",)
        samples = kept
    return Profile(
        fingerprint=file.fields("fingerprint").record(Fingerprint),
        samples=samples,
        buckets=tuple(file.array("buckets", of=int)),
        notes=notes,
        dispatch=_dispatch(file.fields("dispatch_s")) if "dispatch_s" in file else None,
    )


def _dispatch(times: Fields) -> DispatchTimes:
    """Dispatch times of a file."""
    points = {kind: tuple(times.array(kind, of=float)) for kind in KINDS}
    for kind, seconds in points.items():
        if not seconds or seconds[0] < 0 or list(seconds) != sorted(seconds):
            raise times.wrong(kind, "seconds of 0 or more, ascending", list(seconds[:3]))
    return DispatchTimes(**points)


def _sample(file: Fields, index: int, columns: list[str]) -> Sample:
    """One row of a file."""
    row, at = file.value["samples"][index], f"samples[{index}]"
    if not isinstance(row, list) or len(row) != len(columns):
        raise file.wrong(at, f"an array of {len(columns)} figures", row)
    cells = Fields(dict(zip(columns, row, strict=True)), name=file.name, at=at, hint=file.hint)
    load = Load(**{name: cells.integer(name) for name in columns[:-3]})
    return Sample(
        load,
        cells.integer("clock_mhz"),
        cells.number("time_s", least=0),
        cells.number("power_w", least=0) if "power_w" in cells else None,
    )


def spread_over_clocks(profile: Profile, gpu: SimulatedGpu, clocks_mhz: Sequence[int]) -> Profile:
    """A profile of one clock, carried over to others by the ratios of the modelled GPU.

    Without leave to set clocks only one can be measured; how cost follows the clock is then the
    model's word, and what one iteration costs at that clock the measurement's.
    """
    if len(profile.clocks_mhz) != 1:
        return profile
    samples = []
    for sample in profile.samples:
        known = gpu.run(sample.load, sample.clock_mhz or gpu.spec.max_mhz)
        for mhz in clocks_mhz:
            other = gpu.run(sample.load, mhz)
            time_s = sample.time_s * other.time_s / known.time_s
            power_w = None
            if sample.power_w is not None:
                power_w = sample.power_w * other.power_w / known.power_w
            samples.append(Sample(sample.load, mhz, time_s, power_w))
    note = "measured at one clock; other clocks by the modelled GPU's ratios"
    return replace(profile, samples=samples, notes=(*profile.notes, note))


def sweep_plan(
    *,
    kv_capacity_tokens: int,
    max_batch: int = 512,
    max_prefill_tokens: int = 8192,
    buckets: Sequence[int] = (),
) -> list[Load]:
    """The loads a profile visits: decode batches around every tile edge, prompts of all sizes."""
    batches = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, *range(160, max_batch + 1, 32)}
    edges = set(buckets) or {128, 256, 384, 512, 640, 768, 896, 1024}
    batches |= {edge + 1 for edge in edges} | edges
    loads = []
    for batch in sorted(b for b in batches if b <= max_batch):
        bucket = next((size for size in sorted(buckets) if size >= batch), 0)
        for context in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
            if batch * context <= kv_capacity_tokens:
                loads.append(Load(batch=batch, kv_tokens=batch * context, bucket=bucket))
    tokens = [
        16,
        32,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
        768,
        1024,
        1536,
        2048,
        3072,
        4096,
        6144,
        8192,
    ]
    for count in (t for t in tokens if t <= max_prefill_tokens):
        for requests in (1, 2, 4, 8, 16, 32, 64, 128):
            if requests <= count // 8 or requests == 1:
                for cached in (0, 512, 2048, 8192, 32768, 98304):
                    loads.append(
                        Load(prefill_tokens=count, prefill_requests=requests, cached_tokens=cached)
                    )
    return loads


def sweep(
    run: Callable[[Load, int], tuple[float, float | None]],
    loads: Sequence[Load],
    clocks_mhz: Sequence[int],
) -> list[Sample]:
    """Runs every load at every clock; `run` returns seconds and watts (None where unread)."""
    samples = []
    for mhz in clocks_mhz:  # clocks outermost: changing one costs more than changing the load
        for load in loads:
            time_s, power_w = run(load, mhz)
            samples.append(Sample(load, mhz, time_s, power_w))
    return samples


def simulated_profile(
    gpu: SimulatedGpu,
    *,
    clocks_mhz: Sequence[int] | None = None,
    max_batch: int = 1024,
    max_prefill_tokens: int = 8192,
    noise: float = 0.0,
    seed: int = 0,
) -> Profile:
    """The profile that a sweep of the simulated GPU gives, with relative `noise` if asked."""
    generator = np.random.default_rng(seed)

    def run(load: Load, mhz: int) -> tuple[float, float]:
        outcome = gpu.run(load, mhz)
        return outcome.time_s * float(np.exp(noise * generator.standard_normal())), outcome.power_w

    loads = sweep_plan(
        kv_capacity_tokens=gpu.kv_capacity_tokens,
        max_batch=max_batch,
        max_prefill_tokens=max_prefill_tokens,
    )
    return Profile(
        fingerprint=simulated_fingerprint(gpu),
        samples=sweep(run, loads, clocks_mhz or gpu.spec.control_mhz),
        notes=("simulated",),
    )
