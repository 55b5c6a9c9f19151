"""The dashboard's figures and page, over a fake engine; in Chromium where one is installed."""

import shutil
import subprocess
import threading
from types import SimpleNamespace

import fastapi
import pytest
import uvicorn
from fastapi.testclient import TestClient

from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.http.dashboard import Dashboard
from jaxsys.serve.instance import InstanceLoad, TokenEvent
from jaxsys.serve.requests import Request, SamplingParameters


def make():
    instances = [
        SimpleNamespace(
            name="decode-0",
            clock_mhz=1080,
            load=InstanceLoad(batch=3, waiting=1, energy_j=12.5),
            energy_method="measured: a counter",
        ),
        SimpleNamespace(name="decode-1", clock_mhz=None, load=InstanceLoad(), energy_method="none"),
        SimpleNamespace(
            name="decode-2",
            clock_mhz=1980,
            load=InstanceLoad(energy_j=99.5),
            energy_method="modelled: a simulated GPU",
        ),
    ]
    dashboard = Dashboard(
        SimpleNamespace(instances=instances),  # type: ignore[arg-type]
        SharedSlo(Slo(ttft_s=0.5, itl_s=0.05)),
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
    assert dashboard.data()["ttft_attainment_pct"] is None  # nothing yet: not zero
    tell(dashboard, "a", 0.4, 0.44, 0.54)
    tell(dashboard, "b", 0.6)
    tell(dashboard, "c", finish=False)
    data = dashboard.data()
    assert (data["first_tokens"], data["later_tokens"]) == (2, 2)
    assert (data["ttft_attainment_pct"], data["itl_attainment_pct"]) == (50, 50)
    assert dashboard._last_s == {}  # ended requests are forgotten
    decode = data["instances"][0]  # it gave later tokens alone
    assert (decode["ttft_attainment_pct"], decode["itl_attainment_pct"]) == (None, 50)
    assert dashboard.by_instance["prefill-0"].ttft_pct == 50


def test_a_live_slo_change_counts_from_then_on():
    dashboard, _ = make()
    dashboard.slo.change(Slo(ttft_s=0.1, itl_s=0.05))
    tell(dashboard, "a", 0.4)
    assert dashboard.data()["ttft_attainment_pct"] == 0
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
        "clock_mhz": 1080,
        "batch": 3,
        "waiting": 1,
        "ttft_attainment_pct": None,
        "itl_attainment_pct": None,
        "measured": True,
        "energy_j": 12.5,
        "energy_method": "measured: a counter",
    }
    assert third["measured"] is False and third["energy_j"] == 99.5
    assert second["clock_mhz"] is None and second["energy_j"] is None


def test_the_page_fills_in_in_a_browser():
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
         if (found := shutil.which(name))), None,
    )  # fmt: skip
    if browser is None:
        pytest.skip("needs Chromium: `apt-get install chromium` or a Chrome in PATH")
    dashboard, app = make()
    tell(dashboard, "a", 0.4, 0.44)
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
    assert "decode-0" in seen and "1080" in seen and "100.0 %" in seen
    assert 'id="plot-decode-0clock"' in seen and 'id="plot-decode-0power"' in seen
    # Of a GPU that is only modelled no watts are shown, and its joules are marked.
    assert 'id="plot-decode-2power"' not in seen and "modelled 99.5" in seen
