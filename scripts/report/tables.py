"""How each kind of result is shown: result files in, Markdown out."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from headline import Result, Row, number, processor, table

EQUAL_POINTS = 0.5
"""Attainment is equal where neither TTFT's nor ITL's is further below the maximum clock's."""

VLLM_ITL_MS = {8: 7.3, 64: 11.5, 128: 16.5, 256: 26.1}
"""ML.ENERGY benchmark v3: vLLM, Llama-3.1-8B, one H100, with prefill in the same batches."""


def steps(results: Sequence[Result]) -> str:
    """Whole training steps, fastest first within a kind of GPU and length."""
    rows = [(row, result) for result in results for row in result.rows if "failed" not in row]

    def place(row: Row, result: Result) -> tuple:
        kind, shape = processor(result.record), result.record["config"]["shape"]
        return kind, row["devices"], shape, row["sequence_length"], row["step_s"]

    rows.sort(key=lambda pair: place(*pair))
    return table(
        ["GPU", "GPUs", "shape", "tokens", "schedule", "layers", "recompute", "step (s)",
         "model TFLOP/s a GPU", "temporary GiB"],
        [[processor(result.record), row["devices"], result.record["config"]["shape"],
          f"{row['sequence_length']:,}", f"`{row['schedule']}`",
          "written out" if result.record["config"].get("unroll") else "looped", row["recompute"],
          number(row["step_s"], ".3f"), number(row["model_tflops_per_gpu"]),
          number(row["temp_gib"])] for row, result in rows],
    )  # fmt: skip


def several(results: Sequence[Result]) -> str:
    """Steps on several GPUs, each kind, link, model and length beside its ring's."""
    rows = [(processor(result.record), row) for result in results for row in result.rows]

    def place(kind: str, row: Row) -> tuple:
        return kind, row["link"], row["shape"], row["sequence_length"]

    ring = {
        place(kind, row): row["step_s"]
        for kind, row in rows
        if row["schedule"] == "weipipe-interleave"
        and "step_s" in row
        and "remark" not in row
        and not row.get("travel_dtype")
    }
    cells = []
    for kind, row in sorted(rows, key=lambda r: (place(*r), r[1].get("step_s", float("inf")))):
        own, base = row.get("step_s"), ring.get(place(kind, row))
        taken = row["temp_gib"] + row["argument_gib"] if row.get("temp_gib") else None
        failed = "out of memory" if "RESOURCE_EXHAUSTED" in row.get("failed", "") else None
        travels = row.get("travel_dtype")
        gradients = f"{row['gradient_dtype']}, sent in {travels}" if travels else None
        cells.append(
            [*place(kind, row), f"`{row['schedule']}`", row["recompute"],
             gradients or row.get("gradient_dtype"),
             number(own, ".3f") or failed or row.get("failed"),
             number(own / base, ".2f") if own and base else None,
             number(row.get("model_tflops_per_gpu")), number(row.get("predicted_s"), ".3f"),
             number(taken, ".1f"), number(row.get("predicted_gib"), ".1f"),
             "; ".join(["planner's choice"] * bool(row.get("planners_choice"))
                       + [row.get("remark", "")]).strip("; ")]
        )  # fmt: skip
    return table(
        ["GPUs", "link", "model", "tokens", "schedule", "recompute", "gradients", "step (s)",
         "over WeiPipe's", "TFLOP/s a GPU", "predicted (s)", "GiB", "predicted (GiB)", ""],
        cells,
    )  # fmt: skip


def ring_trace(results: Sequence[Result]) -> str:
    cells = [
        [row["what"], number(row["alone_us"]), number(row["beside_us"]),
         number(row["beside_us"] / row["alone_us"], ".2f")]
        for result in results
        for row in result.rows
        if "alone_us" in row
    ]  # fmt: skip
    return table(["kernel", "µs, no transfer beside it", "µs, one all the while", "times"], cells)


def block(results: Sequence[Result]) -> str:
    return table(
        ["GPU", "recompute", "ms a layer", "products and attention alone (ms)", "their share"],
        [[processor(result.record), row["recompute"], number(row["ms_per_layer"]),
          number(row["floor_ms"]), f"{100 * row['floor_share']:.0f} %"]
         for result in results for row in result.rows],
    )  # fmt: skip


