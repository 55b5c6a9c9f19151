"""The README's figures are those of the result files that it links."""

from pathlib import Path

from jaxsys.results import read_result

ROOT = Path(__file__).parents[1]
README = " ".join((ROOT / "README.md").read_text().split())


def rows(name: str, **wanted):
    found = read_result(ROOT / f"results/{name}.json")["rows"]
    assert f"(results/{name}.json)" in README
    return [row for row in found if wanted.items() <= row.items()]


def test_training_figures():
    (best,) = rows("train_step_h100_16k_dp", recompute="none")
    assert f"**{best['model_tflops_per_gpu']:.0f} model TFLOP/s** with 16,384 tokens" in README
    assert best["sequence_length"] == 16384
    looped = rows("train_step_h100_16k_looped", recompute="none")
    plain = rows("train_step_h100_16k_fsdp", recompute="none")
    plain += [row for row in looped if row["schedule"] == "gspmd-fsdp"]
    low, *_, high = sorted(row["model_tflops_per_gpu"] for row in plain)
    assert f"reaches {low:.0f} to {high:.0f}" in README
    (ours,) = (row for row in looped if row["schedule"] == "dp")
    assert f"layers in a loop, {ours['model_tflops_per_gpu']:.0f}, where" in README


def test_serving_figures():
    (row,) = rows("serve_gpu", study="decode", batch=64, weights="bfloat16")
    assert f"**{row['itl_ms']:.1f} ms**, {row['itl_floor_ratio']:.2f} times what reading" in README


def test_network_figures():
    def step_s(schedule, ratio, what="step_s"):
        wanted = {"mbit_per_s": 100, "gs_over_18hlp": ratio}
        (row,) = rows("network", schedule=schedule, **wanted)
        return row[what]

    gains = [step_s("1f1b-overlap", at) / step_s("weipipe-interleave", at) for at in (0.25, 2, 8)]
    expected = [step_s(name, 2, "predicted_s") for name in ("1f1b-overlap", "weipipe-interleave")]
    said = f"is {gains[1]:.1f} times as fast as 1F1B where G S is twice 18 H L/P"
    assert f"{said} ({expected[0] / expected[1]:.1f} was predicted)" in README
    assert f"{gains[2]:.1f} times where it is eight times, and slower below" in README
    assert gains[0] < 1
    for at in (2, 8):
        others = step_s("weipipe-interleave", at), step_s("1f1b-overlap", at)
        assert step_s("zero-3", at) < min(others)
