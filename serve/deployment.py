"""From a loaded model and a few numbers to an engine: devices, page pools, instances, governors."""

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxsys.errors import UsageError
from jaxsys.mesh import Device, request_devices
from jaxsys.model import DecoderConfig, LoadedModel
from jaxsys.model.contract import layer_cache
from jaxsys.serve.cache_groups import CacheGroups, cache_groups, most_held
from jaxsys.serve.clock import WallClock
from jaxsys.serve.engine import Engine
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.grammars import Grammars
from jaxsys.serve.handover import Message, PageTransfer, Receiver, SameProcess, Sender
from jaxsys.serve.hooks import AnyGovernor, NoGovernor, Router
from jaxsys.serve.host_copies import HostCopies
from jaxsys.serve.instance import Instance
from jaxsys.serve.iterations import Role, SchedulerConfig
from jaxsys.serve.lora import AdapterSlots
from jaxsys.serve.member import Member, TokenEvent
from jaxsys.serve.paged_model import CacheForm, number_bytes
from jaxsys.serve.scheduler import Scheduler
from jaxsys.serve.speculation import Method, Speculation, SpeculationConfig
from jaxsys.serve.split import mesh_over
from jaxsys.serve.steps import ExecutorConfig
from jaxsys.serve.weights import (
    Quantisation,
    ServingWeights,
    check_served,
    serving_weights,
)

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.85
"""Share of an accelerator's memory left after the weights that pages may take; the rest is for
the steps' own buffers."""

ACCELERATOR_PAGE = 64
"""Tokens of a page that the kernels of accelerators like."""

GUESSES = SpeculationConfig()
"""How tokens are guessed where nothing else is said."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentConfig:
    """What runs where."""

    prefill: int = 1
    decode: int = 1
    """Decode instances; with 0 the `prefill` ones do both."""
    max_batch: int | None = None
    """Requests an instance works on at once; None takes 16 on CPU, else 128."""
    max_length: int = 2048
    max_prefill_tokens: int | None = None
    """Prompt tokens an iteration computes; None takes 256 on CPU, else 2048."""
    page_size: int | None = None
    """Tokens a page holds; None takes 16 on CPU, and 64 for the kernels of accelerators."""
    page_count: int | None = None
    """Pages of each instance; None takes what the device has, on CPU four times `max_length`."""
    prefix_caching: bool = True
    max_requests: int = 256
    quantisation: Quantisation | None = None
    """Form of the matrices; None keeps the model's dtype."""
    cache_form: CacheForm | None = None
    """Form of keys and values in pages; None keeps the model's dtype."""
    tensor_parallel: int = 1
    """Devices that share one instance, each with its part of the heads and the feed-forward."""
    max_loras: int = 0
    """Low-rank adapters that may be loaded at once; with 0 none are served."""
    max_lora_rank: int = 16
    """The largest rank of one."""
    host_pages_gib: float = 0.0
    """Host memory of each instance that reads prompts, for pages its device has no room for."""
    speculate: Method | None = None
    """How tokens are guessed ahead, where that pays; None guesses none."""
    num_speculative_tokens: int = GUESSES.num_speculative_tokens
    prompt_lookup_min: int = GUESSES.prompt_lookup_min
    prompt_lookup_max: int = GUESSES.prompt_lookup_max
    """As `SpeculationConfig`'s."""

    def __post_init__(self) -> None:
        if self.prefill < 1:
            raise UsageError(f"prefill={self.prefill} must be at least 1")
        if self.decode < 0:
            raise UsageError(f"decode={self.decode} must be 0 (instances do both) or more")
        if self.max_loras < 0:
            raise UsageError(f"max_loras={self.max_loras} must be 0 (no adapters) or more")
        for name in (
            "tensor_parallel",
            "max_lora_rank",
            "max_batch",
            "max_length",
            "max_prefill_tokens",
            "page_size",
            "page_count",
            "max_requests",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} must be at least 1")
        if not 0 <= self.host_pages_gib < float("inf"):
            raise UsageError(f"host_pages_gib={self.host_pages_gib} must be 0 or more GiB")
        if self.host_pages_gib and not self.prefix_caching:
            raise UsageError("host_pages_gib needs prefix_caching: nothing is found again without")
        _ = self.speculation  # refuses what it cannot be

    @property
    def speculation(self) -> SpeculationConfig | None:
        """How tokens are guessed; None where they are not."""
        config = SpeculationConfig(
            num_speculative_tokens=self.num_speculative_tokens,
            prompt_lookup_min=self.prompt_lookup_min,
            prompt_lookup_max=self.prompt_lookup_max,
        )
        return None if self.speculate is None else config

    def weights_named(self, dtype: str) -> str:
        """What profiles call weights of `dtype` in their form, and the cache if it has its own."""
        kept = self.quantisation or dtype
        return kept if self.cache_form is None else f"{kept}, {self.cache_form} cache"

    @property
    def roles(self) -> list[Role]:
        """Roles of the instances in order."""
        if self.decode == 0:
            return ["both" for _ in range(self.prefill)]
        return [
            *("prefill" for _ in range(self.prefill)),
            *("decode" for _ in range(self.decode)),
        ]


