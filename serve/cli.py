"""`jaxsys serve`: a model behind an OpenAI-compatible API."""

import argparse
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
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fastapi
import jax
import jax.numpy as jnp

from jaxsys.errors import RunError, UsageError
from jaxsys.files import MIB, read_text
from jaxsys.interrupt import leave
from jaxsys.model import default_model_path, load
from jaxsys.model.folder import read_generation
from jaxsys.model.peft import largest_rank
from jaxsys.options import Parser, whole
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
from jaxsys.serve.energy.gpu_model import GPUS
from jaxsys.serve.energy.registry import CLOCK_POLICIES, ROUTERS
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.engine import Engine
from jaxsys.serve.http.listening import BACKLOG, HttpServer, raise_descriptor_limit
from jaxsys.serve.http.lora_adapters import check_name
from jaxsys.serve.http.starting import Gateway, Progress
from jaxsys.serve.http.tools import FORMATS
from jaxsys.serve.logs import log_to_stderr
from jaxsys.serve.paged_model import CACHE_FORMS
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
from jaxsys.serve.settings import add_to as add_settings
from jaxsys.serve.settings import with_settings
from jaxsys.serve.speculation import METHODS, SpeculationConfig
from jaxsys.serve.weights import QUANTISATIONS

T = TypeVar("T")

LORAS_LATER = 4
"""Adapters that there is room for beside those of --lora, where more are loaded while serving."""
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
        max_length = min(2048, read_face(path)[0].max_positions)
    adapters = _adapters(arguments.lora or (), arguments.model_name or _name(path))
    max_loras, max_rank = _lora_sizes(arguments, adapters)
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
        slo=Slo(ttft_s=arguments.ttft_s, itl_s=arguments.itl_s),
        compilation_cache=str(arguments.compilation_cache),
        json_log=arguments.log == "json",
        front_host="",
        front_port=0,
        token="",
    )
    spec = FrontSpec(
        host=arguments.host,
        port=arguments.port,
        model_name=arguments.model_name or _name(path),
        api_keys=_read_keys(arguments.api_key_file),
        key_for_all=arguments.key_for_all,
        cors_origins=tuple(arguments.cors or ()),
        tool_format=arguments.tool_format,
        root_path=_root_path(arguments.root_path),
        tls=_tls(arguments.tls_certificate, arguments.tls_key),
        sampling=_sampling_of(path, arguments.no_generation_config),
        route=arguments.route,
        adapters=adapters,
        lora_updates=arguments.allow_lora_updates,
        route_prompts=arguments.route_prompts,
        worker=worker,
    )
    log_to_stderr(as_json=worker.json_log)
    raise_descriptor_limit()
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


def _adapters(given: Sequence[str], model_name: str) -> tuple[tuple[str, str], ...]:
    """Names and folders of --lora."""
    found: dict[str, str] = {}
    for one in given:
        name, mark, folder = one.partition("=")
        if not (name and mark and folder):
            raise UsageError(f"--lora {one!r} must be NAME=FOLDER")
        try:
            check_name(name, model_name)
        except UsageError as error:
            raise UsageError(f"--lora {one!r}: {error}") from None
        if name in found:
            raise UsageError(f"--lora gives {name!r} twice; give each name once")
        found[name] = str(Path(folder).absolute())
    return tuple(found.items())


def _lora_sizes(
    arguments: argparse.Namespace, adapters: Sequence[tuple[str, str]]
) -> tuple[int, int]:
    """Adapters that are loaded at once at most, and their largest rank."""
    updates = arguments.allow_lora_updates
    most, rank = arguments.max_loras, arguments.max_lora_rank
    if not adapters and not updates:
        for name, value in (("--max-loras", most), ("--max-lora-rank", rank)):
            if value is not None:
                raise UsageError(
                    f"{name} {value} needs --lora or --allow-lora-updates; give one, or leave it "
                    "out"
                )
        return 0, 16
    if most is None:
        most = len(adapters) + (LORAS_LATER if updates else 0)
    if most < len(adapters):
        raise UsageError(
            f"--max-loras {most} is below the {len(adapters)} of --lora; give {len(adapters)} or "
            "more"
        )
    if rank is None:
        ranks = [largest_rank(folder) for _, folder in adapters]
        rank = max([*ranks, 16 if updates else 1])
    return most, rank


def _root_path(path: str) -> str:
    if path and not re.fullmatch(r"(/[\w.~-]+)+", path):
        raise UsageError(
            f"--root-path {path!r} must be the like of /llm, without a slash at its end"
        )
    return path


