"""Every family's files against logits that transformers computed, its export, and its training."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import reference_loss
from jaxsys.model import (
    FAMILIES,
    BlockKind,
    DecoderConfig,
    Family,
    abstract_parameters,
    families,
    forward,
    initial_parameters,
    layered,
    load,
    preset,
    register,
    save_safetensors,
)
from jaxsys.model.assemble import expected_tensors
from jaxsys.model.contract import layer_cache, products
from jaxsys.model.families import Key, Windows
from jaxsys.model.names import block_tensors, edge_tensors
from jaxsys.model.safetensors_file import SafetensorsFile, TensorToWrite, write_safetensors
from jaxsys.planner.workload import decoder_workload


def _cases():
    spec = importlib.util.spec_from_file_location(
        "family_cases", Path(__file__).parent / "family_cases.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _cases()
STORED = json.loads(cases.STORED.read_text())["families"]
UNLIKE = (
    "llama",
    "phi3",
    "gemma3_text",
    "starcoder2",
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "glm4",
)
"""Families whose tensors are fused, cut, named or stacked in each of the ways that there are."""


def tensors_of(config):
    def tensors(kind):
        return edge_tensors(config) if kind is None else block_tensors(config, kind)

    return expected_tensors(config, tensors)


def write_folder(folder, settings):
    """A folder as transformers wrote it, its weights made anew by their names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    config = DecoderConfig.from_hf(settings)
    write_safetensors(
        folder / "model.safetensors",
        [
            TensorToWrite(
                name=name,
                shape=shape,
                dtype=np.dtype(np.float32),
                pieces=lambda n=name, s=shape: [cases.weights_of(n, s)],
            )
            for name, shape in sorted(tensors_of(config).items())
        ],
    )
    return config


def test_every_family_has_stored_values():
    assert set(STORED) == set(FAMILIES)


@pytest.mark.parametrize("family", STORED)
def test_logits_are_those_of_transformers(family, tmp_path):
    stored = STORED[family]
    write_folder(tmp_path / "m", stored["config"])
    model = load(tmp_path / "m")
    # Operation by operation: shapes are those of other families, so little is compiled.
    with jax.disable_jit():
        got = forward(model.config, model.parameters, jnp.asarray(cases.TOKENS[:1], jnp.int32))
    wanted = np.array(stored["logits"])
    np.testing.assert_allclose(got[0, -cases.KEPT :], wanted, atol=1e-5 * stored["largest"])


@pytest.mark.parametrize(
    "family",
    [name if name in UNLIKE else pytest.param(name, marks=pytest.mark.slow) for name in STORED],
)
def test_what_is_written_is_read_again(family, tmp_path):
    config = write_folder(tmp_path / "m", STORED[family]["config"])
    model = load(tmp_path / "m")
    assert config == model.config
    save_safetensors(tmp_path / "n", model.config, model.parameters)
    one, two = (SafetensorsFile(tmp_path / name / "model.safetensors") for name in "mn")
    assert one.shapes == two.shapes
    for name in one.shapes:
        np.testing.assert_array_equal(one.read(name), two.read(name))
    assert DecoderConfig.from_hf(json.loads((tmp_path / "n/config.json").read_text())) == config


@pytest.mark.parametrize("family", STORED)
def test_counts_are_those_of_the_arrays(family):
    config = DecoderConfig.from_hf(STORED[family]["config"])
    shapes = abstract_parameters(config)
    assert config.parameter_count() == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    made = jax.eval_shape(lambda: initial_parameters(config))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), dict(shapes)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), dict(made)
    )
    active = config.active_parameter_count()
    assert (active < config.parameter_count()) == (config.experts is not None)


