"""The comparison of known strategies, against the papers' formulas and on the command line."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxsys.cli import main
from jaxsys.errors import UsageError
from jaxsys.hardware import LinkSpec, device, link
from jaxsys.lowering import lower, lower_sharded
from jaxsys.mesh import make_mesh
from jaxsys.model import abstract_parameters, layered
from jaxsys.model.shapes import preset
from jaxsys.planner import cli
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision, cut, full_chunks, schedule_costs
from jaxsys.planner.files import load_plan, plan_file
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.named import Comparison, Row, best_that_runs, compare, with_found
from jaxsys.planner.plans import (
    Gradient,
    LayerPath,
    Order,
    Plan,
    Residual,
    State,
    Weights,
    data_parallel_plan,
)
from jaxsys.planner.problem import Problem
from jaxsys.planner.report import verdict
from jaxsys.planner.runs import that_runs
from jaxsys.planner.search import Effort, Found, Result, search
from jaxsys.planner.space import Space
from jaxsys.planner.workload import BlockWork, EdgeWork, Workload, decoder_workload
from jaxsys.schedule import Schedule, check, simulate
from jaxsys.strategies import NAMES, STRATEGIES, for_layers
from jaxsys.train.cli import parser as train_parser
from jaxsys.train.layout import AskedLayout, lay_out
from jaxsys.train.plan_file import devices_of, read_plan

PAPER = Precision(weight_bytes=2, gradient_bytes=2, rest_bytes=12)


def cluster(name: str, devices: int = 4) -> Cluster:
    return Cluster(device=device("h100"), devices=devices, link=link(name))


def bare_workload(layers: int, parameters: float) -> Workload:
    """Weights and time only: no residuals, no edge."""
    block = BlockWork(parameters=parameters / layers, product_flops=1e9)
    return Workload(
        name="bare",
        blocks=(block,) * layers,
        edge=EdgeWork(parameters=0),
        activation_bytes=0,
        tokens=1,
        model_flops=3e9 * layers,
    )


def bare_simulation(name: str, *, devices: int, microbatches: int, layers: int, parameters: float):
    workload = bare_workload(layers, parameters)
    schedule = for_layers(name, devices=devices, microbatches=microbatches, layers=layers)
    fast = LinkSpec(name="fast", bytes_per_s=1e18, latency_s=0).link
    costs = schedule_costs(
        workload, device("h100"), fast, schedule=schedule, precision=PAPER, recompute="none"
    )
    return simulate(schedule, costs, fast)


@pytest.mark.parametrize(
    ("name", "expected_gb", "in_flight_chunks"),
    # ZeRO paper, figure 1: 7.5 B parameters on 64 devices. In flight at the peak: ZeRO-2 holds one
    # chunk's whole gradient, two while one is being reduced; ZeRO-3 also its weights and the next.
    [("dp", 120.0, 0), ("zero-1", 31.4, 0), ("zero-2", 16.6, 2), ("zero-3", 1.875, 4)],
)
def test_memory_of_the_zero_paper(name, expected_gb, in_flight_chunks):
    devices, layers, parameters = 64, 20, 7.5e9
    result = bare_simulation(
        name, devices=devices, microbatches=2 * devices, layers=layers, parameters=parameters
    )
    exact = {
        "dp": 16 * parameters,
        "zero-1": 4 * parameters + 12 * parameters / devices,
        "zero-2": 2 * parameters + 14 * parameters / devices,
        "zero-3": 16 * parameters / devices,
    }[name]
    assert exact / 1e9 == pytest.approx(expected_gb, rel=3e-3)
    chunk = 2 * parameters / layers
    assert max(result.peak_bytes) == pytest.approx(exact + in_flight_chunks * chunk, rel=1e-9)


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_bytes_of_the_zero_paper(turns):
    """Per device and step, in units of 2 Psi (N-1)/N, with K microbatches a device."""
    devices, parameters = 8, 8e9
    unit = 2 * parameters * (devices - 1) / devices
    volumes = {
        "dp": 2,
        "zero-1": 2,
        "zero-2": 1 + turns,
        "zero-3": 3 * turns,
        "zero-3.5": (turns + 1) + turns,
        "zero-4": (turns + 1) + turns,
    }
    for name, volume in volumes.items():
        result = bare_simulation(
            name, devices=devices, microbatches=devices * turns, layers=8, parameters=parameters
        )
        assert result.sent_bytes[0] == pytest.approx(volume * unit, rel=1e-12)


def test_parameter_and_flop_counts_of_llama():
    config = preset("llama-3-8b")
    workload = decoder_workload("l", config, sequence_length=4096, microbatch_size=2)
    assert workload.parameters == config.parameter_count() == 8_030_261_248
    tokens = 2 * 4096
    norms = (2 * config.num_layers + 1) * config.hidden_size
    embedding = config.vocab_size * config.hidden_size
    multiplied = config.parameter_count() - norms - embedding
    attention = 6 * 4096 * config.hidden_size * config.num_layers
    assert workload.model_flops == pytest.approx(tokens * (6 * multiplied + attention), rel=1e-12)


def test_a_slower_link_never_speeds_up_and_bytes_do_not_change():
    workload = decoder_workload("t", preset("tiny"), sequence_length=64, microbatch_size=1)
    told: list[str] = []
    fast = compare(workload, cluster("nvlink"), microbatches=8, progress=told.append)
    assert told[0].startswith("simulating dp (1 of ")
    assert all(line.startswith("sharing ") for line in told[len(STRATEGIES) :])
    assert {"sharing features", "sharing experts"} <= set(told)
    slow = compare(workload, cluster("sockets"), microbatches=8)
    for a, b in zip(fast.rows, slow.rows, strict=True):
        assert b.step_s >= a.step_s
        assert b.sent_bytes == a.sent_bytes


def test_a_rule_that_refuses_many_is_said_once():
    config = dataclasses.replace(preset("tiny"), num_layers=2)
    workload = decoder_workload("t", config, sequence_length=64, microbatch_size=1)
    with pytest.raises(UsageError, match="no strategy is legal here: dp, ") as refused:
        compare(workload, cluster("nvlink", 3), microbatches=4)
    text = str(refused.value)
    more = text.count("chunks=3 are more than layers=2")
    assert more == text.count("must be a positive multiple") == 1


def test_recompute_is_taken_only_where_memory_asks_for_it():
    workload = decoder_workload("l", preset("llama-3-8b"), sequence_length=8192, microbatch_size=1)
    roomy, tight = (
        compare(workload, cluster("nvlink", 8), microbatches=16, memory_bytes=limit)
        for limit in (1e12, 50 * 2**30)
    )
    assert {row.recompute for row in roomy.rows} == {"none"}
    zero_3 = next(row for row in tight.rows if row.strategy == "zero-3")
    assert zero_3.recompute == "around-attention"
    assert zero_3.fits


def test_stages_that_do_not_divide_the_layers_are_costed_as_they_run():
    """7 layers on 4 devices: chunks of 2, 2, 2 and 1, with room for 2 each."""
    config = dataclasses.replace(preset("tiny"), num_layers=7)
    workload = decoder_workload("t", config, sequence_length=64, microbatch_size=1)
    schedule = for_layers("1f1b", devices=4, microbatches=8, layers=7)
    here = cluster("nvlink", 4)
    costs = schedule_costs(
        workload, here.device, here.group(4), schedule=schedule, precision=PAPER, recompute="none"
    )
    first, *_, last = np.array(costs.forward_s)
    assert last == pytest.approx(first / 2)
    step = lower(schedule, layered(config), make_mesh(4, devices=jax.devices()[:4]))
    rest = jax.eval_shape(step.to_rest, abstract_parameters(config))
    held = sum(leaf.size for leaf in jax.tree.leaves(rest["blocks"])) / 4
    assert costs.weight_bytes == (2 * held,) * 4
    embedding = workload.edge.parameters / 4
    assert costs.static_bytes == pytest.approx(
        12 * (held + embedding) + 4 * workload.edge.parameters + workload.edge.workspace_bytes
    )


def row_of(name: str, **changes) -> Row:
    fields = dict.fromkeys(("memory_bytes", "tokens_per_s", "mfu"), 1.0)
    fields |= {"step_s": 1.0, "compute_s": 0.9, "sent_bytes": 1.1e9}
    return Row(**{**fields, "strategy": name, "recompute": "none", "chunks": 1, "fits": True,
                  **changes})  # fmt: skip


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"step_s": 1.02}, "transfers and waiting take 20.00 ms more of its busiest device."),
        (
            {"step_s": 1.02, "sent_bytes": 1.2e9},
            "more of its busiest device, with 1.2 GB sent against 1.1 GB.",
        ),
        ({"step_s": 1.2, "compute_s": 1.05}, "its busiest device computes 150.00 ms longer."),
        ({"step_s": 1.0003}, "which is as good as equal."),
    ],
)
def test_the_reason_names_the_figure_that_differs(second, reason):
    rows = (row_of("one"), row_of("two", **second))
    text = verdict(Comparison(rows=rows, refused=(), memory_bytes=2.0))
    assert text.startswith("Take one (recompute none): 1.000 s a step, of which transfers and "
                           "waiting are 10.0 %; next is two, ")  # fmt: skip
    assert text.endswith(reason)


def test_plans_are_called_by_their_names_where_they_run():
    workload = decoder_workload("t", preset("tiny"), sequence_length=64, microbatch_size=1)
    problem = Problem(
        workload_of=lambda size: workload, cluster=cluster("nvlink"), batch=8, memory_bytes=1e12
    )
    path = LayerPath(weights=Weights.STAY, gradient=Gradient.ONCE, residual=Residual.KEEP)
    layers = (path,) * workload.layers
    assert to_schedule(problem, Plan(shard=4, state=State.SPLIT, layers=layers)).name == "zero-1"
    assert to_schedule(problem, Plan(shard=4, layers=layers)).name == "dp"
    assert to_schedule(problem, Plan(stages=4, order=Order.SPACED, layers=layers)).name == (
        "1f1b-overlap"
    )


def test_what_no_axis_can_be_cut_for_is_not_planned_in_shards():
    """32 x 32 on 3 devices: the lowered step would keep the matrix whole on each."""
    config = preset("tiny")
    workload = decoder_workload("t", config, sequence_length=64, microbatch_size=1)
    refused = dict(compare(workload, cluster("nvlink", 3), microbatches=6).refused)
    assert "devices=3 divide no axis of a matrix [32, 32]" in refused["zero-3"]
    step = lower_sharded(
        for_layers("zero-3", devices=3, microbatches=6, layers=4),
        layered(config),
        make_mesh(3, devices=jax.devices()[:3]),
    )
    query = step.rest_specs(abstract_parameters(config))["blocks"]["attention"]["query"]
    assert query == PartitionSpec()
    problem = Problem(
        workload_of=lambda size: workload, cluster=cluster("nvlink", 3), batch=6, memory_bytes=1e12
    )
    plans = list(Space.of(problem, microbatch_sizes=[1]).bases())
    assert {plan.shard for plan in plans if plan.state is State.SPLIT} <= {1}


def test_cut_covers_the_layers_in_order():
    assert [list(part) for part in cut(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [list(part) for part in full_chunks(6, 4)] == [[0, 1], [2, 3], [4, 5], []]
    with pytest.raises(UsageError, match="chunks=8"):
        cut(7, 8)


def test_command_prints_all_strategies_and_a_verdict(capsys, tmp_path):
    target = tmp_path / "plan.json"
    arguments = ["plan", "--model", "tiny", "--devices", "4", "--microbatches", "8"]
    assert main([*arguments, "--memory-gib", "inf", "--json", str(target)]) == 0
    text = capsys.readouterr().out
    for name in (*NAMES, "found: "):
        assert f" {name}" in text
    assert "Take " in text
    saved = json.loads(target.read_text())
    assert (saved["version"], saved["memory_limit_gib"]) == (1, None)
    assert saved["best"] in {row["strategy"] for row in saved["rows"]}
    before = target.read_text()
    assert main([*arguments, "--json", str(target)]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert target.read_text() == before


def test_what_a_search_finds_stands_in_the_table_and_runs(tmp_path):
    """More devices than layers: no ring or pipeline spans them all, but replicas of one may win."""
    workload = decoder_workload("t", preset("tiny"), sequence_length=2048, microbatch_size=1)
    problem = Problem(
        workload_of=lambda size: workload, cluster=cluster("sockets", 8), batch=64, memory_bytes=1e9
    )
    named = compare(workload, problem.cluster, microbatches=64, memory_bytes=1e9)
    assert {"1f1b", "weipipe-interleave"} <= {name for name, _ in named.refused}
    space = that_runs(Space.of(problem, microbatch_sizes=[1]))
    result = search(space, effort=Effort(refine=0))
    found = best_that_runs(result)
    assert found is not None
    comparison = with_found(named, problem, found)
    found, best = comparison.rows[-1], comparison.best
    assert found.plan is not None and best is not None and found.fits
    assert best.step_s <= min(row.step_s for row in named.rows if row.fits)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_file(problem, result.best, request={})))
    run = read_plan(file, layers=problem.layers)
    assert run.schedule.replicas * run.schedule.devices == 8
    assert run.recompute == found.recompute


def test_a_plan_that_no_schedule_runs_is_passed_over():
    plain = data_parallel_plan(4, 4)
    again = dataclasses.replace(plain.layers[0], residual=Residual.RECOMPUTE)
    mixed = (again, *plain.layers[1:])
    staged = dataclasses.replace(plain, shard=1, stages=4, layers=mixed)
    whole = dataclasses.replace(plain, layers=mixed)
    sharded = dataclasses.replace(whole, state=State.SPLIT)
    shared = dataclasses.replace(plain, shard=1, stages=2, replicas=2, state=State.SPLIT)

    def result(*plans: Plan) -> Result:
        costs = dict.fromkeys(("step_s", "peak_bytes", "sent_bytes", "compute_s"), 1.0)
        row = tuple(Found(plan=plan, potential=1.0, **costs) for plan in plans)
        return Result(
            best=row[0], by_base=row, history=(), evaluated=len(row), skipped=0, elapsed_s=0.0
        )

    found = best_that_runs(result(staged, whole, shared, sharded, plain))
    assert found is not None and found.plan == sharded
    assert best_that_runs(result(staged, whole, shared)) is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--model", "nofolder"],
            2,
            "'nofolder': there is no such folder, file or preset; presets:",
        ),
        (["--model", "llama-9"], 2, "did you mean 'Llama-2-7b'"),
        (["--model", ""], 2, "model is empty; name a preset"),
        (
            ["--model", "./no/folder"],
            2,
            "'./no/folder': there is no such folder, file or preset; give",
        ),
        (["--model", __file__], 2, "is a file; name the folder that has it"),
        (["--model", "tiny", "--link", "wire"], 2, "known: nvlink"),
        (["--model", "tiny", "--device", "abacus"], 2, "known: h100"),
        (["--model", "tiny", "--microbatches", "0"], 2, "--microbatches 0"),
        (["--model", "tiny", "--microbatch-size", "0"], 2, "--microbatch-size 0"),
        (["--model", "tiny", "--sequence-length", "0"], 2, "--sequence-length 0"),
        (["--model", "tiny", "--memory-gib", "nan"], 2, "--memory-gib nan must be above 0; inf"),
        (["--model", "tiny", "--memory-gib", "0"], 2, "--memory-gib 0 must be above 0; inf"),
        (["--model", "tiny", "--search-seconds", "-1"], 2, "--search-seconds -1"),
        (["--model", "tiny", "--devices", "100000"], 2, "plan for at most 16384, and run replicas"),
        (
            ["--model", "tiny", "--node-devices", "0", "--node-link", "ib-400"],
            2,
            "--node-devices 0",
        ),
        (
            ["--model", "tiny", "--sequence-length", "100000"],
            2,
            "--sequence-length 100000 is past the model's max_positions",
        ),
        (["--model", "tiny", "--json", "no-x", "--plan", "./no-x"], 2, "is named for two files"),
        (["--model", "tiny", "--memory-gib", "0.0001"], 1, "no plan fits 0.0001 GiB per device"),
        pytest.param(
            ["--model", "llama-3-8b", "--microbatches", "8", "--memory-gib", "3"],
            1,
            "smallest limit that would do is",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_requests_are_one_line(arguments, code, message, capsys):
    assert main(["plan", "--devices", "4", *arguments]) == code
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("jaxsys plan: ")]
    assert len(said) == 1 and message in said[0]
    # Beside it only lines of progress, on a machine that is slow enough for some.
    assert all(
        " s  " in line or line in said or "simulating" in line for line in error.splitlines()
    )


def test_the_smallest_limit_named_really_fits():
    workload = decoder_workload(
        "l", preset("llama-3.2-1b"), sequence_length=8192, microbatch_size=1
    )

    def under(memory_bytes):
        return compare(workload, cluster("nvlink"), microbatches=8, memory_bytes=memory_bytes)

    none = under(1e9)
    assert none.best is None
    least = none.smallest_memory_bytes
    assert under(least).best is not None
    assert under(least * 0.999).best is None


def test_a_folder_is_read_as_a_model(tmp_path, capsys):
    config = dataclasses.replace(preset("tiny"), num_layers=8)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    arguments = ["plan", "--model", str(tmp_path), "--devices", "2", "--microbatches", "4"]
    plan = ["--search-seconds", "1", "--plan", str(tmp_path / "plan.json")]
    assert main([*arguments, *plan]) == 0
    text = capsys.readouterr().out
    assert "8 layers" in text and f"`jaxsys train --model {tmp_path}` goes on from" in text
    assert json.loads((tmp_path / "plan.json").read_text())["request"]["dtype"] == "bfloat16"
    (tmp_path / "config.json").write_text("{")
    assert main(["plan", "--model", str(tmp_path), "--devices", "2"]) == 2
    assert "config.json is not JSON" in capsys.readouterr().err


def test_a_folder_is_meant_before_a_preset_of_its_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Llama-3.2-1B", "models/Llama-3.2-1B"):
        Path(name).mkdir(parents=True)
        (Path(name) / "config.json").write_text(json.dumps(preset("tiny").to_hf()))
    beside = "Llama-3.2-1B is ./Llama-3.2-1B, which lies here; the preset is --model preset/Llama"
    arguments = ["plan", "--devices", "2", "--microbatches", "4", "--sequence-length", "64"]
    arguments += ["--search-seconds", "1"]
    for name in ("Llama-3.2-1B", "./Llama-3.2-1B", "models/Llama-3.2-1B"):
        assert main([*arguments, "--model", name, "--plan", "plan.json"]) == 0
        assert (beside in capsys.readouterr().out) == ("/" not in name)
        # What is read goes by what was planned, not by the preset of that name.
        assert load_plan("plan.json").devices == 2
        assert json.loads(Path("plan.json").read_text())["request"]["model"].startswith("./")
        Path("plan.json").unlink()
    assert main(["plan", "--model", "preset/Llama-3.2-1B", "--devices", "2"]) == 0
    assert "preset/Llama-3.2-1B: 1.24 B parameters" in capsys.readouterr().out
    (Path("Llama-3.2-1B") / "config.json").rename("Llama-3.2-1B/model.safetensors")
    assert main(["plan", "--model", "Llama-3.2-1B", "--devices", "2"]) == 2
    assert beside in capsys.readouterr().err


def test_search_on_the_command_line_writes_all_its_files(tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("plan", "schedule", "trace", "png")}
    arguments = ["plan", "--model", "byte-llama", "--devices", "4", "--microbatches", "16"]
    for name, path in files.items():
        arguments += [f"--{name}", str(path)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "from data parallelism" in text
    problem_free = load_plan(files["plan"])
    assert problem_free.devices == 4
    assert problem_free.microbatch_size == 1  # that follows from what was asked for
    schedule = Schedule.from_json(files["schedule"].read_text())
    check(schedule)
    assert json.loads(files["trace"].read_text())["otherData"]["schedule"] == schedule.name
    assert files["png"].stat().st_size > 5000
    assert main(arguments) == 2  # nothing is overwritten
    assert "not overwritten" in capsys.readouterr().err


def test_nothing_is_written_where_nothing_fits(tmp_path, capsys):
    files = [f"--{name}={tmp_path / name}" for name in ("json", "plan", "schedule", "trace")]
    arguments = ["plan", "--model", "tiny", "--devices", "2", "--sequence-length", "16"]
    arguments += ["--search-seconds", "1", "--memory-gib"]
    assert main([*arguments, "0.0001", *files]) == 1
    error = capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    least = error.split("would do is ")[1].split()[0]
    assert main([*arguments, least, *files]) == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_a_winner_with_replicas_is_a_schedule_that_trains(tmp_path, capsys):
    schedule, plan = tmp_path / "schedule.json", tmp_path / "plan.json"
    # On slow links four small groups win over one large.
    arguments = ["plan", "--model", "tiny", "--devices", "8", "--link", "sockets"]
    arguments += ["--microbatches", "64", "--microbatch-size", "1", "--sequence-length", "64"]
    assert main([*arguments, "--schedule", str(schedule)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = line.split("`jaxsys train ")[1].rstrip("`").split()
    asked = train_parser("jaxsys train").parse_args(words)
    written = Schedule.from_json(schedule.read_text())
    assert written.replicas > 1 and devices_of(asked.schedule) == 8
    wanted = AskedLayout(
        schedule=asked.schedule, microbatch_size=asked.microbatch_size,
        sequence_length=asked.sequence_length, dtype=asked.compute_dtype,
    )  # fmt: skip
    layout = lay_out(preset("tiny"), jax.devices()[:8], wanted)
    assert layout.mesh.shape["data"] == written.replicas and layout.rows == 64
    more = ["--search-seconds", "5", "--plan", str(plan), "--schedule", str(tmp_path / "2.json")]
    assert main([*arguments, *more]) == 0
    assert f"is a part of {plan}" in capsys.readouterr().out
    assert load_plan(plan).replicas > 1


def test_recompute_by_layer_is_written_as_a_plan_alone():
    keeps = LayerPath(weights=Weights.REFETCH, gradient=Gradient.EACH, residual=Residual.KEEP)
    plan = Plan(
        shard=2,
        state=State.SPLIT,
        layers=(keeps, dataclasses.replace(keeps, residual=Residual.RECOMPUTE)),
    )
    with pytest.raises(UsageError, match="recompute by layer: nothing was written; name --plan"):
        cli._check_said_by_schedule(plan)


def test_a_row_that_a_search_does_not_better_is_not_called_outside_its_space():
    """The row of a strategy and what a search finds are often one plan."""
    workload = decoder_workload("t", preset("tiny"), sequence_length=64, microbatch_size=1)
    made = compare(workload, cluster("nvlink"), microbatches=16)
    problem = Problem(
        workload_of=lambda size: workload, cluster=cluster("nvlink"), batch=16,
        memory_bytes=made.memory_bytes, lowered=True,
    )  # fmt: skip
    space, row = Space.of(problem, microbatch_sizes=[1]), made.best
    assert row is not None and row.plan is not None and space.why_not(row.plan) is None
    found = Found(
        plan=row.plan, step_s=row.step_s, compute_s=row.compute_s, peak_bytes=row.memory_bytes,
        sent_bytes=row.sent_bytes, potential=row.step_s,
    )  # fmt: skip
    assert cli._beside_found(with_found(made, problem, found), found, space) == ""
    worse = dataclasses.replace(found, step_s=2 * row.step_s)
    narrow = space.require("no rings and no shards", ("shard", "ring"), lambda *_: False)
    said = cli._beside_found(with_found(made, problem, worse), worse, narrow)
    assert f"Of the table {row.strategy}" in said and "was not searched: no rings and" in said


def test_a_schedule_comes_with_the_options_that_it_does_not_say(tmp_path, capsys):
    file = tmp_path / "schedule.json"
    arguments = ["plan", "--model", "tiny", "--devices", "2", "--microbatch-size", "2"]
    assert main([*arguments, "--sequence-length", "16", "--schedule", str(file)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = line.split("`jaxsys train ")[1].rstrip("`").split()
    asked = train_parser("jaxsys train").parse_args(words)
    assert (asked.schedule, asked.microbatch_size, asked.sequence_length) == (str(file), 2, 16)
    assert (asked.compute_dtype, asked.gradient_dtype) == ("bfloat16", None)
    other = tmp_path / "other.json"
    more = ["--gradients", "bfloat16", "--sequence-length", "16", "--schedule", str(other)]
    assert main([*arguments, *more]) == 0
    assert " --dtype bfloat16 --gradients bfloat16`" in capsys.readouterr().out


def test_plan_files_of_another_version_or_cluster_are_refused(tmp_path):
    workload = decoder_workload("t", preset("tiny"), sequence_length=64, microbatch_size=1)
    problem = Problem(
        workload_of=lambda size: workload, cluster=cluster("nvlink"), batch=8, memory_bytes=1e9
    )
    found = search(Space.of(problem, microbatch_sizes=[1]), effort=Effort(refine=0)).best
    value = plan_file(problem, found, request={})
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value))
    assert load_plan(path, problem) == found.plan
    other = dataclasses.replace(problem, cluster=cluster("sockets"))
    with pytest.raises(UsageError, match="is for link='nvlink', not 'sockets'"):
        load_plan(path, other)
    path.write_text(json.dumps({**value, "version": 0}))
    with pytest.raises(UsageError, match="has version 0"):
        load_plan(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="is not a plan file"):
        load_plan(path)
    with pytest.raises(UsageError, match="cannot be read"):
        load_plan(tmp_path / "none.json")
