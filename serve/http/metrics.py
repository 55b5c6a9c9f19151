"""What the server counts, in Prometheus form.

Latencies are taken where tokens reach the host: TTFT from arrival at the server to the first token,
ITL between consecutive tokens of a request. Energy is what each instance's governor reads, by the
method it states; a request's share of an iteration is by the tokens and bytes it causes, and is
absent where nothing reads energy. Energy per output token counts all that instances of a role took,
idle time included, those that are gone too.
"""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import prometheus_client
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from jaxsys.serve.engine import Engine
from jaxsys.serve.http.vllm_metrics import VllmNames
from jaxsys.serve.member import Member, TokenEvent
from jaxsys.serve.requests import Request

# Seconds: fine around the 10-60 ms that decode SLOs ask for and the 0.2-2 s of TTFT.
ITL_BUCKETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1, 2)
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 1.5, 2, 3, 5, 10, 30)
QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.6, 1, 2, 5, 10, 30, 60)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
ENERGY_BUCKETS = (0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


Key = tuple[str, str, tuple[tuple[str, str], ...]]
"""Family, sample and labels."""
Totals = dict[Key, float]
"""What one front has counted since it started."""


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(
        self,
        engine: Engine,
        model_name: str = "",
        others: Callable[[], Sequence[Totals]] = lambda: (),
    ):
        """
        Args:
            model_name: label of the figures that are there by vLLM's names too.
            others: what fronts in other processes have counted, to be shown with this.
        """
        self.registry = CollectorRegistry()
        """All there is to show."""
        self.engine = engine
        self._own = CollectorRegistry()
        self._others = others
        self.registry.register(_Sums(self._own, others))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> "_Histogram":
            found = _Histogram(name, text, buckets)
            self._own.register(found)
            return found

        def counter(name: str, text: str, labels: tuple = ()):
            return prometheus_client.Counter(name, text, labels, registry=self._own)

        self.ttft = histogram("jaxsys_ttft_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self.itl = histogram("jaxsys_itl_seconds", "Between tokens of a request.", ITL_BUCKETS)
        self.latency = histogram(
            "jaxsys_request_seconds", "Arrival to last token.", REQUEST_BUCKETS
        )
        self.iteration = prometheus_client.Histogram(
            "jaxsys_iteration_seconds",
            "One iteration on the device.",
            ("instance",),
            buckets=ITL_BUCKETS,
            registry=self._own,
        )
        self.queue = histogram(
            "jaxsys_queue_seconds", "Arrival to the first piece of the prompt.", QUEUE_BUCKETS
        )
        self.prompt_lengths = histogram(
            "jaxsys_request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS
        )
        self.output_lengths = histogram(
            "jaxsys_request_output_tokens", "Tokens given out of a request.", TOKEN_BUCKETS
        )
        self.request_energy = histogram(
            "jaxsys_request_energy_joules", "Energy attributed to a request.", ENERGY_BUCKETS
        )
        self.token_energy = histogram(
            "jaxsys_output_token_energy_joules",
            "A request's energy over its output tokens.",
            tuple(value / 100 for value in ENERGY_BUCKETS),
        )
        self.requests = counter("jaxsys_requests", "Requests that ended.", ("finish_reason",))
        self.refused = counter("jaxsys_requests_refused", "Requests refused.", ("status",))
        self.prompt_tokens = counter("jaxsys_prompt_tokens", "Prompt tokens of ended requests.")
        self.cached_tokens = counter("jaxsys_cached_tokens", "Of these, found in the prefix cache.")
        self._tokens = 0
        self._own.register(_Tokens(lambda: self._tokens))
        self.registry.register(_EngineCollector(engine, self._all_tokens))
        self._by_vllm = CollectorRegistry()
        self._by_vllm.register(VllmNames(self.registry, engine, model_name))

    def on_token(self, request: Request, event: TokenEvent) -> None:
        """Counts one event of `Engine`."""
        timing = request.timing
        if event.token is not None:
            self._tokens += 1
            times = timing.token_times_s
            if len(times) <= 1 or event.time_s <= times[0]:
                self.ttft.observe(event.time_s - timing.arrival_s)
            else:
                # Later tokens may be in the record already: look for this event's own. Those of one
                # step come together, and each has its share of the time since the step before.
                index = bisect.bisect_left(times, event.time_s)
                together = bisect.bisect_right(times, event.time_s, lo=index) - index
                gap_s = event.time_s - times[index - 1] if index else 0.0
                self.itl.observe(gap_s / max(1, together))
        if event.finish_reason is None:
            return
        ended = event.request
        self.requests.labels(event.finish_reason).inc()
        self.prompt_tokens.inc(ended.prompt_length)
        self.cached_tokens.inc(ended.cached_tokens)
        self.latency.observe(event.time_s - timing.arrival_s)
        self.prompt_lengths.observe(ended.prompt_length)
        # Those given out: the instance may have computed more of it meanwhile.
        tokens = bisect.bisect_right(timing.token_times_s, event.time_s)
        self.output_lengths.observe(tokens)
        if timing.scheduled_s is not None:
            self.queue.observe(max(0.0, timing.scheduled_s - timing.arrival_s))
        if timing.energy_j is not None:
            self.request_energy.observe(timing.energy_j)
            if tokens:
                self.token_energy.observe(timing.energy_j / tokens)

    def count_refused(self) -> int:
        """Requests refused so far, whatever the status."""
        (family,) = self.refused.collect()
        own = sum(s.value for s in family.samples if s.name.endswith("_total"))
        return round(own + self._of_others(f"{family.name}_total"))

    def totals(self) -> Totals:
        """What was counted here so far."""
        return {
            (family.name, sample.name, tuple(sample.labels.items())): sample.value
            for family in self._own.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    def _all_tokens(self) -> float:
        return self._tokens + self._of_others("jaxsys_output_tokens_total")

    def _of_others(self, name: str) -> float:
        return sum(
            value
            for totals in self._others()
            for (_, sample, _), value in totals.items()
            if sample == name
        )

    def watch(self) -> None:
        """Has every instance, and each that joins later, report its iterations."""
        for instance in self.engine.instances:
            self._watch(instance)
        self.engine.on_join = self._watch

    def _watch(self, instance: Member) -> None:
        instance.on_latency = self.iteration.labels(instance.name).observe

    def text(self) -> bytes:
        """The exposition format."""
        ours = prometheus_client.generate_latest(self.registry)
        return ours + prometheus_client.generate_latest(self._by_vllm)


class _Histogram(Collector):
    """As Prometheus' own without labels, for one thread: a token passes two of them."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]):
        self._name = name
        self._text = text
        self._buckets = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one."""
        self._counts[bisect.bisect_left(self._buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        names = [*map(floatToGoString, self._buckets), "+Inf"]
        up_to = itertools.accumulate(self._counts)
        found = HistogramMetricFamily(self._name, self._text)
        found.add_metric([], list(zip(names, up_to, strict=True)), self._sum)
        return [found]


class _Tokens(Collector):
    """The count of tokens, likewise."""

    def __init__(self, count: Callable[[], int]):
        self._count = count

    def collect(self) -> Iterable[Metric]:
        return [CounterMetricFamily("jaxsys_output_tokens", "Tokens generated.", self._count())]


class _Sums(Collector):
    """A registry's counts with those of others added."""

    def __init__(self, own: CollectorRegistry, others: Callable[[], Sequence[Totals]]):
        self._own = own
        self._others = others

    def collect(self) -> Iterable[Metric]:
        others = self._others()
        for family in self._own.collect():
            if not others:
                yield family
                continue
            sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
            for sample in family.samples:
                sums[sample.name, tuple(sample.labels.items())] = sample.value
            for totals in others:
                for (name, sample, labels), value in totals.items():
                    if name == family.name:
                        sums[sample, labels] = sums.get((sample, labels), 0.0) + value
            found = Metric(family.name, family.documentation, family.type)
            for (name, labels), value in sums.items():
                found.add_sample(name, dict(labels), value)
            yield found


class _EngineCollector(Collector):
    """Reads the instances when asked."""

    def __init__(self, engine: Engine, output_tokens: Callable[[], float]):
        self.engine = engine
        self.output_tokens = output_tokens
        self._energies_j: dict[str, tuple[str, str, float]] = {}
        """By instance: role, kind and what it took, also of those that are gone."""

    def collect(self) -> Iterable[Metric]:
        gauges = {
            name: GaugeMetricFamily(f"jaxsys_{name}", text, labels=("instance",))
            for name, text in (
                ("batch", "Requests that decode."),
                ("waiting_requests", "Requests that wait for pages or prefill."),
                ("waiting_tokens", "Prompt tokens that wait."),
                ("kv_tokens", "Tokens attended to by the last iteration."),
                ("kv_pages_used", "Pages held by requests."),
                ("kv_pages", "Pages there are."),
                ("clock_mhz", "Clock last asked for by the governor."),
                ("host_pages_used", "Pages kept in the host's memory."),
                ("guesses_ready", "1 once the steps that guess tokens are compiled; 0 before."),
                ("power_watts", "Power measured; absent where a GPU is only modelled."),
            )
        }
        counters = {
            name: CounterMetricFamily(f"jaxsys_{name}", text, labels=("instance",))
            for name, text in (
                ("iterations", "Iterations planned."),
                ("preemptions", "Requests whose pages were taken back."),
                ("host_pages_fetched", "Pages that came back from the host's memory."),
                ("device_faults", "Faults of the device outlived; its requests began again."),
                ("energy_joules", "Energy of the instance, by the method stated."),
                ("idle_energy_joules", "Of this, what passed while nothing ran."),
                ("energy_at_max_clock_joules", "What the same work would take ungoverned."),
            )
        }
        method = InfoMetricFamily(
            "jaxsys_energy_method", "How energy is known.", labels=("instance",)
        )
        for instance in self.engine.instances:
            label, load = [instance.name], instance.load
            gauges["batch"].add_metric(label, load.batch)
            gauges["waiting_requests"].add_metric(label, load.waiting)
            gauges["waiting_tokens"].add_metric(label, load.waiting_tokens)
            gauges["kv_tokens"].add_metric(label, load.kv_tokens)
            gauges["kv_pages_used"].add_metric(label, load.pages_held)
            gauges["kv_pages"].add_metric(label, instance.page_count)
            counters["iterations"].add_metric(label, load.iterations)
            counters["preemptions"].add_metric(label, load.preemptions)
            counters["device_faults"].add_metric(label, load.faults)
            if load.host_pages is not None:
                gauges["host_pages_used"].add_metric(label, load.host_pages)
                counters["host_pages_fetched"].add_metric(label, load.host_fetched)
            if load.guesses_ready is not None:
                gauges["guesses_ready"].add_metric(label, load.guesses_ready)
            if instance.clock_mhz is not None:
                gauges["clock_mhz"].add_metric(label, instance.clock_mhz)
            if load.power_w is not None:
                gauges["power_watts"].add_metric(label, load.power_w)
            if load.idle_energy_j is not None:
                counters["idle_energy_joules"].add_metric(label, load.idle_energy_j)
            if load.energy_j is not None:
                counters["energy_joules"].add_metric(label, load.energy_j)
            if load.energy_at_max_j is not None:
                counters["energy_at_max_clock_joules"].add_metric(label, load.energy_at_max_j)
            method.add_metric(label, {"method": instance.energy_method})
        total = GaugeMetricFamily("jaxsys_requests_unfinished", "Requests in the engine.")
        total.add_metric([], self.engine.unfinished)
        adapted = [] if not self.engine.adapters.most else [self._by_adapter()]
        return [*gauges.values(), *counters.values(), method, total, *adapted, self._per_token()]

    def _by_adapter(self) -> Metric:
        """Requests in the engine of each adapter that is loaded."""
        counts = {adapter.name: 0 for adapter in self.engine.adapters}
        for name, (waiting, running) in self.engine.by_adapter().items():
            counts[name] = waiting + running
        found = GaugeMetricFamily(
            "jaxsys_adapter_requests", "Requests in the engine, by adapter.", labels=("adapter",)
        )
        for name, count in counts.items():
            found.add_metric([name], count)
        return found

    def _per_token(self) -> Metric:
        """Joules a token of output, by role and kind of knowledge."""
        engine = self.engine
        for role, members in (
            ("prefill" if engine.apart else "both", engine.entries),
            ("decode", engine.decoders),
        ):
            for one in members:
                if one.load.energy_j is not None:
                    kind = one.energy_method.partition(":")[0]
                    self._energies_j[one.name] = role, kind, one.load.energy_j
        sums: defaultdict[tuple[str, str], float] = defaultdict(float)
        for role, kind, energy_j in self._energies_j.values():
            sums[role, kind] += energy_j
        found = GaugeMetricFamily(
            "jaxsys_joules_per_output_token",
            "Energy of a role's instances over all output tokens, idle time included.",
            labels=("role", "kind"),
        )
        tokens = self.output_tokens()
        for labels, energy_j in sums.items():
            if tokens:
                found.add_metric(labels, energy_j / tokens)
        return found