def build_engine(
    model: LoadedModel,
    config: DeploymentConfig,
    *,
    devices: Sequence[Device] | None = None,
    governors: Callable[[tuple[Device, ...], int], AnyGovernor] | None = None,
    prefill_router: Router | None = None,
    decode_router: Router | None = None,
) -> Engine:
    """An engine over as many devices as there are instances (or as exist), not yet started.

    Args:
        devices: `tensor_parallel` for each instance in turn, as `choose_devices` gives them.
        governors: makes the governor of an instance from its devices, and the number of instances
            that have them.
    """
    roles = config.roles
    if devices is None:
        devices = choose_devices(len(roles) * config.tensor_parallel)
    ways = config.tensor_parallel
    groups = [tuple(devices[at * ways : (at + 1) * ways]) for at in range(len(roles))]
    weights: dict[tuple[Device, ...], ServingWeights] = {}
    engine = Engine(
        clock=WallClock(),
        max_requests=config.max_requests,
        prefill_router=prefill_router,
        decode_router=decode_router,
    )
    if model.tokenizer is not None:
        engine.grammars = Grammars(model.tokenizer, model.config.vocab_size)
    engine.adapters.most = config.max_loras
    numbers: dict[Role, int] = {}
    for role, group in zip(roles, groups, strict=True):
        if group not in weights:
            weights[group] = place_weights(model, config, group)
        number = numbers[role] = numbers.get(role, -1) + 1
        name = instance_name(role, number)
        sharing = sum(other == group for other in groups)
        instance = build_instance(
            model.config,
            weights[group],
            config,
            name=name,
            role=role,
            group=group,
            sharing=sharing,
            governor=None if governors is None else governors(group, sharing),
            sink=engine.sink(name),
            grammars=engine.grammars,
        )
        connect(instance, functools.partial(engine.exchange.forward, instance))
        engine.add(instance, decodes=role == "decode")
    return engine


def instance_name(role: Role, number: int) -> str:
    """What the instance of a role with this number is called."""
    return f"{'instance' if role == 'both' else role}-{number}"


def default_dtype(device: Device) -> str:
    """The dtype that a device is fastest with: CPUs compute bfloat16 slowly."""
    return "float32" if device.platform == "cpu" else "bfloat16"


def prefill_budget(config: DeploymentConfig, device: Device) -> int:
    """Prompt tokens an iteration computes."""
    return config.max_prefill_tokens or (256 if device.platform == "cpu" else 2048)


