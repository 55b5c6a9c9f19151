"""Configurations: sizes against published counts, the keys of config.json, and refusals."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxsys.errors import UsageError
from jaxsys.model import BlockKind, DecoderConfig, abstract_parameters, preset
from jaxsys.model.decoder import kind_of_blocks
from jaxsys.model.rope import Llama3RopeScaling
from jaxsys.model.shapes import PRESETS

# Model cards on the Hugging Face Hub give these totals.
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-7b": 6_738_415_616,
    "smollm2-135m": 134_515_008,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gemma-2-9b": 9_241_705_984,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "gpt-oss-20b": 20_914_757_184,
    "DeepSeek-V3": 671_026_419_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert preset(name).parameter_count() == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_arrays(name):
    config = preset(name)
    shapes = abstract_parameters(config, jnp.bfloat16)
    edge = sum(leaf.size for leaf in jax.tree.leaves(shapes["edge"]))
    assert edge == config.edge_parameter_count()
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(shapes))
    for kind in config.kinds:
        stack = jax.tree.leaves(kind_of_blocks(config, shapes["blocks"], kind))
        layers = len(config.layers_of(kind))
        assert all(leaf.shape[0] == layers for leaf in stack)
        size = sum(leaf.size for leaf in stack)
        assert size == layers * config.block_parameter_count(kind)


@pytest.mark.parametrize("name", PRESETS)
def test_hf_keys_round_trip(name):
    config = preset(name)
    written = json.loads(json.dumps(config.to_hf()))
    assert DecoderConfig.from_hf(written) == config
    # transformers 4 wrote no rope_parameters, 5 writes neither rope_theta nor rope_scaling.
    version_4 = {key: value for key, value in written.items() if key != "rope_parameters"}
    version_5 = {
        key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")
    }
    assert DecoderConfig.from_hf(version_4) == config
    assert DecoderConfig.from_hf(version_5) == config


def test_unknown_preset_lists_the_known():
    with pytest.raises(UsageError, match="'mamba': there is no such .*; presets: Llama-2-7b, "):
        preset("mamba")
    with pytest.raises(UsageError, match="; did you mean 'Qwen3-30B-A3B'[?] presets: "):
        preset("qwen3-30B-A3")


@pytest.mark.parametrize(
    "name", ["llama-3-8b", "meta-llama/Meta-Llama-3-8B", "Llama-3-8B-Instruct", "LLAMA-3-8B"]
)
def test_presets_are_found_by_their_names_on_the_hub(name):
    assert preset(name) is PRESETS["Llama-3-8B"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'LlamaForCausalLM' .*'mamba'.* known: Llama"),
        (
            {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]},
            "architecture 'GPTNeoXForCausalLM'.*known: LlamaForCausalLM .llama., Mistral",
        ),
        ({"hidden_act": "xielu"}, "hidden_act='xielu' is not computed; known: 'silu', "),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0 is not understood in llama; what it changes is not"),
        ({"quantization_config": {"bits": 4}}, "quant_method=None is not supported; read are fp8"),
        ({"rope_parameters": {"rope_type": "axial"}}, "rope_type='axial' is not supported; known"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq_factor"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"vocab_size": "many"}, "vocab_size='many' must be a whole number"),
        ({"hidden_size": "wide", "head_dim": None}, "of the wrong kind .*unsupported operand"),
        ({"num_attention_heads": 0, "head_dim": None}, "of the wrong kind"),
        ({"rope_parameters": {"rope_theta": "x"}}, "of the wrong kind"),
        ({"rope_parameters": [1]}, "of the wrong kind"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be above 0"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        DecoderConfig.from_hf(preset("tiny").to_hf() | change)


def test_a_llama_file_may_name_a_window_that_transformers_ignores():
    settings = preset("tiny").to_hf() | {"sliding_window": 16}
    assert DecoderConfig.from_hf(settings) == preset("tiny")


@pytest.mark.parametrize(
    ("given", "window"),
    [({"sliding_window": 64}, 64), ({"sliding_window": None}, None), ({}, 4096)],
)
def test_mistral_has_its_familys_window(given, window):
    settings = preset("tiny").to_hf() | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
    }
    config = DecoderConfig.from_hf(settings | given)
    assert config.kinds == (BlockKind(window=window),)
    assert config.to_hf()["sliding_window"] == window


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0.5}, "factor=0.5 must be at least 1"),
        ({"low_freq_factor": 4.0}, "low_freq_factor=4.0 < high_freq_factor=4.0"),
        ({"original_max_positions": 0}, "original_max_positions=0"),
    ],
)
def test_rope_scaling_bounds(change, message):
    fields = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_positions": 8192,
    }
    with pytest.raises(UsageError, match=message):
        Llama3RopeScaling(**(fields | change))
