"""What answers and /metrics say of energy: shares by role, per token, measured or modelled."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from jaxsys.serve.clock import VirtualClock
from jaxsys.serve.http.answers import Usage
from jaxsys.serve.http.metrics import Metrics
from jaxsys.serve.instance import InstanceLoad, TokenEvent
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.processes.remote import RemoteInstance
from jaxsys.serve.requests import Request, SamplingParameters

NO_ADAPTERS = SimpleNamespace(most=0)


def instance(name: str, energy_method: str, **load: Any) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, clock_mhz=1080, page_count=9, energy_method=energy_method,
        load=InstanceLoad(**load), on_latency=None,
    )  # fmt: skip


def request(name: Any = 0) -> Request:
    return Request(name, sampling=SamplingParameters(), arrival_s=0.0, prompt_length=5)


def figures(metrics: Metrics) -> dict[str, float]:
    lines = metrics.text().decode().splitlines()
    rows = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def test_usage_says_by_role_and_kind():
    usage = Usage(10, 5, 0, 20.0, 15.0)
    body = usage.body("modelled: a simulated GPU")
    assert (body["energy_j"], body["energy_kind"]) == (20.0, "modelled")
    assert body["joules_per_output_token"] == 4.0
    assert body["joules_per_output_token_by_role"] == {"prefill": 3.0, "decode": 1.0}
    assert "energy_kind" not in Usage(10, 5).body("none: nothing reads energy")


def test_metrics_count_every_joule_of_a_role_also_of_instances_that_are_gone():
    prefill = instance("prefill-0", "measured: a counter", energy_j=60.0, power_w=300.0)
    decode = [
        instance(f"decode-{k}", "measured: a counter", energy_j=20.0, idle_energy_j=5.0)
        for k in range(2)
    ]
    engine: Any = SimpleNamespace(
        adapters=NO_ADAPTERS, apart=True, entries=[prefill], decoders=decode, unfinished=0
    )
    engine.instances = [prefill, *decode]
    metrics = Metrics(engine)
    assert not any("per_output_token{" in name for name in figures(metrics))  # no token, no ratio
    one = request()
    for k in range(10):
        metrics.on_token(one, TokenEvent(one, 7, None, None, 0.1 * k))
    found = figures(metrics)
    per_token = 'jaxsys_joules_per_output_token{kind="measured",role="%s"}'
    assert found[per_token % "prefill"] == pytest.approx(6.0)
    assert found[per_token % "decode"] == pytest.approx(4.0)
    assert found['jaxsys_power_watts{instance="prefill-0"}'] == 300.0
    assert 'jaxsys_power_watts{instance="decode-0"}' not in found
    assert found['jaxsys_idle_energy_joules_total{instance="decode-0"}'] == 5.0
    engine.decoders, engine.instances = decode[:1], [prefill, decode[0]]  # one is retired
    assert figures(metrics)[per_token % "decode"] == pytest.approx(4.0)


def test_tokens_computed_ahead_of_the_end_do_not_count():
    engine: Any = SimpleNamespace(
        adapters=NO_ADAPTERS, apart=False, entries=[], decoders=[], instances=[], unfinished=0
    )
    metrics, one = Metrics(engine), request()
    # A stop string ended it at its second token; the instance had computed two more by then.
    one.timing.token_times_s += [0.1, 0.2, 0.3, 0.4]
    one.generated, one.timing.energy_j = 4, 8.0
    metrics.on_token(one, TokenEvent(one, 7, None, None, 0.1))
    metrics.on_token(one, TokenEvent(one, 7, None, "stop", 0.2))
    assert figures(metrics)["jaxsys_output_token_energy_joules_sum"] == 4.0
    assert figures(metrics)["jaxsys_request_output_tokens_sum"] == 2.0


def test_figures_are_there_by_vllms_names_too():
    engine: Any = SimpleNamespace(
        adapters=NO_ADAPTERS, apart=False, entries=[], decoders=[], unfinished=3
    )
    engine.instances = [instance("a", "none", waiting=2, pages_held=6, preemptions=4)]
    metrics, one = Metrics(engine, "m"), request()
    one.timing.scheduled_s = one.timing.arrival_s + 0.5
    one.timing.token_times_s += [1.0, 1.5]
    metrics.on_token(one, TokenEvent(one, 7, None, None, 1.0))
    metrics.on_token(one, TokenEvent(one, 7, None, "length", 1.5))
    broken = request()
    metrics.on_token(broken, TokenEvent(broken, None, None, "error", 2.0))
    found = figures(metrics)
    named = {name: value for name, value in found.items() if name.startswith("vllm:")}
    assert all('model_name="m"' in name for name in named)
    for name, value in [
        ("time_to_first_token_seconds_sum", 1.0),
        ("inter_token_latency_seconds_sum", 0.5),
        ("request_queue_time_seconds_sum", 0.5),
        ("generation_tokens_total", 2.0),
        ("request_generation_tokens_sum", 2.0),
        ("num_requests_waiting", 2.0),
        ("num_requests_running", 1.0),
        ("num_preemptions_total", 4.0),
        ("kv_cache_usage_perc", 6 / engine.instances[0].page_count),
    ]:
        assert named[f'vllm:{name}{{model_name="m"}}'] == pytest.approx(value), name
    ended = 'vllm:request_success_total{finished_reason="%s",model_name="m"}'
    assert named[ended % "length"] == 1.0 and ended % "error" not in named
    assert found['jaxsys_requests_total{finish_reason="error"}'] == 1.0


def test_a_request_through_two_processes_keeps_its_energy_by_role():
    async def run():
        engine: Any = SimpleNamespace(clock=VirtualClock())
        config = SchedulerConfig(page_count=9)
        sides = [
            RemoteInstance(name, config, energy_method="measured", process="", engine=engine,
                           transport=SimpleNamespace(write=lambda data: None,  # type: ignore[arg-type]
                                                     is_closing=lambda: False))
            for name in ("prefill-0", "decode-0")
        ]  # fmt: skip
        one = request("r")
        for side in sides:
            side.requests["r"] = one
        sides[0]._event(["r", 7, None, None, "", False, [3.0, 3.0], 0, 0, None, None, 0.25], 0.1)
        sides[1]._event(["r", 8, None, None, "", False, [1.0, None], 0, 0, None, None, None], 0.2)
        # Preempted there, its prompt was computed again.
        sides[1]._event(["r", 9, "length", None, "", False, [4.0, 2.0], 0, 1, None, None, 0.5], 0.3)
        return one.timing

    timing = asyncio.run(run())
    assert (timing.energy_j, timing.prefill_energy_j) == (7.0, 5.0)
    assert timing.scheduled_s == timing.arrival_s + 0.25  # the first time