def network(results: Sequence[Result]) -> str:
    """One table a file, as hosts and shapes may differ between files."""
    return "\n\n".join(f"{_hosts(result)}\n\n{_over_the_ring(result.rows)}" for result in results)


def _hosts(result: Result) -> str:
    config = result.record["config"]
    devices = config.get("local_devices", 1)
    each = f"{devices} devices and " if devices > 1 else ""
    return (
        f"{config['hosts']} hosts of {each}{config['cpu_share']:g} cores each, hidden size "
        f"{config['hidden']}, sequences of {config['sequence_length']} tokens "
        f"({result.name.removesuffix('.json')})."
    )


def _over_the_ring(rows: Sequence[Row]) -> str:
    def place(row: Row) -> tuple[float | None, float]:
        return row["mbit_per_s"], row["gs_over_18hlp"]

    ring = {
        place(row): row["step_s"]
        for row in rows
        if row["schedule"] == "weipipe-interleave" and "step_s" in row and "remark" not in row
        if row.get("members", 1) == 1
    }
    cells = []
    for row in rows:
        rate, ratio = place(row)
        own, base = row.get("step_s"), ring.get(place(row))
        cells.append(
            [f"{rate:g}" if rate else "no limit", f"{ratio:.2f}", _divided(row),
             number(own, ".3f") or row.get("failed"),
             number(own / base, ".2f") if own and base else None,
             number(row.get("predicted_s"), ".3f")]
        )  # fmt: skip
    return table(
        ["Mbit/s a host", "G S / (18 H L/P)", "schedule", "step (s)", "over WeiPipe's",
         "predicted (s)"],
        cells,
    )  # fmt: skip


def _divided(row: Row) -> str:
    """A schedule's name, with the nodes or replicas that it runs on."""
    members, replicas = row.get("members", 1), row.get("replicas", 1)
    nodes = f" on nodes of {members}" if members > 1 else ""
    return f"`{row['schedule']}`{nodes}" + (f", {replicas} times" if replicas > 1 else "")


def releases(results: Sequence[Result]) -> str:
    """A column a file, in order of processor and release."""

    def place(result: Result) -> tuple[str, list[int]]:
        release = result.record["versions"]["jax"]
        return processor(result.record), [int(part) for part in release.split(".")]

    ordered = sorted(results, key=place)
    columns = [{row["figure"]: row["value"] for row in result.rows} for result in ordered]
    names = dict.fromkeys(name for column in columns for name in column)

    def cell(value: Any) -> str | None:
        return number(value, ".0f") if isinstance(value, float) else str(value).partition(":")[0]

    return table(
        ["", *(f"{processor(r.record)}, JAX {r.record['versions']['jax']}" for r in ordered)],
        [[name, *(cell(column.get(name)) for column in columns)] for name in names],
    )


def long_context(results: Sequence[Result]) -> str:
    """All lengths that were run, and the longest that compiled into the memory."""
    best: dict[tuple, Row] = {}
    for result in results:
        compiled = bool(result.record["config"].get("compile_only"))
        for row in (row for row in result.rows if "failed" not in row):
            length = row["sequence_length"]
            gpu = processor(result.record)
            key = (gpu, row["devices"], compiled, row["schedule"], row["recompute"])
            if not compiled:
                best[*key, length] = row
            elif key not in best or length > best[key]["sequence_length"]:
                best[key] = row
    return table(
        ["GPU", "GPUs", "how", "schedule", "recompute", "context", "GiB a GPU", "tokens/s a GPU",
         "TFLOP/s a GPU"],
        [[*key[:2], "longest that fits, compiled alone" if key[2] else "run", f"`{key[3]}`", key[4],
          f"{row['sequence_length']:,}", number(row.get("compiled_gib") or row.get("peak_gib")),
          number(row.get("tokens_per_s_per_gpu"), ",.0f"),
          number(row.get("tflops_per_gpu"), ".0f")]
         for key, row in sorted(best.items(), key=lambda item: item[0][:5])],
    )  # fmt: skip


