"""The server side of scripts/bench_energy_live.py: a profile of the engine, then serving over HTTP.

The weights are random, everything else is what `jaxsys serve` runs: engine, HTTP face, and the
governor in its loop, whose decisions are timed. It talks with its parent in lines of JSON on
standard output, ends when its standard input does, and leaves the timings in a file.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import uvicorn

from jaxsys.errors import RunError
from jaxsys.model import DecoderConfig, LoadedModel, Tokenizer, preset
from jaxsys.nvml import NvmlGpu
from jaxsys.serve.deployment import (
    DeploymentConfig,
    build_engine,
    build_instance,
    choose_devices,
    default_dtype,
)
from jaxsys.serve.energy.energy_log import EnergyLog
from jaxsys.serve.energy.engine_sweep import MOST_STEPS, WARM_UP, EngineSweep
from jaxsys.serve.energy.governors import GovernorChoice, Served, make_governor
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.meters import Reading
from jaxsys.serve.energy.profile import Profile, fingerprint_here
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.hooks import AnyGovernor, NoGovernor
from jaxsys.serve.http.api import ApiConfig
from jaxsys.serve.instance import Instance
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.processes.front import bind, build_app
from jaxsys.serve.processes.gpus import gpu_of
from jaxsys.serve.sampling import SamplingNeeds
from studies.iteration_log import ServerLog
from studies.random_weights import random_parameters

COMPILERS = 8
"""Steps compiled at once."""


def short_plan(config: SchedulerConfig, piece_buckets: tuple[int, ...]) -> list[Load]:
    """Few loads that say what serving needs: every compiled size, short and long contexts."""
    room = config.page_count * config.page_size
    longest = config.max_length - MOST_STEPS - WARM_UP
    contexts = sorted({max(1, longest // 16), max(1, longest // 4), longest})
    loads = []
    for batch in config.decode_buckets:
        fitting = [c for c in contexts if batch * (c + MOST_STEPS + config.page_size) <= room]
        # The least context where not even that leaves room to grow: one that does.
        fitting = fitting or [max(1, room // batch - MOST_STEPS - config.page_size)]
        loads += [Load(batch=batch, kv_tokens=batch * c, bucket=batch) for c in fitting]
    budget = config.max_prefill_tokens
    below = 0
    for size in piece_buckets:
        # Within one padded size, pieces short and long: their rows are padded alike.
        for tokens in sorted({(below + size) // 2 + 1, min(size, budget)}):
            loads.append(Load(prefill_tokens=tokens, prefill_requests=1))
        later = min(size, budget, config.max_length - budget - 1)
        if later > below:
            loads.append(Load(prefill_tokens=later, prefill_requests=1, cached_tokens=budget))
        below = size
    return loads


def tell(**message: Any) -> None:
    print(json.dumps(message), flush=True)


class TimedGovernor:
    """Times another governor's calls in the live loop. It is given after the engine is built,
    because it begins from a profile of it."""

    def __init__(self) -> None:
        self.inner: AnyGovernor = NoGovernor()
        self.wall_s: dict[str, list[float]] = {"decide": [], "observe": []}
        self.cpu_s: dict[str, list[float]] = {"decide": [], "observe": []}
        self.plan_after_s: list[float] = []
        """From an iteration's end until the host plans anew, while the next one runs."""
        self._running = 0
        self._ended_s: float | None = None

    @property
    def method(self) -> str:
        return self.inner.method

    @property
    def idle_after_s(self) -> float | None:
        return self.inner.idle_after_s

    def start(self, now_s: float) -> None:
        self.inner.start(now_s)

    def before_iteration(self, iteration: Any, waiting: Any, now_s: float) -> None:
        if self._running and self._ended_s is not None:
            self.plan_after_s.append(now_s - self._ended_s)
        self._running, self._ended_s = self._running + 1, None
        self._time("decide", self.inner.before_iteration, iteration, waiting, now_s)

    def after_iteration(self, iteration: Any, latency_s: float, now_s: float) -> None:
        self._running, self._ended_s = self._running - 1, now_s
        self._time("observe", self.inner.after_iteration, iteration, latency_s, now_s)

    def dropped(self, count: int, now_s: float) -> None:
        self._running = 0
        self.inner.dropped(count, now_s)

    def idle(self, now_s: float, quiet_since_s: float) -> None:
        self.inner.idle(now_s, quiet_since_s)

    def reading(self, now_s: float) -> Reading:
        return self.inner.reading(now_s)

    def close(self) -> None:
        self.inner.close()

    def _time(self, what: str, call: Callable[..., None], *arguments: Any) -> None:
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        call(*arguments)
        self.cpu_s[what].append(time.thread_time() - cpu_s)
        self.wall_s[what].append(time.perf_counter() - wall_s)

    def forget(self) -> None:
        for times in (*self.wall_s.values(), *self.cpu_s.values(), self.plan_after_s):
            times.clear()