def place_weights(
    model: LoadedModel, config: DeploymentConfig, group: tuple[Device, ...]
) -> ServingWeights:
    """The model's weights as `group` serves them.

    Raises:
        UsageError: if the pages that `config` asks for hold no request of its `max_length`.
    """
    if config.page_count is not None:  # at once, not when all weights are read
        _check_pages(model.config, config, group[0], config.page_count)
    weights = serving_weights(
        model.config,
        model.parameters,
        quantisation=config.quantisation,
        placement=_placement(group),
    )
    if config.quantisation is not None:
        how = weights.layers[0].matrices["out"].way.reason
        logger.info("weights", extra={"form": config.quantisation, "products": how})
    return weights


def build_instance(
    shape: DecoderConfig,
    weights: ServingWeights,
    config: DeploymentConfig,
    *,
    name: str,
    role: Role,
    group: tuple[Device, ...],
    sink: Callable[[Sequence[TokenEvent]], None],
    governor: AnyGovernor | None = None,
    sharing: int = 1,
    grammars: Grammars | None = None,
) -> Instance:
    """One instance, not yet started.

    Args:
        group: its devices, where `weights` lie.
        sink: receives its events, on its thread.
        sharing: how many instances these devices have.
        grammars: over the model's vocabulary.
    """
    adapters = None
    if config.max_loras:  # before pages take what is left of the memory
        adapters = AdapterSlots(
            shape,
            weights.dtype,
            count=config.max_loras,
            rank=config.max_lora_rank,
            placement=_placement(group),
        )
    on_cpu = group[0].platform == "cpu"
    scheduler = _scheduler_config(shape, config, role, group, sharing, weights.dtype)
    guesses = None if role == "prefill" else config.speculation
    executor = JaxExecutor(
        shape,
        weights,
        scheduler,
        placement=_placement(group),
        # The portable attention reads a piece's own tokens from pages as it does earlier ones.
        shapes=ExecutorConfig.for_scheduler(
            scheduler,
            distinguish_first=not on_cpu,
            adapter_buckets=adapter_buckets(config.max_loras, few=on_cpu),
            guesses=0 if guesses is None else guesses.num_speculative_tokens,
        ),
        cache_form=config.cache_form,
        grammars=grammars,
        adapters=adapters,
    )
    instance = Instance(
        name,
        Scheduler(
            scheduler,
            None if guesses is None else Speculation(guesses, ready=executor.can_guess),
        ),
        executor,
        governor=governor or NoGovernor(),
        clock=WallClock(),
        sink=sink,
    )
    if scheduler.host_pages:
        instance.copies = HostCopies(executor, scheduler.host_pages, instance.post)
    return instance


def adapter_buckets(count: int, *, few: bool) -> tuple[int, ...]:
    """How many of `count` adapters steps are compiled for; `few` where compiling is dear."""
    if few or not count:
        return (count,) if count else ()
    buckets = [1]
    while buckets[-1] < count:
        buckets.append(min(4 * buckets[-1], count))
    return tuple(buckets)


def connect(
    instance: Instance, send: Callable[[Message], None], pages: PageTransfer | None = None
) -> None:
    """Gives an instance its part in hand-overs, if its role has one."""
    role = instance.scheduler.config.role
    if role != "both":
        side = Sender if role == "prefill" else Receiver
        instance.transfer = side(instance, send, pages or SameProcess())


def _placement(group: tuple[Device, ...]) -> jax.sharding.Sharding:
    if len(group) == 1:
        return jax.sharding.SingleDeviceSharding(group[0])
    if len(set(group)) < len(group):
        raise UsageError(
            f"tensor_parallel={len(group)} needs as many devices for each instance; "
            f"{len(set(group))} are left for one: use fewer instances or a lower value"
        )
    return NamedSharding(mesh_over(group), PartitionSpec())


