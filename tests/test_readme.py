"""The figures of the README and docs/measured.md are those of the result files they link."""

from pathlib import Path

import pytest

from jaxsys.results import read_result

ROOT = Path(__file__).parents[1]
README = " ".join((ROOT / "README.md").read_text().split())
PAGE = " ".join((ROOT / "docs/measured.md").read_text().split())


def rows(name: str, **wanted):
    found = read_result(ROOT / f"results/{name}.json")["rows"]
    assert f"(../results/{name}.json)" in PAGE
    return [row for row in found if wanted.items() <= row.items()]


def test_training_figures():
    (best,) = rows("train_step_h100_16k_dp", recompute="none")
    assert f"**{best['model_tflops_per_gpu']:.0f} model TFLOP/s** with 16,384 tokens" in PAGE
    assert best["sequence_length"] == 16384
    plain = rows("train_step_h100_16k_fsdp") + rows("train_step_h100_16k_again")
    plain = [row["model_tflops_per_gpu"] for row in plain if row["schedule"] == "gspmd-fsdp"]
    assert f"`jax.jit` step does {min(plain):.0f} to {max(plain):.0f} (" in PAGE
    (again,) = (
        row["model_tflops_per_gpu"]
        for row in rows("train_step_h100_16k_again")
        if row["schedule"] == "dp"
    )
    assert f"(`jaxsys train --unroll`), {again:.0f} when run again" in PAGE
    short, its = (row["model_tflops_per_gpu"] for row in rows("train_step_h100_4k"))
    assert f"layers written out, {short:.0f}, where the plain step does {its:.0f}" in PAGE
    (own, held), (other, its) = (
        (row["model_tflops_per_gpu"], row["temp_gib"])
        for row in rows("train_step_h100_16k_looped", recompute="none")
    )
    looped = (
        f"{own:.0f} in {held:.1f} GiB of temporary memory, where the plain step does {other:.0f}"
    )
    assert f"{looped} in {its:.1f}" in PAGE


def test_training_figures_of_an_h200():
    def made(length, **wanted):
        (row,) = rows(f"train_step_h200_{length}", **wanted)
        return f"{row['model_tflops_per_gpu']:.0f}"

    ours, plain = (made("16k", schedule=s, recompute="none") for s in ("dp", "gspmd-fsdp"))
    assert f"does {ours} with 16,384 tokens a sequence, plain `jax.jit` {plain}" in PAGE
    ours, plain = (made("64k", schedule=s, recompute="none") for s in ("dp", "gspmd-fsdp"))
    assert f"{ours} and {plain} with 65,536, nothing computed again" in PAGE
    assert f"gates computed again, {made('128k', schedule='dp', recompute='selective')}" in PAGE


@pytest.mark.parametrize(
    ("heading", "results", "lines"),
    [
        ("on two H100s", ["gpus_2"], 5),
        ("on two H200s", ["gpus_h200x2_rings", "gpus_h200x2"], 12),
    ],
)
def test_two_gpu_training_figures(heading, results, lines):
    columns = (("direct", 8), ("host", 8), ("sockets", 8), ("direct", 32))  # links, sequences
    names = {
        "plain `jax.jit`": "gspmd-fsdp",
        "PyTorch 2.11 FSDP2": "torch-fsdp2",
        "PyTorch 1F1B": "torch-1f1b",
    }
    text = (ROOT / "docs/measured.md").read_text()
    text = text[text.index(f"**Training {heading}.**") :]
    schedule = ""
    for line in text[text.index("| | NVLink |") :].splitlines()[2 : 2 + lines]:
        name, *cells = [cell.strip(" *") for cell in line.strip(" |").split("|")]
        if not name.startswith("the same"):
            schedule = names.get(name.split(",")[0]) or name.split("`")[1]
        for (link, sequences), cell in zip(columns, cells, strict=False):
            asked = {"schedule": schedule, "link": link, "sequence_length": 16384}
            made = [
                row
                for result in results
                for row in read_result(ROOT / f"results/{result}.json")["rows"]
                if asked.items() <= row.items() and row.get("microbatches", 8) == sequences
            ]
            figures = {f"{r['model_tflops_per_gpu']:.0f}" for r in made if "step_s" in r}
            assert not cell or cell in figures, line