def context(results: Sequence[Result]) -> str:
    """Steps whose sequences lie on several GPUs, beside those of one."""
    rows = [row for result in results for row in result.rows if "step_s" in row]
    asked = {id(row): result.record["config"] for result in results for row in result.rows}
    return table(
        ["shape", "tokens", "GPUs", "what travels", "recompute", "step (s)", "samples", "tokens/s",
         "TFLOP/s a GPU", "compiled (GiB)", "predicted (GiB)"],
        [[row.get("shape", asked[id(row)]["shape"]), f"{row['length']:,}",
          row.get("devices", asked[id(row)]["context"]), row.get("by", "-"), row["recompute"],
          number(row["step_s"], ".2f"), len(row["samples_s"]), number(row["tokens_per_s"], ",.0f"),
          number(row["model_tflops_per_gpu"], ".0f"), number(row["compiled_gib"]),
          number(row["predicted_gib"])]
         for row in rows],
    )  # fmt: skip


def train_memory(results: Sequence[Result]) -> str:
    return table(
        ["model", "GPUs", "tokens", "schedule", "recompute", "compiled (GiB)", "predicted (GiB)",
         "error (%)"],
        [[row["shape"], row["devices"], f"{row['sequence_length']:,}", f"`{row['schedule']}`",
          row["recompute"], number(row["compiled_gib"]), number(row.get("predicted_gib")),
          number(100 * (row["predicted_gib"] / row["compiled_gib"] - 1), "+.0f")
          if row.get("predicted_gib") else None]
         for result in results for row in result.rows],
    )  # fmt: skip


def train_runs(results: Sequence[Result]) -> str:
    return table(
        ["run", "steps", "tokens a step", "seconds of steps", "held-out loss before", "after"],
        [[f"`{result.record['config']['command']}`", result.rows[-1]["step"],
          f"{result.record['config']['tokens_per_step']:,}", number(result.record["seconds"]),
          number(result.record.get("held_out_loss_before"), ".3f"),
          number(result.record["held_out_loss"], ".3f")]
         for result in results],
    )  # fmt: skip


def bubbles(results: Sequence[Result]) -> str:
    (result,) = results
    config = result.record["config"]
    text = table(
        ["schedule", "bubble (%), in lockstep", "coupled", "eager sends", "stages held"],
        [[f"`{row['schedule']}`", *(number(row[f"equal_{mode}_pct"])
          for mode in ("lockstep", "coupled", "eager")), f"{row['held_stages']:g}"]
         for row in result.rows],
    )  # fmt: skip
    return (
        f"P = {config['devices']}, M = {config['microbatches']}, equal times, a link that takes no "
        f"time; the three clocks are explained beside the [formulas](schedules.md).\n\n{text}"
    )


def compiling(results: Sequence[Result]) -> str:
    rows = [row for result in results for row in result.rows]
    return table(
        ["schedule", "layers", "trace (CPU s)", "compile (CPU s)", "temporary (KiB)",
         "0.1.0 (CPU s)"],
        [[f"`{row['schedule']}`", row["layers"], number(row["trace_cpu_s"], ".1f"),
          number(row["compile_cpu_s"], ".1f"), f"{row['temporary_kib']:,}",
          number(row.get("before_cpu_s"), ".1f")] for row in rows],
    )  # fmt: skip


def ring_search(results: Sequence[Result]) -> str:
    names = ("interleave", "wzb1", "wzb2", "wzb2-paired")
    rows = [row for result in results for row in result.rows if row["times"] == "1/1/1"]
    largest = {row["devices"]: row["microbatches"] for row in rows}
    return table(
        ["P, M", "ticks cost", "held", "ideal", "least found", *names],
        [[f"{row['devices']}, {row['microbatches']}", row["tick_cost"], row["held"], row["ideal"],
          row["best"], *(row[name] for name in names)]
         for row in rows if row["microbatches"] == largest[row["devices"]]],
    )  # fmt: skip


def zero(results: Sequence[Result]) -> str:
    return table(
        ["gather / forward", "ZeRO-3.5 over ZeRO-3", "ZeRO-4 over ZeRO-3", "found over ZeRO-3",
         "ZeRO-4 over ZeRO-2", "memory below ZeRO-2"],
        [[f"{row['gather_over_forward']:g}", number(row["zero_3_5_speedup_over_zero_3"], ".2f"),
          number(row["zero_4_speedup_over_zero_3"], ".2f"),
          number(row["found_speedup_over_zero_3"], ".2f"),
          number(row["zero_4_speedup_over_zero_2"], ".2f"),
          f"{row['zero_4_memory_below_zero_2_pct']:.1f} %"]
         for result in results for row in result.rows],
    )  # fmt: skip


