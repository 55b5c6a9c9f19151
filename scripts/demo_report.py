"""Runs `jaxsys plan`, `train` and `serve` in turn and writes one page about what happened.

Every figure on the page comes from what these commands wrote: the plan's JSON, the metrics log, the
answers the openai client received, and the server's /metrics. Energy is modelled where there is no
GPU whose counters can be read, and the page says so.
"""

import argparse
import base64
import contextlib
import html
import json
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import openai
from matplotlib.layout_engine import ConstrainedLayoutEngine

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Why is the sky blue? Answer briefly.",
    "Name three fruits.",
)
STARTUP_S = 180
REPLAY_TITLE = "Llama-3-8B, 8 requests/s on 2 prefill and 2 decode H100"
REPLAY = ("--gpu", "h100", "--model", "llama-3-8b", "--instances", "2P2D", "--rate", "8")
REPLAY += ("--duration", "60", "--predictor", "model", "--policy", "max,sweet-spot,both")


def run(title: str, *words: str) -> str:
    """Runs a jaxsys command, shows it as it goes, and returns what it printed on stdout."""
    print(f"\n=== {title}\n$ jaxsys {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "jaxsys.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"demo: jaxsys {words[0]} failed with exit code {process.returncode}")
    return "".join(lines)


def plan(out: Path) -> tuple[str, dict[str, Any]]:
    """The plan's table as printed, and its JSON."""
    target = out / "plan.json"
    words = ("--model", "llama-3-8b", "--devices", "8", "--link", "nvlink", "--json", str(target))
    target.unlink(missing_ok=True)
    return run("1/3 plan a model on a cluster", "plan", *words), json.loads(target.read_text())


def train(out: Path, steps: int) -> list[dict[str, Any]]:
    """The metrics log of a training run."""
    folder = Path(tempfile.mkdtemp(prefix="train-", dir=out))
    run(
        "2/3 train a byte-level Llama on the standard library's sources, weights round a ring",
        *("train", "--steps", str(steps), "--learning-rate", "1e-3"),
        *("--out", str(folder), "--export", str(folder / "export")),
    )
    log = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in log]


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A running `jaxsys serve` with its default model; yields its address."""
    words = ("serve", "--port", "0")
    print(f"\n=== 3/3 serve SmolLM2-135M\n$ jaxsys {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "jaxsys.cli", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            deadline_s, address = time.monotonic() + STARTUP_S, None
            for line in process.stderr:
                print(line, end="", flush=True)
                found = re.search(r"serving on (http://\S+)/v1", line)
                if found:
                    address = found.group(1)
                    break
                if time.monotonic() > deadline_s:
                    break
            if address is None:
                raise SystemExit("demo: the server did not start")
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def chat(address: str) -> list[dict[str, Any]]:
    """Asks the questions through the openai client, streaming."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    model = client.models.list().data[0].id
    answers = []
    for question in QUESTIONS:
        print(f"\n> {question}", flush=True)
        start_s, times_s, text = time.monotonic(), [], ""
        for part in client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=48,
            temperature=0,
            stream=True,
        ):
            piece = part.choices[0].delta.content if part.choices else None
            if piece:
                times_s.append(time.monotonic() - start_s)
                text += piece
                print(piece, end="", flush=True)
        print()
        answers.append(
            {
                "question": question,
                "answer": text,
                "ttft_s": times_s[0] if times_s else None,
                "tokens_per_s": (len(times_s) - 1) / (times_s[-1] - times_s[0])
                if len(times_s) > 1
                else None,
            }
        )
    return answers


def metrics(address: str) -> tuple[dict[str, float], str]:
    """Sums of the server's counters over instances, and how its energy is known."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name = line.split("{")[0].split(" ")[0]
            sums[name] = sums.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    method = re.search(r'jaxsys_energy_method_info\{.*?method="([^"]*)"', text)
    return sums, method.group(1) if method else "not read"


def replay(out: Path) -> dict[str, Any]:
    """Energy under policies, from requests replayed on simulated GPUs."""
    folder = Path(tempfile.mkdtemp(prefix="replay-", dir=out))
    run(f"energy: {REPLAY_TITLE}", "replay", *REPLAY, "--out", str(folder))
    record = json.loads((folder / "replay.json").read_text())
    policies = [{"policy": name, **row} for name, row in record["policies"].items()]
    first, last = (policies[i]["energy_j_per_token"] for i in (0, -1))
    return {"policies": policies, "saving_pct": 100 * (1 - last / first)}


def draw(out: Path, plan_json: dict[str, Any], log: list[dict], answers, energy: dict) -> Path:
    """The page as one picture."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout=layout)
    draw_plan(axes[0][0], plan_json)
    draw_loss(axes[0][1], log)
    draw_answers(axes[1][0], answers)
    draw_energy(axes[1][1], energy)
    figure.suptitle("jaxsys: plan, train, serve", fontsize=15)
    target = out / "report.png"
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def draw_plan(axis, plan_json: dict[str, Any]) -> None:
    rows = [row for row in plan_json["rows"] if row["fits"]]
    rows.sort(key=lambda row: row["step_s"])
    names = [row["strategy"] for row in rows]
    colours = ["#2a7f62" if i == 0 else "#b8c4cc" for i in range(len(rows))]
    axis.barh(names, [row["step_s"] for row in rows], color=colours)
    axis.invert_yaxis()
    axis.set_xlabel("predicted step time (s); strategies that fit in memory")
    axis.set_title("Plan: Llama-3-8B on 8 H100 over NVLink (predicted)")


