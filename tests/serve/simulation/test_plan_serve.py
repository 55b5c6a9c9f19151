"""`jaxsys plan serve`: bounds that hold, a frontier, and refusals that say what it would take."""

import json
import shlex
from dataclasses import replace

import pytest

from jaxsys import cli
from jaxsys.model import preset
from jaxsys.serve.cli import parser as serve_parser
from jaxsys.serve.energy.governors import VALUE_BYTES
from jaxsys.serve.energy.slo import Slo
from jaxsys.serve.settings import with_settings
from jaxsys.serve.simulation import plan_search, plan_serve
from jaxsys.serve.simulation.deployments import Bounds, Deployment, candidates, demand_of
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.plan_search import Judged, chosen_of, frontier, halving, judge
from jaxsys.serve.simulation.plan_serve import listed
from jaxsys.serve.simulation.plan_start import command_of, manifest_of

CONFIG = preset("Llama-3-8B")
TRACE = synthetic_trace(rate_per_s=25, duration_s=12, seed=1, prompt_mean=300, output_mean=120)
BOUNDS = Bounds(CONFIG, demand_of(TRACE), Slo(reserve=0.02))
ONE = Deployment(
    gpu="h100", tensor_parallel=1, prefill=1, decode=0, max_batch=128, weights="bfloat16"
)


@pytest.mark.parametrize("policy", ["max", "ahead"])
@pytest.mark.parametrize("counts", [(1, 0), (1, 1)])
def test_a_replay_takes_more_energy_than_the_bound(counts, policy):
    deployment = replace(ONE, prefill=counts[0], decode=counts[1])
    bound = BOUNDS.of(deployment)
    assert bound.why_not is None
    found = judge(CONFIG, deployment, BOUNDS, TRACE, policy)
    assert found.energy_j_per_token > bound.energy_j_per_token > 0.3 * found.energy_j_per_token
    assert found.attainment_pct > 95


def test_instances_that_do_both_are_filled_evenly():
    """With prompts gathered, a fifth of the tokens of those that write them too came late."""
    trace = synthetic_trace(rate_per_s=100, duration_s=5, seed=1, prompt_mean=250, output_mean=215)
    bounds, both = Bounds(CONFIG, demand_of(trace), Slo()), replace(ONE, prefill=2, max_batch=512)
    most, ahead = (judge(CONFIG, both, bounds, trace, name) for name in ("max", "ahead"))
    assert ahead.attainment_pct > most.attainment_pct - 1
    assert ahead.energy_j_per_token < 0.9 * most.energy_j_per_token


def test_what_the_bound_rules_out_fails_in_a_replay_too():
    hundred = synthetic_trace(
        rate_per_s=160, duration_s=8, seed=1, prompt_mean=300, output_mean=120
    )
    bounds = Bounds(CONFIG, demand_of(hundred), Slo(reserve=0.02))
    assert "% busy" in (bounds.of(replace(ONE, decode=1)).why_not or "")
    assert judge(CONFIG, replace(ONE, decode=1), bounds, hundred, "max").attainment_pct < 50
    assert bounds.least_rate(replace(ONE, decode=1)) == pytest.approx(0.5, abs=0.25)


def test_shares_fall_with_instances_and_rise_with_the_rate():
    shares = [BOUNDS.of(replace(ONE, prefill=n, decode=n)) for n in (1, 2, 4)]
    assert [s.prefill_share for s in shares] == pytest.approx(
        [shares[0].prefill_share / n for n in (1, 2, 4)]
    )
    assert shares[0].decode_share > shares[1].decode_share > shares[2].decode_share
    faster = BOUNDS.of(replace(ONE, decode=1), 2 * BOUNDS.demand.per_s)
    assert faster.prefill_share == pytest.approx(2 * shares[0].prefill_share)


def test_candidates_fit_the_gpus_and_pass_the_bound():
    known = list(
        candidates(
            BOUNDS, {"h100": 4}, ways=(1, 2), weights=("bfloat16", "int8"), batches=(128, 512)
        )
    )
    assert known and all(d.gpus <= 4 and b.why_not is None for d, b in known)
    assert {d.weights for d, _ in known} == {"bfloat16", "int8"}
    assert {d.tensor_parallel for d, _ in known} == {1, 2}
    assert {bool(d.decode) for d, _ in known} == {True, False}
    assert len({d for d, _ in known}) == len(known)


def judged(gpus: int, energy_j: float, attainment: float) -> Judged:
    return Judged(
        deployment=replace(ONE, prefill=gpus),
        policy="max",
        bound=BOUNDS.of(ONE),
        ttft_attainment_pct=attainment,
        itl_attainment_pct=100.0,
        ttft_p99_ms=1.0,
        itl_p99_ms=1.0,
        energy_j_per_token=energy_j,
    )


