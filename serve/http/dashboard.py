"""`/dashboard`: one live page with each instance's clock, power, batch and SLO attainment.

The page is self-contained (no script or font from elsewhere) and asks `/dashboard/data` once a
second. Power is the slope of the instance's energy counter between two answers, and shown only
where it is measured: nobody draws what a modelled GPU would take, so its energy is marked as
modelled. Attainment counts since the server started. What is not known is shown as a dash, never as
zero.
"""

import dataclasses
import time
from collections import defaultdict
from typing import Any

import fastapi
from fastapi.responses import HTMLResponse

from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.engine import Engine
from jaxsys.serve.instance import TokenEvent
from jaxsys.serve.requests import Request

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>jaxsys dashboard</title>
<style>
 body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; max-width: 76em; }
 table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .3em .9em; }
 td, th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
 th { font-weight: 600; border-bottom: 1px solid #999; vertical-align: bottom; }
 td:first-child, th:first-child, td:last-child, th:last-child { text-align: left; }
 td:last-child { white-space: normal; font-size: 85%; color: #666; }
 section { display: flex; gap: 1em; align-items: flex-end; } h2 { font-size: 100%; width: 6em; }
 figure { margin: 0 0 .6em; } canvas { border: 1px solid #ddd; display: block; }
 figcaption { font-size: 85%; color: #666; } #error { color: #b00; }
</style></head><body>
<h1>jaxsys</h1><p id="summary">waiting for data</p><p id="error"></p>
<table><thead><tr><th>instance</th><th>clock<br>(MHz)</th><th>power<br>(W)</th><th>batch</th>
<th>waiting</th><th>TTFT kept<br>(%)</th><th>ITL kept<br>(%)</th><th>energy<br>(J)</th>
<th>energy is</th></tr></thead><tbody id="rows"></tbody></table>
<div id="plots"></div>
<script>
const kept = 120, width = 300, height = 80, series = {}, last = {};
const shown = (v, d = 0) => v === null || v === undefined ? "\\u2013" : v.toFixed(d);
function canvas(name, label, unit) {
  const id = "plot-" + name + label, found = document.getElementById(id);
  if (found) return found;
  let row = document.getElementById("plots-" + name);
  if (!row) {
    row = document.createElement("section"); row.id = "plots-" + name;
    const head = document.createElement("h2"); head.textContent = name; row.append(head);
    document.getElementById("plots").append(row);
  }
  const f = document.createElement("figure"), t = document.createElement("figcaption");
  const c = document.createElement("canvas"); c.id = id; c.width = width; c.height = height;
  t.textContent = label + unit + ", last two minutes"; f.append(t, c); row.append(f);
  return c;
}
function line(name, values, label, unit) {
  const g = canvas(name, label, unit).getContext("2d");
  const known = values.filter(v => v !== null), top = Math.max(1, ...known);
  g.clearRect(0, 0, width, height); g.fillStyle = "#666"; g.fillText(top.toFixed(0), 2, 10);
  g.fillText("0", 2, height - 3);
  g.beginPath(); g.strokeStyle = "#1f77b4"; let drawing = false;
  values.forEach((v, i) => {  // newest at the right edge; a gap where nothing is known
    if (v === null) { drawing = false; return; }
    const x = width - (values.length - 1 - i) * width / kept;
    const y = height - 4 - (height - 18) * v / top;
    if (drawing) g.lineTo(x, y); else g.moveTo(x, y);
    drawing = true;
  });
  g.stroke();
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
      const power = one.measured && before && one.energy_j !== null && before.energy_j !== null &&
        data.time_s > before.time_s
        ? (one.energy_j - before.energy_j) / (data.time_s - before.time_s) : null;
      last[one.name] = {energy_j: one.energy_j, time_s: data.time_s};
      const tr = document.createElement("tr");
      for (const text of [one.name, shown(one.clock_mhz), shown(power), one.batch, one.waiting,
          shown(one.ttft_attainment_pct, 1), shown(one.itl_attainment_pct, 1),
          (one.measured || one.energy_j === null ? "" : "modelled ") + shown(one.energy_j, 1),
          one.energy_method]) {
        const td = document.createElement("td"); td.textContent = text; tr.append(td);
      }
      rows.append(tr);
      for (const [label, unit, value] of [["clock", " (MHz)", one.clock_mhz],
          ["power", " (W)", power], ["batch", "", one.batch]]) {
        if (label === "power" && !one.measured) continue;
        const values = series[one.name + label] ??= [];
        values.push(value); if (values.length > kept) values.shift();
        line(one.name, values, label, unit);
      }
    }
  } catch (error) { document.getElementById("error").textContent = "no answer: " + error; }
}
refresh(); setInterval(refresh, 1000);
</script></body></html>
"""


@dataclasses.dataclass(slots=True)
class Attainment:
    """Tokens so far, and how many of them kept the SLO that was in force."""

    first_tokens: int = 0
    first_in_time: int = 0
    later_tokens: int = 0
    later_in_time: int = 0

    @property
    def ttft_pct(self) -> float | None:
        """Share of first tokens in time; None before there is one."""
        return _share(self.first_in_time, self.first_tokens)

    @property
    def itl_pct(self) -> float | None:
        """Share of later tokens in time; None before there is one."""
        return _share(self.later_in_time, self.later_tokens)


class Dashboard:
    """Counts attainment and serves the page. Give `on_token` every event of the engine."""

    def __init__(self, engine: Engine, slo: SharedSlo) -> None:
        self.engine = engine
        self.slo = slo
        self.total = Attainment()
        self.by_instance: defaultdict[str, Attainment] = defaultdict(Attainment)
        """By the instance a token came from."""
        self._last_s: dict[str | int, float] = {}

    def on_token(self, request: Request, event: TokenEvent, instance: str) -> None:
        """Counts one token of an instance against the SLO in force."""
        slo = self.slo.current
        if event.token is not None:
            last_s = self._last_s.get(request.request_id)
            for count in (self.total, self.by_instance[instance]):
                if last_s is None:
                    count.first_tokens += 1
                    count.first_in_time += event.time_s - request.timing.arrival_s <= slo.ttft_s
                else:
                    count.later_tokens += 1
                    count.later_in_time += event.time_s - last_s <= slo.itl_s
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
            "first_tokens": self.total.first_tokens,
            "later_tokens": self.total.later_tokens,
            "ttft_attainment_pct": self.total.ttft_pct,
            "itl_attainment_pct": self.total.itl_pct,
            "instances": [
                {
                    "name": instance.name,
                    "clock_mhz": instance.clock_mhz,
                    "batch": instance.load.batch,
                    "waiting": instance.load.waiting,
                    "ttft_attainment_pct": self.by_instance[instance.name].ttft_pct,
                    "itl_attainment_pct": self.by_instance[instance.name].itl_pct,
                    "measured": instance.energy_method.startswith("measured"),
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