def word_tokenizer(size: int) -> Tokenizer:
    """One whole word an id, so that each token is sent as it comes."""
    words = {f"w{index}": index for index in range(size)}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")))


def compile_greedy(instances: Sequence[Instance]) -> None:
    """Compiles every step that greedy requests need, several at once, and runs each once."""
    work: list[tuple[JaxExecutor, tuple]] = []
    for instance in instances:
        executor = instance.executor
        assert isinstance(executor, JaxExecutor)
        for key in (*executor.steps.essential(), *executor.steps.others()):
            if key[0] != "sample" or key[2] == SamplingNeeds():
                work.append((executor, key))
    with ThreadPoolExecutor(COMPILERS if jax.default_backend() != "cpu" else 2) as pool:
        list(pool.map(lambda item: item[0].steps.compile(item[1]), work))
    for executor, key in work:
        executor.run_once(key)


def take_profile(
    instance: Instance, config: DecoderConfig, gpu: NvmlGpu | None, device: Any, least_s: float
) -> tuple[Profile, float]:
    """The short sweep, whose loads that fail are left out, and said; and what the host takes
    before a prompt that finds the instance idle, in seconds."""
    log = None if gpu is None else EnergyLog(gpu.energy_j)
    sweep = EngineSweep(
        instance,
        config.vocab_size,
        least_s=least_s if log else 0.0,
        energy_j=log.between if log else lambda start_s, end_s: None,
    )
    executor = instance.executor
    assert isinstance(executor, JaxExecutor)
    samples, notes, clocks_mhz = [], [], []
    try:
        for load in short_plan(instance.scheduler.config, executor.shapes.piece_buckets):
            try:
                sample = sweep.sample(load, 0)
            except RunError as error:
                notes.append(f"left out: {error}")
                continue
            samples.append(sample)
            clocks_mhz.append((gpu.actual_mhz() if gpu else None) or 0)
        # The shortest prompt: no heat, and so no lower clock, between one way and the other.
        load = next(
            load
            for load in short_plan(instance.scheduler.config, executor.shapes.piece_buckets)
            if load.prefill_tokens
        )
        dispatch_s = max(0.0, sweep.alone_s(load) - sweep.sample(load, 0).time_s)
    finally:
        if log:
            log.close()
    common = statistics.mode(clocks_mhz)
    profile = Profile(
        fingerprint=fingerprint_here(device.device_kind, config, str(executor.weights.dtype)),
        samples=[dataclasses.replace(sample, clock_mhz=common) for sample in samples],
        buckets=instance.scheduler.config.decode_buckets,
        notes=(*notes, "at the default clock alone; nothing was set"),
        dispatch=sweep.dispatch,
    )
    return profile, dispatch_s


async def serve(app: Any, engine: Any, listener: Any) -> None:
    """Serves until standard input ends: the parent wishes so, or is gone."""
    await engine.start()
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=3
        )
    )

    def watch() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    await server.serve(sockets=[listener])
    await engine.drain(0.0)


