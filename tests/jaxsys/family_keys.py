"""Every key of every family's configuration class, one at a time: ours against transformers.

`python tests/jaxsys/family_keys.py` (with the extra `parity`) takes the first of a family's shapes
in `family_cases`, sets one key to each of some values, leaves it out, or makes it null, and has
both compute the file. What the class has and nothing here gives a value to is listed: a new release
of transformers may have brought it. Whatever we refuse by name is counted, not computed.
"""

import argparse
import dataclasses
import importlib.util
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

spec = importlib.util.spec_from_file_location(
    "family_draws", Path(__file__).parent / "family_draws.py"
)
assert spec is not None and spec.loader is not None
draws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draws)

ABSENT = draws.ABSENT
FULL, WINDOW = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: list[Any] = [
    None,
    {},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_theta": 700.0},
    {"type": "dynamic", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16},
    YARN | {"original_max_position_embeddings": 16, "rope_theta": 300.0},
    YARN | {"original_max_position_embeddings": 16, "finetuned": True},
    YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    LLAMA3 | {"original_max_position_embeddings": 16},
    LLAMA3,
    {"full_attention": {"rope_type": "default", "rope_theta": 400.0}},
    {FULL: {"type": "linear", "factor": 4.0}, WINDOW: {"rope_theta": 50.0}},
]
ACTIVATIONS = [None, *draws.ACTIVATIONS, "gelu_fast", "swish", "quick_gelu", "tanh", "xielu"]
VALUES: dict[str, list[Any]] = {
    "head_dim": [8, 16, 12, 10],
    "num_key_value_heads": [1, 4, 3],
    "hidden_act": ACTIVATIONS,
    "hidden_activation": ACTIVATIONS,
    "max_position_embeddings": [24, 4096],
    "tie_word_embeddings": [True, False],
    "rope_theta": [500, 1e6, 0],
    "rope_parameters": ROPES,
    "rope_scaling": ROPES,
    "partial_rotary_factor": [0.25, 0.5, 0.75, 1.0, 0.3, 0],
    "original_max_position_embeddings": [16, 4096],
    "sliding_window": [8, 1, 0, 1000],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 100],
    "sliding_window_pattern": [1, 2, 3, "LG", 0],
    "_sliding_window_pattern": [2, 3],
    "layer_types": [
        [FULL] * 4,
        [WINDOW] * 4,
        [FULL, WINDOW] * 2,
        ["attention"] * 4,
        [FULL] * 3,
        ["chunked_attention"] * 4,
    ],
    "no_rope_layers": [[0, 1, 1, 0], [], [1, 1, 1, 1], [True, False, True, True]],
    "no_rope_layer_interval": [1, 2, 100],
    "attention_multiplier": [0.3, 2],
    "embedding_multiplier": [3.0, 2],
    "residual_multiplier": [0.3, 2],
    "logits_scaling": [3.0, 2],
    "logit_scale": [0.3, 2],
    "attn_logit_softcapping": [2.0, 0, 0.0, 30],
    "final_logit_softcapping": [2.0, 0, 0.0, 30],
    "query_pre_attn_scalar": [16, 7.5],
    "rope_local_base_freq": [100, 1e6],
    "num_experts_per_tok": [1, 3],
    "num_experts": [4, 6],
    "num_local_experts": [4, 6],
    "n_routed_experts": [4, 8],
    "moe_intermediate_size": [24],
    "shared_expert_intermediate_size": [8, 0],
    "decoder_sparse_step": [1, 2, 3, 0],
    "mlp_only_layers": [[], [0], [0, 3], [7]],
    "first_k_dense_replace": [0, 1, 4, 9],
    "n_group": [1, 2, 4],
    "topk_group": [1, 2, 4],
    "routed_scaling_factor": [0.5, 2],
    "n_shared_experts": [0, 1, 2],
    "topk_method": ["greedy", "group_limited_greedy", "noaux_tc", "other"],
    "scoring_func": ["softmax", "sigmoid"],
    "q_lora_rank": [16],
    "kv_lora_rank": [8],
    "qk_rope_head_dim": [4],
    "qk_nope_head_dim": [12],
    "v_head_dim": [8, 20],
    "swiglu_limit": [1.0, 0, 3],
    "swiglu_alpha": [1.0, 0.5],
    "router_jitter_noise": [0.5],
    "router_aux_loss_coef": [0.5],
    "output_router_logits": [True],
    "intermediate_size": [24],
    "vocab_size": [64],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [2, 8],
    "hidden_size": [16, 48],
    "num_nextn_predict_layers": [1, 0],
    "num_mtp_layers": [1, 0],
    "moe_layer_freq": [1, 2],
    "router_dtype": ["float32"],
    "is_causal": [True, False],
    "dtype": ["float32"],
    "torch_dtype": ["bfloat16", "float16"],
    "attention_dropout": [0.5],
    "residual_dropout": [0.5],
    "hidden_dropout": [0.5],
    "embedding_dropout": [0.5],
    "resid_pdrop": [0.5],
    "embd_pdrop": [0.5],
    "initializer_range": [1.0],
    "pretraining_tp": [2],
    "eod_token_id": [3],
    "pad_token_id": [0, 63],
    "bos_token_id": [3],
    "eos_token_id": [3, [3, 4]],
    "use_cache": [True, False],
    "clip_qkv": [0.5],
    "rope_interleaved": [True],
    "rotary_pct": [0.5],
    "rotary_dim": [4],
    "qk_rope_dim": [4],
    "per_layer_config": [{"1": {"intermediate_size": 24}}],
    "layer_norm_eps": [1e-2],
    "rms_norm_eps": [1e-2],
    "norm_eps": [1e-2],
    "norm_epsilon": [1e-2],
    "layer_norm_epsilon": [1e-2],
    "attention_chunk_size": [4],
    "attn_temperature_tuning": [True],
    "use_rope": [False],
    "rope_ratio": [2.0],
    "ffn_config": [{}],
    "attention_factor": [2.0],
    "seq_length": [16],
    "scale_embeddings": [True],
    "multi_query_attention": [True],
    "kv_channels": [4],
    "tie_encoder_decoder": [True],
    "add_cross_attention": [True],
    "is_decoder": [True],
    "bidirectional": [True],
    "use_bidirectional_attention": [True, False],
}
"""What a key is set to, beside being left out and null."""
FLAGS = (
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "use_bias",
    "qkv_bias",
    "use_qkv_bias",
    "use_qk_norm",
    "qk_layernorm",
    "qk_norm",
    "norm_topk_prob",
    "rope_interleave",
    "use_parallel_residual",
    "scale_attn_by_inverse_layer_idx",
    "no_bias",
    "bias",
    "lm_head_bias",
    "use_mla",
    "parallel_attn",
)
VALUES |= {key: [True, False] for key in FLAGS}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "moe_intermediate_size", "shared_expert_intermediate_size")
"""Keys that are not left out: what stands for them is large."""