def zero_memory(results: Sequence[Result]) -> str:
    rows = [row for result in results for row in result.rows if row["gradient_bytes"] == 2]
    return table(
        ["devices", "residuals / weights", "ZeRO-3.5, all kept", "ZeRO-3.5, within ZeRO-3's memory",
         "layers it keeps", "ZeRO-4, all kept and deferred"],
        [[row["devices"], f"{row['residuals_over_weights']:g}",
          number(row["zero_3_5_all_below_zero_2_pct"]),
          number(row["zero_3_5_within_below_zero_2_pct"]), row["layers_kept_within"],
          number(row["zero_4_all_below_zero_2_pct"])] for row in rows],
    )  # fmt: skip


def rediscovery(results: Sequence[Result]) -> str:
    rows = [row for result in results for row in result.rows]
    same = sum(row["expected"] == row["found"] for row in rows)
    text = table(
        ["expected", "found", "next best, slower by", "plans tried", "CPU (s)", "where"],
        [[f"`{row['expected']}`", f"`{row['found']}`",
          f"`{row['next']}`, {row['next_slower_pct']:.1f} %", f"{row['plans_evaluated']:,}",
          number(row["cpu_s"]), row["reason"]] for row in rows],
    )  # fmt: skip
    return f"{same} of {len(rows)} found, each searched from plain data parallelism.\n\n{text}"


def strategy_map(results: Sequence[Result]) -> str:
    (result,) = results
    config = result.record["config"]
    links = sorted({row["link_gb_per_s"] for row in result.rows})
    by: dict[tuple, dict[float, str]] = {}
    for row in result.rows:
        key = (row["memory_gib"], row["tokens_per_microbatch"])
        name = f"`{row['strategy']}`" + (f" x tp{row['features']}" if row["features"] > 1 else "")
        by.setdefault(key, {})[row["link_gb_per_s"]] = name if row["fits"] else "nothing fits"
    text = table(
        ["GiB", "tokens", *(f"{link:g} GB/s" for link in links)],
        [[memory, f"{tokens:,}", *(cells.get(link) for link in links)]
         for (memory, tokens), cells in by.items()],
    )  # fmt: skip
    return f"{config['model']} on {config['devices']} x {config['device']}.\n\n{text}"


def sweep(results: Sequence[Result]) -> str:
    (result,) = results
    record, config = result.record, result.record["config"]
    best: dict[str, Row] = {}
    for row in result.rows:
        best.setdefault(row["strategy"], row)
    text = table(
        ["strategy", "step (s)", "peak GiB", "plan"],
        [[f"`{name}`", number(row["step_s"], ".3f"), number(row["peak_gib"]), row["plan"]]
         for name, row in best.items()],
    )  # fmt: skip
    return (
        f"{config['model']}, {config['sequences']} sequences of {config['sequence_length']:,} "
        f"tokens on {config['cluster']}: {record['plans_evaluated']:,} plans in "
        f"{record['cpu_s']:.0f} s of CPU time ({record['wall_s']:.0f} s by the clock).\n\n{text}"
    )


def planning(results: Sequence[Result]) -> str:
    """What `jaxsys plan` itself takes."""
    (result,) = results
    return table(
        ["jaxsys plan", "CPU s", "s by the clock", "load before", "peak GiB"],
        [[f"`{row['plan']}`", number(row["cpu_s"]), number(row["wall_s"]),
          number(row["load"], ".0f"), number(row["peak_gib"], ".2f")] for row in result.rows],
    )  # fmt: skip


def published(results: Sequence[Result]) -> str:
    """Runs of others: tokens/s of a GPU, published and predicted."""
    (result,) = results
    text = table(
        ["source", "run", "published tokens/s", "predicted", "error", "part"],
        [[row["source"], row["run"], number(row["published"], ",.0f"),
          number(row["predicted"], ",.0f"), f"{row['error_pct']:+.1f} %", row["part"]]
         for row in result.rows],
    )  # fmt: skip
    return (
        f"Median error {result.record['median_abs_error_pct']:.1f} %, of those held out "
        f"{result.record['median_abs_error_held_out_pct']:.1f} %.\n\n{text}"
    )