def test_two_gpu_serving_figures():
    found = {row["figure"]: row for row in rows("energy_live_h100x2")}
    late = [f"{-found[name]['prediction_error_pct']:.0f}" for name in
            ("ttft_mean_ms", "itl_mean_ms", "ttft_p99_ms", "itl_p99_ms")]  # fmt: skip
    first, others = (found[f"{name}_mean_ms"]["measured"] for name in ("ttft", "itl"))
    assert f"after {first:.0f} ms and the others every {others:.1f} ms" in PAGE
    assert "{} and {} % too early, at p99 {} and {} %".format(*late) in PAGE


def test_serving_figures_of_an_h200():
    error = {
        row["figure"]: abs(row["prediction_error_pct"])
        for row in rows("energy_live_h200")
        if row["prediction_error_pct"] is not None
    }
    assert f"and {error.pop('itl_p90_ms'):.0f} % off at p90 of ITL" in PAGE
    assert max(error.values()) < 7
    assert "within 7 % of mean, median and p99 and of energy a token" in PAGE


def test_planned_figures_of_an_h200():
    rows("planner_measure_h200")
    found = read_result(ROOT / "results/planner_measure_h200.json")["summary"]
    assert f"{found['cells']} steps, predicted from a profile" in PAGE
    time, memory = found["median_error_pct"], found["median_memory_error_pct"]
    assert f"off by {time:.1f} % of time and {memory:.1f} % of memory at the median" in PAGE
    assert found["chosen_behind_best_pct"] == 0


def test_serving_figures():
    (row,) = rows("serve_gpu", study="decode", batch=64, weights="bfloat16")
    assert f"**{row['itl_ms']:.1f} ms**, {row['itl_floor_ratio']:.2f} times what reading" in PAGE


def test_network_figures():
    def slower(other, ratio, rate, what="step_s"):
        wanted = {"mbit_per_s": rate, "gs_over_18hlp": ratio}
        (row,) = rows("network", schedule=other, **wanted)
        (ring,) = rows("network", schedule="weipipe-interleave", **wanted)
        return row[what] / ring[what]

    sizes = (0.25, 1, 2, 8)
    gains, expected = (
        [slower("1f1b-overlap", at, 25, what) for at in sizes] for what in ("step_s", "predicted_s")
    )
    assert (
        f"took {gains[0]:.2f} times as long with 1F1B as with a ring at a quarter of that "
        f"({expected[0]:.2f} was predicted), {gains[1]:.2f} times at it ({expected[1]:.2f}), "
        f"{gains[2]:.1f} times at twice ({expected[2]:.1f}) and {gains[3]:.1f} times at eight "
        f"times ({expected[3]:.1f})"
    ) in PAGE
    fast, free = ([slower("1f1b-overlap", at, rate) for at in sizes] for rate in (100, None))
    assert "took {:.2f}, {:.2f}, {:.1f} and {:.1f} times as long, with no".format(*fast) in PAGE
    assert "limit on the network {:.1f}, {:.1f}, {:.1f} and {:.1f}.".format(*free) in PAGE
    plain = {rate: [slower("gspmd-fsdp", at, rate) for at in sizes] for rate in (100, 25)}
    low, high = (f"{min(p):.1f} to {max(p):.1f} times" for p in plain.values())
    assert f"took {low} the ring's time at 100 Mbit/s and {high} at 25" in PAGE
    for at in sizes:
        assert max(slower("dp", at, rate) for rate in (None, 100, 25)) < 1
        assert slower("zero-3", at, 25) < 1
        assert at < 2 or max(slower("zero-3", at, rate) for rate in (None, 100)) < 1


