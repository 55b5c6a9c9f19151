"""The page of `/dashboard`: one file, no script or font from elsewhere.

It asks `/dashboard/data` once a second, the first time for all that the server remembers, so that a
page opened late or again shows what was before it. What is not known is a dash, never a zero.
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>jaxsys dashboard</title>
<style>
 body { font: 14px system-ui, sans-serif; margin: 1.5em 2em; color: #222; max-width: 84em; }
 h1 { font-size: 130%; margin: 0 0 .4em; } h1 small { font-weight: 400; color: #666; }
 table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .3em .7em; }
 td, th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
 th { font-weight: 600; border-bottom: 1px solid #999; vertical-align: bottom; }
 td:first-child, th:first-child, td:last-child, th:last-child { text-align: left; }
 td:last-child { white-space: normal; font-size: 85%; color: #666; min-width: 12em; }
 #tiles { display: flex; flex-wrap: wrap; gap: .6em; }
 #tiles div { border: 1px solid #ddd; border-radius: 4px; padding: .4em .8em; min-width: 7em; }
 #tiles b { display: block; font-size: 125%; font-variant-numeric: tabular-nums; }
 #tiles span { font-size: 85%; color: #666; } #tiles .late b { color: #b00; }
 section { display: flex; flex-wrap: wrap; gap: 1em; }
 h2 { font-size: 100%; margin: 1em 0 .2em; }
 figure { margin: 0 0 .6em; } figcaption { font-size: 85%; color: #666; }
 canvas { display: block; } #error { color: #b00; margin: .2em 0; }
</style></head><body>
<h1><span id="model">jaxsys</span> <small id="about"></small></h1><p id="error"></p>
<div id="tiles"></div>
<h2>All instances</h2><section id="plots-all"></section>
<table><thead><tr><th>instance</th><th>clock<br>(MHz)</th><th>power<br>(W)</th><th>batch</th>
<th>waiting</th><th>pages<br>held</th><th>pre-<br>empted</th><th>faults</th>
<th>TTFT kept<br>(%)</th><th>ITL kept<br>(%)</th><th>energy<br>(J)</th>
<th>energy is</th></tr></thead><tbody id="rows"></tbody></table>
<div id="plots"></div>
<script>
const width = 330, height = 130, left = 48, bottom = 20, upper = 8, ratio = devicePixelRatio || 1;
const colours = ["#1f77b4", "#ff7f0e", "#2ca02c"];
let points = [], newest = null, span = 600;
const known = v => v !== null && v !== undefined;
const shown = (v, d = 0) => known(v) ? v.toFixed(d) : "\\u2013";
// Three figures of a value, whatever its size.
const three = v => !known(v) ? "\\u2013" : v === 0 ? "0" : Math.abs(v) >= 100 ? v.toFixed(0)
  : v.toPrecision(3);
const element = (kind, text) => {
  const made = document.createElement(kind); made.textContent = text; return made;
};
function step(range, most) {  // 1, 2 or 5 times a power of ten
  const rough = range / most, ten = 10 ** Math.floor(Math.log10(rough));
  return ten * [1, 2, 5, 10].find(k => k * ten >= rough);
}
function canvas(place, id, caption) {
  let found = document.getElementById(id);
  if (!found) {
    const figure = document.createElement("figure"); found = document.createElement("canvas");
    found.id = id; found.width = width * ratio; found.height = height * ratio;
    found.style.width = width + "px"; found.style.height = height + "px";
    figure.append(element("figcaption", caption), found);
    document.getElementById(place).append(figure);
  }
  const g = found.getContext("2d"); g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.clearRect(0, 0, width, height); g.font = "10px system-ui, sans-serif"; return g;
}
// lines: [label, value of a point]; levels: [label, value] drawn across, such as a target.
function plot(place, id, caption, lines, levels = []) {
  const g = canvas(place, id, caption), end = points.length ? points.at(-1).time_s : 0;
  const columns = lines.map(([, of]) => points.map(of));
  const values = [...columns.flat(), ...levels.map(l => l[1])].filter(known);
  const most = Math.max(...values, 0) || 1, tick = step(most, 4);
  const top = tick * Math.ceil(most / tick);
  const x = t => left + (width - left - 6) * (1 + (t - end) / span);
  const y = v => height - bottom - (height - bottom - upper) * v / top;
  const digits = Math.max(0, -Math.floor(Math.log10(tick)));
  g.textAlign = "right"; g.textBaseline = "middle";
  for (let k = 0; k * tick <= top * 1.001; k++) {
    g.strokeStyle = k ? "#eee" : "#999"; g.beginPath();
    g.moveTo(left - 3, y(k * tick)); g.lineTo(width - 6, y(k * tick)); g.stroke();
    g.fillStyle = "#666"; g.fillText((k * tick).toFixed(digits), left - 6, y(k * tick));
  }
  g.textAlign = "center"; g.textBaseline = "top";
  for (let back = 0; back <= span; back += 120) {
    const at = x(end - back); g.strokeStyle = "#999"; g.beginPath();
    g.moveTo(at, height - bottom); g.lineTo(at, height - bottom + 3); g.stroke();
    g.fillText(back ? `-${back / 60} min` : "now", Math.min(at, width - 14), height - bottom + 5);
  }
  g.textBaseline = "middle"; g.textAlign = "left";
  for (const [label, value] of levels) {
    if (!known(value)) continue;
    g.strokeStyle = "#b00"; g.setLineDash([4, 3]); g.beginPath();
    g.moveTo(left, y(value)); g.lineTo(width - 6, y(value)); g.stroke(); g.setLineDash([]);
    g.fillStyle = "#b00"; g.fillText(label, left + 4, y(value) + (y(value) < 20 ? 7 : -6));
  }
  lines.forEach(([label], i) => {
    g.strokeStyle = g.fillStyle = colours[i]; g.beginPath();
    let before = null;
    points.forEach((point, k) => {  // a gap where nothing is known, or nobody looked
      const v = columns[i][k];
      if (!known(v)) { before = null; return; }
      if (before !== null && point.time_s - before < 5) g.lineTo(x(point.time_s), y(v));
      else { g.moveTo(x(point.time_s), y(v)); g.lineTo(x(point.time_s) + 0.5, y(v)); }
      before = point.time_s;
    });
    g.stroke();
    if (lines.length > 1) g.fillText(label, left + 8 + 34 * i, upper + 4);
  });
}
function tile(label, value, late = false) {
  const one = element("div", ""); if (late) one.className = "late";
  one.append(element("b", value), element("span", label));
  document.getElementById("tiles").append(one);
}
function percentiles(name, of, target) {
  for (const key of ["p50", "p99"])
    tile(`${name} ${key} (ms), target ${three(target)}`, three(of[key]), of[key] > target);
}
function draw(data) {
  document.getElementById("model").textContent = data.model || "jaxsys";
  document.getElementById("about").textContent =
    `jaxsys ${data.version}, ${data.instances.length} instances, rates of the last minute`;
  document.getElementById("tiles").textContent = "";
  const last = data.last_minute, total = data.total;
  tile("tokens/s", three(last.tokens_per_s)); tile("requests/s", three(last.requests_per_s));
  tile("in the server", `${data.unfinished}`);
  percentiles("TTFT", last.ttft_ms, data.ttft_slo_ms);
  percentiles("ITL", last.itl_ms, data.itl_slo_ms);
  tile(`TTFT kept of ${total.first_tokens}`, shown(total.ttft_attainment_pct, 1) + " %");
  tile(`ITL kept of ${total.later_tokens}`, shown(total.itl_attainment_pct, 1) + " %");
  tile("pages held", shown(data.pages_held_pct, 0) + " %");
  tile("preempted", `${data.preemptions}`);
  tile(`errors, ${total.refused} refused`, `${total.errors}`, total.errors > 0);
  tile(`J a token${data.energy_kind ? ", " + data.energy_kind : ""}`,
    three(last.energy_j_per_token));
  tile("saved against maximum clock" + (known(data.saving_pct) ? ", modelled" : ""),
    known(data.saving_pct) ? shown(data.saving_pct, 1) + " %" : "\\u2013");
  plot("plots-all", "plot-tokens", "tokens a second", [["", p => p.tokens_per_s]]);
  plot("plots-all", "plot-requests", "requests that ended, a second",
    [["", p => p.requests_per_s]]);
  for (const [name, slo] of [["ttft", data.ttft_slo_ms], ["itl", data.itl_slo_ms]])
    plot("plots-all", "plot-" + name, name.toUpperCase() + " (ms)",
      ["p50", "p90", "p99"].map(key => [key, p => p[name + "_" + key + "_ms"]]),
      [["target", slo]]);
  plot("plots-all", "plot-pages", "pages held (%)", [["", p => p.pages_held_pct]]);
  if (data.energy_kind) plot("plots-all", "plot-energy", `J a token (${data.energy_kind})`,
    [["", p => p.energy_j_per_token]]);
  const rows = document.getElementById("rows"); rows.textContent = "";
  for (const one of data.instances) {
    const bounds = one.clock_bounds_mhz, tr = document.createElement("tr");
    const clock = shown(one.clock_mhz) + (bounds ? ` (${bounds[0]} to ${bounds[1]})` : "");
    for (const text of [one.name + (one.failed ? " (failed)" : ""), clock, shown(one.power_w),
        one.batch, one.waiting, `${one.pages_held} of ${one.pages}`, one.preemptions, one.faults,
        shown(one.ttft_attainment_pct, 1), shown(one.itl_attainment_pct, 1),
        (one.measured || !known(one.energy_j) ? "" : "modelled ") + shown(one.energy_j, 1),
        one.energy_method]) tr.append(element("td", text));
    rows.append(tr);
    const place = "plots-" + one.name, of = key => p => (p.instances[one.name] || {})[key];
    if (!document.getElementById(place)) {
      const section = document.createElement("section"); section.id = place;
      document.getElementById("plots").append(element("h2", one.name), section);
    }
    if (known(one.clock_mhz)) plot(place, `plot-${one.name}-clock`, "clock (MHz)",
      [["", of("clock_mhz")]], bounds ? [["lowest", bounds[0]], ["highest", bounds[1]]] : []);
    if (known(one.power_w)) plot(place, `plot-${one.name}-power`, "power, measured (W)",
      [["", of("power_w")]]);
    plot(place, `plot-${one.name}-batch`, "batch", [["", of("batch")]]);
  }
}
async function refresh() {
  try {
    const asked = "dashboard/data" + (newest === null ? "" : "?since=" + newest);
    const data = await (await fetch(asked)).json();
    document.getElementById("error").textContent = "";
    if (data.started_s !== started) { points = []; newest = null; }  // another server
    started = data.started_s; span = data.remembered_s;
    points.push(...data.history.filter(p => newest === null || p.time_s > newest));
    if (points.length) newest = points.at(-1).time_s;
    points = points.filter(p => p.time_s >= newest - span);
    draw(data);
  } catch (error) { document.getElementById("error").textContent = "no answer: " + error; }
}
let started = null;
refresh(); setInterval(refresh, 1000);
</script></body></html>
"""
