"""`jaxsys profile serving`: measures iterations for EcoPred, on this machine or on a simulated GPU.

Live, the real executor computes the sweep's prompts and decode steps one by one. Clocks are swept
only with `--control-clocks` and the driver's leave; else the profile holds the default clock alone,
and says so.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxsys.clocks import GpuClocks
from jaxsys.errors import RunError, UsageError
from jaxsys.files import check_writable
from jaxsys.options import Parser, whole
from jaxsys.serve.energy.energy_log import EnergyLog
from jaxsys.serve.energy.gpu_model import GPUS, SHAPES, Load, simulated_gpu
from jaxsys.serve.energy.profile import (
    Profile,
    fingerprint_here,
    simulated_profile,
    sweep_plan,
)

if TYPE_CHECKING:
    from jaxsys.mesh import Device
    from jaxsys.model import LoadedModel
    from jaxsys.serve.iterations import SchedulerConfig
    from jaxsys.serve.weights import Quantisation

QUANTISATIONS = ("int8", "fp8")
"""Those of `jaxsys.serve.weights`, which need JAX to be imported."""
COUNTER_S = 0.5
"""Time a load is repeated for where an energy counter is to tell its power."""


def main(argv: Sequence[str], prog: str) -> int:
    """`jaxsys profile serving`."""
    arguments = parser(prog).parse_args(argv)
    if not 0 <= arguments.noise < 1:
        raise UsageError(f"--noise {arguments.noise:g} must be at least 0 and below 1")
    check_writable(arguments.out.parent)
    if arguments.simulated is not None:
        profile = simulated_profile(
            simulated_gpu(arguments.simulated, arguments.shape), noise=arguments.noise
        )
    else:
        import jax
        import jax.numpy as jnp

        from jaxsys.model import default_model_path, load
        from jaxsys.serve.deployment import choose_devices, default_dtype

        # As `jaxsys serve` loads it.
        device = choose_devices(arguments.tensor_parallel)[0]
        path = default_model_path() if arguments.model is None else arguments.model
        with jax.default_device(jax.devices("cpu")[0]):
            model = load(path, jnp.dtype(arguments.dtype or default_dtype(device)))
        profile = measure(
            model,
            max_batch=arguments.max_batch,
            max_length=arguments.max_length,
            repeats=arguments.repeats,
            control=arguments.control_clocks,
            quantisation=arguments.quantisation,
            tensor_parallel=arguments.tensor_parallel,
        )
    profile.save(arguments.out)
    clocks = ", ".join(str(mhz) for mhz in profile.clocks_mhz)
    print(f"wrote {arguments.out}: {len(profile.samples)} samples at {clocks} MHz")
    for note in profile.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of `jaxsys profile serving`."""
    result = Parser(
        prog=prog, description="Measure iteration latency and power for `jaxsys serve --profile`."
    )
    add = result.add_argument
    add(
        "--out", type=Path, default=Path("profile.json"), help="file to write (default %(default)s)"
    )
    add("--model", type=Path, help="folder or .gguf file (default: SmolLM2-135M-Instruct)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights, as in serve (default: float32 on CPU, else bfloat16)",
    )
    add(
        "--quantise",
        choices=QUANTISATIONS,
        dest="quantisation",
        help="form of the weight matrices, as in serve (default: that of --dtype)",
    )
    add(
        "--tensor-parallel",
        type=whole(most=1024),
        default=1,
        help="GPUs that share the instance, as in serve (default %(default)s)",
    )
    add("--max-batch", type=whole(), default=16, help="largest batch (default %(default)s)")
    add(
        "--max-length", type=whole(), default=1024, help="tokens of a request (default %(default)s)"
    )
    add(
        "--repeats", type=whole(), default=3, help="timings a load, of which the median (default 3)"
    )
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
    quantisation: "Quantisation | None" = None,
    tensor_parallel: int = 1,
) -> Profile:
    """Runs the sweep on the real executor of one instance.

    Raises:
        UsageError: if the sizes make no sweep.
    """
    from jaxsys.serve.deployment import (
        DeploymentConfig,
        build_engine,
        choose_devices,
        compile_ahead,
    )
    from jaxsys.serve.energy.engine_sweep import EngineSweep
    from jaxsys.serve.executor import JaxExecutor
    from jaxsys.serve.instance import Instance

    if repeats < 1:
        raise UsageError(f"repeats={repeats} must be at least 1")
    config = DeploymentConfig(
        prefill=1,
        decode=0,
        max_batch=max_batch,
        max_length=max_length,
        prefix_caching=False,
        quantisation=quantisation,
        tensor_parallel=tensor_parallel,
    )
    group = choose_devices(tensor_parallel)
    engine = build_engine(model, config, devices=group)
    compile_ahead(engine.instances)
    instance = engine.instances[0]
    assert isinstance(instance, Instance)
    executor = instance.executor
    assert isinstance(executor, JaxExecutor)
    clocks, notes = _clocks(group, control)
    log = None if clocks is None else EnergyLog(clocks.energy_j)
    sweep = EngineSweep(
        instance,
        model.config.vocab_size,
        repeats=repeats,
        least_s=0.0 if log is None else COUNTER_S,
        energy_j=(lambda start_s, end_s: None) if log is None else log.between,
    )
    buckets = instance.scheduler.config.decode_buckets
    settings = [None]
    if clocks is not None and clocks.can_set:
        settings = [mhz for mhz in clocks.available_mhz[:: max(1, len(clocks.available_mhz) // 6)]]
    samples = []
    try:
        for mhz in settings:
            if mhz is not None and clocks is not None:
                clocks.set_clock(mhz)
            for plan in _fitting(instance.scheduler.config, buckets, repeats):
                sample = sweep.sample(plan, mhz or 0)
                if mhz is None and clocks is not None:
                    sample = replace(sample, clock_mhz=clocks.actual_mhz() or 0)
                samples.append(sample)
    finally:
        if log is not None:
            log.close()
        if clocks is not None:
            clocks.close()
    if settings == [None]:  # the reading flutters; the clock was one and the same
        common = statistics.mode(sample.clock_mhz for sample in samples)
        samples = [replace(sample, clock_mhz=common) for sample in samples]
        notes.append("clocks were not swept: all samples are at the default clock")
    return Profile(
        fingerprint=fingerprint_here(
            group[0].device_kind,
            model.config,
            quantisation or str(executor.weights.dtype),
            tensor_parallel,
        ),
        samples=samples,
        buckets=tuple(buckets),
        notes=tuple(notes),
        dispatch=sweep.dispatch,
    )


def _clocks(group: "Sequence[Device]", control: bool) -> tuple[GpuClocks | None, list[str]]:
    if group[0].platform == "cpu":
        return None, ["no GPU here: no clock and no power"]
    from jaxsys.nvml import open_group
    from jaxsys.serve.processes.gpus import gpu_of

    try:
        return open_group([gpu_of(device) for device in group], control=control), []
    except (RunError, UsageError) as error:
        return None, [f"no clock and no power: {error}"]


def _fitting(config: "SchedulerConfig", buckets: Sequence[int], repeats: int) -> list[Load]:
    """The sweep's loads that this instance can run in one iteration."""
    from jaxsys.serve.energy.engine_sweep import steps_needed

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
            # Those that come first decode while the others' prompts are computed.
            longest = plan.kv_tokens // plan.batch + steps_needed(repeats)
            longest += -(-plan.kv_tokens // config.max_prefill_tokens)
            fits = longest <= config.max_length
            fits = fits and plan.batch * (longest + config.page_size) <= room
        if fits:
            kept.append(plan)
    return kept