def test_network_figures_of_eight_hosts():
    def step_s(schedule):
        (row,) = rows("network_8", schedule=schedule, mbit_per_s=10.0)
        assert row["gs_over_18hlp"] == 2
        return row["step_s"]

    ring = step_s("weipipe-interleave")
    pipeline, sharded = (step_s(name) / ring for name in ("1f1b-overlap", "zero-3"))
    assert f"1F1B took {pipeline:.1f} times the ring's time and ZeRO-3 {sharded:.1f} (" in PAGE


def test_the_readmes_table():
    def made(name, **wanted):
        found = read_result(ROOT / f"results/{name}.json")
        assert f"(results/{name}.json)" in README
        (row,) = [row for row in found["rows"] if wanted.items() <= row.items()]
        return row

    ours, plain = (
        made("train_step_h200_16k", schedule=s, recompute="none")["model_tflops_per_gpu"]
        for s in ("dp", "gspmd-fsdp")
    )
    assert f"**{ours:.0f}** model TFLOP/s; plain `jax.jit` {plain:.0f}" in README
    links = ("direct", "host", "sockets")

    def cells(schedule):
        found = read_result(ROOT / "results/gpus_h200x2_rings.json")["rows"]
        wanted = {"schedule": schedule, "sequence_length": 16384, "microbatches": 8}
        best = (
            max(
                (
                    row["model_tflops_per_gpu"]
                    for row in found
                    if {**wanted, "link": at}.items() <= row.items()
                ),
                default=None,
            )
            for at in links
        )
        return " / ".join("-" if value is None else f"{value:.0f}" for value in best)

    text = README.replace("**", "")
    names = ("zero-1", "gspmd-fsdp", "weipipe-keep", "1f1b-overlap")
    ours, plain, ring, pipeline = map(cells, names)
    assert (
        f"`zero-1` {ours}; plain `jax.jit` FSDP {plain}; a weight ring that keeps {ring}; "
        f"1F1B {pipeline}"
    ) in text
    shared, plain = (
        made("train_step_h200x2_8b_tensor_8k", schedule=name)["model_tflops_per_gpu"]
        for name in ("dp", "gspmd-fsdp")
    )
    assert f"{shared:.0f} against {plain:.0f} model TFLOP/s a GPU, {shared / plain:.2f}" in text
    found = [read_result(ROOT / f"results/planner_measure_h200x2_{at}.json") for at in links]
    errors = " / ".join(f"{result['summary']['median_error_pct']:.1f}" for result in found)
    assert f"| {errors} % |" in README
    gains = next(g for g in found[1]["summary"]["gains"] if g["gradients"] == "bfloat16")
    assert (
        f"**{gains['zero-3.5_measured_speedup_over_zero_3']:.2f}** times as fast; "
        f"{gains['zero-3.5_predicted_speedup_over_zero_3']:.2f} predicted"
    ) in README
    experts = [made("serve_gpt_oss_20b", study="decode", batch=batch) for batch in (1, 8, 64)]
    times = " / ".join(f"{row['itl_ms']:.1f}" for row in experts).replace("2.5", "**2.5**", 1)
    ratios = " / ".join(f"{row['itl_floor_ratio']:.1f}" for row in experts)
    assert f"every {times} ms: {ratios} times what reading takes" in README
    name = "serve_gpu_quantised_h200"
    times, small = (
        " / ".join(
            f"{made(f'{name}_again', study='decode', batch=batch, weights=form)['itl_ms']:.1f}"
            for batch in batches
        )
        for form, batches in (("fp8+fp8", (1, 64, 128)), ("int4+int8", (1,)))
    )
    prompt, wide = (
        made(name, study="prefill", weights=weights)["prefill_ms"]
        for weights in ("fp8+fp8", "turned")
    )
    assert f"every {times} ms; {small} ms. A prompt of 2,048 tokens in {prompt:.0f} ms" in text
    assert f"in bfloat16 in {wide:.0f} |" in text
