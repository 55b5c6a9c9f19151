"""`jaxsys serve`: a model behind an OpenAI-compatible API."""

import asyncio
import contextlib
import dataclasses
import gc
import importlib.util
import logging
import math
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fastapi
import jax
import jax.numpy as jnp

from jaxsys.errors import RunError, UsageError, did_you_mean
from jaxsys.interrupt import leave
from jaxsys.model import default_model_path, load
from jaxsys.model.folder import read_generation, read_unapplied
from jaxsys.serve.deployment import (
    BackgroundCompilation,
    DeploymentConfig,
    build_engine,
    choose_devices,
    compile_ahead,
    default_dtype,
    prefill_budget,
)
from jaxsys.serve.energy.governors import (
    GovernorChoice,
    Served,
    make_governor,
    make_router,
)
from jaxsys.serve.energy.slo import SharedSlo, targets_of
from jaxsys.serve.engine import Engine
from jaxsys.serve.http.listening import BACKLOG, HttpServer, raise_descriptor_limit
from jaxsys.serve.http.starting import Gateway, StartProgress
from jaxsys.serve.logs import log_to_stderr
from jaxsys.serve.options import (
    adapters_of,
    lora_sizes,
    model_name_of,
    parser,
    read_keys,
    root_path,
    tls_files,
)
from jaxsys.serve.processes.fleet import LocalProcesses
from jaxsys.serve.processes.front import (
    Front,
    FrontSpec,
    bind,
    build_app,
    load_adapters,
    name_of,
    read_face,
    shown,
)
from jaxsys.serve.processes.fronts import Fronts
from jaxsys.serve.processes.worker import WorkerSpec
from jaxsys.serve.requests import SamplingParameters
from jaxsys.serve.settings import with_settings
from jaxsys.serve.weights import longest_served

T = TypeVar("T")

CLUSTERS = ("local", "auto")
"""What `--cluster` takes beside an address."""
LOOK_S = 2.0
"""How often a server on a cluster is asked whether it has failed."""


def main(argv: Sequence[str], prog: str) -> int:
    """Serves until SIGTERM or SIGINT.

    Raises:
        RunError: if it could not go on, after it has drained.
    """
    options = parser(prog)
    arguments = options.parse_args(with_settings(options, argv))
    if not (math.isfinite(arguments.drain) and arguments.drain >= 0):
        raise UsageError(f"--drain {arguments.drain} must be 0 or more seconds")
    if arguments.key_for_all and arguments.api_key_file is None:
        raise UsageError("--key-for-all needs --api-key-file; give one, or leave it out")
    for origin in arguments.cors or ():
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise UsageError(f"--cors {origin!r} is no origin; use the like of https://example.org")
    path = default_model_path() if arguments.model is None else arguments.model
    max_length = arguments.max_length
    if max_length is None:
        max_length = min(2048, longest_served(read_face(path)[0]))
    adapters = adapters_of(arguments.lora or (), arguments.model_name or model_name_of(path))
    max_loras, max_rank = lora_sizes(arguments, adapters)
    deployment = DeploymentConfig(
        max_loras=max_loras,
        max_lora_rank=max_rank,
        prefill=arguments.prefill,
        decode=arguments.decode,
        max_batch=arguments.max_batch,
        max_prefill_tokens=arguments.max_prefill_tokens,
        max_length=max_length,
        page_size=arguments.page_size,
        page_count=arguments.page_count,
        max_requests=arguments.max_requests,
        quantisation=arguments.quantisation,
        cache_form=arguments.cache_form,
        tensor_parallel=arguments.tensor_parallel,
        host_pages_gib=arguments.host_pages_gib,
        speculate=None if arguments.speculate == "off" else arguments.speculate,
        num_speculative_tokens=arguments.num_speculative_tokens,
        prompt_lookup_min=arguments.prompt_lookup_min,
        prompt_lookup_max=arguments.prompt_lookup_max,
    )
    worker = WorkerSpec(
        name="",
        role="both",
        model=str(path.absolute()),
        dtype=arguments.dtype,
        deployment=deployment,
        governor=GovernorChoice(
            gpu=arguments.gpu,
            policy=arguments.policy,
            clocks=arguments.clocks,
            profile=None if arguments.profile is None else str(arguments.profile.absolute()),
        ),
        slo=targets_of(arguments),
        compilation_cache=str(arguments.compilation_cache),
        json_log=arguments.log == "json",
        front_host="",
        front_port=0,
        token="",
    )
    spec = FrontSpec(
        host=arguments.host,
        port=arguments.port,
        model_name=arguments.model_name or model_name_of(path),
        api_keys=read_keys(arguments.api_key_file),
        key_for_all=arguments.key_for_all,
        cors_origins=tuple(arguments.cors or ()),
        tool_format=arguments.tool_format,
        root_path=root_path(arguments.root_path),
        tls=tls_files(arguments.tls_certificate, arguments.tls_key),
        sampling=_sampling_of(path, arguments.no_generation_config),
        route=arguments.route,
        adapters=adapters,
        lora_updates=arguments.allow_lora_updates,
        route_prompts=arguments.route_prompts,
        worker=worker,
    )
    log_to_stderr(as_json=worker.json_log)
    raise_descriptor_limit()
    where = arguments.cluster
    if where not in (None, *CLUSTERS) and ":" not in where:
        raise UsageError(
            f"--cluster {where} is neither {' nor '.join(CLUSTERS)}, nor an address such as "
            f"10.0.0.1:6379{did_you_mean(where, CLUSTERS)}"
        )
    if arguments.fronts > 1 and arguments.cluster != "local":
        where = "" if arguments.cluster is None else f" --cluster {arguments.cluster}"
        raise UsageError(
            f"--fronts {arguments.fronts}{where}: several fronts need instances that are processes "
            "of this machine; add --cluster local, or leave --fronts out"
        )
    if arguments.cluster is None:
        return _serve_here(spec, arguments.drain)
    if arguments.cluster == "local":
        return asyncio.run(_serve_processes(spec, arguments.fronts, arguments.drain))
    _serve_cluster(spec, arguments.cluster, arguments.drain)
    return 0


