"""The routers' choices in states drawn by hand."""

import time
from dataclasses import dataclass

import pytest

from jaxsys.errors import UsageError
from jaxsys.serve.energy.ecoroute import (
    EcoRouteConfig,
    EnergyRouter,
    QueueRouter,
    RoundRobinRouter,
    StateSpaceRouter,
)
from jaxsys.serve.energy.gpu_model import Load, simulated_gpu
from jaxsys.serve.energy.predictors import ModelPredictor
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.requests import Request, SamplingParameters

GPU = simulated_gpu("a100-80g", "llama-3-8b")
CLOCKS = (1005, 1410)


@dataclass
class View:
    in_flight: int
    kv_tokens: int = 0
    waiting_tokens: int = 0
    clock_mhz: float | None = 1005
    name: str = "view"

    busy_until_s: float | None = None
    page_size: int = 0
    page_count: int = 0

    @property
    def batch(self) -> int:
        return self.in_flight

    @property
    def waiting_requests(self) -> int:
        return self.in_flight


class Reader(View):
    """Of those that read prompts alone."""

    @property
    def batch(self) -> int:
        return 0


def request(length: int = 100) -> Request:
    return Request(
        0, sampling=SamplingParameters(max_tokens=10), arrival_s=0.0, prompt_length=length
    )


class Levels(StateSpaceRouter):
    """The published rule over levels given by hand."""

    def __init__(self, now, after, late=(0.0, 0.0), *, are_late=True, clocks=(1, 2, 3), **config):
        super().__init__(
            ModelPredictor(GPU),
            SharedSlo(),
            clocks_mhz=clocks,
            config=EcoRouteConfig(**({"tile_from": 0} | config)),
        )
        self._given = (now, after, late, are_late)

    def _levels(self, instances, counts, request):
        return self._given


def slo_between(batch: int, kv_tokens: int) -> SharedSlo:
    """An ITL that `batch` keeps at the sweet spot only just."""
    time_s = GPU.run(Load(batch=batch, kv_tokens=kv_tokens + 50 * batch), CLOCKS[0]).time_s
    return SharedSlo(Slo(itl_s=time_s * 1.0001, reserve=0.0))


def test_round_robin():
    router = RoundRobinRouter()
    views = [View(0), View(0), View(0)]
    assert [router.choose(views, request()) for _ in range(4)] == [0, 1, 2, 0]


def test_below_one_tile_the_lowest_clock_then_the_fewest_requests():
    router = StateSpaceRouter(ModelPredictor(GPU), SharedSlo(), clocks_mhz=CLOCKS)
    views = [View(3, clock_mhz=1410), View(50), View(40)]
    assert router.choose(views, request()) == 2


def test_an_instance_whose_clock_would_rise_is_spared():
    # 0 would rise from level 0 to 1; 1 would stay.
    assert Levels([0, 0], [1, 0]).choose([View(200), View(300)], request()) == 1


def test_the_boosted_instance_is_filled_before_a_slow_one_is_disturbed():
    assert Levels([1, 0], [1, 0]).choose([View(250), View(200)], request()) == 0


def test_wide_spread_sends_the_request_to_the_slowest():
    assert Levels([2, 0], [2, 0]).choose([View(500), View(100)], request()) == 1


def test_ties_take_fewer_tiles_then_more_requests():
    assert Levels([0, 0], [0, 0]).choose([View(130), View(120)], request()) == 1
    assert Levels([0, 0], [0, 0]).choose([View(140), View(150)], request()) == 1


def test_all_at_the_top_takes_the_fewest_tiles():
    assert Levels([2, 2], [2, 2]).choose([View(700), View(500)], request()) == 1


