"""`jaxsys replay`: policies side by side, honest records, and refusals that name the fault."""

import json
import re
import time
from pathlib import Path

import pytest

from jaxsys import cli
from jaxsys.errors import UsageError
from jaxsys.serve.energy.gpu_model import simulated_gpu
from jaxsys.serve.energy.predictors import ModelPredictor
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.energy.window_control import WindowControl
from jaxsys.serve.simulation.comparison import compare, setting, unmeetable
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.policies import POLICIES, policy_named
from jaxsys.serve.simulation.replay import carried_turns_per_s, parse_instances
from studies.calibration import (
    FITTED,
    dataset_trace,
    errors_of,
    published,
    scenario,
    static_rows,
)

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
TABLE = DATA / "voltanallm_llama8b_lmsys.csv"
LIGHT = synthetic_trace(rate_per_s=6, duration_s=15, seed=3)


def test_every_policy_serves_the_same_tokens():
    rows = compare(LIGHT, setting("h100", predictor="model"), list(POLICIES))
    assert list(rows) == list(POLICIES)
    tokens = {row["output_tokens"] for row in rows.values()}
    assert tokens == {LIGHT.output_tokens.sum()}
    assert rows["max"]["energy_saving_pct"] == 0
    assert rows["both"]["energy_saving_pct"] > 25
    assert set(rows["sweet-spot"]["clock_seconds"]["decode"]) == {"1080"}
    for row in rows.values():
        assert row["ttft_attainment_pct"] >= rows["max"]["ttft_attainment_pct"] - 0.5
        assert 0 < row["idle_energy_pct"] < 100


def test_the_learned_predictor_governs_as_well_as_the_exact_one():
    exact = compare(LIGHT, setting("h100", predictor="model"), ["ecofreq"])["ecofreq"]
    learned = compare(LIGHT, setting("h100", predictor="ecopred"), ["ecofreq"])["ecofreq"]
    assert learned["energy_j"] == pytest.approx(exact["energy_j"], rel=0.03)
    assert learned["itl_attainment_pct"] >= exact["itl_attainment_pct"] - 0.5


@pytest.mark.skipif(not TABLE.is_file(), reason="needs ../shared/data")
@pytest.mark.parametrize(("line", "rate"), list(zip(FITTED, (95, 75), strict=True)))
def test_the_published_static_runs_are_met(line, rate):
    """One rate of each line, at both clocks; the study has them all."""
    points = [p for p in published(DATA / line.table) if p.rate_per_s == rate]
    found = errors_of(static_rows(line, points))
    assert found["energy_points"] == 2
    most = {
        "energy_error_worst_pct": 8,
        "ratio_error_worst_pct": 4,
        "ttft_error_worst_points": 12,
    }
    for name, bound in most.items():
        worst = found[name]
        assert worst is not None and worst < bound, name


@pytest.mark.skipif(not TABLE.is_file(), reason="needs ../shared/data")
def test_the_published_table_is_read():
    points = published(TABLE)
    assert [p.rate_per_s for p in points] == [75, 80, 85, 90, 95, 100, 105, 110, 120, 130]
    assert points[0].saving_pct == pytest.approx(36.3, abs=0.1)
    assert points[0].energy_j["1005"] is None  # could not be read off the plot


def test_light_load_of_the_published_setting_saves_at_equal_attainment():
    trace = dataset_trace("lmsys", 40, 1, duration_s=40)
    rows = compare(trace, scenario(predictor="model"), ["both-energy"])
    assert rows["both-energy"]["energy_saving_pct"] > 30
    for key in ("ttft_attainment_pct", "itl_attainment_pct"):
        assert rows["both-energy"][key] >= rows["max"][key] - 0.5


def test_unmeetable_bounds_are_said():
    s = setting("h100", slo=Slo(ttft_s=0.005, itl_s=0.001))
    ttft, itl = sorted(unmeetable(LIGHT, s), reverse=True)
    assert "TTFT of 5 ms cannot be met" in ttft and "served at the maximum clock" in ttft
    assert "ITL of 1 ms cannot be met" in itl
    assert unmeetable(LIGHT, setting("h100")) == []


def test_window_control_needs_a_window():
    gpu = simulated_gpu("h100", "llama-3-8b")
    with pytest.raises(UsageError, match="window_s=0"):
        WindowControl(ModelPredictor(gpu), SharedSlo(), window_s=0.0)


