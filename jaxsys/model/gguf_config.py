"""From a GGUF's metadata to a decoder's description, as llama.cpp reads them (of 2026-10).

Metadata become the keys of the family's config.json, so that what a family has in common stands in
`families` alone. What is absent means llama.cpp's value, not the config.json's: a rope factor
without a type is linear, an old `rope.scale_linear` counts, biases are there if their tensors are.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.model.config import DecoderConfig
from jaxsys.model.hf_config import refuse_many_layers
from jaxsys.model.rope import LinearRopeScaling
from jaxsys.model.rows import Rows


class Source(Protocol):
    """What is asked of an open file."""

    @property
    def name(self) -> str:
        """For errors."""
        ...

    def field(self, name: str, default: Any = None) -> Any:
        """A metadata value."""
        ...

    def need(self, name: str) -> Any:
        """A metadata value; UsageError where there is none."""
        ...

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """A tensor's, slowest axis first; None where there is none."""
        ...

    def values(self, tensor: str) -> Rows:
        """A tensor's, dequantised."""
        ...


class _Metadata:
    """The metadata under an architecture's name."""

    def __init__(self, source: Source, architecture: str) -> None:
        self.source, self.architecture = source, architecture

    def get(self, name: str, default: Any = None) -> Any:
        """Absent: `default`. Arrays of one value for all layers are that value."""
        return self._one(name, self.source.field(f"{self.architecture}.{name}", default))

    def need(self, name: str) -> Any:
        """Absent: UsageError."""
        return self._one(name, self.source.need(f"{self.architecture}.{name}"))

    def number(self, name: str, default: float) -> float:
        """A float as it was written before it became 32 bits wide."""
        return shortest(self.get(name, default))

    def has(self, tensor: str) -> bool:
        """Whether the first layer has a tensor."""
        return self.source.shape(f"blk.0.{tensor}") is not None

    def _one(self, name: str, value: Any) -> Any:
        if not isinstance(value, list) or name.endswith("pattern"):
            return value
        if len(set(value)) != 1:
            raise UsageError(
                f"{self.source.name}: {self.architecture}.{name} differs from layer to layer, "
                "which is not computed"
            )
        return value[0]


Keys = dict[str, Any]
More = Callable[[_Metadata, Keys], None]


