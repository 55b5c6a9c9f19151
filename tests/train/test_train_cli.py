"""`jaxsys train` as a user calls it."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsys.cli import main
from jaxsys.errors import UsageError
from jaxsys.model import (
    ByteTokenizer,
    LinearRopeScaling,
    initial_parameters,
    load,
    preset,
    save_safetensors,
)
from jaxsys.model.peft import read_adapters
from jaxsys.train import memory
from jaxsys.train.start import start_of

TEXT = "def add(a, b):\n    return a + b\n\n\n" * 120


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


def options(text, *more: str) -> list[str]:
    return [
        *("train", "--model", "tiny", "--data", str(text), "--sequence-length", "16"),
        *("--microbatch-size", "2", "--learning-rate", "0.01", *more),
    ]


def test_trains_stops_resumes_and_exports(text, tmp_path, capsys):
    out, exported = tmp_path / "run", tmp_path / "model"
    more = ("--devices", "1", "--steps", "6", "--out", str(out))
    assert main(options(text, *more, "--stop-at", "3")) == 0
    first = capsys.readouterr().err
    assert "schedule dp on 1" in first and "step 3/3  loss" in first
    assert main(options(text, *more, "--resume", "--export", str(exported))) == 0
    second = capsys.readouterr().err
    assert "resumed from step 3" in second and "held-out loss" in second
    assert "(saved under dp on 1 device; goes on under dp on 1 device)" in second
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert len(losses) == 6 and losses[-1] < losses[0]
    unbroken = tmp_path / "unbroken"
    more_of_it = ("--devices", "1", "--steps", "6", "--out", str(unbroken))
    assert main(options(text, *more_of_it)) == 0
    records = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert losses == [record["loss"] for record in records if record["kind"] == "step"]
    capsys.readouterr()
    model = load(exported)
    assert model.config.num_layers == 4
    assert main(options(text, *more)) == 2
    assert "holds a run at step 6; resume it (--resume)" in capsys.readouterr().err
    assert main(options(text, *more, "--resume", "--seed", "7")) == 2
    assert "seed: 0 -> 7" in capsys.readouterr().err


def test_a_folder_is_meant_before_a_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = preset("tiny")
    numbers = initial_parameters(config, seed=3)
    save_safetensors(Path("Llama-3.2-1B"), config, numbers, ByteTokenizer())

    def start(name: str):
        return start_of(name, seed=0, float8=None, lora=None)

    for name in ("Llama-3.2-1B", "./Llama-3.2-1B"):
        found = start(name)
        assert found.config.num_layers == 4 and found.settings == {"from": "Llama-3.2-1B"}
        said = found.from_what or ""
        assert ("the preset is --model preset/Llama-3.2-1B" in said) == (name == "Llama-3.2-1B")
    asked = start("preset/Llama-3.2-1B")
    assert asked.config.num_layers == 16 and "random weights" in (asked.from_what or "")
    assert start("tiny").from_what is None
    for name in ("./tiny", str(tmp_path / "Llama-3-8B")):  # as if somebody had weights there
        with pytest.raises(UsageError, match="there is no such folder, file or preset; did you"):
            start(name)
    Path("tiny").mkdir()  # a run's, say
    assert start("tiny").from_what is None and start("tiny").name == start("preset/tiny").name
    (Path("tiny") / "model.safetensors").touch()
    with pytest.raises(UsageError, match="config.json.*; tiny is ./tiny, which lies here; the pre"):
        start("tiny")


def test_what_a_folder_asks_of_training_and_is_not_done_is_said(text, tmp_path, capsys):
    config = dataclasses.replace(
        preset("byte-moe"), num_layers=2, in_training=(("attention_dropout", 0.1),)
    )
    save_safetensors(tmp_path / "base", config, initial_parameters(config), ByteTokenizer())
    more = ("--model", str(tmp_path / "base"), "--devices", "1", "--steps", "1")
    assert main(options(text, *more, "--export", str(tmp_path / "again"))) == 0
    said = capsys.readouterr().err
    assert said.count("asks for attention_dropout=0.1 in training, which is done without") == 1
    assert "the loss has 0.001 times that of unequally busy experts; see --balance" in said
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    assert settings["attention_dropout"] == 0.1


@pytest.mark.slow
def test_adapters_of_a_folder_are_trained_and_exported_as_peft_has_them(text, tmp_path, capsys):
    base, out, exported = tmp_path / "base", tmp_path / "run", tmp_path / "python"
    config = dataclasses.replace(preset("tiny"), num_layers=2)
    save_safetensors(base, config, initial_parameters(config, seed=1), ByteTokenizer())
    more = ("--model", str(base), "--devices", "1", "--steps", "3", "--out", str(out))
    more += ("--lora", "2", "--lora-alpha", "8", "--lora-targets", "query", "mlp/up")
    more += ("--schedule", "dp")
    assert main(options(text, *more, "--export", str(exported))) == 0
    assert f"jaxsys serve --model {base} --lora python={exported}" in capsys.readouterr().err
    settings = json.loads((exported / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 8.0)
    assert sorted(settings["target_modules"]) == ["q_proj", "up_proj"]
    (stack,) = read_adapters(exported, config)[0].values()
    assert sorted(stack) == ["attention/query", "mlp/up"]
    assert all(np.abs(pair["b"]).max() > 0 for pair in stack.values())
    assert main(options(text, *more, "--resume", "--lora-alpha", "4")) == 2
    assert "lora: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--devices", "64"), "--devices 64, but 8 cpu device(s) are present; use --devices 8"),
        (("--devices", "4", "--microbatches", "6"), "--microbatches 6 must be a positive multiple"),
        (("--model", "huge"), "model 'huge': there is no such folder, file or preset"),
        (("--schedule", "magic", "--devices", "2"), "schedule 'magic' is not known"),
        (("--schedule", __file__, "--devices", "2"), "test_train_cli.py' is no .json file; use"),
        (("--steps", "0"), "--steps 0 must be from 1 to"),
        (("--sequence-length", "512"), "past the model's max_positions=256"),
        (("--resume",), "--resume needs --out"),
        (("--lora", "2"), "--model tiny is a preset, whose weights are random: adapters are of"),
        (("--lora-alpha", "2"), "say their rank with --lora"),
        (("--data", "/nowhere/at/all"), "does not exist"),
        (("--out", __file__), "test_train_cli.py: Not a directory"),
        (("--export", f"{__file__}/model"), "test_train_cli.py: Not a directory"),
        (("--tensorboard",), "--tensorboard needs --out"),
        (("--profile",), "--profile needs --out"),
        (("--clip-norm", "0"), "--clip-norm 0.0 must be above 0"),
        (
            ("--float8-forward", "mlp/.*"),
            "--float8-forward is of products in float8; give --float8",
        ),
        (
            ("--float8", "mlp/.*", "--float8-forward", "attention/.*"),
            "float8 path 'attention/.*' of forward products names none of the matrices",
        ),
        (
            ("--float8-backward", "e4m3"),
            "--float8-backward is of products in float8; give --float8",
        ),
        (("--float8-exact", "all"), "--float8-exact is of products in float8; give --float8"),
        (("--float8-transfers",), "--float8-transfers is of products in float8; give --float8"),
        (
            ("--float8", "--float8-transfers", "--devices", "1"),
            "schedule dp sends no weights, which float8 transfers are of; leave them out",
        ),
        (("--dtype", "float8"), "--dtype: invalid choice: 'float8' (choose from"),
        (("--devices", "4", "--replicas", "3"), "--replicas 3 does not divide --devices 4"),
        (("--coordinator", "a:1"), "go together"),
        (("--devices", "8"), "--devices 8; use --devices 4 or fewer"),
        (
            ("--steps", "99999999999999999999"),
            "must be from 1 to 2147483647",
        ),
        (("--balance", "0.1"), "--balance 0.1, but llama has no experts; leave it out"),
        (("--model", "byte-moe", "--balance", "-1"), "--balance -1 must be a finite number"),
        (
            ("--model", "byte-moe", "--devices", "2", "--context", "2"),
            "use --balance 0, or --context 1",
        ),
        (("--steps", "2", "--stop-at", "5"), "--stop-at 5 is past --steps 2"),
        (("--learning-rate", "0"), "--learning-rate 0.0 must be above 0"),
        (("--learning-rate", "nan"), "--learning-rate nan must be above 0, and finite"),
        (("--learning-rate", "1e39"), "--learning-rate 1e+39 must be above 0, and finite"),
        (("--learning-rate", "inf"), "--learning-rate inf must be above 0, and finite"),
    ],
)
def test_faults_are_one_line_and_exit_2(text, capsys, more, says):
    assert main(options(text, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxsys train: ") and says in error and error.count("\n") == 1


@pytest.mark.parametrize("more", [("--model", "llama-3-8b"), ("--memory-gib", "0.0001")])
def test_what_does_not_fit_is_refused_before_anything_else_is_said(text, capsys, monkeypatch, more):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 8.0 * 2**30)
    assert main(options(text, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxsys train: a step of ") or "optimizer state" in error
    assert "go on anyway with --memory-gib inf" in error and error.count("\n") == 1


def test_half_as_wide_a_dtype_is_named_where_it_would_fit(text, capsys):
    more = ("--sequence-length", "256", "--microbatch-size", "8", "--devices", "2")
    assert main(options(text, *more, "--memory-gib", "0.019")) == 2
    assert "what would fit: --dtype bfloat16 (0.0178 GiB)" in capsys.readouterr().err


def test_a_model_whose_held_out_loss_is_not_finite_is_not_exported(text, tmp_path, capsys):
    exported = tmp_path / "model"
    # The only step's own loss is that of the weights before it, and still good.
    more = ("--devices", "1", "--steps", "1", "--learning-rate", "1e18", "--non-finite", "skip")
    assert main(options(text, *more, "--export", str(exported))) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step 1: the held-out loss is nan; nothing was exported" in error
    assert not exported.exists()


def test_one_step_trains_what_it_exports(text, tmp_path):
    exported = tmp_path / "model"
    assert main(options(text, "--devices", "1", "--steps", "1", "--export", str(exported))) == 0
    model = load(exported)
    before = initial_parameters(model.config, seed=0)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), model.parameters, before)
    assert all(jax.tree.leaves(moved)), moved


def test_what_no_config_says_is_refused_before_training(text, tmp_path, capsys, monkeypatch):
    """Such as what a GGUF file says of attention."""
    linear = LinearRopeScaling(factor=2.0, attention_factor=0.5)
    config = dataclasses.replace(preset("tiny"), rope_scaling=linear)
    monkeypatch.setattr("jaxsys.train.start.preset", lambda name: config)
    assert main(options(text, "--export", str(tmp_path / "model"), "--devices", "1")) == 2
    error = capsys.readouterr().err
    assert "a config.json has no attention_factor=0.5" in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_an_export_is_not_put_over_another(text, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert main(options(text, "--export", str(tmp_path / "model"))) == 2
    error = capsys.readouterr().err
    assert "model is not empty; name another folder, or go on with the run" in error
    assert "--resume" in error and "overwrite" not in error


def test_empty_and_short_text(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert main(options(empty)) == 2
    assert "holds no text" in capsys.readouterr().err
    empty.write_text("short")
    assert main(options(empty, "--devices", "2")) == 2
    assert "one sample of --sequence-length 16 needs 17" in capsys.readouterr().err


def test_held_out_tokens_are_checked_like_those_trained_on(tmp_path, capsys):
    ids = np.random.default_rng(0).integers(0, 200, 2000).astype(np.int32)
    path = tmp_path / "a.npy"
    wrong = ids.copy()
    wrong[-5] = 5000  # the last twentieth is held out
    np.save(path, wrong)
    more = ("--devices", "1", "--steps", "2", "--out", str(tmp_path / "run"))
    assert main(options(path, *more)) == 2
    assert "a.npy, held out holds token 5000" in capsys.readouterr().err
    np.save(path, ids)
    assert main(options(path, *more, "--stop-at", "1")) == 0
    ids[-5] += 1
    np.save(path, ids)
    capsys.readouterr()
    assert main(options(path, *more, "--resume")) == 2
    error = capsys.readouterr().err
    assert "was made with other settings: held_out: " in error and "data:" not in error