def predicted_steps(results: Sequence[Result]) -> str:
    cells = []
    for result in results:
        summary, config = result.record["summary"], result.record["config"]
        cells.append(
            [result.name.removesuffix(".json"),
             "none: compiled alone" if config.get("compile_only") else config["link"],
             config["devices"],
             summary["cells"], number(summary.get("median_first_error_pct",
                                                  summary.get("median_error_pct"))),
             number(summary.get("median_error_pct")) if "median_first_error_pct" in summary
             else None,
             number(summary["median_memory_error_pct"]),
             number(summary.get("chosen_behind_best_pct"))]
        )  # fmt: skip
    return table(
        ["file", "link", "devices", "plans", "median error of step time (%)",
         "with a profile taken later (%)", "of peak memory (%)",
         "best predicted behind best measured (%)"],
        cells,
    )  # fmt: skip


def zero_measured(results: Sequence[Result]) -> str:
    def gain(found: Row, name: str, what: str) -> list[str | None]:
        return [number(found.get(f"{name}_{kind}_{what}"), ".2f")
                for kind in ("measured", "predicted")]  # fmt: skip

    return table(
        ["file", "tokens", "gradients", "ZeRO-3.5 over ZeRO-3", "predicted", "ZeRO-4 over ZeRO-3",
         "predicted", "ZeRO-4's memory below ZeRO-2's (%)", "predicted"],
        [[result.name.removesuffix(".json"), found["tokens"], found.get("gradients", "float32"),
          *gain(found, "zero-3.5", "speedup_over_zero_3"),
          *gain(found, "zero-4", "speedup_over_zero_3"),
          *gain(found, "zero-4", "memory_below_zero_2_pct")]
         for result in results for found in result.record["summary"].get("gains", ())
         if len(found) > 2],
    )  # fmt: skip


def calibration(results: Sequence[Result]) -> str:
    """Errors of each line by what it was fitted to, and of the presets measured here."""
    (result,) = results
    lines = table(
        ["data set", "constants fitted to", "energy, median (%)", "worst (%)",
         "ratio of the clocks, median (%)", "worst (%)", "TTFT within 10 points", "worst (points)"],
        [[line["dataset"], line["fitted_to"], number(line["energy_error_median_pct"]),
          number(line["energy_error_worst_pct"]), number(line["ratio_error_median_pct"]),
          number(line["ratio_error_worst_pct"]),
          f"{line['ttft_within_10_points']} of {line['ttft_points']}",
          number(line["ttft_error_worst_points"])]
         for line in result.record["lines"]],
    )  # fmt: skip
    presets = table(
        ["preset", "points of", "", "time: points", "median (%)", "worst (%)", "power: points",
         "median (%)", "worst (%)"],
        [[f"`{row['preset']}`", _run_of(row), row["kind"], row["time_points"],
          number(row["time_error_median_pct"]), number(row["time_error_worst_pct"]),
          row["power_points"], number(row["power_error_median_pct"]),
          number(row["power_error_worst_pct"])]
         for row in result.record["presets"]],
    )  # fmt: skip
    return f"{lines}\n\nDecode steps of the presets that this project measured:\n\n{presets}"


def _run_of(row: Row) -> str:
    """The measured run's name; its file is shown where measured figures are."""
    return f"`{row['points_of'].removeprefix('results/').removesuffix('.json')}`"


def live(results: Sequence[Result]) -> str:
    """A table a run: measured, predicted, what deciding took."""
    parts = []
    for result in results:
        said = {"predicted": "prediction_error_pct"}
        if any("again" in row for row in result.rows):
            said["again"] = "again_error_pct"
        names = {"predicted": "predicted", "again": "predicted later, with the recorded profile"}
        config = result.record["config"]
        parts.append(
            f"{config['requests']} requests over {config['duration_s']:g} s to {config['model']}, "
            f"{config['instances']}, {processor(result.record)}:"
        )
        parts.append(table(
            ["figure", "measured", *(title for key in said for title in (names[key], "error (%)"))],
            [[row["figure"], number(row["measured"], ".4g"),
              *(cell for key, error in said.items()
                for cell in (number(row.get(key), ".4g"), number(row.get(error), "+.1f")))]
             for row in result.rows],
        ))  # fmt: skip
        parts += [
            f"Deciding, `{row['instance']}`: {row['decide_wall_p50_us']:.0f} us at the median of "
            f"{row['decisions']} iterations, {row['decide_wall_p99_us']:.0f} us at p99."
            for row in result.record["decisions"] or ()
        ]
    return "\n\n".join(parts)