def draw_loss(axis, log: list[dict]) -> None:
    steps = [row for row in log if row.get("kind") == "step"]
    axis.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#2a5f9f")
    held = [r for r in log if r["kind"] == "held_out"]
    if held:
        axis.plot(
            [r["step"] for r in held],
            [r["loss"] for r in held],
            "o",
            color="#c8553d",
            label="held out",
        )
        axis.legend()
    start = next(row for row in log if row["kind"] == "run")
    mesh = start["mesh"]
    axis.set_title(f"Train: {start['schedule']} on {mesh['ring']} {start['device']} devices")
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats per byte)")


def draw_answers(axis, answers: list[dict]) -> None:
    axis.axis("off")
    axis.set_title("Serve: answers of SmolLM2-135M-Instruct, greedy")
    lines = []
    for row in answers:
        lines += textwrap.wrap(f"> {row['question']}", 74)
        lines += [f"  {line}" for line in textwrap.wrap(row["answer"], 72)[:4]]
        lines.append("")
    axis.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=8.5)


def draw_energy(axis, energy: dict[str, Any]) -> None:
    rows = energy["policies"]
    names = [row["policy"] for row in rows]
    values = [row["energy_j_per_token"] for row in rows]
    colours = ["#b8c4cc"] * (len(rows) - 1) + ["#2a7f62"]
    bars = axis.bar(names, values, color=colours)
    axis.bar_label(bars, labels=[f"{row['energy_j_per_token']:.2f} J" for row in rows])
    axis.set_ylabel("energy (J per output token, idle included)")
    kept = (
        f"{rows[-1]['ttft_attainment_pct']:.1f} % of TTFT, {rows[-1]['itl_attainment_pct']:.1f} %"
    )
    said = (
        f"Energy: {energy['saving_pct']:.0f} % under the maximum clock, {kept} of ITL targets met "
        f"({REPLAY_TITLE}; simulated)"
    )
    axis.set_title(textwrap.fill(said, 58), fontsize=10)
    axis.margins(y=0.1)


def page(out: Path, picture: Path, plan_text: str, log, answers, energy, took_s: float) -> Path:
    """The page as HTML, its picture inside."""
    image = base64.b64encode(picture.read_bytes()).decode()
    steps = [row for row in log if row.get("kind") == "step"]
    replies = "".join(
        f"<tr><td>{html.escape(r['question'])}</td><td>{html.escape(r['answer'])}</td>"
        f"<td>{_ms(r['ttft_s'])}</td><td>{_number(r['tokens_per_s'])}</td></tr>"
        for r in answers
    )
    policies = "".join(
        f"<tr><td>{html.escape(r['policy'])}</td><td>{r['energy_j_per_token']:.3f}</td>"
        f"<td>{r['ttft_attainment_pct']:.1f} %</td><td>{r['itl_attainment_pct']:.1f} %</td></tr>"
        for r in energy["policies"]
    )
    target = out / "report.html"
    target.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>jaxsys demo</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto }}
pre {{ overflow-x: auto; background: #f4f6f7; padding: 1rem; font-size: 12px }}
td, th {{ text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0 }}
img {{ max-width: 100% }}
</style>
<h1>jaxsys: plan, train, serve</h1>
<p>Made in {took_s:.0f} s. Predicted: the plan. Measured: loss and answers. Simulated: energy.</p>
<img alt="plan, loss curve, answers and energy" src="data:image/png;base64,{image}">
<h2>Plan</h2><pre>{html.escape(plan_text)}</pre>
<h2>Train</h2><p>Loss {steps[0]["loss"]:.3f} at step {steps[0]["step"]}, {steps[-1]["loss"]:.3f} at
step {steps[-1]["step"]}.</p>
<h2>Serve</h2><table>
<tr><th>question</th><th>answer</th><th>first token</th><th>tokens/s</th></tr>
{replies}</table>
<h2>Energy</h2><p>{html.escape(REPLAY_TITLE)}, simulated, idle time included:</p>
<table><tr><th>policy</th><th>J per output token</th><th>TTFT met</th><th>ITL met</th></tr>
{policies}</table>
<p>The server above, on this machine, accounted {energy["served_j"]:.0f} J for
{energy["output_tokens"]:.0f} output tokens ({html.escape(energy["method"])}); at the pace of this
machine most of that is a modelled GPU waiting.</p>
</html>
"""
    )
    return target


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:.0f} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="default %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="of training (default %(default)s)")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    start_s = time.monotonic()
    plan_text, plan_json = plan(out)
    log = train(out, arguments.steps)
    with server() as address:
        answers = chat(address)
        sums, method = metrics(address)
    energy = replay(out) | {
        "served_j": sums["jaxsys_energy_joules_total"],
        "output_tokens": sums["jaxsys_output_tokens_total"],
        "method": method,
    }
    picture = draw(out, plan_json, log, answers, energy)
    took_s = time.monotonic() - start_s
    target = page(out, picture, plan_text, log, answers, energy, took_s)
    steps = [row for row in log if row.get("kind") == "step"]
    print(
        f"\n=== done in {took_s:.0f} s\n"
        f"loss {steps[0]['loss']:.2f} -> {steps[-1]['loss']:.2f}; energy "
        f"{energy['saving_pct']:.0f} % under the maximum clock (simulated)\n"
        f"report: {target} and {picture}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