def choose_devices(count: int) -> list[Device]:
    """A device for each instance; GPUs are shared in turn where there are too few.

    On CPU every instance gets a virtual device of its own, if JAX has not started yet.
    """
    try:
        return request_devices(count)
    except UsageError:
        present = jax.devices()
        if present[0].platform == "cpu":
            raise
    return [present[index % len(present)] for index in range(count)]


def compile_ahead(
    instances: Iterable[Member],
    *,
    everything: bool = False,
    begin: Callable[[int], None] | None = None,
    done: Callable[[], None] | None = None,
) -> None:
    """Compiles what serving cannot do without, or every step there is, and runs it once.

    The instances, which must not have been started, do so in parallel.

    Args:
        begin: told how many steps there are.
        done: told of each that is ready, on whatever thread.

    Raises:
        Exception: the first that a step ended with.
    """
    local = _local(instances)
    if begin is not None:
        begin(sum(len(_steps(executor, everything)) for _, executor in local))
    failures: list[Exception] = []

    def run(executor: JaxExecutor) -> None:
        try:
            _compile(executor, everything, done)
        except Exception as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for _, one in local]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class BackgroundCompilation:
    """Compiles the other steps while the server already serves; an idle instance runs them once."""

    def __init__(self, instances: Iterable[Member]):
        self._instances = _local(instances)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="compile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends after the step at work: a process must not exit while XLA compiles."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        started_s = time.monotonic()
        for instance, executor in self._instances:
            speculation = instance.scheduler.speculation
            buckets = instance.scheduler.config.decode_buckets
            for key in executor.steps.others():
                if self._stopping.is_set():
                    return
                executor.steps.compile(key)
                instance.post(functools.partial(_run_if_idle, instance, executor, key))
                if speculation is not None and speculation.ready_for(buckets):
                    seconds = round(time.monotonic() - started_s, 1)
                    logger.info(
                        "guesses begin", extra={"instance": instance.name, "seconds": seconds}
                    )
                    speculation = None  # said once
        logger.info("compiled", extra={"seconds": round(time.monotonic() - started_s, 1)})


def _local(instances: Iterable[Member]) -> list[tuple[Instance, JaxExecutor]]:
    """Those of this process."""
    return [
        (one, one.executor)
        for one in instances
        if isinstance(one, Instance) and isinstance(one.executor, JaxExecutor)
    ]


def _steps(executor: JaxExecutor, everything: bool) -> list[tuple]:
    return [*executor.steps.essential(), *(executor.steps.others() if everything else ())]


def _compile(executor: JaxExecutor, everything: bool, done: Callable[[], None] | None) -> None:
    for key in _steps(executor, everything):
        executor.steps.compile(key)
        executor.run_once(key)
        if done is not None:
            done()


def _run_if_idle(instance: Instance, executor: JaxExecutor, key: tuple) -> None:
    if not instance.requests:
        executor.run_once(key)


