"""`jaxsys profile serving`: measures iterations for EcoPred, on this machine or on a simulated GPU.

Live, the real executor computes the sweep's prompts and decode steps one by one. Clocks are swept
only with `--control-clocks` and the driver's leave; else the profile holds the default clock alone,
and says so.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxsys.clocks import GpuClocks
from jaxsys.errors import RunError, UsageError
from jaxsys.serve.energy.gpu_model import GPUS, SHAPES, Load, simulated_gpu
from jaxsys.serve.energy.profile import (
    Profile,
    Sample,
    fingerprint_here,
    simulated_profile,
    sweep_plan,
)

if TYPE_CHECKING:
    from jaxsys.model import LoadedModel


def main(argv: Sequence[str], prog: str) -> int:
    """`jaxsys profile serving`."""
    arguments = parser(prog).parse_args(argv)
    if arguments.simulated is not None:
        profile = simulated_profile(
            simulated_gpu(arguments.simulated, arguments.shape), noise=arguments.noise
        )
    else:
        from jaxsys.model import default_model_path, load

        profile = measure(
            load(default_model_path() if arguments.model is None else arguments.model),
            max_batch=arguments.max_batch,
            max_length=arguments.max_length,
            repeats=arguments.repeats,
            control=arguments.control_clocks,
        )
    profile.save(arguments.out)
    clocks = ", ".join(str(mhz) for mhz in profile.clocks_mhz)
    print(f"wrote {arguments.out}: {len(profile.samples)} samples at {clocks} MHz")
    for note in profile.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of `jaxsys profile serving`."""
    result = argparse.ArgumentParser(
        prog=prog, description="Measure iteration latency and power for `jaxsys serve --profile`."
    )
    add = result.add_argument
    add(
        "--out", type=Path, default=Path("profile.json"), help="file to write (default %(default)s)"
    )
    add("--model", type=Path, help="folder or .gguf file (default: SmolLM2-135M-Instruct)")
    add("--max-batch", type=int, default=16, help="largest batch (default %(default)s)")
    add("--max-length", type=int, default=1024, help="tokens of a request (default %(default)s)")
    add("--repeats", type=int, default=3, help="timings a load, of which the median (default 3)")
    add("--control-clocks", action="store_true", help="sweep the GPU's clocks (changes them!)")
    add("--simulated", choices=list(GPUS), help="sweep this simulated GPU instead")
    add(
        "--shape",
        choices=list(SHAPES),
        default="llama-3-8b",
        help="model of --simulated (default %(default)s)",
    )
    add("--noise", type=float, default=0.0, help="relative noise of --simulated (default 0)")
    return result