def shortest(value: float) -> float:
    """The shortest number that is the same float32: 1e-05 comes back as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _factors(source: Source, tensor: str) -> list[float]:
    """Those of rotary frequencies, which lie in a tensor."""
    rows = source.values(tensor)
    return list(map(shortest, rows.read(0, rows.shape[0])))


def _plain(name: str) -> More:
    def more(metadata: _Metadata, keys: Keys) -> None:
        keys["model_type"] = name

    return more


def _biased(name: str, key: str = "attention_bias", mlp: str | None = "mlp_bias") -> More:
    """A family whose biases are there if their tensors are."""

    def more(metadata: _Metadata, keys: Keys) -> None:
        keys |= {"model_type": name, key: metadata.has("attn_q.bias")}
        if mlp is not None:
            keys[mlp] = metadata.has("ffn_up.bias")

    return more


def _llama(metadata: _Metadata, keys: Keys) -> None:
    if not metadata.get("expert_count", 0):
        return _biased("llama")(metadata, keys)
    keys |= {
        "model_type": "mixtral",
        "num_local_experts": metadata.need("expert_count"),
        "num_experts_per_tok": metadata.need("expert_used_count"),
    }
    return None


def _softmax_experts(name: str) -> More:
    def more(metadata: _Metadata, keys: Keys) -> None:
        size = metadata.get("expert_feed_forward_length")
        if size is None:
            shape = metadata.source.shape("blk.0.ffn_gate_exps.weight")
            size = shape[1] if shape else 0
        keys |= {
            "model_type": name,
            "num_experts": metadata.need("expert_count"),
            "num_experts_per_tok": metadata.need("expert_used_count"),
            "moe_intermediate_size": size,
        }
        if name == "qwen3_moe":
            keys["norm_topk_prob"] = True
            return
        shared = metadata.source.shape("blk.0.ffn_up_shexp.weight")
        keys["shared_expert_intermediate_size"] = shared[0] if shared else 0

    return more


def _gpt_oss(metadata: _Metadata, keys: Keys) -> None:
    keys |= {
        "model_type": "gpt_oss",
        "intermediate_size": metadata.need("expert_feed_forward_length"),
        "num_local_experts": metadata.need("expert_count"),
        "num_experts_per_tok": metadata.need("expert_used_count"),
        "sliding_window": metadata.need("attention.sliding_window"),
        "layer_types": _layer_types(metadata, keys, 2),
    }


def _layer_types(metadata: _Metadata, keys: Keys, period: int) -> list[str]:
    """Windows in all but each `period`-th layer, unless the file says otherwise."""
    pattern = metadata.get("attention.sliding_window_pattern", period)
    layers = keys["num_hidden_layers"]
    if isinstance(pattern, list):
        windows = [bool(entry) for entry in pattern[:layers]]
    else:
        windows = [pattern == 0 or (index + 1) % pattern != 0 for index in range(layers)]
    return ["sliding_attention" if has else "full_attention" for has in windows]


def _gemma2(metadata: _Metadata, keys: Keys) -> None:
    keys |= {
        "model_type": "gemma2",
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
        "sliding_window": metadata.get("attention.sliding_window", 4096),
        "layer_types": _layer_types(metadata, keys, 2),
        "query_pre_attn_scalar": _query_scalar(keys, 46),
    }


def _query_scalar(keys: Keys, layers: int) -> int:
    """llama.cpp tells the largest models, which scale by D / N, by their layers."""
    if keys["num_hidden_layers"] == layers:
        return keys["hidden_size"] // keys["num_attention_heads"]
    return keys["head_dim"]


def _gemma3(metadata: _Metadata, keys: Keys) -> None:
    window = metadata.get("attention.sliding_window", 0)
    keys |= {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scalar(keys, 62),
        "sliding_window": window or 4096,
        "final_logit_softcapping": metadata.get("final_logit_softcapping") or None,
    }
    types = _layer_types(metadata, keys, 6)
    keys["layer_types"] = types if window else ["full_attention"] * keys["num_hidden_layers"]
    keys["rope_parameters"] = {
        "full_attention": keys["rope_parameters"],
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": metadata.number("rope.freq_base_swa", 10000.0),
        },
    }


def _olmo2(metadata: _Metadata, keys: Keys) -> None:
    window = metadata.get("attention.sliding_window", 0)
    if not window:
        return _biased("olmo2", mlp=None)(metadata, keys)
    rope = keys["rope_parameters"]
    theta = metadata.number("rope.freq_base_swa", rope["rope_theta"])
    keys |= {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": _layer_types(metadata, keys, 4),
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }
    return None


def _exaone4(metadata: _Metadata, keys: Keys) -> None:
    keys |= {"model_type": "exaone4", "sliding_window": None}
    if keys["num_hidden_layers"] == 64:  # the one size with windows, as llama.cpp tells them
        keys["sliding_window"] = metadata.get("attention.sliding_window", 4096)
        keys["layer_types"] = _layer_types(metadata, keys, 4)


def _cohere(metadata: _Metadata, keys: Keys) -> None:
    keys |= {
        "model_type": "cohere",
        "logit_scale": metadata.number("logit_scale", 1.0) or 1.0,
        "use_qk_norm": metadata.has("attn_q_norm.weight"),
    }


def _cohere2(metadata: _Metadata, keys: Keys) -> None:
    keys |= {
        "model_type": "cohere2",
        "logit_scale": shortest(metadata.need("logit_scale")),
        "sliding_window": metadata.need("attention.sliding_window"),
        "layer_types": _layer_types(metadata, keys, 4),
    }


def _granite(metadata: _Metadata, keys: Keys) -> None:
    if metadata.get("expert_count", 0):
        raise UsageError(f"{metadata.source.name}: Granite's mixtures of experts are not computed")
    if metadata.get("rope.scaling.finetuned", True) is not True:
        # What says elsewhere how a model was made says here whether heads turn.
        raise UsageError(f"{metadata.source.name}: Granite without positions is not computed")
    scale = metadata.number("attention.scale", 0.0)
    keys |= {
        "model_type": "granite",
        "logits_scaling": shortest(metadata.need("logit_scale")),
        "residual_multiplier": metadata.number("residual_scale", 0.0) or 1.0,
        "embedding_multiplier": metadata.number("embedding_scale", 0.0) or 1.0,
        "attention_multiplier": scale or keys["head_dim"] ** -0.5,
        "attention_bias": metadata.has("attn_q.bias"),
    }


def _stablelm(metadata: _Metadata, keys: Keys) -> None:
    keys |= {
        "model_type": "stablelm",
        "use_qkv_bias": metadata.has("attn_q.bias"),
        "qk_layernorm": metadata.has("attn_q_norm.weight"),
        "use_parallel_residual": not metadata.has("ffn_norm.weight"),
    }


def _starcoder2(metadata: _Metadata, keys: Keys) -> None:
    keys |= {"model_type": "starcoder2", "sliding_window": None}


def _smollm3(metadata: _Metadata, keys: Keys) -> None:
    keys |= {"model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": None}


SOFTMAX, SIGMOID = 1, 2
"""What llama.cpp calls the scores of a router."""


def _routed(metadata: _Metadata, keys: Keys) -> None:
    """Experts of DeepSeek and GLM beside leading dense layers."""
    keys |= {
        "n_routed_experts": metadata.need("expert_count"),
        "num_experts_per_tok": metadata.need("expert_used_count"),
        "moe_intermediate_size": metadata.need("expert_feed_forward_length"),
        "n_shared_experts": metadata.need("expert_shared_count"),
        "first_k_dense_replace": metadata.get("leading_dense_block_count", 0),
        "norm_topk_prob": bool(metadata.get("expert_weights_norm", False)),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 0.0) or 1.0,
        "n_group": metadata.get("expert_group_count", 0) or 1,
        "topk_group": metadata.get("expert_group_used_count", 0) or 1,
    }


def _glm4_moe(metadata: _Metadata, keys: Keys) -> None:
    scores = metadata.get("expert_gating_func", 0) or SIGMOID
    if scores != SIGMOID:
        raise UsageError(
            f"{metadata.source.name}: expert_gating_func={scores} is not computed in glm4moe; only "
            f"{SIGMOID} (sigmoid) is"
        )
    # Layers at the end that predict further tokens are counted, and not computed.
    keys["num_hidden_layers"] -= metadata.get("nextn_predict_layers", 0)
    _routed(metadata, keys)
    keys |= {
        "model_type": "glm4_moe",
        "use_qk_norm": metadata.has("attn_q_norm.weight"),
        "attention_bias": metadata.has("attn_q.bias") or metadata.has("attn_qkv.bias"),
    }


def _chatglm(metadata: _Metadata, keys: Keys) -> None:
    biased = metadata.has("attn_q.bias") or metadata.has("attn_qkv.bias")
    keys |= {"model_type": "glm", "attention_bias": biased}


def _deepseek2(metadata: _Metadata, keys: Keys) -> None:
    """V2 and V3, by the scores of their routers."""
    source = metadata.source
    scores = metadata.get("expert_gating_func", 0) or SOFTMAX
    first = metadata.get("leading_dense_block_count", 0)
    corrected = source.shape(f"blk.{first}.exp_probs_b.bias") is not None
    if (scores, corrected) not in ((SOFTMAX, False), (SIGMOID, True)):
        has = "with" if corrected else "without"
        raise UsageError(
            f"{source.name}: expert_gating_func={scores} {has} exp_probs_b is not computed in "
            f"deepseek2; {SOFTMAX} (softmax) without and {SIGMOID} (sigmoid) with it are"
        )
    keys["num_hidden_layers"] -= metadata.get("nextn_predict_layers", 0)
    _routed(metadata, keys)
    turned = metadata.need("rope.dimension_count")
    # Where a file has heads unfolded and narrow, the lengths without _mla are the narrow ones.
    width = metadata.get("attention.key_length_mla") or metadata.need("attention.key_length")
    values = metadata.get("attention.value_length_mla") or metadata.need("attention.value_length")
    keys |= {
        "kv_lora_rank": metadata.need("attention.kv_lora_rank"),
        "q_lora_rank": None,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": width - turned,
        "v_head_dim": values,
    }
    if not metadata.has("attn_q.weight"):
        keys["q_lora_rank"] = metadata.need("attention.q_lora_rank")
    if scores == SIGMOID:
        keys["model_type"] = "deepseek_v3"
    else:
        keys |= {"model_type": "deepseek_v2", "topk_method": "greedy"}
        if keys["n_group"] > 1:
            keys["topk_method"] = "group_limited_greedy"
    rope = keys["rope_parameters"]
    if rope["rope_type"] == "linear":
        # llama.cpp sharpens scores by the factor then, as a config.json cannot say.
        raise UsageError(f"{source.name}: linear rope scaling is not computed in deepseek2")
    if rope["rope_type"] != "yarn" or rope["factor"] <= 1.0:
        return
    # llama.cpp: queries and keys turn without a magnitude; scores have that of mscale_all_dim,
    # squared, which is kept times a tenth.
    sharper = metadata.number("rope.scaling.yarn_log_multiplier", 0.0)
    if not sharper or metadata.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise UsageError(
            f"{source.name}: yarn without rope.scaling.yarn_log_multiplier, or with an "
            "attn_factor, is not computed in deepseek2"
        )
    del rope["attention_factor"]
    rope["mscale"] = rope["mscale_all_dim"] = round(10 * sharper, 6)


ARCHITECTURES: Mapping[str, More] = {
    "llama": _llama,
    "qwen2": _plain("qwen2"),
    "qwen3": _biased("qwen3", mlp=None),
    "qwen2moe": _softmax_experts("qwen2_moe"),
    "qwen3moe": _softmax_experts("qwen3_moe"),
    "gemma": _plain("gemma"),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _plain("phi3"),
    "olmo2": _olmo2,
    "command-r": _cohere,
    "cohere2": _cohere2,
    "granite": _granite,
    "glm4": _biased("glm4", mlp=None),
    "exaone4": _exaone4,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
    "nemotron": _biased("nemotron"),
    "smollm3": _smollm3,
    "arcee": _biased("arcee"),
    "ernie4_5": _biased("ernie4_5", "use_bias", mlp=None),
    "seed_oss": _biased("seed_oss", mlp=None),
    "hunyuan-dense": _biased("hunyuan_v1_dense", mlp=None),
    "gpt-oss": _gpt_oss,
    "chatglm": _chatglm,
    "glm4moe": _glm4_moe,
    "deepseek2": _deepseek2,
}
"""Architectures of GGUF, and what each says beside the sizes."""

PARTIAL = frozenset({"phi3", "chatglm", "glm4", "glm4moe", "stablelm", "nemotron"})
LATENT = frozenset({"deepseek2"})
"""Architectures whose heads are unfolded from narrow vectors."""
LAYER_NORMS = frozenset({"stablelm", "starcoder2", "nemotron", "command-r", "cohere2"})
EPSILONS = {"starcoder2": "norm_epsilon", "nemotron": "norm_eps"}


def read_config(source: Source, architecture: str) -> DecoderConfig:
    """The configuration that the metadata describe; `rope_freqs.weight` is left to the caller.

    Raises:
        UsageError: if a key is missing, or asks for what is not computed.
    """
    metadata = _Metadata(source, architecture)
    table = source.shape("token_embd.weight")
    if table is None:
        raise UsageError(f"{source.name} lacks tensor 'token_embd.weight'")
    heads, width = metadata.need("attention.head_count"), metadata.need("embedding_length")
    head_dim = metadata.get("attention.key_length", width // heads if heads else 0)
    latent = architecture in LATENT
    if not latent and metadata.get("attention.value_length", head_dim) != head_dim:
        raise UsageError(f"{source.name}: values of another width than keys are not computed")
    if architecture in LAYER_NORMS:
        epsilon, key = "attention.layer_norm_epsilon", EPSILONS.get(architecture, "layer_norm_eps")
    else:
        epsilon, key = "attention.layer_norm_rms_epsilon", "rms_norm_eps"
    if metadata.get("attention.causal", True) is not True:
        raise UsageError(f"{source.name}: attention.causal=false is not computed; only true is")
    experts = metadata.get("expert_count", 0)
    refuse_many_layers("block_count", metadata.need("block_count"))
    keys: Keys = {
        "vocab_size": table[0],
        "hidden_size": width,
        "intermediate_size": (metadata.get if experts else metadata.need)("feed_forward_length"),
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.need("context_length"),
        key: shortest(metadata.need(epsilon)),
        "tie_word_embeddings": source.shape("output.weight") is None,
    }
    if keys["intermediate_size"] is None:
        keys["intermediate_size"] = width
    turned = head_dim if latent else metadata.get("rope.dimension_count", head_dim)
    if turned != head_dim:
        if architecture not in PARTIAL:
            raise UsageError(f"{source.name}: rotary over {turned} of {head_dim} is not supported")
        factor = turned / head_dim
        keys["partial_rotary_factor"] = (
            factor if int(head_dim * factor) == turned else math.nextafter(factor, 1.0)
        )
    elif architecture in PARTIAL:
        keys["partial_rotary_factor"] = 1.0
    keys["rope_parameters"] = _rope(metadata, keys)
    ARCHITECTURES[architecture](metadata, keys)
    try:
        config = DecoderConfig.from_hf(keys)
    except UsageError as error:
        raise UsageError(f"{source.name}: {error}") from error
    if latent and config.experts is not None and config.experts.group_worth == 1:
        # Of every router's groups llama.cpp adds up the two best experts.
        config = dataclasses.replace(
            config, experts=dataclasses.replace(config.experts, group_worth=2)
        )
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    scaling = config.rope_scaling
    if attention == 1.0 or not (scaling is None or isinstance(scaling, LinearRopeScaling)):
        return config
    # No config.json says this.
    factor = 1.0 if scaling is None else scaling.factor
    scaling = LinearRopeScaling(factor=factor, attention_factor=attention)
    return dataclasses.replace(config, rope_scaling=scaling)


def _rope(metadata: _Metadata, keys: Keys) -> Keys:
    source = metadata.source
    rope: Keys = {
        "rope_type": "default",
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
    }
    kind = metadata.get("rope.scaling.type", "linear")
    factor = metadata.get("rope.scaling.factor")
    if factor is None:
        factor = metadata.get("rope.scale_linear", 0.0)
    factor = shortest(factor) or 1.0
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    trained = metadata.get("rope.scaling.original_context_length")
    long = source.shape("rope_factors_long.weight")
    if long is not None:
        short = source.shape("rope_factors_short.weight")
        if short != long:
            raise UsageError(f"{source.name} lacks tensor 'rope_factors_short.weight'")
        if factor != 1.0 or kind not in ("linear", "longrope"):
            raise UsageError(
                f"{source.name}: rope scaling of type {kind!r} by {factor:g} beside "
                "rope_factors_long.weight is not computed"
            )
        keys["original_max_position_embeddings"] = trained or keys["max_position_embeddings"]
        return rope | {
            "rope_type": "longrope",
            "short_factor": _factors(source, "rope_factors_short.weight"),
            "long_factor": _factors(source, "rope_factors_long.weight"),
            "attention_factor": attention,
        }
    if kind == "yarn":
        magnitude = 0.1 * math.log(factor) + 1.0
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": trained or keys["max_position_embeddings"],
            "attention_factor": attention * magnitude,
            "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    if kind not in ("linear", "none", "longrope"):
        raise UsageError(f"{source.name}: rope scaling of type {kind!r} is not supported")
    if kind == "none":
        factor = 1.0
    return rope if factor == 1.0 else rope | {"rope_type": "linear", "factor": factor}