def loads(results: Sequence[Result]) -> str:
    """Loads predicted from a shape alone, and served later where that was done."""
    parts = []
    for result in results:
        record = result.record
        if record["kind"] == "simulated":
            host = record["config"]["host"]
            parts.append(
                f"Predicted on {record['config']['predicted_on']} for {record['config']['model']} "
                f"on one prefill and one decode {record['config']['gpu'].upper()}, from the GPU's "
                f"row and the shape; the host's times ({len(host)} figures) are in the file."
            )
            names = ["ttft_mean_ms", "ttft_p90_ms", "ttft_p99_ms", "itl_mean_ms", "itl_p90_ms",
                     "itl_p99_ms", "energy_j_per_token"]  # fmt: skip
            parts.append(table(
                ["load", "requests", *names],
                [[row["load"], row["requests"], *(number(row[n], ".4g") for n in names)]
                 for row in result.rows],
            ))  # fmt: skip
            continue
        parts.append(
            f"Served on {processor(record)}; {record['within_goal']} of {record['judged']} within "
            "10 % (p99 15 %):"
        )
        parts.append(table(
            ["load", "figure", "measured", "predicted", "error (%)"],
            [[row["load"], row["figure"], number(row["measured"], ".4g"),
              number(row["predicted"], ".4g"), number(row["prediction_error_pct"], "+.1f")]
             for row in result.rows],
        ))  # fmt: skip
    return "\n\n".join(parts)


def savings(results: Sequence[Result]) -> str:
    """What of the headroom each policy saves, and what it loses in attainment."""
    cells = []
    for row in (row for result in results for row in result.rows):
        policies = row["policies"]

        def share(name: str, policies: Row = policies) -> str | None:
            policy = policies.get(name)
            if policy is None:
                return None
            return f"{policy['headroom_pct']:.0f} ({policy['lost_points']:+.1f})"

        cells.append(
            [row["dataset"], f"{row['rate_per_s']:g}", row["arrivals"],
             _attainment(policies["max"]), "yes" if row["counts"] else "no",
             number(row["published_headroom_pct"], ".0f"),
             number(row["published_ttft_lost_points"]), share("both"), share("cap-250"),
             share("ahead"), share("eco"), number(policies["eco"]["energy_saving_pct"])]
        )  # fmt: skip
    text = table(
        ["data set", "requests/s", "arrivals", "maximum clock's TTFT / ITL ok (%)", "counts",
         "published (%)", "its TTFT lost (points)", "`both`", "`cap-250`", "`ahead`",
         "`eco`", "its saving (%)"],
        cells,
    )  # fmt: skip
    return (
        "Saved, in percent of what the static sweet spot saves against the maximum clock; in "
        "brackets how many points of TTFT or ITL attainment, whichever is more, lie below the "
        f"maximum clock's (equal: at most {EQUAL_POINTS}). A point where that itself attains too "
        f"little does not count.\n\n{text}"
    )


def headroom(results: Sequence[Result]) -> str:
    """What each part of the headroom is worth, at most half a point lost."""
    (result,) = results
    cells = []
    for row in result.rows:
        if row["best"]:
            clocks = f"{row['prefill_mhz']}"
            clocks += (
                f", high from {row['rises_s']:g} s"
                if row["decode_mhz"] is None
                else f" / {row['decode_mhz']}"
            )
            cells.append(
                [row["dataset"], f"{row['rate_per_s']:g}", row["what"], clocks,
                 number(row["headroom_pct"], ".0f"), number(row["lost_points"], ".2f")]
            )  # fmt: skip
    text = table(
        ["data set", "requests/s", "held", "prefill / decode (MHz)", "of the headroom (%)",
         "points lost"],
        cells,
    )  # fmt: skip
    most = result.record["config"]["most_lost_points"]
    return (
        f"Of each kind the most that loses {most:g} points at most; where all lose more, what "
        "loses least. A schedule knows when the last request arrives: between the moment named and "
        "that one decode is at the highest clock, before and after at the lowest that keeps the "
        f"ITL.\n\n{text}"
    )


