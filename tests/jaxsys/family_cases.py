"""Tiny models of every family in three shapes, with weights that any library can make alike.

`python tests/jaxsys/family_cases.py` (with the extra `parity`) computes the first shape's logits
with transformers and stores them in data/families.json, which says with which version.
"""

import json
import zlib
from pathlib import Path

import numpy as np

STORED = Path(__file__).parent / "data" / "families.json"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 40))
KEPT = 3
"""Positions from the end of the first row whose logits are stored."""

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOW = {"sliding_window": 8}
MIXED = ["sliding_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    **EXPERTS,
}


def rope(kind, theta=10000.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LINEAR = rope("linear", factor=4.0)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
DYNAMIC = rope("dynamic", factor=4.0) | {"max_position_embeddings": 24}
LONG = {
    "short_factor": [1.0, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0],
    "partial_rotary_factor": 0.75,
}

CASES = {
    "llama": (LLAMA3, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}, DYNAMIC),
    "mistral": (WINDOW | {"head_dim": 8}, {"sliding_window": None, "head_dim": 16}, LINEAR),
    "ministral": (
        WINDOW | {"head_dim": 8, "layer_types": MIXED * 2},
        WINDOW | {"head_dim": 16},
        {"head_dim": 8, "layer_types": ["full_attention"] * 4, **WINDOW, **YARN},
    ),
    "qwen2": (
        {"use_sliding_window": True, "max_window_layers": 2, **WINDOW},
        {"tie_word_embeddings": True},
        YARN,
    ),
    "qwen3": (
        {"head_dim": 16},
        {"head_dim": 8, "attention_bias": True, "layer_types": MIXED * 2, **WINDOW}
        | {"use_sliding_window": True},
        {"head_dim": 8, "tie_word_embeddings": True, **YARN},
    ),
    "seed_oss": (
        {"head_dim": 8},
        {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True},
        {"head_dim": 8, "attention_bias": False, **LLAMA3},
    ),
    "hunyuan_v1_dense": (
        {"head_dim": 16},
        {"head_dim": 8, **rope("dynamic", alpha=50.0, factor=1.0)},
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "smollm3": (
        {},
        {"use_sliding_window": True, "no_rope_layers": [1, 0, 0, 1], **WINDOW},
        {"no_rope_layer_interval": 2, "tie_word_embeddings": False, **LINEAR},
    ),
    "helium": (
        {"head_dim": 8},
        {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 8, "tie_word_embeddings": True, **LLAMA3},
    ),
    "ernie4_5": (
        {"head_dim": 8},
        {"head_dim": 16, "use_bias": True},
        {"head_dim": 8, "tie_word_embeddings": False, **LINEAR},
    ),
    "arcee": ({"head_dim": 8}, {"head_dim": 16, "mlp_bias": True}, {"head_dim": 8, **YARN}),
    "granite": (
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 7.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
        },
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "attention_multiplier": 0.5, **LLAMA3},
    ),
    "phi3": (
        WINDOW,
        rope("longrope", original_max_position_embeddings=16, **LONG)
        | {"original_max_position_embeddings": 16},
        rope("longrope", original_max_position_embeddings=48, **LONG)
        | {"original_max_position_embeddings": 48},
    ),
    "olmo2": ({}, {"tie_word_embeddings": True, **YARN}, {"attention_bias": True}),
    "olmo3": (
        WINDOW,
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, **WINDOW}
        | {"layer_types": MIXED * 2},
        {"layer_types": ["full_attention"] * 4, **WINDOW},
    ),
    "exaone4": (
        WINDOW,
        {"sliding_window": None, "layer_types": ["full_attention"] * 4},
        {"layer_types": MIXED * 2, "tie_word_embeddings": True, **WINDOW},
    ),
    "gemma": ({"head_dim": 16}, {"head_dim": 8, "hidden_act": "gelu"}, {"head_dim": 8, **LINEAR}),
    "gemma2": (
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            **WINDOW,
        },
        {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None, **WINDOW},
        {"head_dim": 16, "tie_word_embeddings": False, **WINDOW},
    ),
    "gemma3_text": (
        {"head_dim": 16, "num_hidden_layers": 7, "query_pre_attn_scalar": 24, **WINDOW},
        {"head_dim": 16, "layer_types": MIXED * 2, **WINDOW}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"head_dim": 8, "layer_types": MIXED * 2, "final_logit_softcapping": 5.0, **WINDOW},
    ),
    "glm": (
        {"head_dim": 8},
        {"head_dim": 16, "attention_bias": False},
        {"head_dim": 8, **rope("linear", factor=2.0, partial_rotary_factor=0.25)},
    ),
    "glm4": (
        {"head_dim": 16},
        {"head_dim": 8, "attention_bias": False},
        {"head_dim": 8, **rope("default", partial_rotary_factor=1.0)},
    ),
    "stablelm": (
        {"use_qkv_bias": True, "qk_layernorm": True, **rope("default", partial_rotary_factor=0.5)},
        {"use_parallel_residual": True},
        {"tie_word_embeddings": True},
    ),
    "starcoder2": (WINDOW, {"use_bias": False}, {"tie_word_embeddings": False, **LINEAR}),
    "nemotron": (
        {"head_dim": 8},
        {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 8, **rope("default", partial_rotary_factor=1.0)},
    ),
    "cohere": ({}, {"use_qk_norm": True}, {"attention_bias": True, "logit_scale": 0.5, **LINEAR}),
    "cohere2": (
        WINDOW,
        {"layer_types": MIXED * 2, "attention_bias": True, **WINDOW},
        {"layer_types": MIXED * 2, "logit_scale": 0.5, "tie_word_embeddings": False, **WINDOW},
    ),
    "mixtral": (
        {"num_local_experts": 4, **WINDOW},
        {"num_local_experts": 8, "num_experts_per_tok": 3},
        {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, **YARN},
    ),
    "qwen2_moe": (
        {"num_experts": 4, "shared_expert_intermediate_size": 24, **EXPERTS},
        {"num_experts": 4, "mlp_only_layers": [1], "shared_expert_intermediate_size": 24}
        | {"use_sliding_window": True, **WINDOW, **EXPERTS},
        {"num_experts": 8, "norm_topk_prob": True, "shared_expert_intermediate_size": 16}
        | {"qkv_bias": False, **EXPERTS},
    ),
    "qwen3_moe": (
        {"num_experts": 4, "head_dim": 16, "norm_topk_prob": True, **EXPERTS},
        {"num_experts": 4, "head_dim": 8, "decoder_sparse_step": 2, **EXPERTS},
        {"num_experts": 8, "head_dim": 8, "use_sliding_window": True, **WINDOW, **EXPERTS},
    ),
    "glm4_moe": (
        {"n_routed_experts": 8, "n_group": 2, "use_qk_norm": True, "head_dim": 8, **EXPERTS}
        | {"routed_scaling_factor": 1.5},
        {"n_routed_experts": 4, "attention_bias": True, "head_dim": 16, **EXPERTS},
        {"n_routed_experts": 4, "first_k_dense_replace": 2, "norm_topk_prob": False}
        | {"head_dim": 8, "n_shared_experts": 2, **EXPERTS},
    ),
    "gpt_oss": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **WINDOW},
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "swiglu_limit": 0.5}
        | {**WINDOW, **rope("default")},
        {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, **WINDOW}
        | {"layer_types": ["full_attention"] * 4},
    ),
    "deepseek_v3": (
        {"first_k_dense_replace": 1, "q_lora_rank": 24, "n_group": 2, "topk_group": 1, **LATENT},
        {"first_k_dense_replace": 2, "q_lora_rank": None, "n_group": 2, "topk_group": 2, **LATENT}
        | rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=1.0,
            mscale_all_dim=0.8,
        ),
        {"first_k_dense_replace": 1, "q_lora_rank": 24, "n_group": 1, "topk_group": 1, **LATENT}
        | {"n_shared_experts": 2, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "deepseek_v2": (
        {"first_k_dense_replace": 1, "q_lora_rank": None, "n_group": 1, "topk_group": 1, **LATENT},
        {"q_lora_rank": 24, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
        | {"first_k_dense_replace": 1, "routed_scaling_factor": 2.0, **LATENT}
        | rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
        {"q_lora_rank": None, "n_group": 4, "topk_group": 2, "topk_method": "greedy", **LATENT}
        | {"n_shared_experts": 1},
    ),
}


def weights_of(name, shape):
    """The tensor of a checkpoint, by its name: large enough that every term shows."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.normal(0.0, 0.15, shape).astype(np.float32)
    is_scale = name.endswith("norm.weight") or "layernorm" in name
    return values + 1 if is_scale and not name.endswith(".bias") else values


def their_config(family, case):
    """transformers' configuration."""
    import transformers  # pyright: ignore[reportMissingImports]

    return transformers.CONFIG_MAPPING[family](**(BASE | CASES[family][case]))


def their_folder(family, case, folder):
    """Writes transformers' folder with the weights of `weights_of`; returns its model."""
    import safetensors.numpy
    import transformers  # pyright: ignore[reportMissingImports]

    config = their_config(family, case)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {
        name: weights_of(name, value.shape)
        for name, value in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def their_logits(model, tokens=TOKENS):
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def store():
    """Computes and writes data/families.json."""
    import tempfile

    import transformers  # pyright: ignore[reportMissingImports]

    found = {"transformers": transformers.__version__, "families": {}}
    for family in CASES:
        with tempfile.TemporaryDirectory() as name:
            logits = their_logits(their_folder(family, 0, Path(name)))
            config = json.loads((Path(name) / "config.json").read_text())
        rows = logits[0, -KEPT:].astype(float)
        found["families"][family] = {
            "config": config,
            "largest": float(np.abs(logits).max()),
            "logits": [[float(f"{value:.8g}") for value in row] for row in rows],
        }
    lines = [f'"{name}": {json.dumps(value)}' for name, value in found["families"].items()]
    text = f'{{"transformers": "{found["transformers"]}", "families": {{\n'
    STORED.write_text(text + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    store()
