"""Deployments of a model on a number of GPUs, and what each could do at best.

A deployment is instances of `tensor_parallel` GPUs each: `prefill` that read prompts and `decode`
that write answers, or, with no decode instances, ones that do both. Before any is replayed, a bound
is taken from means, at L requests a second of p tokens in and o out:

    prefill  busy share   L / P * t_prompt                     t_prompt of a full batch, the clock's
    decode   batch N      N / T(N) = L o / D                   tokens that come are those that leave

Neither share may be 1, nor T(N) above the ITL; the least energy is that of the clock that takes
least, busy and idle, at that load. Arrivals that fluctuate only make it worse, so what the bound
rules out need not be replayed, and a replay's joules lie above the bound's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.model.config import DecoderConfig
from jaxsys.serve.energy.governors import VALUE_BYTES, Served
from jaxsys.serve.energy.gpu_model import Load, SimulatedGpu, gpu_spec
from jaxsys.serve.energy.slo import Slo
from jaxsys.serve.simulation.traces import RequestTrace

FULL = 0.98
"""Busy share at which an instance is taken to be full."""
WAYS = (1, 2, 4, 8)
"""GPUs an instance that are tried: those of one machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What runs where, apart from who sets the clocks."""

    gpu: str
    tensor_parallel: int
    prefill: int
    decode: int
    """With 0 the `prefill` ones do both."""
    max_batch: int
    weights: str

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * (self.prefill + self.decode)

    @property
    def label(self) -> str:
        apart = f"{self.prefill}P{self.decode}D" if self.decode else f"{self.prefill} both"
        return (
            f"{apart} x {self.tensor_parallel} {self.gpu}, {self.weights}, batch {self.max_batch}"
        )


@dataclass(frozen=True, slots=True)
class Demand:
    """Means of what is asked for."""

    per_s: float
    prompt: float
    """Tokens."""
    output: float
    context: float
    """Of a sequence that decodes, at a random moment: long answers are met more often."""


def demand_of(trace: RequestTrace) -> Demand:
    """The trace's means."""
    prompts, outputs = (x.astype(float) for x in (trace.prompt_tokens, trace.output_tokens))
    weight = outputs.sum()
    context = float((outputs * (prompts + outputs / 2)).sum() / weight)
    return Demand(trace.rate_per_s, float(prompts.mean()), float(outputs.mean()), context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a deployment could do at best."""

    prefill_share: float
    """Busy share of the prefill instances at the highest clock; of all where they do both."""
    decode_share: float
    """Tokens asked for, of those that decode instances could write within the ITL."""
    itl_s: float
    """Of steady decoding at the highest clock ..."""
    batch: int
    """... and the sequences of it."""
    energy_j_per_token: float
    why_not: str | None
    """What rules it out."""

    @property
    def busiest(self) -> float:
        return max(self.prefill_share, self.decode_share)


def check_model(config: DecoderConfig, ways: Sequence[int]) -> tuple[int, ...]:
    """Of `ways` those that divide the model's heads and those of keys and values."""
    fit = tuple(w for w in ways if config.num_heads % w == 0 and config.num_kv_heads % w == 0)
    if not fit:
        raise UsageError(
            f"tensor_parallel={','.join(map(str, ways))} divides neither {config.num_heads} heads "
            f"nor {config.num_kv_heads} of keys and values"
        )
    return fit


class Bounds:
    """Bounds of a model's deployments under one demand."""

    def __init__(
        self, config: DecoderConfig, demand: Demand, slo: Slo, *, prefill_budget: int = 2048
    ) -> None:
        self.config = config
        self.demand = demand
        self.slo = slo
        self.prefill_budget = prefill_budget
        self._gpus: dict[tuple[str, int, str], SimulatedGpu | None] = {}

    def gpu(self, gpu: str, ways: int, weights: str) -> SimulatedGpu | None:
        """The modelled instance; None where the model does not fit it."""
        key = (gpu, ways, weights)
        if key not in self._gpus:
            if weights not in VALUE_BYTES:
                raise UsageError(
                    f"weights={weights!r} is not known; use one of {', '.join(VALUE_BYTES)}"
                )
            shape = Served(model=self.config, weights=weights, tensor_parallel=ways).shape()
            try:
                self._gpus[key] = SimulatedGpu(gpu_spec(gpu), shape)
            except UsageError:  # it does not fit
                self._gpus[key] = None
        return self._gpus[key]

    def of(self, deployment: Deployment, rate_per_s: float | None = None) -> Bound:
        """The bound, at the demand's rate or another."""
        gpu = self.gpu(deployment.gpu, deployment.tensor_parallel, deployment.weights)
        if gpu is None:
            return _ruled_out("the model does not fit")
        demand = self.demand
        per_s = demand.per_s if rate_per_s is None else rate_per_s
        top, spec = gpu.spec.max_mhz, gpu.spec
        together = max(1, int(self.prefill_budget / demand.prompt))
        prompts = Load(prefill_tokens=round(together * demand.prompt), prefill_requests=together)
        alone = Load(prefill_tokens=round(demand.prompt), prefill_requests=1)
        if gpu.run(alone, top).time_s > self.slo.ttft_s:
            return _ruled_out("a prompt of mean length takes longer than the TTFT")
        most = min(deployment.max_batch, int(gpu.kv_capacity_tokens / demand.context))
        if most < 1:
            return _ruled_out("no sequence of mean length fits beside the weights")
        apart = deployment.decode > 0
        readers = deployment.prefill
        writers = deployment.decode or deployment.prefill
        best_j = math.inf
        found: tuple[float, float, float, int] | None = None
        for mhz in dict.fromkeys((top, *reversed(spec.control_mhz))):
            prompt = gpu.run(prompts, mhz)
            reading = per_s / readers * prompt.time_s / together
            free = 1.0 if apart else 1.0 - reading
            if free <= 0:
                found = found or (reading, math.inf, math.inf, most)
                continue
            tokens_per_s = per_s * demand.output / writers / free
            batch, itl_s, most_per_s = self._steady(gpu, mhz, tokens_per_s, most)
            writing = tokens_per_s / most_per_s if most_per_s else math.inf
            found = found or (reading, writing, itl_s, batch)
            if reading >= FULL or writing >= FULL:
                continue
            step = gpu.run(Load(batch=batch, kv_tokens=round(batch * demand.context)), mhz)
            idle_w = gpu.idle_power_w(spec.control_mhz[0])
            # A batch below one is an instance that idles in between.
            busy = min(1.0, tokens_per_s * step.time_s / batch)
            written_w = busy * step.power_w + (1 - busy) * idle_w
            if apart:
                read_w = reading * prompt.power_w + (1 - reading) * idle_w
                total_w = readers * read_w + writers * written_w
            else:
                total_w = writers * (reading * prompt.power_w + (1 - reading) * written_w)
            best_j = min(best_j, total_w / (per_s * demand.output))
        assert found is not None
        reading, writing, itl_s, batch = found
        why = None
        if reading >= FULL:
            why = f"prompts alone keep it {100 * reading:.0f} % busy"
        elif writing >= FULL:
            why = (
                f"{100 * writing:.0f} % of the tokens that it can write within the ITL"
                if math.isfinite(writing)
                else "one sequence alone takes longer than the ITL"
            )
        return Bound(
            prefill_share=reading,
            decode_share=writing,
            itl_s=itl_s,
            batch=batch,
            energy_j_per_token=best_j,
            why_not=why,
        )

    def _steady(
        self, gpu: SimulatedGpu, mhz: int, tokens_per_s: float, most: int
    ) -> tuple[int, float, float]:
        """The batch at which as many tokens leave as come, its step, and the most a second within
        the ITL."""
        context = self.demand.context

        def step_s(batch: int) -> float:
            return gpu.run(Load(batch=batch, kv_tokens=round(batch * context)), mhz).time_s

        if step_s(1) > self.slo.itl_s:
            return 1, step_s(1), 0.0
        low, high = 1, most  # the largest batch whose step keeps the ITL
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if step_s(middle) <= self.slo.itl_s else (low, middle - 1)
        largest = low
        per_s = largest / step_s(largest)
        low, high = 1, largest
        while low < high:  # tokens a second rise with the batch
            middle = (low + high) // 2
            enough = middle / step_s(middle) >= tokens_per_s
            low, high = (low, middle) if enough else (middle + 1, high)
        return low, step_s(low), per_s

    def least_rate(self, deployment: Deployment) -> float:
        """The rate that it could just serve, as a share of the demand's."""
        low, high = 0.0, 64.0
        for _ in range(20):
            middle = (low + high) / 2
            ruled_out = self.of(deployment, middle * self.demand.per_s).why_not
            low, high = (middle, high) if ruled_out is None else (low, middle)
        return low


def _ruled_out(why: str) -> Bound:
    return Bound(
        prefill_share=math.inf,
        decode_share=math.inf,
        itl_s=math.inf,
        batch=0,
        energy_j_per_token=math.inf,
        why_not=why,
    )


def candidates(
    bounds: Bounds,
    gpus: Mapping[str, int],
    *,
    ways: Sequence[int],
    weights: Sequence[str],
    batches: Sequence[int],
) -> Iterator[tuple[Deployment, Bound]]:
    """Deployments that the bound lets pass: for each kind, form and size the fewest instances that
    could do, and somewhat and twice as many, as far as there are GPUs. A larger batch is left out
    where a smaller one is twice what steady decoding holds."""
    for gpu, most in gpus.items():
        for tensor_parallel in ways:
            instances = most // tensor_parallel
            for form in weights:
                ample: set[tuple[int, int]] = set()
                for batch in sorted(batches):

                    def make(
                        prefill: int,
                        decode: int,
                        shared: tuple[str, int, str, int] = (gpu, tensor_parallel, form, batch),
                    ) -> Deployment:
                        kind, ways_each, form_each, batch_each = shared
                        return Deployment(
                            gpu=kind,
                            tensor_parallel=ways_each,
                            prefill=prefill,
                            decode=decode,
                            max_batch=batch_each,
                            weights=form_each,
                        )

                    seen: set[tuple[int, int]] = set()
                    for pair in _sizes(bounds, make, instances):
                        if pair in seen | ample or sum(pair) > instances:
                            continue
                        seen.add(pair)
                        deployment = make(*pair)
                        bound = bounds.of(deployment)
                        if bound.why_not is None:
                            if 2 * bound.batch <= batch:
                                ample.add(pair)
                            yield deployment, bound


def _sizes(bounds: Bounds, make, instances: int) -> Iterator[tuple[int, int]]:
    """Numbers of prefill and decode instances to look at."""
    if instances >= 1:
        alone = bounds.of(make(1, 0))
        if math.isfinite(alone.prefill_share):
            least = _least(lambda n: bounds.of(make(n, 0)), instances)
            if least:
                for times in (1.0, 1.25, 1.5, 2.0):
                    yield max(least, math.ceil(least * times)), 0
    if instances < 2:
        return
    # The two shares are apart: neither's count moves the other's.
    one = bounds.of(make(1, 1))
    if not (math.isfinite(one.prefill_share) and math.isfinite(one.decode_share)):
        return
    prefill = max(1, math.ceil(one.prefill_share / FULL))
    decode = max(1, math.ceil(one.decode_share / FULL))
    for p_times, d_times in (
        (1.0, 1.0), (1.25, 1.0), (1.0, 1.25), (1.25, 1.25), (1.5, 1.5), (2.0, 2.0),
    ):  # fmt: skip
        yield math.ceil(prefill * p_times), math.ceil(decode * d_times)


def _least(bound_of, most: int) -> int:
    """The fewest instances that are not ruled out; 0 where even the most are."""
    if bound_of(most).why_not is not None:
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bound_of(middle).why_not is None else (middle + 1, high)
    return low


def lengths_summary(trace: RequestTrace) -> str:
    """The trace's demand in words."""
    prompts, outputs = trace.prompt_tokens, trace.output_tokens
    return (
        f"{len(trace)} requests at {trace.rate_per_s:.3g} a second, {np.mean(prompts):.0f} tokens "
        f"in and {np.mean(outputs):.0f} out on average"
    )