@pytest.mark.parametrize(
    "family",
    [
        "gpt_oss",  # windows, sinks, biases and experts
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gemma2", "qwen3_moe", "glm4_moe")
        ),
    ],
)
def test_training_is_the_forward_pass(family, tmp_path):
    """Loss through the layered model = cross-entropy of the logits, router losses apart."""
    config = DecoderConfig.from_hf(STORED[family]["config"])
    if config.experts is not None:
        config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, balance=0))
    weights = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(0, 0.1, leaf.shape)),
        initial_parameters(config),
    )
    tokens = jnp.asarray(cases.TOKENS[:, :12], jnp.int32)
    batch = {"inputs": tokens[None, :, :-1], "targets": tokens[None, :, 1:]}
    with jax.disable_jit():
        logits = jax.nn.log_softmax(forward(config, weights, batch["inputs"][0]))
    wanted = -jnp.take_along_axis(logits, batch["targets"][0][..., None], axis=-1).mean()
    got = jax.jit(lambda w: reference_loss(layered(config, loss_chunk_tokens=8), w, batch))(weights)
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)


def test_router_losses_travel_beside_the_residual():
    """E sum f p a layer: the number of experts a token uses where all are used alike."""
    config = DecoderConfig.from_hf(STORED["mixtral"]["config"])
    experts = config.experts
    assert experts is not None
    balance = dataclasses.replace(experts, balance=0.5)
    weights = initial_parameters(config)
    router = jnp.zeros_like(weights["blocks"]["experts"]["router"])
    weights["blocks"]["experts"]["router"] = router  # all alike: p = 1 / E, whoever is chosen
    tokens = jnp.asarray(cases.TOKENS[None, :, :12], jnp.int32)
    batch = {"inputs": tokens, "targets": tokens.at[..., :6].set(-1)}

    def loss(config):
        return float(jax.jit(lambda w: reference_loss(layered(config), w, batch))(weights))

    plain = dataclasses.replace(experts, balance=0.0)
    with_loss, without = (
        loss(dataclasses.replace(config, experts=one)) for one in (balance, plain)
    )
    assert with_loss - without == pytest.approx(0.5 * experts.active, rel=1e-4)


