"""Folders that PEFT writes give, served, the logits that PEFT merges; by its own rules of scale.

Needs the extra `parity`, and peft.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.model import load
from jaxsys.serve import paged_model
from jaxsys.serve.cache_groups import cache_groups
from jaxsys.serve.lora import Adapted, AdapterSlots
from jaxsys.serve.paged_attention import choose_kernels
from jaxsys.serve.weights import serving_weights

pytestmark = pytest.mark.parity

spec = importlib.util.spec_from_file_location(
    "family_cases", Path(__file__).parents[1] / "jaxsys/family_cases.py"
)
assert spec is not None and spec.loader is not None
family_cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(family_cases)

TOLERANCE = 2e-5
"""Of the largest logit: paged attention sums in another order than the whole pass."""
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "every module": ("llama", {"r": 4, "lora_alpha": 10, "target_modules": ALL}),
    "all-linear, rank-stabilised": (
        "qwen3",
        {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
    ),
    "patterns": (
        "gemma2",
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": ALL,
            "rank_pattern": {r".*\.0\.self_attn.*": 4, "up_proj": 3},
            "alpha_pattern": {"layers.1.mlp.gate_proj": 20, r"(q|k)_proj": 1},
        },
    ),
    "joined matrices": (
        "phi3",
        {"r": 4, "lora_alpha": 4, "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]},
    ),
    "some layers": (
        "glm4",
        {
            "r": 2,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "gate_up_proj"],
            "layers_to_transform": [1],
        },
    ),
    "latent attention": (
        "deepseek_v3",
        {
            "r": 2,
            "lora_alpha": 8,
            "target_modules": ["q_b_proj", "q_a_proj", "kv_a_proj_with_mqa", "o_proj"],
        },
    ),
    "fan_in_fan_out of a linear module": (
        "starcoder2",
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "c_fc"], "fan_in_fan_out": True},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def peft():
    pytest.importorskip("torch", reason="needs the extra `parity`")
    return pytest.importorskip("peft", reason="needs peft")


def served_logits(folder, adapter, tokens):
    """Behind a prompt, and behind each of two steps of a batch whose other row has no adapter."""
    model = load(folder)
    config, place = model.config, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = serving_weights(config, model.parameters, placement=place)
    slots = AdapterSlots(config, jnp.dtype("float32"), count=2, rank=4, placement=place)
    slots.put("a", slots.read(adapter))
    kernels = choose_kernels(
        dtype=jnp.dtype("float32"), head_dim=config.head_dim, device=jax.devices()[0]
    )
    groups = len(cache_groups(config).windows)
    cache = paged_model.empty_cache(config, 16 * groups, 4, jnp.dtype("float32"), place)
    table = np.concatenate([np.arange(8) + 16 * g for g in range(groups)]).astype(np.int32)
    nobody = np.full_like(table, 16 * groups)
    adapted = Adapted(slots.tables, jnp.asarray([0]), jnp.asarray([0]))
    tokens = np.asarray(tokens, np.int32)
    logits, cache = jax.jit(functools.partial(paged_model.prefill_pass, config, kernels, True))(
        weights, cache, tokens[:18], np.int32(0), np.int32(18), table, adapted
    )
    found = [np.asarray(logits[0])]
    both = Adapted(slots.tables, jnp.asarray([0, 1]), jnp.asarray([0, -1]))
    decode = jax.jit(functools.partial(paged_model.decode_pass, config, kernels))
    for position in (18, 19):
        logits, cache = decode(
            weights, cache, tokens[[position] * 2], np.full(2, position, np.int32),
            np.stack([table, nobody]), both,
        )  # fmt: skip
        found.append(np.asarray(logits[0]))
    return np.stack(found)


@pytest.mark.parametrize("case", CASES)
def test_served_folders_are_what_peft_merges(peft, tmp_path, case):
    import torch  # pyright: ignore[reportMissingImports]

    family, settings = CASES[case]
    theirs = family_cases.their_folder(family, 0, tmp_path / "base")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = family_cases.TOKENS[:1, :20]
    base = family_cases.their_logits(type(theirs).from_pretrained(tmp_path / "base").eval(), tokens)
    wanted = family_cases.their_logits(adapted.merge_and_unload(), tokens)[0, 17:]
    found = served_logits(tmp_path / "base", tmp_path / "adapter", tokens[0])
    scale = np.abs(wanted).max()
    assert np.abs(base[0, 17:] - wanted).max() > 0.05 * scale  # it matters
    assert np.abs(found - wanted).max() < TOLERANCE * scale
