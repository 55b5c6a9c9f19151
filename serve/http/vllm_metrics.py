"""The server's figures by vLLM's names, for dashboards and autoscalers that were made for those.

Each is made of ours when it is asked for, with the label `model_name`: the same numbers twice,
never two counts of one thing.
"""

import time
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from jaxsys.serve.engine import Engine
from jaxsys.serve.member import InstanceLoad

RENAMED: Mapping[str, tuple[str, ...]] = {
    "jaxsys_ttft_seconds": ("time_to_first_token_seconds",),
    "jaxsys_itl_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "jaxsys_request_seconds": ("e2e_request_latency_seconds",),
    "jaxsys_queue_seconds": ("request_queue_time_seconds",),
    "jaxsys_request_prompt_tokens": ("request_prompt_tokens",),
    "jaxsys_request_output_tokens": ("request_generation_tokens",),
    "jaxsys_prompt_tokens": ("prompt_tokens", "prefix_cache_queries"),
    "jaxsys_cached_tokens": ("prefix_cache_hits",),
    "jaxsys_output_tokens": ("generation_tokens",),
    "jaxsys_requests": ("request_success",),
}
"""Ours, and what vLLM calls the same."""
LABELS = {"finish_reason": "finished_reason"}
SUCCESSES = ("stop", "length", "abort")
"""Reasons that vLLM counts as such."""


class VllmNames(Collector):
    """Reads another registry when asked."""

    def __init__(self, registry: CollectorRegistry, engine: Engine, model_name: str):
        self.registry = registry
        self.engine = engine
        self.model_name = model_name

    def collect(self) -> Iterable[Metric]:
        for family in self.registry.collect():
            for name in RENAMED.get(family.name, ()):
                yield self._renamed(family, f"vllm:{name}")
        yield from self._loads()

    def _renamed(self, family: Metric, name: str) -> Metric:
        found = Metric(name, family.documentation, family.type)
        for sample in family.samples:
            if sample.labels.get("finish_reason", "stop") not in SUCCESSES:
                continue
            labels = {LABELS.get(key, key): value for key, value in sample.labels.items()}
            labels["model_name"] = self.model_name
            suffix = sample.name.removeprefix(family.name)
            found.add_sample(name + suffix, labels, sample.value)
        return found

    def _loads(self) -> Iterable[Metric]:
        instances = self.engine.instances
        loads = [one.load for one in instances]
        waiting = sum(load.waiting for load in loads)
        pages = sum(one.page_count for one in instances)
        used = sum(load.pages_held for load in loads) / pages if pages else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests that hold pages.", self.engine.unfinished - waiting),
            ("num_requests_waiting", "Requests that wait for pages or prefill.", waiting),
            ("kv_cache_usage_perc", "Share of the pages that requests hold, from 0 to 1.", used),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=("model_name",))
            gauge.add_metric([self.model_name], max(0.0, float(value)))
            yield gauge
        counter = CounterMetricFamily(
            "vllm:num_preemptions", "Requests whose pages were taken back.", labels=("model_name",)
        )
        counter.add_metric([self.model_name], sum(load.preemptions for load in loads))
        yield counter
        if self.engine.adapters.most:
            yield self._adapters()
        yield from self._guesses([load for load in loads if load.drafts is not None])

    def _adapters(self) -> Metric:
        """Names in labels, the time as the value: vLLM's form."""
        used = self.engine.by_adapter()
        running = [name for name, (_, begun) in used.items() if begun]
        waiting = [name for name, (fresh, _) in used.items() if fresh]
        found = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and of waiting requests.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        names = [",".join(sorted(group)) for group in (running, waiting)]
        found.add_metric([str(self.engine.adapters.most), *names], time.time())
        return found

    def _guesses(self, loads: Sequence[InstanceLoad]) -> Iterable[Metric]:
        """What became of guessed tokens, where tokens are guessed."""
        if not loads:
            return
        places = max(len(load.accepted_at) for load in loads)
        at = [
            sum(load.accepted_at[place] for load in loads if place < len(load.accepted_at))
            for place in range(places)
        ]
        for name, text, value in (
            ("drafts", "Guesses computed.", sum(load.drafts or 0 for load in loads)),
            ("draft_tokens", "Tokens guessed.", sum(load.draft_tokens for load in loads)),
            ("accepted_tokens", "Of these, tokens that were right.", sum(at)),
        ):
            counter = CounterMetricFamily(
                f"vllm:spec_decode_num_{name}", text, labels=("model_name",)
            )
            counter.add_metric([self.model_name], value)
            yield counter
        by_place = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "The same by place in the guess, from 0.",
            labels=("model_name", "position"),
        )
        for place, value in enumerate(at):
            by_place.add_metric([self.model_name, str(place)], value)
        yield by_place