def test_any_clock_policy_goes_with_any_router():
    rows = compare(LIGHT, setting("h100", predictor="model"), ["both-energy", "ecofreq+energy"])
    assert rows["both-energy"]["energy_j"] == rows["ecofreq+energy"]["energy_j"]
    assert policy_named("eco") == policy_named("ecofreq+ecoroute+gather")
    assert policy_named("ahead") == policy_named("ahead+energy+gather")
    for name, message in (
        ("magic", "policy 'magic' is not known; use one of max, sweet-spot, window, ecofreq"),
        ("max+magic", "router 'magic' is not known; use one of fewest, round-robin"),
    ):
        with pytest.raises(UsageError, match=message):
            compare(LIGHT, setting("h100"), [name])


def test_a_power_limit_is_a_policy_to_compare_with():
    """It lowers the clock where the work draws more, and does nothing where it draws less."""
    rows = compare(LIGHT, setting("h100", predictor="model"), ["cap-700", "cap-400", "sweet-spot"])
    assert rows["cap-700"]["energy_j"] == rows["max"]["energy_j"]
    assert 5 < rows["cap-400"]["energy_saving_pct"] < rows["sweet-spot"]["energy_saving_pct"]
    for watts, message in (("10", "must lie above the"), ("900", "at most its 700 W")):
        with pytest.raises(UsageError, match=message):
            compare(LIGHT, setting("h100"), [f"cap-{watts}"])


def test_a_power_limit_out_of_range_is_refused_before_the_header(capsys):
    assert run("--policy", "max,cap-50", "--duration", "5") == 2
    error = capsys.readouterr().err
    assert "policy cap-50: a limit of 50 W must lie above" in error and error.count("\n") == 1


# --- command line -----------------------------------------------------------------------------


def run(*arguments: str) -> int:
    return cli.main(["replay", "--predictor", "model", *arguments])


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    out = tmp_path / "out"
    code = run("--rate", "5", "--duration", "10", "--policy", "sweet-spot,both", "--out", str(out))
    assert code == 0
    text = capsys.readouterr()
    assert "sweet-spot" in text.out and "saving" in text.out
    assert "all figures are simulated" in text.err.replace("\n", " ")
    record = json.loads((out / "replay.json").read_text())
    assert record["kind"] == "simulated" and record["config"]["extrapolated"] is False
    assert {"hardware", "versions"} <= set(record) and len(record["rows"]) == 3
    assert set(record["policies"]) == {"max", "sweet-spot", "both"}
    assert record["energy_saving_pct"] == max(
        row["energy_saving_pct"] for row in record["policies"].values()
    )
    for name in ("replay_overview.png", "replay_clocks.png", "replay_course.png"):
        assert (out / name).stat().st_size > 10_000