def _attains(policy: Row, most: Row) -> bool:
    return all(
        policy[key] >= most[key] - EQUAL_POINTS
        for key in ("ttft_attainment_pct", "itl_attainment_pct")
    )


def _attainment(policy: Row) -> str:
    return f"{policy['ttft_attainment_pct']:.1f} / {policy['itl_attainment_pct']:.1f}"


def matrix(results: Sequence[Result]) -> str:
    cells = []
    for row in (row for result in results for row in result.rows):
        most, ours = row["policies"]["max"], row["policies"]["ahead"]
        eco = row["policies"]["eco"]
        cells.append(
            [row["gpu"] + ("*" if row["extrapolated"] else ""), row["instances"], row["model"],
             row["trace"], row["load"], number(ours["energy_saving_pct"]),
             number(ours["headroom_pct"], ".0f"), _attainment(ours), _attainment(most),
             "yes" if row["counts"] else "no", "yes" if _attains(ours, most) else "no",
             f"{eco['headroom_pct']:.0f} ({eco['lost_points']:+.1f})"]
        )  # fmt: skip
    text = table(
        ["GPU", "instances", "model", "trace", "load", "saving (%)",
         "of the sweet spot's (%)", "TTFT / ITL ok (%)", "maximum clock's", "counts", "equal",
         "`eco`, of the sweet spot's (points lost)"],
        cells,
    )  # fmt: skip
    return f"Policy `ahead`; * marks constants extrapolated from data sheets.\n\n{text}"


def decisions(results: Sequence[Result]) -> str:
    (result,) = results
    text = table(
        ["decision", "median (us)", "p99 (us)"],
        [[f"`{row['decision']}`", number(row["cpu_p50_us"], ".0f"),
          number(row["cpu_p99_us"], ".0f")] for row in result.rows],
    )  # fmt: skip
    return f"CPU time of the deciding thread; {result.record['config']['other_load']}.\n\n{text}"


def day(results: Sequence[Result]) -> str:
    (result,) = results
    config = result.record["config"]
    text = table(
        ["policy", "J a token", "saving (%)", "of it idle (%)", "TTFT / ITL ok (%)",
         "asleep (instance hours)", "wakes", "replay CPU (s)"],
        [[f"`{row['policy']}`", number(row["energy_j_per_token"], ".2f"),
          number(row["energy_saving_pct"]), number(row["idle_energy_pct"]), _attainment(row),
          number(row["asleep_instance_s"] / 3600), row["wakes"], number(row["cpu_s"])]
         for row in result.rows],
    )  # fmt: skip
    return (
        f"{config['trace']}, {config['instances']}, {config['requests']:,} requests in "
        f"{config['seconds']:.0f} s: {result.record['energy_saving_pct']:.1f} % saved, asleep "
        f"{result.record['energy_saving_asleep_pct']:.1f} %.\n\n{text}"
    )


def serving(results: Sequence[Result]) -> str:
    parts = []
    for result in results:
        decode = [row for row in result.rows if row["study"] == "decode"]
        prefill = [row for row in result.rows if row["study"] == "prefill"]
        parts += [f"{result.record['config']['model']} ({result.name}):", _decode(decode)]
        parts += [_prefill(prefill)] if prefill else []
    return "\n\n".join(parts)


def _decode(rows: Sequence[Row]) -> str:
    return table(
        ["weights", "batch", "context", "ms between tokens", "p99", "over the floor", "J a token",
         "public vLLM (ms)"],
        [[row["weights"], row["batch"], row["context"], number(row["itl_ms"], ".2f"),
          number(row["itl_p99_ms"], ".2f"), number(row["itl_floor_ratio"], ".2f"),
          number(row.get("energy_j_per_token"), ".3g"),
          number(VLLM_ITL_MS.get(row["batch"])) if row["weights"] == "bfloat16" else None]
         for row in rows],
    )  # fmt: skip


