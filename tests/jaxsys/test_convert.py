"""`jaxsys convert` reads every form tensor by tensor and writes the numbers that it stands for."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxsys import cli
from jaxsys.errors import UsageError
from jaxsys.model import (
    ByteTokenizer,
    DecoderConfig,
    initial_parameters,
    load,
    preset,
    save_safetensors,
)
from jaxsys.model.convert import convert
from jaxsys.model.load import open_model

CONFIG = dataclasses.replace(preset("tiny"), num_layers=2)
GENERATION = {"temperature": 0.6, "top_k": 20}


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch):
    """Pieces of few rows, as those of large matrices are."""
    monkeypatch.setattr("jaxsys.model.rows.AT_ONCE", 1000)


def converted(source, target, dtype="float32"):
    assert (
        cli.main(["convert", "--model", str(source), "--out", str(target), "--dtype", dtype]) == 0
    )
    return load(target, jnp.dtype(dtype))


def assert_same(one, two):
    for left, right in zip(jax.tree.leaves(dict(one)), jax.tree.leaves(dict(two)), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_a_folder_and_what_lies_beside_its_weights(tmp_path, capsys):
    parameters = initial_parameters(CONFIG, seed=4)
    save_safetensors(tmp_path / "a", CONFIG, parameters, ByteTokenizer(), generation=GENERATION)
    model = converted(tmp_path / "a", tmp_path / "b", "bfloat16")
    assert model.config == CONFIG and model.generation == GENERATION
    assert_same(model.parameters, jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters))
    assert model.tokenizer is not None and model.tokenizer.eos_ids == ByteTokenizer().eos_ids
    said = f"b: llama, {CONFIG.parameter_count():,} parameters in bfloat16\n"
    assert capsys.readouterr().out.endswith(said)


def packed_folder(settings, folder, exponents=(118, 124), codes=(0, 256)):
    """Experts in MXFP4, of any numbers."""
    config = DecoderConfig.from_hf(settings)
    save_safetensors(folder, config, initial_parameters(config))
    path = folder / "model.safetensors"
    tensors, rng = safetensors.numpy.load_file(path), np.random.default_rng(0)
    for name in [name for name, value in tensors.items() if value.ndim == 3]:
        experts, inputs, outputs = tensors.pop(name).shape
        size = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = rng.integers(codes[0], codes[1], (*size, 16), np.uint8)
        tensors[f"{name}_scales"] = rng.integers(exponents[0], exponents[1], size, np.uint8)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    source = folder / "config.json"
    written = json.loads(source.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    source.write_text(json.dumps(written))
    return folder


def test_unlike_layers_and_packed_experts(tmp_path):
    """gpt-oss: windows in every second layer, experts in MXFP4."""
    settings = {
        "model_type": "gpt_oss", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8,
    }  # fmt: skip
    config = DecoderConfig.from_hf(settings)
    packed_folder(settings, tmp_path / "a")
    model = converted(tmp_path / "a", tmp_path / "b")
    assert model.config == config
    assert_same(model.parameters, load(tmp_path / "a").parameters)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """The table and the head too, 1 MiB each as they are written."""
    config = dataclasses.replace(CONFIG, vocab_size=8192, hidden_size=64, intermediate_size=4096)
    save_safetensors(tmp_path / "a", config, initial_parameters(config))
    model = open_model(tmp_path / "a")
    tracemalloc.start()
    try:
        convert(model, tmp_path / "b", jnp.bfloat16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.6 * 2**20
    assert load(tmp_path / "b", jnp.bfloat16).config == config


def test_packed_numbers_beyond_the_dtype_are_refused(tmp_path):
    """6 times two to the 18th is no float16."""
    settings = {
        "model_type": "gpt_oss", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "num_local_experts": 2, "num_experts_per_tok": 1,
    }  # fmt: skip
    folder = packed_folder(settings, tmp_path / "a", exponents=(145, 146), codes=(0x77, 0x78))
    with pytest.raises(UsageError, match=r"experts[.]gate_up_proj' holds NaN or infinity as float"):
        convert(open_model(folder), tmp_path / "b", jnp.float16)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "none", "--out", "b"], "none does not exist; give a model folder or a .gguf"),
        (["--model", "tiny", "--out", "b"], "tiny is a preset, sizes without weights; give a"),
        (["--model", "none", "--out", "taken"], "taken is not empty; choose another folder"),
    ],
)
def test_what_cannot_be_converted(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert cli.main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
