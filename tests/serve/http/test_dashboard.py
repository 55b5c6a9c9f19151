"""The dashboard's figures and page, over a fake engine; in Chromium where one is installed."""

import dataclasses
import shutil
import subprocess
import threading
from types import SimpleNamespace

import fastapi
import pytest
import uvicorn
from fastapi.testclient import TestClient

from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.http.dashboard import Dashboard, Latencies
from jaxsys.serve.instance import InstanceLoad, TokenEvent
from jaxsys.serve.requests import Request, SamplingParameters


def member(name, method, load, clock_mhz=None):
    return SimpleNamespace(
        name=name,
        clock_mhz=clock_mhz,
        load=load,
        energy_method=method,
        page_count=50,
        failure=None,
    )


def make(**changes):
    load = InstanceLoad(
        batch=3,
        waiting=1,
        energy_j=12.5,
        power_w=310.0,
        pages_held=20,
        preemptions=2,
        clock_bounds_mhz=(1080, 1980),
    )
    instances = [
        member("decode-0", "measured: a counter", load, 1080),
        member("decode-1", "none", InstanceLoad()),
        member("decode-2", "modelled: a simulated GPU", InstanceLoad(energy_j=99.5), 1980),
    ]
    dashboard = Dashboard(
        SimpleNamespace(instances=instances, unfinished=4),  # type: ignore[arg-type]
        SharedSlo(Slo(ttft_s=0.5, itl_s=0.05)),
        **{"model_name": "a-model", "refused": lambda: 7, **changes},
    )
    app = fastapi.FastAPI()
    dashboard.add_to(app)
    return dashboard, app


def tell(dashboard, name, *times_s, finish=True):
    request = Request(name, sampling=SamplingParameters(), arrival_s=0.0, prompt_length=5)
    for k, time_s in enumerate(times_s):
        last = finish and k == len(times_s) - 1
        event = TokenEvent(request, 7, None, "length" if last else None, time_s)
        dashboard.on_token(request, event, "prefill-0" if k == 0 else "decode-0")


def test_attainment_counts_first_and_later_tokens():
    dashboard, _ = make()
    assert dashboard.data()["total"]["ttft_attainment_pct"] is None  # nothing yet: not zero
    tell(dashboard, "a", 0.4, 0.44, 0.54)
    tell(dashboard, "b", 0.6)
    tell(dashboard, "c", finish=False)
    data = dashboard.data()
    total = data["total"]
    assert (total["first_tokens"], total["later_tokens"]) == (2, 2)
    assert (total["ttft_attainment_pct"], total["itl_attainment_pct"]) == (50, 50)
    assert dashboard._last_s == {}  # ended requests are forgotten
    decode = data["instances"][0]  # it gave later tokens alone
    assert (decode["ttft_attainment_pct"], decode["itl_attainment_pct"]) == (None, 50)
    assert dashboard.by_instance["prefill-0"].ttft_pct == 50


def test_a_live_slo_change_counts_from_then_on():
    dashboard, _ = make()
    dashboard.slo.change(Slo(ttft_s=0.1, itl_s=0.05))
    tell(dashboard, "a", 0.4)
    assert dashboard.data()["total"]["ttft_attainment_pct"] == 0
    assert dashboard.data()["ttft_slo_ms"] == pytest.approx(100)


def test_page_and_data_are_served():
    _, app = make()
    client = TestClient(app)
    page = client.get("/dashboard")
    assert page.status_code == 200 and "jaxsys dashboard" in page.text
    assert "http://" not in page.text and "https://" not in page.text  # self-contained
    first, second, third = client.get("/dashboard/data").json()["instances"]
    assert first == {
        "name": "decode-0",
        "failed": False,
        "clock_mhz": 1080,
        "clock_bounds_mhz": [1080, 1980],
        "power_w": 310.0,
        "batch": 3,
        "waiting": 1,
        "pages_held": 20,
        "pages": 50,
        "preemptions": 2,
        "faults": 0,
        "ttft_attainment_pct": None,
        "itl_attainment_pct": None,
        "measured": True,
        "energy_j": 12.5,
        "energy_method": "measured: a counter",
    }
    assert third["measured"] is False and third["energy_j"] == 99.5 and third["power_w"] is None
    assert second["clock_mhz"] is None and second["energy_j"] is None


