"""Configurations: sizes against published counts, the keys of config.json, and refusals."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from jaxsys.errors import UsageError
from jaxsys.model import BlockKind, DecoderConfig, abstract_parameters, hf_config, layered, preset
from jaxsys.model.decoder import kind_of_blocks
from jaxsys.model.families import FAMILIES
from jaxsys.model.rope import LinearRopeScaling, Llama3RopeScaling
from jaxsys.model.shapes import PRESETS, find_preset, lies_here, preset_beside

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
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "01-ai/Yi-1.5-34B-Chat": 34_388_917_248,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "mistralai/Mistral-Large-Instruct-2407": 122_610_069_504,
    "mistralai/Ministral-8B-Instruct-2410": 8_019_808_256,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-Coder-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-235B-A22B-Thinking-2507-FP8": 235_093_634_560,
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": 480_154_875_392,
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": 14_315_784_192,
    "google/gemma-2b-it": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-3-270m-it": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "allenai/OLMo-2-0425-1B-Instruct": 1_484_916_736,
    "allenai/OLMo-2-0325-32B": 32_234_279_936,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "bigcode/starcoder2-15b": 15_957_889_024,
    "stabilityai/stablelm-2-1_6b-chat": 1_644_515_328,
    "CohereLabs/c4ai-command-r-v01": 34_980_831_232,
    "CohereLabs/c4ai-command-r-plus": 103_810_674_688,
    "CohereLabs/aya-expanse-8b": 8_028_033_024,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "ByteDance-Seed/Seed-OSS-36B-Instruct": 36_151_104_512,
    "LGAI-EXAONE/EXAONE-4.0-1.2B": 1_279_391_488,
    "baidu/ERNIE-4.5-0.3B-PT": 360_748_032,
    "openai/gpt-oss-120b": 116_829_156_672,
    "deepseek-ai/DeepSeek-R1-0528": 671_026_419_200,
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
    with pytest.raises(UsageError, match="; did you mean 'Qwen3-30B-A3B'[?]$"):
        preset("qwen3-30B-A3")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("llama-3-8b", "Llama-3-8B"),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B"),
        ("Llama-3-8B-Instruct", "Llama-3-8B"),
        ("LLAMA-3-8B", "Llama-3-8B"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "Llama-3.1-8B"),
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "Mistral-7B-v0.1"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B-v0.1"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen2.5-7B"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "Qwen3-8B"),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", "Qwen3-30B-A3B-Instruct-2507"),
        ("Qwen/Qwen3-30B-A3B-Base", "Qwen3-30B-A3B"),
        ("deepseek-ai/DeepSeek-V3-Base", "DeepSeek-V3"),
        ("google/gemma-3-1b-it", "gemma-3-1b-pt"),
        ("zai-org/glm-4-9b-chat-hf", "glm-4-9b-chat-hf"),
        ("zai-org/GLM-4.5-Air-FP8", "GLM-4.5-Air"),
    ],
)
def test_presets_are_found_by_their_names_on_the_hub(name, meant):
    assert preset(name) is PRESETS[meant]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Qwen3-8B-Instrct", "'Qwen3-8B'"),
        ("Qwen/Qwen3-8B-Instrct-FP8", "'Qwen3-8B'"),
        ("Qwen2.5-7B-Instruct-GTPQ-Int4", "'Qwen2.5-7B'"),
        ("Llma-3.2-1B-Instruct", "'Llama-3.2-1B'"),
        ("llama-3-1b", "'Llama-3.2-1B'"),
        ("llama-70b", "'Llama-2-70b' or 'Llama-3-70B'"),
        ("Mixtral-8x7B-v0.3", "'Mixtral-8x7B-v0.1'"),
        ("./Llama-3.2-1B", "'Llama-3.2-1B'"),
    ],
)
def test_a_near_miss_is_answered_with_a_model_of_its_size(name, meant):
    with pytest.raises(UsageError, match=rf"preset; did you mean {re.escape(meant)}[?]$"):
        preset(name)


@pytest.mark.parametrize(
    "name",
    ["instruct", "Qwen3-8B.gguf", "Llama-9-8B-Instruct", "Qwen3-8"]
    + ["./Qwen3-8B", "../Qwen3-8B", "/models/Qwen3-8B", "~/Qwen3-8B", "all/models/Qwen3-8B"],
)
def test_names_that_are_none(name):
    assert find_preset(name) is None


def test_names_of_presets_are_apart():
    assert [find_preset(name) for name in PRESETS] == list(PRESETS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'LlamaForCausalLM' .*'mamba'.* known: Llama"),
        (
            {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]},
            "architecture 'GPTNeoXForCausalLM'.*known: LlamaForCausalLM .llama., Mistral",
        ),
        ({"model_type": "mistral"}, "'LlamaForCausalLM' and model_type 'mistral' disagree"),
        ({"architectures": {"a": 1}}, "architectures=.* must be a list of names"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True is not computed"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not computed"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads=.* is not computed"),
        ({"eos_token_id": "x"}, "eos_token_id='x' must be a token id"),
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
        ({"hidden_size": "wide", "head_dim": None}, "hidden_size='wide' must be a whole number of"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0 must be a whole"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x' must be a number above 0$"),
        ({"rope_parameters": [1]}, "rope_parameters=.1. must be a JSON object"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be a number above 0"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        DecoderConfig.from_hf(preset("tiny").to_hf() | change)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_a_type_that_transformers_does_not_read_is_refused(family):
    """Of families whose rotary settings are by kind of layer it takes `rope_type` alone."""
    scaling = {"type": "linear", "factor": 8.0}
    with pytest.raises(UsageError, match="type='linear' is not read by .*; call it rope_type"):
        DecoderConfig.from_hf({"model_type": family, "rope_scaling": scaling})
    for said in (
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_scaling": scaling, "rope_parameters": {"full_attention": {}}},
    ):
        config = DecoderConfig.from_hf({"model_type": family, **said})
        assert config.rope_scaling == LinearRopeScaling(factor=8.0)


@pytest.mark.parametrize(
    ("said", "factor"),
    [
        ({}, 32.0),
        ({"rope_parameters": None}, 32.0),
        ({"rope_scaling": {}}, 32.0),
        ({"rope_parameters": {}}, None),
        ({"rope_parameters": {}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 2.0),
    ],
)
def test_an_empty_object_of_rotary_settings_is_no_scaling(said, factor):
    """gpt-oss has one where its file is silent; transformers' logits are those without it here."""
    scaling = DecoderConfig.from_hf({"model_type": "gpt_oss", **said}).rope_scaling
    assert getattr(scaling, "factor", None) == factor