def test_the_frontier_holds_what_nothing_beats():
    small, thrifty, late = judged(1, 0.2, 99.5), judged(2, 0.1, 99.5), judged(1, 0.1, 80.0)
    beaten, dear = judged(2, 0.2, 99.5), judged(3, 0.1, 100.0)
    everything = [dear, beaten, thrifty, late, small]
    assert frontier(everything) == [late, small, thrifty, dear]
    assert chosen_of(everything, 99.0) == small
    assert chosen_of(everything, 100.0) == dear
    assert chosen_of([late], 99.0) is None


# --- command line -----------------------------------------------------------------------------

SHORT = ("--rate", "20", "--duration", "6", "--replays", "4", "--prompt-mean", "200")


def run(*arguments: str) -> int:
    return cli.main(["plan", "serve", "Llama-3-8B", *arguments])


def test_the_command_prints_a_frontier_and_what_starts_the_choice(tmp_path, capsys):
    out, manifest = tmp_path / "plan.json", tmp_path / "manifest.json"
    assert run(*SHORT, "--gpus", "h100=2", "--out", str(out), "--manifest", str(manifest)) == 0
    text = capsys.readouterr()
    assert "J a token" in text.out and "half the energy" in text.out
    assert "jaxsys serve --model FOLDER_OF_Llama-3-8B --prefill 1 --decode 0" in text.out
    assert "weights are needed: FOLDER_OF_Llama-3-8B stands for the folder" in text.out
    record, chosen = json.loads(out.read_text()), json.loads(manifest.read_text())
    assert record["kind"] == "simulated" and len(record["rows"]) == record["replays"] <= 4
    assert chosen == record["chosen"]
    assert chosen["weights_needed"] == "FOLDER_OF_Llama-3-8B" and "power_limit" not in chosen
    assert chosen["instances"] == [{"role": "both", "count": 1, "gpu": "h100", "gpus_each": 1}]
    # What it prints is a command of the server.
    serve = serve_parser("jaxsys serve")
    options = serve.parse_args(chosen["command"][2:])
    assert (options.prefill, options.decode, options.clocks) == (1, 0, "control")
    # So is the manifest, and what is typed goes before it.
    read = serve.parse_args(with_settings(serve, ["--settings", str(manifest)], {}))
    assert vars(read) == vars(options) | {"settings": manifest}
    typed = ["--settings", str(manifest), "--model", str(tmp_path)]
    assert serve.parse_args(with_settings(serve, typed, {})).model == tmp_path
    assert f"jaxsys serve --settings {manifest} --model FOLDER" in text.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--gpus", "h100"], 2, "--gpus h100 must read like h100=8"),
        (["--gpus", "v9=1"], 2, "'v9' is not modelled; use one of"),
        (["--gpus", "h10=1"], 2, "(did you mean 'h100'?)"),
        (["--policy", "ahed"], 2, "(did you mean 'ahead'?)"),
        (["--trace", "ok.csv"], 2, "--prompt-mean 200.0 is of traffic that is made, and"),
        (["--attainment", "0"], 2, "--attainment 0 must be above 0"),
        (["--ttft-ms", "0.0006"], 2, "--ttft-ms 0.0006 must be from 1 to 300000 milliseconds"),
        (["--ttft-slo", "500"], 2, "give --ttft-ms 500000"),
        (["--tensor-parallel", "3"], 2, "divides neither 32 heads nor 8"),
        (["--itl-ms", "1"], 1, "ITL of 1 ms cannot be met"),
        (["--gpus", "h100=1", "--rate", "400", "--duration", "2"], 1, "% of the rate"),
        (["--policy", "magic"], 2, "policy 'magic' is not known"),
        (["--policy", "ahead+magic"], 2, "router 'magic' is not known; use one of fewest"),
        (["--policy", "magic+energy"], 2, "use one of max, sweet-spot"),
        (["--policy", "max,cap-0"], 2, "must lie above the"),
        (["--policy", "max,cap-50"], 2, "be at most its 700 W"),
        (["--policy", "max,cap-701"], 2, "be at most its 700 W"),
        (["--weights", "int5"], 2, "must be of float32, bfloat16, int8, fp8"),
    ],
)
def test_refusals_say_why(arguments, code, message, capsys, monkeypatch):
    monkeypatch.setattr(plan_serve, "search", None)  # none is found by replaying
    assert run(*SHORT, *arguments) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--manifest"])