def changed(config: dict[str, Any], key: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A configuration with a key in every form, where that is another one."""
    rest = {name: value for name, value in config.items() if name != key}
    if key in config and key not in SIZES:
        yield "absent", rest
    for value in (None, *VALUES[key]):
        if key not in config or config[key] != value or type(config[key]) is not type(value):
            yield value, rest | {key: value}


def unlisted(family: str) -> list[str]:
    """Fields of a family's configuration class that nothing here sets."""
    import transformers  # pyright: ignore[reportMissingImports]

    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    fields = dataclasses.fields(transformers.CONFIG_MAPPING[family])
    return sorted({field.name for field in fields} - common - set(VALUES))


def accepts(config: dict[str, Any]) -> str | None:
    """What we say against a configuration, None where we read it."""
    from jaxsys.errors import UsageError
    from jaxsys.model import DecoderConfig

    try:
        DecoderConfig.from_hf(json.loads(json.dumps(config)))
    except UsageError as error:
        return str(error)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", choices=list(draws.FAMILIES))
    parser.add_argument("--key", action="append", choices=list(VALUES))
    parser.add_argument("--case", type=int, default=0, choices=range(3))
    arguments = parser.parse_args()
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for family in arguments.family or draws.FAMILIES:
        for name in unlisted(family):
            print(f"{family} has {name}, which nothing sets", flush=True)
        cases = draws.cases
        config = {"model_type": family} | cases.BASE | cases.CASES[family][arguments.case]
        for key in arguments.key or VALUES:
            for value, one in changed(config, key):
                refusal = accepts(one)
                if refusal is not None:
                    counts["ours refuses"] += 1
                    print(f"{family} {key}={value} ours refuses {refusal[:200]}", flush=True)
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    found = draws.compared(one, Path(folder))
                counts[found.what] += 1
                said = found.said.replace("\n", " ")[:200]
                print(f"{family} {key}={value} {found.what} {found.error:.1e} {said}", flush=True)
    print(dict(counts))
    return int(counts["different"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