def test_what_says_nothing_is_passed_over():
    says = {"architectures": "LlamaForCausalLM", "is_encoder_decoder": False, "pruned_heads": {}}
    assert DecoderConfig.from_hf(preset("tiny").to_hf() | says) == preset("tiny")


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"attention_dropout": 0.1, "resid_pdrop": 0}, {"attention_dropout": 0.1}),
        ({"model_type": "phi3", "resid_pdrop": 0.2, "embd_pdrop": None}, {"resid_pdrop": 0.2}),
        ({"model_type": "mixtral", "router_jitter_noise": 0.01}, {"router_jitter_noise": 0.01}),
        ({"model_type": "deepseek_v3", "aux_loss_alpha": 0.001}, {"aux_loss_alpha": 0.001}),
        ({"model_type": "seed_oss"}, {"attention_dropout": 0.1, "residual_dropout": 0.1}),
        ({"model_type": "seed_oss", "attention_dropout": 0.0}, {"residual_dropout": 0.1}),
        ({"model_type": "stablelm", "attention_dropout": 0.0}, {}),
    ],
)
def test_what_is_asked_of_training_alone_is_kept_and_said(given, asked, caplog):
    config = DecoderConfig.from_hf({"model_type": "llama", "num_hidden_layers": 4, **given})
    assert dict(config.in_training) == asked
    written = config.to_hf()
    assert {name: written[name] for name in asked} == asked
    layered(config)
    for name, value in asked.items():
        assert f"{name}={value:g}" in caplog.text
    assert ("in training, which is done without" in caplog.text) == bool(asked)


@pytest.mark.parametrize("value", ["0.1", True, [0.1]])
def test_dropout_is_a_number(value):
    with pytest.raises(UsageError, match="attention_dropout=.* must be a number"):
        DecoderConfig.from_hf({"model_type": "llama", "attention_dropout": value})


def test_a_llama_file_may_name_a_window_that_transformers_ignores():
    settings = preset("tiny").to_hf() | {"sliding_window": 16}
    assert DecoderConfig.from_hf(settings) == preset("tiny")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "rms_norm_eps", "1e-5"),
        ("llama", "rope_theta", True),
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": "4"}),
        ("granite", "residual_multiplier", True),
        ("granite", "logits_scaling", "8"),
        ("gemma2", "attn_logit_softcapping", True),
        ("gemma2", "query_pre_attn_scalar", "256"),
        ("qwen2", "max_window_layers", 1.5),
        ("qwen3_moe", "decoder_sparse_step", True),
        ("qwen3_moe", "mlp_only_layers", "0"),
        ("glm4_moe", "first_k_dense_replace", 1.5),
        ("deepseek_v3", "routed_scaling_factor", "2.5"),
    ],
)
def test_numbers_are_numbers(family, key, value):
    """Neither texts nor truth: transformers takes none of them either."""
    sizes = {"use_sliding_window": True} if family == "qwen2" else {}
    name = "factor" if key == "rope_parameters" else key
    with pytest.raises(UsageError, match=rf"{name}(\[0\])?=.* must be a (whole |list.*)?number"):
        DecoderConfig.from_hf({"model_type": family, key: value, **sizes})