def microseconds(times: dict[str, list[float]], clock: str) -> dict[str, float]:
    found = {}
    for what, values in times.items():
        for percent in (50, 99):
            if values:
                value = 1e6 * float(np.percentile(values, percent))
                found[f"{what}_{clock}_p{percent}_us"] = round(value, 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a preset")
    add("--gpu", required=True, help="preset whose model the governor holds")
    add("--decode", type=int, required=True)
    add("--max-batch", type=int, required=True)
    add("--max-length", type=int, required=True)
    add("--max-prefill-tokens", type=int, required=True)
    add("--pages", type=int, required=True)
    add("--load-seconds", type=float, default=1.0, help="time of a load in the profile")
    add("--no-profile", action="store_true", help="measure nothing before serving")
    add("--log", action="store_true", help="note when each iteration's parts began and ended")
    add("--folder", type=Path, required=True, help="for the profile and the timings")
    arguments = parser.parse_args()
    config = preset(arguments.model)
    deployment = DeploymentConfig(
        prefill=1,
        decode=arguments.decode,
        max_batch=arguments.max_batch,
        max_length=arguments.max_length,
        max_prefill_tokens=arguments.max_prefill_tokens,
        page_count=arguments.pages,
        prefix_caching=False,
        max_requests=4096,
    )
    devices = choose_devices(len(deployment.roles))
    device = devices[-1]
    dtype = jnp.dtype(default_dtype(device))
    # Instances of one process share what was compiled where their steps are alike.
    jax.config.update("jax_compilation_cache_dir", str(arguments.folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    tell(stage="weights", device=device.device_kind)
    with jax.default_device(devices[0]):
        parameters = random_parameters(config, dtype)
    model = LoadedModel(
        config=config,
        parameters=parameters,
        tokenizer=None,
        chat_template=None,
        source="random weights",
    )
    governors: list[tuple[TimedGovernor, Any]] = []

    def governor(group: Any, sharing: int) -> TimedGovernor:
        governors.append((TimedGovernor(), group))
        return governors[-1][0]

    tell(stage="engine")
    engine = build_engine(model, deployment, devices=devices, governors=governor)
    instances = [one for one in engine.instances if isinstance(one, Instance)]
    profiled = instances[-1]
    sweeps = not arguments.no_profile
    if sweeps and arguments.decode:  # the sweep needs an instance that does both
        beside = profiled.executor
        assert isinstance(beside, JaxExecutor)
        profiled = build_instance(
            config,
            beside.weights,
            dataclasses.replace(deployment, decode=0),
            name="profiled",
            role="both",
            group=(device,),
            sink=lambda events: None,
        )
    del model, parameters
    gc.collect()
    tell(stage="compile")
    compile_greedy([*instances, *([profiled] if profiled not in instances else [])])
    gpu = None if device.platform == "cpu" else NvmlGpu(gpu_of(device))
    profile_path, dispatch_s = arguments.folder / "profile.json", None
    if sweeps:
        tell(stage="profile")
        profile, dispatch_s = take_profile(profiled, config, gpu, device, arguments.load_seconds)
        profile.save(profile_path)
    executor = profiled.executor
    assert isinstance(executor, JaxExecutor)
    piece_buckets = executor.shapes.piece_buckets
    if arguments.decode:
        del profiled, executor
        gc.collect()
    tell(stage="governor")
    slo = SharedSlo()
    choice = GovernorChoice(
        gpu=arguments.gpu,
        clocks="observe",
        # On CPU the governor's GPU is simulated, of which this profile says nothing.
        profile=None if gpu is None or not sweeps else str(profile_path),
    )
    served = Served(
        model=config,
        weights=str(dtype),
        prefill_budget=instances[0].scheduler.config.max_prefill_tokens,
    )
    for timed, group in governors:
        timed.inner = make_governor(choice, served, slo, group)
    for instance in instances:  # it has been asked before there was a governor
        instance.energy_method = instance.governor.method
    api = ApiConfig(model_name=arguments.model, max_length=arguments.max_length)
    app = build_app(engine, word_tokenizer(config.vocab_size), api, slo)

    @app.post("/forget-timings")
    async def forget() -> dict[str, float]:
        known = [value for timed, _ in governors for value in timed.plan_after_s]
        for timed, _ in governors:
            timed.forget()
        return {"plan_after_s": statistics.median(known) if known else 0.0}

    log = ServerLog(engine) if arguments.log else None

    @app.post("/take-log/{name}")
    async def take_log(name: str) -> dict[str, Any]:
        assert log is not None
        return log.save(arguments.folder / f"{name}.npz")

    @app.post("/switch-interval/{microseconds}")
    async def switch_interval(microseconds: int) -> dict[str, float]:
        """How long a thread keeps the interpreter while another waits for it."""
        sys.setswitchinterval(1e-6 * microseconds)
        return {"switch_interval_s": sys.getswitchinterval()}

    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        listener.listen(512)
        tell(
            stage="ready",
            port=listener.getsockname()[1],
            gpus=[] if gpu is None else [gpu_of(each) for each in dict.fromkeys(devices)],
            piece_buckets=list(piece_buckets),
            decode_buckets=list(instances[-1].scheduler.config.decode_buckets),
            dispatch_s=dispatch_s,
            page_size=instances[0].scheduler.config.page_size,
            parameters=config.parameter_count(),
            energy=governors[0][0].method,
        )
        gc.collect()
        gc.freeze()  # as `jaxsys serve` does
        asyncio.run(serve(app, engine, listener))
    rows = []
    for instance, (timed, _) in zip(instances, governors, strict=True):
        rows.append(
            {
                "instance": instance.name,
                "decisions": len(timed.wall_s["decide"]),
                **microseconds(timed.wall_s, "wall"),
                **microseconds(timed.cpu_s, "cpu"),
            }
        )
    (arguments.folder / "decisions.json").write_text(json.dumps(rows))
    sys.stdout.flush()
    # Threads of governors and XLA need not be waited for: nothing is set, all is written.
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