def _tls(certificate: Path | None, key: Path | None) -> tuple[str, str] | None:
    """The files of a certificate, if they are good."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError("--tls-certificate and --tls-key belong together; give both or none")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:  # SSLError is one
        raise UsageError(
            f"--tls-certificate {certificate} and --tls-key {key} cannot be used: {error}"
        ) from None
    return str(certificate.absolute()), str(key.absolute())


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
    progress = Progress()
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


def _build(spec: FrontSpec, progress: Progress, address: str) -> _Built:
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
    # Layers are read one at a time when they are placed; embedding and head wait in the host's
    # memory, so that the accelerator's is left to weights and pages.
    with jax.default_device(jax.devices("cpu")[0]):
        model = load(worker.model, jnp.dtype(dtype), layerwise=True)
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
    _tell_address(address)
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
    served = cluster.Cluster(spec)
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


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of `jaxsys serve`."""
    result = Parser(prog=prog, description="Serve a model over an OpenAI-compatible API.")
    add = result.add_argument
    add_settings(result)
    add("--model", type=Path, help="folder or .gguf file (default: SmolLM2-135M-Instruct)")
    add("--model-name", help="name in the API (default: the file's or folder's)")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on, or unix:PATH for a socket of this machine "
        "(default %(default)s)",
    )
    add(
        "--port",
        type=whole(0, 65535),
        default=8000,
        help="0 takes a free one (default %(default)s)",
    )
    add("--tls-certificate", type=Path, help="PEM file; with --tls-key, the server speaks HTTPS")
    add("--tls-key", type=Path, help="PEM file of the certificate's key")
    add("--root-path", default="", metavar="/PATH", help="path that the API stands under")
    add("--api-key-file", type=Path, help="file with one key a line; without it all are let in")
    add(
        "--key-for-all",
        action="store_true",
        help="ask for a key at /metrics, /dashboard, /docs, /openapi.json and /version too; "
        "/health stays open",
    )
    add(
        "--cors",
        action="append",
        metavar="ORIGIN",
        help="origin whose pages may ask from a browser, * for any; may be given several times",
    )
    add(
        "--tool-format",
        choices=("auto", *FORMATS),
        default="auto",
        help="how the model writes calls of tools; auto goes by its chat template",
    )
    add(
        "--max-requests",
        type=whole(),
        default=256,
        help="requests taken before answering 429 (default %(default)s)",
    )
    add(
        "--drain",
        type=float,
        default=30.0,
        help="seconds to finish requests after SIGTERM (default %(default)s)",
    )
    add(
        "--no-generation-config",
        action="store_true",
        help="do not sample by the model's generation_config.json where a request does not say",
    )
    add("--log", choices=("text", "json"), default="text", help="form of the log on stderr")
    many = result.add_argument_group("instances: who computes")
    many.add_argument(
        "--prefill",
        type=whole(most=1024),
        default=1,
        help="instances that read prompts (default %(default)s)",
    )
    many.add_argument(
        "--decode",
        type=whole(0, 1024),
        default=1,
        help="instances that write answers; 0: those of --prefill do both (default %(default)s)",
    )
    many.add_argument(
        "--tensor-parallel",
        type=whole(most=1024),
        default=1,
        help="GPUs that share one instance (default %(default)s)",
    )
    many.add_argument(
        "--cluster",
        metavar="WHERE",
        help="run instances as processes: local (of this machine), auto (the Ray cluster that "
        "runs here, or one started for it), or the address of a Ray cluster (default: all in this "
        "process)",
    )
    many.add_argument(
        "--fronts",
        type=whole(most=64),
        default=1,
        help="processes that speak HTTP behind the one port, tokenize and stream; more than one "
        "needs --cluster local (default %(default)s)",
    )
    loras = result.add_argument_group("low-rank adapters of the model")
    loras.add_argument(
        "--lora",
        action="append",
        metavar="NAME=FOLDER",
        help="serve the adapter of a folder that PEFT writes, as model NAME; may be given several "
        "times",
    )
    loras.add_argument(
        "--allow-lora-updates",
        action="store_true",
        help="load and unload adapters by /v1/load_lora_adapter and /v1/unload_lora_adapter: "
        "whoever may ask may name any folder of this machine",
    )
    loras.add_argument(
        "--max-loras",
        type=whole(most=1024),
        help="adapters loaded at once (default: those of --lora, and "
        f"{LORAS_LATER} more with --allow-lora-updates)",
    )
    loras.add_argument(
        "--max-lora-rank",
        type=whole(most=1024),
        help="largest rank of an adapter (default: that of --lora; with --allow-lora-updates 16 at "
        "least)",
    )
    sizes = result.add_argument_group("sizes of an instance")
    sizes.add_argument(
        "--max-length",
        type=whole(),
        help="tokens of a request, prompt and output (default: the model's or 2048, whichever is "
        "less)",
    )
    sizes.add_argument(
        "--max-batch",
        type=whole(),
        help="requests worked on at once (default: 16 on CPU, else 128)",
    )
    sizes.add_argument(
        "--max-prefill-tokens",
        type=whole(),
        help="prompt tokens computed at once (default: 256 on CPU, else 2048)",
    )
    sizes.add_argument(
        "--page-size",
        type=whole(),
        help="tokens in a page, the unit of cache memory (default: 16 on CPU, else 64)",
    )
    sizes.add_argument(
        "--pages",
        type=whole(),
        dest="page_count",
        metavar="PAGES",
        help="pages of cache memory (default: what the device has)",
    )
    sizes.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights (default: float32 on CPU, else bfloat16)",
    )
    sizes.add_argument(
        "--quantise",
        choices=QUANTISATIONS,
        dest="quantisation",
        help="form of the weight matrices (default: that of --dtype)",
    )
    sizes.add_argument(
        "--quantise-cache",
        choices=CACHE_FORMS,
        dest="cache_form",
        help="form of keys and values in pages (default: that of --dtype)",
    )
    ahead = result.add_argument_group("tokens guessed ahead (speculation)")
    ahead.add_argument(
        "--speculate",
        choices=("off", *METHODS),
        default="off",
        help="ngram: where a text repeats itself, compute what followed before with the next token "
        "and keep what is right; stops by itself where that does not pay (default %(default)s)",
    )
    for name, text in (
        ("num_speculative_tokens", "most tokens guessed at once"),
        ("prompt_lookup_min", "last tokens that must have stood somewhere before"),
        ("prompt_lookup_max", "last tokens compared to choose among several places"),
    ):
        ahead.add_argument(
            f"--{name.replace('_', '-')}",
            type=whole(),
            default=getattr(SpeculationConfig(), name),
            help=f"{text} (default %(default)s)",
        )
    sizes.add_argument(
        "--host-pages-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="host memory of each instance that reads prompts, for pages that the device has no "
        "room to keep (default: none)",
    )
    sizes.add_argument(
        "--compilation-cache",
        type=Path,
        default=Path.home() / ".cache" / "jaxsys" / "compiled",
        help="folder that keeps compiled steps between runs (default %(default)s)",
    )
    energy = result.add_argument_group("latency and energy")
    energy.add_argument(
        "--ttft-slo",
        type=float,
        default=0.6,
        dest="ttft_s",
        metavar="S",
        help="seconds to the first token to aim for (default %(default)s)",
    )
    energy.add_argument(
        "--itl-slo",
        type=float,
        default=0.06,
        dest="itl_s",
        metavar="S",
        help="seconds between tokens to aim for (default %(default)s)",
    )
    energy.add_argument(
        "--clocks",
        choices=("observe", "control"),
        default="observe",
        help="whether a real GPU's clock may be set; it is given back at the end, come what may "
        "(default %(default)s)",
    )
    energy.add_argument(
        "--policy",
        choices=list(CLOCK_POLICIES),
        help="what chooses the clock of each iteration (default: ecofreq, or own-rule where the "
        "GPU's costs are not known)",
    )
    energy.add_argument(
        "--route",
        choices=list(ROUTERS),
        default="fewest",
        help="which decode instance gets a request, such as that of the fewest requests or of the "
        "least energy (default %(default)s)",
    )
    energy.add_argument(
        "--route-prompts",
        choices=list(ROUTERS),
        default="fewest",
        help="which instance reads a prompt; prefix: one that holds its beginning, where that "
        "saves energy and is in time (default %(default)s)",
    )
    energy.add_argument(
        "--gpu",
        choices=[*GPUS, "none"],
        default="h100",
        help="GPU to model clock and energy of (default %(default)s)",
    )
    energy.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="of `jaxsys profile serving`, from which predictions begin (default: the model of "
        "--gpu)",
    )
    return result


def _read_keys(path: Path | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    text = read_text(path, what="--api-key-file", most_bytes=MIB)
    keys = frozenset(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise UsageError(f"--api-key-file {path} holds no key; write one a line")
    return keys


def _name(path: Path) -> str:
    return path.stem if path.suffix == ".gguf" else path.name


def _describe(config: DeploymentConfig) -> str:
    if config.decode == 0:
        return f"{config.prefill} instance(s) for prefill and decode"
    return f"{config.prefill} prefill and {config.decode} decode instance(s)"