WRONG = (True, "2", "x", [2], {"a": 1}, 1.5, 0, -1, None, float("nan"), 10**400)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_of_a_file_fails_but_with_its_key_and_a_rule(family):
    """Every number a family reads, each in turn something else; what loads is as good."""
    entry = FAMILIES[family]
    names = {*hf_config.SIZES, *(key.name for key in entry.keys), entry.epsilon[0]}
    names |= {"rope_theta", "partial_rotary_factor", "sliding_window", "max_window_layers"}
    names |= {"layer_types", "no_rope_layers", "no_rope_layer_interval", "sliding_window_pattern"}
    names |= {"first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers", "hidden_act"}
    names |= {"rope_scaling", "rope_parameters", "attention_dropout", "rope_local_base_freq"}
    base = {"model_type": family, "num_hidden_layers": 4}
    if family == "deepseek_v2":
        base["num_experts_per_tok"] = 2
    if family == "glm4_moe":
        base["head_dim"] = 128
    DecoderConfig.from_hf(base)
    for name in sorted(names):
        for value in WRONG:
            try:
                DecoderConfig.from_hf({**base, name: value})
            except UsageError as error:
                said = str(error)
                assert "computed with in" not in said, (name, value, said)
                if isinstance(value, bool | str | list):
                    assert said.startswith((name, "the configuration")), (name, value, said)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1}
        | {"attention_factor": 1, "mscale_all_dim": 1, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
        | {"original_max_position_embeddings": 4096.0},
        {"rope_type": "longrope", "factor": 2, "short_factor": [1.0] * 64}
        | {"long_factor": [1] * 64, "original_max_position_embeddings": 64},
    ],
)
def test_numbers_of_rotary_settings_are_numbers(scaling):
    base = {"model_type": "llama", "num_hidden_layers": 2}
    DecoderConfig.from_hf({**base, "rope_scaling": scaling})
    for name in set(scaling) - {"rope_type"}:
        for value in ("2", True, {"a": 1}):
            with pytest.raises(UsageError, match=f"{name}=.* must be a "):
                DecoderConfig.from_hf({**base, "rope_scaling": {**scaling, name: value}})


def test_a_number_in_another_form_is_said_how_to_write():
    base = {"model_type": "llama"}
    for name, value, words in (
        ("num_hidden_layers", 2.0, "num_hidden_layers=2.0 must be a whole number of at least 1; "),
        ("num_hidden_layers", "2", "write 2"),
        ("rope_theta", "1e6", "rope_theta='1e6' must be a number above 0; write 1000000.0"),
    ):
        with pytest.raises(UsageError, match=words):
            DecoderConfig.from_hf({**base, name: value})
    assert DecoderConfig.from_hf({**base, "rope_theta": 10000}).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("family", "given", "full"),
    [
        ("gemma3_text", {"sliding_window_pattern": 3}, [2, 5]),
        ("gemma3_text", {"_sliding_window_pattern": 3}, [5]),
        ("cohere2", {"_sliding_window_pattern": 3}, [3]),
        ("cohere2", {"sliding_window_pattern": 2}, [1, 3, 5]),
        ("gemma2", {"_sliding_window_pattern": 3}, [1, 3, 5]),
        ("gpt_oss", {}, [1, 3, 5]),
    ],
)
def test_periods_of_windows_are_read_where_transformers_reads_them(family, given, full):
    """A key with a line in front is one that it writes, not one that it reads."""
    config = DecoderConfig.from_hf({"model_type": family, "num_hidden_layers": 6, **given})
    windows = [config.kind(layer).window for layer in range(6)]
    assert [layer for layer, window in enumerate(windows) if window is None] == full


@pytest.mark.parametrize("family", ["gemma2", "olmo3", "gpt_oss"])
def test_a_period_that_a_family_does_not_have_is_refused(family):
    with pytest.raises(UsageError, match="sliding_window_pattern=3 is not understood in"):
        DecoderConfig.from_hf({"model_type": family, "sliding_window_pattern": 3})


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


def test_a_folder_named_like_a_preset_is_meant_where_it_is_a_model(tmp_path, monkeypatch):
    """A run may be called as its model is, and going on with it must not take it for the model."""
    monkeypatch.chdir(tmp_path)
    assert not lies_here("tiny")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "train.json").write_text("{}")
    assert not lies_here("tiny") and preset_beside("tiny") is None
    (tmp_path / "mine").mkdir()
    assert lies_here("mine")  # no preset: what is missing there is said
    (tmp_path / "tiny" / "model.safetensors").touch()
    assert lies_here("tiny")
    assert "preset/tiny" in (preset_beside("tiny") or "")
    assert not lies_here("preset/tiny")