def test_files_that_cannot_be_written_are_refused_before_replays(
    option, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(plan_serve, "search", None)
    assert run(*SHORT, option, str(tmp_path / "none" / "a.json")) == 2
    error = capsys.readouterr().err
    assert f"folder {tmp_path / 'none'} does not exist" in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()
    (tmp_path / "a.json").write_text("mine")
    assert run(*SHORT, option, str(tmp_path / "a.json")) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_a_power_limit_is_said_beside_the_command(capsys, tmp_path, monkeypatch):
    def capped(*arguments, **options):
        return replace(judged(1, 0.1, 100.0), policy="cap-400")

    monkeypatch.setattr(plan_search, "judge", capped)
    manifest = tmp_path / "manifest.json"
    assert run(*SHORT, "--gpus", "h100=1", "--policy", "cap-400", "--manifest", str(manifest)) == 0
    *_, limit, command, _ = capsys.readouterr().out.splitlines()
    assert "set 400 W on each of the 1 h100 first: nvidia-smi -pl 400" in limit
    chosen = json.loads(manifest.read_text())
    assert shlex.split(command) == chosen["command"]
    assert chosen["power_limit"]["watts_each"] == 400 and chosen["power_limit"]["gpus"] == 1
    assert chosen["power_limit"]["command"] == ["nvidia-smi", "-pl", "400"]
    assert chosen["predicted"]["policy"] == "cap-400"


@pytest.mark.parametrize("weights", VALUE_BYTES)
def test_every_form_of_weights_is_a_command_of_the_server(weights):
    one = replace(judged(1, 0.1, 100.0), deployment=replace(ONE, weights=weights))
    options = serve_parser("jaxsys serve").parse_args(
        command_of("Llama-3-8B", one, Slo(), 4000)[2:]
    )
    assert weights in (options.dtype, options.quantisation)
    assert None in (options.dtype, options.quantisation)
    # Nothing that was replayed is refused.
    assert options.max_length == 4000 and options.max_requests >= 256


def test_help_lists_the_forms_of_weights(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert "forms to try, of float32, bfloat16, int8, fp8" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_folder_is_named_as_it_is(tmp_path):
    found = manifest_of(str(tmp_path), judged(1, 0.1, 100.0), Slo(), 4000)
    assert str(tmp_path) in found["command"] and "weights_needed" not in found


def test_what_is_named_twice_is_counted_once():
    assert listed()("128, 512,0128") == ["128", "512"]
    assert listed(tuple(VALUE_BYTES))("int8,bfloat16,int8") == ["int8", "bfloat16"]


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (None, "no instance so small is allowed"),
        (0, "memory is the reason; an instance of 2 GPUs at most holds not even the weights"),
        (900, "holds 900 tokens of a request of 1000"),
        (9000, "no deployment of 2 GPUs passes the bound"),
    ],
)
def test_half_the_cost_says_when_memory_is_the_reason(room, said):
    one = judged(4, 0.1, 100.0)
    assert said in halving(one, [one], BOUNDS, longest=1000, roomiest=lambda gpus: room)[0]


@pytest.mark.parametrize(("factor", "said"), [(1.2, True), (1.05, False)])
def test_a_load_far_from_the_rate_asked_for_is_said(factor, said, capsys, monkeypatch):
    monkeypatch.setattr(
        plan_serve, "synthetic_trace", lambda **asked: TRACE.at_rate(asked["rate_per_s"] * factor)
    )
    monkeypatch.setattr(plan_search, "judge", lambda *_, **__: judged(1, 0.1, 100.0))
    assert run(*SHORT) == 0
    error = capsys.readouterr().err
    assert ("the load replayed has 24 requests a second, not 20" in error) == said


def test_a_model_that_fits_no_gpu_is_said(capsys):
    assert cli.main(["plan", "serve", "Llama-3-70B", "--gpus", "h100=1", *SHORT]) == 1
    assert "the model does not fit 1 h100, in bfloat16" in capsys.readouterr().err
    arguments = ["--gpus", "h100=2", "--weights", "float32", *SHORT]
    assert cli.main(["plan", "serve", "Llama-3-70B", *arguments]) == 1
    said = "the model does not fit 2 h100, in float32; with --weights bfloat16 or int8 or"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("longer", "code", "said"),
    [
        (2, 0, "2 of 6 requests of trace trace are longer than the model's 256 positions"),
        (4, 2, "4 of 6 requests of trace trace are longer than the model's 256 positions"),
        (6, 2, "6 of 6 requests of trace trace are longer than the model's 256 positions"),
    ],
)
def test_no_deployment_is_planned_past_the_positions(longer, code, said, tmp_path, capsys):
    trace, manifest = tmp_path / "trace.csv", tmp_path / "plan.json"
    lengths = [246 if row < 6 - longer else 247 for row in range(6)]  # 256 tokens, or one more
    rows = "".join(f"{row},{length},10\n" for row, length in enumerate(lengths))
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    asked = ["--gpus", "h100=1", "--trace", str(trace), "--manifest", str(manifest), "--json"]
    assert cli.main(["plan", "serve", "tiny", *asked, "--policy", "max"]) == code
    text = capsys.readouterr()
    assert said in text.err
    assert manifest.exists() == (code == 0)
    if code == 0:
        record = json.loads(text.out)
        assert record["config"]["requests"] == 4 and record["config"]["requests_too_long"] == 2
        assert json.loads(manifest.read_text())["serve"]["max-length"] == 256


def test_a_duration_that_leaves_one_moment_is_named(tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,9,9\n1,9,9\n2,9,9\n")
    asked = ["--gpus", "h100=1", "--trace", str(trace), "--duration", "1"]
    assert cli.main(["plan", "serve", "Llama-3-8B", *asked]) == 2
    assert "--duration 1 leaves 1 of trace" in capsys.readouterr().err
