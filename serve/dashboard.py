"""`/dashboard`: one live page with each instance's clock, power, batch and SLO attainment.

The page is self-contained (no script or font from elsewhere) and asks `/dashboard/data` once a
second. Power is the slope of the instance's energy between two answers; attainment counts since the
server started. What is not known is shown as a dash, never as zero.
"""

import time
from typing import Any

import fastapi
from fastapi.responses import HTMLResponse

from jaxsys.serve.engine import Engine
from jaxsys.serve.instance import TokenEvent
from jaxsys.serve.requests import Request
from jaxsys.serve.slo import SharedSlo

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>jaxsys dashboard</title>
<style>
 body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; }
 table { border-collapse: collapse; } td, th { padding: .3em .9em; text-align: right; }
 th { font-weight: 600; border-bottom: 1px solid #999; } td:first-child, th:first-child
 { text-align: left; } canvas { border: 1px solid #ddd; margin: .4em 1em .4em 0; }
 figure { display: inline-block; margin: 0; } #error { color: #b00; }
</style></head><body>
<h1>jaxsys</h1><p id="summary">waiting for data</p><p id="error"></p>
<table><thead><tr><th>instance</th><th>clock (MHz)</th><th>power (W)</th><th>batch</th>
<th>waiting</th><th>energy (J)</th><th>energy is</th></tr></thead><tbody id="rows"></tbody></table>
<div id="plots"></div>
<script>
const kept = 120, series = {}, last = {};
const shown = (v, d = 0) => v === null || v === undefined ? "\\u2013" : v.toFixed(d);
function line(name, values, label) {
  let c = document.getElementById("plot-" + name + label);
  if (!c) {
    const f = document.createElement("figure"), t = document.createElement("figcaption");
    c = document.createElement("canvas"); c.id = "plot-" + name + label;
    c.width = 300; c.height = 80; t.textContent = name + ": " + label;
    f.append(t, c); document.getElementById("plots").append(f);
  }
  const g = c.getContext("2d"), known = values.filter(v => v !== null);
  const top = Math.max(1, ...known);
  g.clearRect(0, 0, 300, 80); g.beginPath(); g.strokeStyle = "#1f77b4";
  values.forEach((v, i) => { if (v !== null) g.lineTo(i * 300 / kept, 78 - 70 * v / top); });
  g.stroke(); g.fillStyle = "#666"; g.fillText(top.toFixed(0), 2, 10);
}
async function refresh() {
  try {
    const data = await (await fetch("dashboard/data")).json();
    document.getElementById("error").textContent = "";
    document.getElementById("summary").textContent =
      `TTFT within ${shown(data.ttft_slo_ms)} ms: ${shown(data.ttft_attainment_pct, 1)} % of ` +
      `${data.first_tokens}; ITL within ${shown(data.itl_slo_ms)} ms: ` +
      `${shown(data.itl_attainment_pct, 1)} % of ${data.later_tokens}`;
    const rows = document.getElementById("rows"); rows.textContent = "";
    for (const one of data.instances) {
      const before = last[one.name];
      const power = before && one.energy_j !== null && before.energy_j !== null &&
        data.time_s > before.time_s
        ? (one.energy_j - before.energy_j) / (data.time_s - before.time_s) : null;
      last[one.name] = {energy_j: one.energy_j, time_s: data.time_s};
      const tr = document.createElement("tr");
      for (const text of [one.name, shown(one.clock_mhz), shown(power), one.batch, one.waiting,
          shown(one.energy_j, 1), one.energy_method]) {
        const td = document.createElement("td"); td.textContent = text; tr.append(td);
      }
      rows.append(tr);
      for (const [label, value] of [["clock", one.clock_mhz], ["power", power],
          ["batch", one.batch]]) {
        const values = series[one.name + label] ??= [];
        values.push(value); if (values.length > kept) values.shift();
        line(one.name, values, label);
      }
    }
  } catch (error) { document.getElementById("error").textContent = "no answer: " + error; }
}
refresh(); setInterval(refresh, 1000);
</script></body></html>
"""


class Dashboard:
    """Counts attainment and serves the page. Give `on_token` every event of the engine."""

    def __init__(self, engine: Engine, slo: SharedSlo) -> None:
        self.engine = engine
        self.slo = slo
        self.first_tokens = self.first_in_time = 0
        self.later_tokens = self.later_in_time = 0
        self._last_s: dict[str | int, float] = {}

    def on_token(self, request: Request, event: TokenEvent) -> None:
        """Counts one token against the SLO in force."""
        slo = self.slo.current
        if event.token is not None:
            last_s = self._last_s.get(request.request_id)
            if last_s is None:
                self.first_tokens += 1
                self.first_in_time += event.time_s - request.timing.arrival_s <= slo.ttft_s
            else:
                self.later_tokens += 1
                self.later_in_time += event.time_s - last_s <= slo.itl_s
            self._last_s[request.request_id] = event.time_s
        if event.finish_reason is not None:
            self._last_s.pop(request.request_id, None)

    def data(self) -> dict[str, Any]:
        """What the page shows."""
        slo = self.slo.current
        return {
            "time_s": time.monotonic(),
            "ttft_slo_ms": slo.ttft_s * 1e3,
            "itl_slo_ms": slo.itl_s * 1e3,
            "first_tokens": self.first_tokens,
            "later_tokens": self.later_tokens,
            "ttft_attainment_pct": _share(self.first_in_time, self.first_tokens),
            "itl_attainment_pct": _share(self.later_in_time, self.later_tokens),
            "instances": [
                {
                    "name": instance.name,
                    "clock_mhz": instance.clock_mhz,
                    "batch": instance.load.batch,
                    "waiting": instance.load.waiting,
                    "energy_j": instance.load.energy_j,
                    "energy_method": instance.energy_method,
                }
                for instance in self.engine.instances
            ],
        }

    def add_to(self, app: fastapi.FastAPI) -> None:
        """Adds `/dashboard` and `/dashboard/data`."""

        @app.get("/dashboard", response_class=HTMLResponse, include_in_schema=False)
        async def page() -> HTMLResponse:
            return HTMLResponse(PAGE)

        @app.get("/dashboard/data", include_in_schema=False)
        async def data() -> dict[str, Any]:
            return self.data()


def _share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