def fill(dashboard, moments, seconds=3):
    """Seconds of tokens, 40 ms apart, each second 2 requests that end and 10 tokens more."""
    for k in range(seconds):
        for name in range(2):
            start = 10.0 * k
            tell(dashboard, f"{k} {name}", *(start + 0.2 + 0.04 * i for i in range(6)))
        load = dashboard.engine.instances[0].load
        energy_j = load.energy_j + 24.0
        dashboard.engine.instances[0].load = dataclasses.replace(load, energy_j=energy_j)
        moments[0] += 1.0
        dashboard.tick()


def test_the_server_remembers_and_states_rates_and_percentiles():
    moments = [100.0]
    dashboard, _ = make(now_s=lambda: moments[0])
    assert dashboard.data()["last_minute"]["tokens_per_s"] is None
    fill(dashboard, moments)
    moments[0] += 0.5
    data = dashboard.data()  # half a second is no point yet
    assert [point["time_s"] for point in data["history"]] == [101.0, 102.0, 103.0]
    last = data["last_minute"]
    assert last["tokens_per_s"] == 12 and last["requests_per_s"] == 2
    assert last["itl_ms"]["p50"] == pytest.approx(40, rel=0.03)  # half of a class
    assert last["itl_ms"]["p99"] == pytest.approx(40, rel=0.03)
    # The first reading of a counter tells nothing: two seconds of three are known.
    assert last["energy_j_per_token"] == pytest.approx(2 * 24.0 / 36)
    assert data["history"][-1]["energy_j_per_token"] == pytest.approx(2.0)
    assert data["history"][-1]["instances"]["decode-0"] == {
        "clock_mhz": 1080, "power_w": 310.0, "batch": 3,
    }  # fmt: skip
    assert data["pages_held_pct"] == pytest.approx(100 * 20 / 150)
    assert data["preemptions"] == 2 and data["unfinished"] == 4 and data["model"] == "a-model"
    assert data["total"]["refused"] == 7 and data["total"]["errors"] == 0
    assert data["energy_kind"] == "measured and modelled" and data["saving_pct"] is None
    # A page that has been there asks for what is new; one of another server gets all.
    assert [p["time_s"] for p in dashboard.data(102.0)["history"]] == [103.0]
    assert len(dashboard.data(500.0)["history"]) == 3


def test_percentiles_of_many_latencies_lie_within_a_class():
    latencies = Latencies()
    values = [0.001 * k for k in range(1, 1001)]
    for value in values:
        latencies.add(value)
    found = latencies.percentiles_ms()
    for percent in (50, 90, 99):
        assert found[f"p{percent}"] == pytest.approx(10 * percent, rel=0.05)
    assert Latencies().percentiles_ms() == {"p50": None, "p90": None, "p99": None}
    latencies.add(0.0)  # two tokens of one step


def test_a_saving_is_stated_where_all_instances_model_the_maximum_clock():
    dashboard, _ = make()
    loads = [InstanceLoad(energy_j=30.0, energy_at_max_j=40.0), InstanceLoad(), InstanceLoad()]
    for one, load in zip(dashboard.engine.instances, loads, strict=True):
        one.load = load
    assert dashboard.data()["saving_pct"] == pytest.approx(25.0)


def test_errors_are_counted():
    dashboard, _ = make()
    request = Request("x", sampling=SamplingParameters(), arrival_s=0.0, prompt_length=5)
    dashboard.on_token(request, TokenEvent(request, None, None, "error", 1.0, "gone"), "decode-0")
    assert dashboard.data()["total"]["errors"] == 1


def test_the_page_fills_in_in_a_browser():
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
         if (found := shutil.which(name))), None,
    )  # fmt: skip
    if browser is None:
        pytest.skip("needs Chromium: `apt-get install chromium` or a Chrome in PATH")
    moments = [100.0]
    dashboard, app = make(now_s=lambda: moments[0])
    fill(dashboard, moments, 5)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        pass
    port = server.servers[0].sockets[0].getsockname()[1]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=4000", f"http://127.0.0.1:{port}/dashboard"]
    seen = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120).stdout
    server.should_exit = True
    thread.join(timeout=10)
    assert "a-model" in seen and "1080 (1080 to 1980)" in seen and "100.0 %" in seen
    assert "20 of 50" in seen and '<p id="error"></p>' in seen
    assert 'id="plot-decode-0-clock"' in seen and 'id="plot-decode-0-power"' in seen
    # Of a GPU that is only modelled no watts are shown, and its joules are marked.
    assert 'id="plot-decode-2-power"' not in seen and "modelled 99.5" in seen