def test_what_is_late_at_every_clock_stays_together():
    views = [View(700), View(500)]
    # Only 0 keeps the SLO with the request: by the published rule 1 would get it.
    assert Levels([2, 2], [2, 2], [0.0, 0.1]).choose(views, request()) == 0
    assert Levels([2, 2], [2, 2], [0.0, 0.1], late_share=0.0).choose(views, request()) == 1
    # Neither does: the later one takes it, unless it is too late.
    assert Levels([2, 2], [2, 2], [0.3, 0.1]).choose(views, request()) == 0
    assert Levels([2, 2], [2, 2], [0.5, 0.1]).choose(views, request()) == 1
    assert Levels([2, 2], [2, 2], [0.6, 0.5]).choose(views, request()) == 1
    # Nor would it, but no token is late yet: by the published rule, as if neither were.
    assert Levels([2, 2], [2, 2], [0.3, 0.1], are_late=False).choose(views, request()) == 1


def test_what_is_looked_ahead_for_is_not_late_yet():
    views = [View(700, kv_tokens=140_000, clock_mhz=1410), View(690, kv_tokens=138_000)]
    now_s, then_s = (
        GPU.run(Load(batch=count, kv_tokens=kv), CLOCKS[1]).time_s
        for count, kv in ((690, 138_000 + 2 * 690), (691, 138_100 + 50 * 691))
    )

    def late(itl_s):
        slo = SharedSlo(Slo(itl_s=itl_s, reserve=0.0))
        router = StateSpaceRouter(ModelPredictor(GPU), slo, clocks_mhz=CLOCKS)
        *_, late, are_late = router._levels(views, [700, 690], request())
        return all(late), are_late

    assert late((now_s + then_s) / 2) == (True, False)
    assert late(now_s * 0.99) == (True, True)
    assert late(then_s * 1.1) == (False, False)


def test_state_space_router_asks_the_predictor_for_the_levels():
    slo = slo_between(301, 60_000)
    router = StateSpaceRouter(ModelPredictor(GPU), slo, clocks_mhz=CLOCKS)
    just_below = View(300, kv_tokens=60_000)
    full = View(330, kv_tokens=66_000, clock_mhz=1410)
    edge = View(301, kv_tokens=60_050)
    now, after, late, are_late = router._levels(
        [just_below, full, edge], [300, 330, 301], request(1)
    )
    assert now == [0, 1, 0]
    assert after == [0, 1, 1]
    assert late == [0.0, 0.0, 0.0] and not are_late
    # The edge would rise, the boosted one would not: it is filled first.
    assert router.choose([edge, full], request(1)) == 1


def energy_router(slo: SharedSlo) -> EnergyRouter:
    return EnergyRouter(
        ModelPredictor(GPU), slo, clocks_mhz=CLOCKS, idle_power_w=GPU.idle_power_w(1005)
    )


def test_energy_router_fills_a_working_instance_before_waking_one():
    assert energy_router(SharedSlo()).choose([View(0), View(20, kv_tokens=4000)], request()) == 1


def test_energy_router_spreads_once_filling_would_cost_a_clock():
    """Filled up to the room that `calm_share` leaves at the lowest clock, then evened out."""
    itl_s = GPU.run(Load(batch=300, kv_tokens=75_000), CLOCKS[0]).time_s
    router = energy_router(SharedSlo(Slo(itl_s=itl_s, reserve=0.0)))
    assert router.choose([View(100, kv_tokens=25_000), View(0)], request()) == 0
    assert router.choose([View(280, kv_tokens=70_000), View(0)], request()) == 1
    assert router.choose([View(280, kv_tokens=70_000), View(270, kv_tokens=70_000)], request()) == 1
    with pytest.raises(UsageError, match="calm_share=1"):
        EcoRouteConfig(calm_share=1.0)


def test_energy_router_does_not_open_a_tile():
    views = [View(128, kv_tokens=26_000), View(120, kv_tokens=26_000)]
    assert energy_router(SharedSlo()).choose(views, request()) == 1