def _scheduler_config(
    shape: DecoderConfig,
    config: DeploymentConfig,
    role: Role,
    group: tuple[Device, ...],
    sharing: int,
    dtype: DTypeLike,
) -> SchedulerConfig:
    device = group[0]
    on_cpu = device.platform == "cpu"
    page_size = _page_size(config, device)
    max_batch = config.max_batch or (16 if on_cpu else 128)
    check_served(shape, config.max_length)
    if config.max_length > shape.max_positions:
        raise UsageError(
            f"max_length={config.max_length} exceeds the model's {shape.max_positions} positions; "
            f"use {shape.max_positions} or less"
        )
    groups = cache_groups(shape)
    longest = _most_pages(groups, config, device)
    page_count = config.page_count
    of_number = number_bytes(shape, dtype, config.cache_form)
    cache = layer_cache(shape, shape.kinds[0])
    page_bytes = groups.depth * page_size * cache.token_numbers * of_number
    if page_count is None:
        page_count = 4 * longest
        stats = None if on_cpu else device.memory_stats()
        if stats:
            ways = 1 if cache.split is None else len(group)
            free_bytes = (
                (stats["bytes_limit"] - stats["bytes_in_use"]) * CACHE_SHARE / sharing * ways
            )
            page_count = int(free_bytes / page_bytes)
            if page_count < longest:
                raise UsageError(
                    f"{free_bytes / 2**30:.1f} GiB for pages hold {page_count} of {page_size} "
                    f"tokens, below the {longest} of max_length={config.max_length}; lower it or "
                    "use fewer instances a device"
                )
    _check_pages(shape, config, device, page_count)
    # Compiled steps are dear to make on CPU and padding is cheap; on accelerators the reverse.
    factor = 4 if on_cpu else 2
    buckets = [1]
    while buckets[-1] < max_batch:
        buckets.append(min(factor * buckets[-1], max_batch))
    return SchedulerConfig(
        page_count=page_count,
        page_size=page_size,
        max_batch=max_batch,
        max_prefill_tokens=prefill_budget(config, device),
        max_length=config.max_length,
        decode_buckets=tuple(buckets),
        role=role,
        prefix_caching=config.prefix_caching,
        windows=groups.windows,
        host_pages=_host_pages(config, role, groups, page_bytes),
        pair_cost=4.0 * shape.num_heads * shape.head_dim / (2.0 * _token_numbers(shape)),
    )


def _host_pages(
    config: DeploymentConfig, role: Role, groups: CacheGroups, page_bytes: float
) -> int:
    """Pages that the host keeps of an instance."""
    if not config.host_pages_gib or role == "decode":  # it computes no prompts but preempted ones
        return 0
    if groups.windows != (None,):
        raise UsageError(
            f"host_pages_gib={config.host_pages_gib:g} keeps pages of layers that see all tokens; "
            f"this model has layers with windows: leave it out"
        )
    count = int(config.host_pages_gib * 2**30 / page_bytes)
    if count < 1:
        raise UsageError(
            f"host_pages_gib={config.host_pages_gib:g} holds no page of {page_bytes / 2**20:.1f} "
            f"MiB; give more"
        )
    return count


def _token_numbers(shape: DecoderConfig) -> float:
    """Weights that a token is multiplied with, of a layer on the mean."""
    return (
        sum(
            len(shape.layers_of(kind)) * shape.active_block_parameter_count(kind)
            for kind in shape.kinds
        )
        / shape.num_layers
    )


def _page_size(config: DeploymentConfig, device: Device) -> int:
    """Tokens a page holds there."""
    return config.page_size or (16 if device.platform == "cpu" else ACCELERATOR_PAGE)


def _most_pages(groups: CacheGroups, config: DeploymentConfig, device: Device) -> int:
    """Pages that a request of `max_length` holds at most."""
    ahead, size = prefill_budget(config, device) + 1, _page_size(config, device)
    return sum(most_held(window, config.max_length, ahead, size) for window in groups.windows)


def _check_pages(
    shape: DecoderConfig, config: DeploymentConfig, device: Device, page_count: int
) -> None:
    """Raises UsageError if `page_count` pages are too few for a request of `max_length`."""
    size, most, groups = _page_size(config, device), config.max_length, cache_groups(shape)
    pages = f"{page_count} pages" if config.page_count is None else f"page_count={page_count}"
    if len(groups.windows) > 1:
        longest = _most_pages(groups, config, device)
        if page_count < longest:
            raise UsageError(
                f"{pages} is below the {longest} pages of {size} tokens that "
                f"{len(groups.windows)} groups of layers need for max_length={most}; use "
                f"page_count={longest} or more, or lower max_length"
            )
    elif page_count * size < most:
        # A size that nobody gave is not said as if somebody had.
        tokens = f"{size} tokens a page" if config.page_size is None else f"page_size={size} tokens"
        raise UsageError(
            f"{pages} x {tokens} hold {page_count * size} tokens, below max_length={most}; use "
            f"page_count={-(-most // size)} or more, or lower max_length"
        )