def test_caches_and_products_say_what_layers_hold():
    gemma, deepseek, qwen = (
        DecoderConfig.from_hf(STORED[name]["config"])
        for name in ("gemma2", "deepseek_v3", "qwen3_moe")
    )
    window, full = (layer_cache(gemma, kind) for kind in gemma.kinds)
    assert (window.kind, window.tokens(100), full.kind, full.tokens(100)) == (
        "window",
        8,
        "whole",
        100,
    )
    assert full.token_numbers == 2 * 2 * 16
    latent = layer_cache(deepseek, deepseek.kinds[0])
    assert (latent.kind, latent.shapes, latent.split) == ("latent", ((1, 24),), None)
    found = {product.reads: product for product in products(qwen, qwen.kinds[0])}
    assert [leaf.path[-1] for leaf in found["attention"].leaves] == ["query", "key", "value"]
    assert [found[name].split for name in ("attention", "heads", "experts", "router")] == [
        "out",
        "in",
        "out",
        None,
    ]
    assert found["experts"].grouped
    assert found["experts"].active_parameters == found["experts"].parameters * 2 / 4


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types holds 'chunked_atten"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types holds 1 entries, num_hidden"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is n"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy' is not computed; only"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias=True is not understood in deepseek_v2"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is neither true"),
        ("stablelm", {"qk_layernorm": "no"}, "qk_layernorm='no' is neither true nor false"),
        ("qwen3", {"attention_bias": 0.0}, "attention_bias=0.0 is neither true nor false"),
        ("smollm3", {"no_rope_layers": ["0"] * 4}, "no_rope_layers='0' is neither true nor"),
        (
            "mistral",
            {"num_key_value_heads": 0},
            "num_key_value_heads=0 must be a whole number of at",
        ),
        ("gemma2", {"is_causal": False}, "is_causal=False is not computed; only true is"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not com"),
        ("qwen3_moe", {"num_experts": 8}, "num_experts=8 and num_local_experts=4 are names of"),
        (
            "olmo3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "truncate": False}},
            "truncate=False under full_attention is not computed",
        ),
        ("qwen3_moe", {"mlp_bias": True}, "mlp_bias=True is not understood in qwen3_moe"),
        ("llama", {"quantization_config": {"quant_method": "hqq"}}, "quant_method='hqq' is not"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope"}}, "longrope lacks short_factor"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4, "mrope_section": [1]}}, "mrope"),
        ("glm4", {"partial_rotary_factor": 1.5, "rope_parameters": None}, "partial_rotary_factor"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "active=9 experts of count=4"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(family, change, message):
    with pytest.raises(UsageError, match=message):
        DecoderConfig.from_hf(STORED[family]["config"] | change)


def test_another_name_and_another_meaning():
    """As transformers reads files: a Mistral of unlike layers is a Ministral, and such."""
    types = ["sliding_attention", "full_attention"] * 2
    config = DecoderConfig.from_hf(STORED["mistral"]["config"] | {"layer_types": types})
    assert (config.family, [kind.window for kind in config.kinds]) == ("ministral", [8, None])
    gemma = DecoderConfig.from_hf(STORED["gemma"]["config"] | {"hidden_act": "gelu"})
    assert gemma.activation == "gelu_tanh"
    llama = DecoderConfig.from_hf(STORED["llama"]["config"] | {"hidden_act": "gelu"})
    assert llama.activation == "gelu"
    latent = STORED["deepseek_v3"]["config"] | {"attention_bias": True}
    assert {
        f"model.layers.0.self_attn.{name}.bias"
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
    } <= set(tensors_of(DecoderConfig.from_hf(latent)))


def test_a_family_cannot_be_written_as_another():
    with pytest.raises(UsageError, match="family 'llama' has no config.json for qk_norm='head'"):
        dataclasses.replace(preset("tiny"), qk_norm="head").to_hf()
    with pytest.raises(UsageError, match="family 'klingon' is not known; known: llama, "):
        dataclasses.replace(preset("tiny"), family="klingon").to_hf()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ("block",)}, "the pattern names 1 layers, num_layers=4"),
        ({"kinds": (BlockKind(name="a"), BlockKind(name="b"))}, "need a pattern"),
        ({"kinds": (BlockKind(experts=True),)}, "block layers have experts, which are not"),
        ({"kinds": (BlockKind(window=0),)}, "window of block layers=0 must be a whole number"),
        ({"activation": "xielu"}, "activation='xielu' is not known; known: silu, "),
    ],
)
def test_descriptions_that_do_not_fit_together(changes, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(preset("tiny"), **changes)


def test_a_family_from_outside(monkeypatch):
    """One entry of known building blocks: it is read, written, trained and planned."""
    monkeypatch.setattr("jaxsys.model.families.FAMILIES", dict(FAMILIES))
    for place in ("hf_config", "names"):
        monkeypatch.setattr(f"jaxsys.model.{place}.FAMILIES", families.FAMILIES)
    register(
        Family(
            name="toy",
            architecture="ToyForCausalLM",
            sizes=(64, 32, 48, 3, 4, 2, 8, 64),
            keys=(Key(name="biased", fields=("qkv_bias",), default=True),),
            fixed={"qk_norm": "head", "norm": "layer", "gated": False},
            activation=("act", "relu"),
            windows=Windows(how="all", default=4),
            modules={"mlp/up": "mlp.wide"},
        )
    )
    config = DecoderConfig.from_hf({"model_type": "toy", "biased": False})
    assert (config.qkv_bias, config.kinds[0].window, config.activation) == (False, 4, "relu")
    assert DecoderConfig.from_hf(config.to_hf()) == config
    assert tensors_of(config)["model.layers.2.mlp.wide.weight"] == (48, 32)
    work = decoder_workload("toy", config, sequence_length=16, microbatch_size=1)
    assert work.parameters == config.parameter_count()
    ids = jax.ShapeDtypeStruct((1, 1, 8), jnp.int32)
    loss = jax.eval_shape(
        lambda w, rows: reference_loss(layered(config), w, rows),
        abstract_parameters(config),
        {"inputs": ids, "targets": ids},
    )
    assert loss.shape == ()
    with pytest.raises(UsageError, match="family 'toy' is registered already"):
        register(families.FAMILIES["toy"])