def _sampling_of(path: Path, unasked: bool) -> dict[str, float]:
    """What generation_config.json says that requests are sampled with; the user is told."""
    if unasked or not path.is_dir():
        return {}
    found = read_generation(path)
    try:
        SamplingParameters(max_tokens=1, **found)  # type: ignore[arg-type]
    except UsageError as error:
        raise UsageError(
            f"{path}/generation_config.json: {error}; correct it, or serve with "
            "--no-generation-config"
        ) from error
    if found:
        said = ", ".join(f"{name}={value:g}" for name, value in found.items())
        _tell(
            f"requests that do not say are sampled with {said} (generation_config.json; "
            "--no-generation-config turns this off)"
        )
    left = read_unapplied(path)
    if left:
        said = ", ".join(f"{name}={value}" for name, value in left.items())
        _tell(f"generation_config.json asks for {said}, which is not applied")
    return found


def _millions(count: int) -> str:
    """A number of parameters: 135M, 0.3M."""
    return f"{count / 1e6:.0f}M" if count >= 10e6 else f"{count / 1e6:.2g}M"


def _serve_here(spec: FrontSpec, drain_s: float) -> int:
    """Serves with instances on threads of this process; returns the exit code."""
    with contextlib.closing(bind(spec.host, spec.port)) as listener:
        listener.listen(BACKLOG)
        code = asyncio.run(_serve_threads(spec, listener, drain_s))
    return code


async def _serve_threads(spec: FrontSpec, listener: socket.socket, drain_s: float) -> int:
    address = shown(spec, *name_of(listener))
    progress = StartProgress()
    gateway = Gateway(progress, spec.root_path)
    server = HttpServer(gateway, drain_s=drain_s, tls=spec.tls)
    stop, serving = _stopped(), asyncio.create_task(server.serve(sockets=[listener]))
    built: asyncio.Future[_Built] = _on_thread(lambda: _build(spec, progress, address))
    await asyncio.wait([built, stop], return_when=asyncio.FIRST_COMPLETED)
    if not built.done():  # compiling threads cannot be ended, and need not be waited for
        leave(128 + stop.result())
    try:
        found = built.result()
    except BaseException:
        server.should_exit = True
        await serving
        raise
    engine = found.engine
    await engine.start()
    try:
        await load_adapters(engine, spec)
    except BaseException:
        await engine.drain(0.0)
        found.app.state.close()
        server.should_exit = True
        await serving
        raise
    compilation = BackgroundCompilation(engine.instances)
    # What is there now stays: looked through for garbage again and again, it would hold up tokens.
    gc.collect()
    gc.freeze()
    gateway.app = found.app
    _tell(found.description)
    _tell_address(address, f"; energy is {engine.energy_method}")
    _tell_guesses(spec.worker.deployment)
    failing = asyncio.create_task(engine.until_failure())
    await asyncio.wait([stop, failing, serving], return_when=asyncio.FIRST_COMPLETED)
    failing.cancel()
    server.should_exit = True  # listens no more, and waits `drain_s` for open requests
    await serving
    ended = await engine.drain(0.0)
    found.app.state.close()
    await asyncio.to_thread(compilation.stop)
    if ended:
        logging.getLogger(__name__).warning("ended unfinished requests: %d", ended)
    if engine.failure is not None:
        raise RunError(engine.failure)
    return 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    engine: Engine
    app: fastapi.FastAPI
    description: str