def measure(
    model: "LoadedModel",
    *,
    max_batch: int = 16,
    max_length: int = 1024,
    repeats: int = 3,
    control: bool = False,
) -> Profile:
    """Runs the sweep on the real executor of one instance.

    Raises:
        UsageError: if the sizes make no sweep.
    """
    import jax

    from jaxsys.serve.deployment import DeploymentConfig, build_engine, compile_ahead
    from jaxsys.serve.instance import Instance

    if repeats < 1:
        raise UsageError(f"repeats={repeats} must be at least 1")
    config = DeploymentConfig(
        prefill=1, decode=0, max_batch=max_batch, max_length=max_length, prefix_caching=False
    )
    engine = build_engine(model, config)
    compile_ahead(engine.instances)
    instance = engine.instances[0]
    assert isinstance(instance, Instance)
    device = jax.devices()[0]
    clocks, notes = _clocks(device, control)
    runner = _Runner(instance, model.config.vocab_size, repeats)
    buckets = instance.scheduler.config.decode_buckets
    settings = [None]
    if clocks is not None and clocks.can_set:
        settings = [mhz for mhz in clocks.available_mhz[:: max(1, len(clocks.available_mhz) // 6)]]
    samples = []
    try:
        for mhz in settings:
            if mhz is not None and clocks is not None:
                clocks.set_clock(mhz)
            for plan in _fitting(instance.scheduler.config, buckets):
                time_s = runner.time_of(plan)
                now_mhz = None if clocks is None else clocks.actual_mhz()
                power_w = None if clocks is None else clocks.power_w()
                samples.append(Sample(plan, mhz or now_mhz or 0, time_s, power_w))
    finally:
        if clocks is not None:
            clocks.close()
    if settings == [None]:  # the reading flutters; the clock was one and the same
        common = statistics.mode(sample.clock_mhz for sample in samples)
        samples = [Sample(s.load, common, s.time_s, s.power_w) for s in samples]
        notes.append("clocks were not swept: all samples are at the default clock")
    return Profile(
        fingerprint=fingerprint_here(
            device.device_kind, model.config.num_layers, model.config.hidden_size
        ),
        samples=samples,
        buckets=tuple(buckets),
        notes=tuple(notes),
    )


def _clocks(device, control: bool) -> tuple[GpuClocks | None, list[str]]:  # type: ignore[no-untyped-def]
    if device.platform == "cpu":
        return None, ["no GPU here: no clock and no power"]
    from jaxsys.nvml import open_clocks

    try:
        return open_clocks(device.local_hardware_id, control=control), []
    except (RunError, UsageError) as error:
        return None, [f"no clock and no power: {error}"]


def _fitting(config, buckets: Sequence[int]) -> list[Load]:  # type: ignore[no-untyped-def]
    """The sweep's loads that this instance can run in one iteration."""
    room = config.page_count * config.page_size
    plans = sweep_plan(
        kv_capacity_tokens=room,
        max_batch=config.max_batch,
        max_prefill_tokens=config.max_prefill_tokens,
        buckets=buckets,
    )
    kept = []
    for plan in plans:
        if plan.prefill_tokens:
            each = plan.prefill_tokens // plan.prefill_requests
            fits = each < config.max_length and plan.prefill_requests <= config.max_batch
            # Cached tokens would need a prefix; their share is small and learnt online.
            fits = fits and not plan.cached_tokens
        else:
            fits = plan.kv_tokens // plan.batch < config.max_length - 8
            # Room for the page each sequence grows into.
            fits = fits and plan.kv_tokens + plan.batch * config.page_size * 2 <= room
        if fits:
            kept.append(plan)
    return kept


class _Runner:
    """Times single iterations of one instance, outside its loop."""

    def __init__(self, instance, vocabulary: int, repeats: int) -> None:  # type: ignore[no-untyped-def]
        self.scheduler = instance.scheduler
        self.executor = instance.executor
        self.clock = instance.clock
        self.vocabulary = vocabulary
        self.repeats = repeats
        self._count = 0

    def time_of(self, load: Load) -> float:
        """Median seconds of an iteration of this load."""
        prefill = load.prefill_tokens > 0
        count = load.prefill_requests if prefill else load.batch
        each = load.prefill_tokens // count if prefill else max(1, load.kv_tokens // count)
        times: list[float] = []
        if prefill:
            for _ in range(self.repeats + 1):
                requests = self._add(count, each)
                times.append(self._step())
                self._end(requests)
        else:
            requests = self._add(count, each)
            while self.scheduler.waiting or self.scheduler.prefilling:
                self._step()
            times = [self._step() for _ in range(self.repeats + 1)]
            self._end(requests)
        return statistics.median(times[1:])  # the first may still load or compile something

    def _add(self, count: int, length: int) -> list:
        from jaxsys.serve.requests import Request, SamplingParameters

        requests = []
        for _ in range(count):
            self._count += 1
            request = Request(
                self._count,
                sampling=SamplingParameters(max_tokens=self.repeats + 4, temperature=0.0),
                arrival_s=0.0,
                prompt_tokens=[(7 * k + self._count) % self.vocabulary for k in range(length)],
            )
            self.scheduler.add(request)
            requests.append(request)
        return requests

    def _end(self, requests: list) -> None:
        for request in requests:
            self.scheduler.abort(request, self.clock.now_s())

    def _step(self) -> float:
        iteration = self.scheduler.next_iteration(self.clock.now_s())
        if iteration is None:
            raise RunError("the sweep found nothing to compute; lower --max-batch or --max-length")
        began_s = self.clock.now_s()
        outcome = self.executor.collect(self.executor.dispatch(iteration))
        now_s = self.clock.now_s()
        self.scheduler.complete(iteration, now_s, outcome.tokens)
        return now_s - began_s