def test_a_trace_file_is_replayed_as_json(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    # As spreadsheets save it: with a mark of its encoding before the header.
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n1,200,6\n", "utf-8-sig")
    assert run("--trace", str(path), "--policy", "ecofreq", "--json", "--gpu", "gh200") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["requests"] == 2
    assert record["config"]["extrapolated"] is True


def test_requests_that_fit_no_instance_are_counted(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n1,9000000,6\n")
    assert run("--trace", str(path), "--policy", "max", "--json") == 0
    text = capsys.readouterr()
    said = "1 of 2 requests are longer than the 8192 positions of llama-3-8b and left out"
    assert said in text.err
    config = json.loads(text.out)["config"]
    assert (config["requests"], config["requests_too_long"]) == (1, 1)


def test_a_request_of_all_positions_is_served_and_one_more_is_not(tmp_path, capsys):
    path = tmp_path / "moon.jsonl"
    line = '{"timestamp": %d, "input_length": %d, "output_length": 10, "hash_ids": [0, 1]}\n'
    path.write_text(line % (0, 8182) + line % (1500, 8183))
    assert run("--trace", str(path), "--policy", "max", "--json") == 0
    text = capsys.readouterr()
    config = json.loads(text.out)["config"]
    assert (config["requests"], config["requests_too_long"]) == (1, 1)
    assert "hash_ids of trace moon is not used" in text.err
    path.write_text(line % (0, 9000) + line % (1500, 9000))
    assert run("--trace", str(path), "--policy", "max") == 2
    error = capsys.readouterr().err
    assert "no request fits 8192 positions of llama-3-8b; the shortest has 9010 tokens" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--instances", "2X2"], "must read like 2P2D"),
        (["--instances", "0P2D"], "at least one of each"),
        (["--instances", "1000000P1D"], "are too many; 4096 at most"),
        (["--prompt-mean", "1e9"], "--prompt-mean 1e+09 must be from 1 to 3000 tokens"),
        (["--out", f"{__file__}/folder"], "test_replay.py: Not a directory"),
        (["--gpu", "v100"], "is not simulated"),
        (["--policy", "magic"], "'magic' is not known"),
        (["--ttft-ms", "-1"], "--ttft-ms -1 must be from 1 to 300000"),
        (["--itl-slo", "0.05"], "give --itl-ms 50"),
        (["--trace", "absent.csv"], "No such file"),
        (["--trace", str(Path(__file__).parent)], "Is a directory"),
        (["--rate", "-3"], "must be a finite positive"),
        (["--rate", "0"], "--rate 0 must be a finite positive"),
        (["--duration", "nan"], "--duration nan must be a finite positive"),
        (["--duration", "inf"], "--duration inf must be a finite positive"),
        (["--duration", "0.01"], "no request arrives in --duration 0.01 at --rate 10: the first"),
        (["--rate", "1000000", "--duration", "1"], "1,000,000 requests are too many"),
        (["--out", __file__], "is a file; name a folder"),
        (["--trace", "ok.csv", "--prompt-mean", "9"], "--prompt-mean 9.0 is of traffic that is"),
        (["--trace", "ok.csv", "--output-mean", "9"], "--output-mean 9.0 is of traffic that is"),
        (["--trace", "ok.csv", "--cv", "1"], "--cv 1.0 is of traffic that is made, and --trace"),
        (["--trace", "ok.csv", "--seed", "0"], "--seed 0 is of traffic that is made"),
        (["--trace", "ok.csv", "--agents", "2"], "--agents 2 is of traffic that is made"),
        (["--trace", "ok.csv", "--turns", "2"], "--turns 2 is of traffic that is made"),
        (["--turns", "40"], "--turns 40 is of sessions of agents; say how many with --agents"),
        (["--known-share", "0.5"], "--known-share 0.5 is of sessions of agents"),
        (["--common-tokens", "0"], "--common-tokens 0 is of sessions of agents"),
        (["--agents", "2", "--cv", "3"], "--cv 3 is of requests that know nothing of each other"),
    ],
)
def test_wrong_requests_exit_2_with_one_line(arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_trace_of_one_moment_has_no_rate_to_change(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n5,100,5\n")
    assert run("--trace", str(path), "--rate", "3") == 2
    assert "no rate to bring to --rate 3" in capsys.readouterr().err


def test_instances():
    assert parse_instances("32p16d") == (32, 16)


def test_sessions_of_agents_are_replayed_whole_at_a_rate_that_is_carried(capsys):
    """40 turns of 140,000 tokens in, as the options stand: quickly, and no queue grows."""
    command = ["--agents", "1", "--ttft-ms", "5000", "--json"]
    before_s = time.process_time()
    assert run(*command, "--policy", "ecofreq+energy+prefix") == 0
    assert time.process_time() - before_s < 30
    said = capsys.readouterr()
    rows = {row["policy"]: row for row in json.loads(said.out)["rows"]}
    assert re.search(r"--rate 0\.19 turns a second: 33 % of what 2P2D carry", said.err)
    row = rows["ecofreq+energy+prefix"]
    assert row["requests"] >= 20 and row["prefix_hit_pct"] > 90
    assert row["itl_attainment_pct"] > 95


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_what_is_carried_of_agents_is_the_less_of_reading_and_writing(gpu):
    chosen = setting(gpu, "llama-3-8b", prefill=2, decode=2, slo=Slo())

    def carried(prefill, decode, **changed):
        usual = {"prompt_tokens": 140_000, "output_tokens": 440, "known_share": 0.96}
        return carried_turns_per_s(
            chosen.gpu, prefill, decode, piece_tokens=2048, **usual | changed
        )

    reading, writing = carried(1, 10**6), carried(10**6, 1)
    assert carried(2, 10**6) == pytest.approx(2 * reading)
    for prefill, decode in ((2, 2), (4, 2), (1, 7)):
        least = min(prefill * reading, decode * writing)
        assert carried(prefill, decode) == pytest.approx(least)
    assert carried(1, 0) == pytest.approx(1 / (1 / reading + 1 / writing))
    assert carried(1, 10**6, known_share=0.9) < reading < carried(1, 10**6, known_share=0.98)
    assert carried(10**6, 1, output_tokens=880) < 0.6 * writing