def _build(spec: FrontSpec, progress: StartProgress, address: str) -> _Built:
    """All that serving needs, compiled; nothing runs yet."""
    worker = spec.worker
    config = worker.deployment
    jax.config.update("jax_compilation_cache_dir", worker.compilation_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Before anything starts JAX: a host without accelerator is divided.
    devices = choose_devices(len(config.roles) * config.tensor_parallel)
    dtype = worker.dtype or default_dtype(devices[0])
    started_s = time.monotonic()
    progress.enter("reading the model")
    # What the file holds is read when it is placed.
    model = load(worker.model, jnp.dtype(dtype), leafwise=True)
    if model.tokenizer is None:
        raise UsageError(f"{worker.model} has no tokenizer.json; add the one the model came with")
    shape, slo, governor = model.config, SharedSlo(worker.slo), worker.governor
    progress.enter("placing weights")
    served = Served(
        model=shape,
        weights=config.weights_named(dtype),
        tensor_parallel=config.tensor_parallel,
        prefill_budget=prefill_budget(config, devices[0]),
    )
    engine = build_engine(
        model,
        config,
        devices=devices,
        governors=lambda group, sharing: make_governor(
            governor, dataclasses.replace(served, sharing=sharing), slo, group
        ),
        prefill_router=make_router(
            spec.route_prompts, governor.gpu, served, slo, option="--route-prompts"
        ),
        decode_router=make_router(spec.route, governor.gpu, served, slo),
    )
    app = build_app(engine, model.tokenizer, spec.api(), slo)
    del model  # the engine holds its own weights
    _tell_starting(address)  # now that nothing is wrong with what was asked for
    compile_ahead(
        engine.instances,
        begin=lambda count: progress.enter("compiling steps", count),
        done=progress.advance,
    )
    return _Built(
        engine=engine,
        app=app,
        description=(
            f"{spec.model_name} ({_millions(shape.parameter_count())}, {dtype}) on "
            f"{devices[0].device_kind}: {_describe(config)}; "
            f"ready in {time.monotonic() - started_s:.1f} s"
        ),
    )


def _on_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """The result of `work` on a thread that the process's end does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_it(value)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
            loop.call_soon_threadsafe(settle, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(settle, future.set_result, result)

    threading.Thread(target=run, name="start", daemon=True).start()
    return future


def _stopped() -> "asyncio.Future[int]":
    """The first SIGTERM or SIGINT from now on."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[int] = loop.create_future()

    def receive(number: int) -> None:
        if not future.done():
            future.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, receive, number)
    return future


async def _serve_processes(spec: FrontSpec, fronts: int, drain_s: float) -> int:
    """Serves with instances in processes of this machine; returns the exit code."""
    stop = _stopped()
    launcher, here = LocalProcesses(), "127.0.0.1"
    front: Front | Fronts
    if fronts == 1:
        front = Front(spec, launcher, reached_at=here)
    else:
        front = Fronts(spec, launcher, count=fronts, drain_s=drain_s, reached_at=here)
    started_s = time.monotonic()
    host, port = await front.listen()
    address = shown(spec, host, port)
    _tell_starting(address)
    starting = asyncio.ensure_future(front.start())
    await asyncio.wait([starting, stop], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return 128 + stop.result()
    starting.result()
    _tell_ready(spec, time.monotonic() - started_s)
    _tell_address(address, f" from {fronts} fronts" if fronts > 1 else "")
    _tell_guesses(spec.worker.deployment)
    failing = asyncio.ensure_future(front.until_failure())
    await asyncio.wait([stop, failing], return_when=asyncio.FIRST_COMPLETED)
    await front.stop(drain_s)
    if failing.done():
        raise RunError(failing.result())
    failing.cancel()
    return 0


def _serve_cluster(spec: FrontSpec, address: str, drain_s: float) -> None:
    """Serves with front and instances on a Ray cluster."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            f"--cluster {address} needs Ray: pip install 'jaxsys[cluster]', or use --cluster local"
        )
    from jaxsys.serve.processes import cluster

    read_face(Path(spec.worker.model))  # what is wrong with it is better said before Ray starts
    cluster.connect(address)
    started_s = time.monotonic()
    served = cluster.ServerOnCluster(spec)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    _tell_ready(spec, time.monotonic() - started_s)
    _tell_address(shown(spec, served.host, served.port))
    _tell_guesses(spec.worker.deployment)
    failure = None
    while failure is None and not stop.wait(LOOK_S):
        failure = served.failure()
    served.stop(drain_s)
    if failure is not None:
        raise RunError(failure)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell_starting(address: str) -> None:
    _tell(f"starting on {address} (/health says how far it is)")


def _tell_ready(spec: FrontSpec, seconds: float) -> None:
    described = _describe(spec.worker.deployment)
    _tell(f"{spec.model_name}: {described} in processes of their own; ready in {seconds:.1f} s")


def _tell_address(address: str, more: str = "") -> None:
    _tell(f"serving on {address}/v1 (also /health, /metrics, /dashboard, /docs){more}")


def _tell_guesses(deployment: DeploymentConfig) -> None:
    if deployment.speculate is not None:
        adapted = "; a batch in which a request has an adapter guesses none"
        _tell(
            "tokens are guessed once the steps for that are compiled, behind the first answers "
            f"(jaxsys_guesses_ready in /metrics says when){adapted if deployment.max_loras else ''}"
        )


def _describe(config: DeploymentConfig) -> str:
    if config.decode == 0:
        return f"{config.prefill} instance(s) for prefill and decode"
    return f"{config.prefill} prefill and {config.decode} decode instance(s)"
