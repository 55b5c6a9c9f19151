"""Adapters on blocks of several kinds and on experts; folders in PEFT's layout, both ways."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters, reference_loss
from jaxsys.model import DecoderConfig, abstract_parameters, layered
from jaxsys.model.peft import read_adapters, write_adapters
from jaxsys.train.lora import add_adapters

STORED = json.loads((Path(__file__).parents[1] / "jaxsys/data/families.json").read_text())[
    "families"
]
ATTENTION = ("query", "key", "value", "attention/out")


def described(family, **changes):
    return DecoderConfig.from_hf(STORED[family]["config"] | changes)


def filled(tree, seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(0, 0.2, leaf.shape), jnp.float32), tree
    )


def adapted(config, targets):
    """A model with adapters that do something."""
    parameters = filled(abstract_parameters(config), 0)
    model, start, merge = add_adapters(
        layered(config), parameters, rank=2, targets=targets, scale=6.0
    )
    stacks = model.stacks(start["blocks"])
    for seed, stack in enumerate(stacks.values()):
        stack["adapters"] = filled(stack["adapters"], seed + 1)
    return model, Parameters(edge=start["edge"], blocks=model.blocks(stacks)), merge


def batch():
    ids = np.random.default_rng(3).integers(0, 64, (1, 1, 13))
    return {"inputs": jnp.asarray(ids[..., :-1]), "targets": jnp.asarray(ids[..., 1:])}


def test_blocks_of_several_kinds_and_experts_have_adapters():
    """A dense first layer beside layers with experts; the merged model is the adapted one."""
    config = described("glm4_moe", num_hidden_layers=2)
    assert len(config.kinds) == 2
    model, start, merge = adapted(config, ("query", "down"))
    stacks = {kind: stack["adapters"] for kind, stack in model.stacks(start["blocks"]).items()}
    names = {name for stack in stacks.values() for name in stack}
    assert names == {"attention/query", "mlp/down", "experts/down", "shared/down"}

    def loss(parameters):
        return reference_loss(model, parameters, batch())

    found, slopes = jax.jit(jax.value_and_grad(loss))(start)
    whole = merge(start)
    wanted = reference_loss(layered(config), whole, batch())
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for stack in model.stacks(slopes["blocks"]).values():
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(stack["adapters"]))
        assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(stack["frozen"]))
    with pytest.raises(UsageError, match="no block kernel is named 'gates'"):
        adapted(config, ("query", "gates"))


def merged_kernels(stack, scale):
    return {name: np.asarray(scale * (own["a"] @ own["b"])) for name, own in stack.items()}


@pytest.mark.parametrize(
    ("family", "targets", "module"),
    [
        ("qwen3", (*ATTENTION, "mlp/gate", "mlp/up", "mlp/down"), "self_attn.o_proj"),
        ("phi3", ("query", "value", "mlp/up"), "self_attn.qkv_proj"),
        ("deepseek_v3", ("query_up", "latent_down", "mlp/up"), "self_attn.kv_a_proj_with_mqa"),
    ],
)
def test_what_is_written_is_read_again(tmp_path, family, targets, module):
    config = described(family)
    model, start, _ = adapted(config, targets)
    stacks = {kind: stack["adapters"] for kind, stack in model.stacks(start["blocks"]).items()}
    write_adapters(tmp_path, config, stacks, scale=6.0, base="somebody/base")
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.1.{module}.lora_A.weight"
    assert tensors[name].shape == (6 if family == "phi3" else 2, tensors[name].shape[1])
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 2 and settings["lora_alpha"] == 6.0
    assert module.rpartition(".")[2] in settings["target_modules"]
    if family == "phi3":
        assert settings["rank_pattern"]["qkv_proj"] == 6
        assert settings["alpha_pattern"]["qkv_proj"] == 18.0
    again, scale = read_adapters(tmp_path, config)
    for kind, stack in zip(config.kinds, stacks.values(), strict=True):
        rank = next(iter(again[kind.name].values()))["a"].shape[-1]
        found = merged_kernels(again[kind.name], scale / rank)
        for name, wanted in merged_kernels(stack, 6.0 / 2).items():
            np.testing.assert_allclose(found[name], wanted, atol=1e-5)
        unasked = found.keys() - stack.keys()  # the others of a joined module
        assert all(np.abs(found[name]).max() == 0 for name in unasked)


def test_what_is_no_adapter_of_a_linear_module_is_refused(tmp_path):
    config = described("qwen3")
    model, start, _ = adapted(config, ("query",))
    stacks = {kind: stack["adapters"] for kind, stack in model.stacks(start["blocks"]).items()}
    write_adapters(tmp_path, config, stacks, scale=6.0)
    weights, path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = safetensors.numpy.load_file(weights)
    extra = {"base_model.model.lm_head.weight": np.zeros((64, 32), np.float32)}
    safetensors.numpy.save_file(tensors | extra, weights)
    with pytest.raises(UsageError, match=r"1 tensor\(s\) that are no low-rank .*lm_head.weight"):
        read_adapters(tmp_path, config)
    safetensors.numpy.save_file(tensors, weights)
    settings = json.loads(path.read_text())
    others = 2 * (config.num_layers - 1)
    for change, text in (
        ({"use_dora": True}, "use_dora=True is not computed"),
        ({"bias": "all"}, "bias='all' is not computed"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the model's own"),
        ({"alora_invocation_tokens": [7]}, r"alora_invocation_tokens=\[7\] is not computed"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* is not computed"),
        ({"alpha_pattern": {"(": 2}}, "is no regular expression"),
        ({"layers_to_transform": [1]}, rf"=\[1\] leaves out .* {others} tensor"),
        ({"r": 16}, r"have rank .* says 16; alpha / r"),
        ({"rank_pattern": {"q_proj": 3}}, r"q_proj have rank .* says 3"),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(UsageError, match=text):
            read_adapters(tmp_path, config)
    moe = described("qwen3_moe")
    model, start, _ = adapted(moe, ("experts/up",))
    stacks = {kind: stack["adapters"] for kind, stack in model.stacks(start["blocks"]).items()}
    with pytest.raises(UsageError, match="adapters of experts/up are an expert's each"):
        write_adapters(tmp_path, moe, stacks, scale=6.0)