def _prefill(rows: Sequence[Row]) -> str:
    return table(
        ["prompt", "pieces of", "prefill (ms)", "tokens/s", "of the rate of a large product (%)"],
        [[row["prompt"], row["piece"], number(row["prefill_ms"]),
          number(row["tokens_per_s"], ",.0f"), number(100 * row["matmul_rate_share"], ".0f")]
         for row in rows],
    )  # fmt: skip


def crashes(results: Sequence[Result]) -> str:
    return table(
        ["kills", "during a save", "files cut short", "bits of records flipped",
         "second runs refused", "data changed", "full disks", "steps", "losses that differ",
         "faults"],
        [[row["kills"], row["kills_during_a_save"], row["files_cut_short"],
          row.get("bits_of_records_flipped", "-"), row.get("second_runs_refused", "-"),
          sum(count for name, count in row.items() if name.startswith("data_")),
          sum(count for name, count in row.items() if name.startswith("disk_full_")),
          row["steps"], row["losses_that_differ"], len(row["faults"])]
         for result in results for row in result.rows],
    )  # fmt: skip


def health(results: Sequence[Result]) -> str:
    return table(
        ["bodies of 8 MB", "at once", "refused in all", "health asked", "p50 (ms)", "p99 (ms)",
         "longest (ms)"],
        [[row["bodies"], row["clients"], row["refused"], row["asked"],
          *(number(row[f"{name}_ms"]) for name in ("p50", "p99", "max"))]
         for result in results for row in result.rows],
    )  # fmt: skip


def clients(results: Sequence[Result]) -> str:
    found: dict[tuple[str, str], list[Row]] = {}
    for result in results:
        versions = result.record["config"]["clients"]
        for row in result.rows:
            found.setdefault((row["client"], versions.get(row["client"], "")), []).append(row)
    return table(
        ["client", "version", "examples", "passed", "failed"],
        [[client, version, len(rows), sum(row["ok"] for row in rows),
          ", ".join(row["example"] for row in rows if not row["ok"])]
         for (client, version), rows in found.items()],
    )  # fmt: skip


def script_kinds(results: Sequence[Result]) -> str:
    rows = [row for result in results for row in result.rows]
    schedules = [name.removesuffix("_loss") for row in rows[:1] for name in row if "_loss" in name]
    return table(
        ["script", "lines changed", *(f"`{name}`, loss" for name in schedules)],
        [[row["script"], row["changed_lines"],
          *(number(row[f"{name}_loss"], ".1e") for name in schedules)]
         for row in rows],
    )  # fmt: skip


def random_models(results: Sequence[Result]) -> str:
    counts = Counter((row["outcome"], row["reason"]) for result in results for row in result.rows)
    return table(
        ["models", "outcome", "reason"],
        [[count, outcome, reason] for (outcome, reason), count in sorted(counts.items())],
    )  # fmt: skip


def ablation(results: Sequence[Result]) -> str:
    return table(
        ["varied", "value", "saving (%)", "TTFT / ITL ok (%)"],
        [[row["study"], row["value"], number(row["energy_saving_pct"]), _attainment(row)]
         for result in results for row in result.rows],
    )  # fmt: skip


def front(results: Sequence[Result]) -> str:
    rows = [row for result in results for row in result.rows]
    return table(
        ["fronts", "instances", "by way of", "route", "output tokens",
         "requests a CPU second of a front", "CPU ms a request", "and of what looks after them",
         "requests/s with a core each"],
        [[row.get("fronts", 1), row["instances"], row["way"], row["route"], row["output_tokens"],
          number(row["requests_per_front_cpu_s"], ",.0f"),
          number(row["front_cpu_ms_per_request"], ".2f"),
          number(row.get("supervisor_cpu_ms_per_request", 0) or None, ".3f"),
          number(row.get("fronts", 1) * row["requests_per_front_cpu_s"], ",.0f")]
         for row in rows],
    )  # fmt: skip


def pages(results: Sequence[Result]) -> str:
    return table(
        ["model", "device", "tokens", "MiB", "ms", "first time (ms)", "GB/s"],
        [[result.record["config"]["model"], result.record["config"]["device"],
          f"{row['tokens']:,}", number(row["mib"]), number(row["pull_ms"]),
          number(row["first_pull_ms"]), number(row["gb_per_s"], ".2f")]
         for result in results for row in result.rows],
    )  # fmt: skip