def test_energy_router_never_breaks_the_slo_while_another_can_keep_it():
    slo = SharedSlo(Slo(itl_s=GPU.run(Load(batch=300, kv_tokens=75_000), 1410).time_s, reserve=0.0))
    views = [View(300, kv_tokens=75_000), View(0)]
    assert energy_router(slo).choose(views, request()) == 1
    # None keeps it with what is looked ahead for, though both do now.
    edge = [View(300, kv_tokens=74_000), View(299, kv_tokens=74_000)]
    assert energy_router(slo).choose(edge, request(400)) == 1
    full = [View(420, kv_tokens=75_000), View(400, kv_tokens=75_000)]
    assert energy_router(slo).choose(full, request()) == 0  # none can: the slowest
    overfull = [View(1400, kv_tokens=275_000), View(1300, kv_tokens=275_000)]
    assert energy_router(slo).choose(overfull, request()) == 1  # too late: the shortest step


def test_queue_router_takes_the_earliest_first_token():
    router = QueueRouter(ModelPredictor(GPU), clocks_mhz=(1005,))
    views = [
        Reader(4, waiting_tokens=9000),
        Reader(9, waiting_tokens=500),
        Reader(6, waiting_tokens=700),
    ]
    assert router.choose(views, request()) == 1  # nine waiting prompts cost less than 9000 tokens

    class Telling(View):
        @property
        def waiting_requests(self) -> int:
            return 0

    # An idle instance against one that ends its iteration soon and one that does late.
    views = [Telling(1, busy_until_s=0.5), Telling(1, busy_until_s=0.1), Telling(0)]
    assert router.choose(views, request()) == 2
    assert router.choose(views[:2], request()) == 1


def test_prompts_gather_where_others_are_as_long_as_there_is_time():
    slo = SharedSlo(Slo(ttft_s=0.6, reserve=0.0))
    router = QueueRouter(ModelPredictor(GPU), clocks_mhz=CLOCKS, slo=slo, gather_share=0.5)
    first_s = [
        GPU.run(Load(prefill_tokens=n + 100, prefill_requests=2), 1005).time_s
        for n in (500, 20_000)
    ]
    assert first_s[0] < 0.3 < first_s[1]
    assert router.choose([Reader(0), Reader(1, waiting_tokens=500)], request(100)) == 1
    assert router.choose([Reader(0), Reader(1, waiting_tokens=20_000)], request(100)) == 0
    # A long one fills the device: beside another it would save nothing.
    assert router.choose([Reader(0), Reader(1, waiting_tokens=100)], request(1500)) == 0
    # Where they decode as well, sequences are not to gather.
    assert router.choose([View(0), View(1, waiting_tokens=500)], request(100)) == 0
    # Nobody waits: all go to the same one.
    assert router.choose([Reader(0), Reader(0)], request(100)) == 0
    # Time that passes behind the prompt is no time to gather in.
    for _ in range(500):
        slo.first_token_came(0.25)
    assert slo.planned_prompt_s == pytest.approx(0.35, abs=0.001)
    busy = Reader(1, waiting_tokens=2500)
    assert 0.5 * 0.35 < GPU.run(Load(2600, 2), 1005).time_s < 0.3
    assert router.choose([Reader(0), busy], request(100)) == 0
    with pytest.raises(UsageError, match="gather_share=1"):
        QueueRouter(ModelPredictor(GPU), clocks_mhz=CLOCKS, gather_share=1.0)


@pytest.mark.parametrize(
    "make",
    [
        energy_router,
        lambda slo: StateSpaceRouter(ModelPredictor(GPU), slo, clocks_mhz=GPU.spec.control_mhz),
    ],
    ids=["energy", "state-space"],
)
def test_a_choice_among_64_instances_is_cheap(make):
    router = make(SharedSlo())
    views = [View(100 + i, kv_tokens=20_000 + 300 * i) for i in range(64)]
    times = []
    for _ in range(100):
        start = time.perf_counter()
        router.choose(views, request())
        times.append(time.perf_counter() - start)
    # The best of many: the bound is 1 ms, and a loaded test machine must not decide it.
    assert min(times) < 1e-3


@pytest.mark.parametrize("bad", [{"tile_from": -1}, {"headroom": 1.0}])
def test_bad_configs_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        EcoRouteConfig(**bad)
