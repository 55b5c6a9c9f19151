"""Shapes of published models, by their names on the Hugging Face Hub without the owner.

Sizes are those of each model's config.json there. What a fine-tune or a quantised copy shares with
the model it is of stands once: `jaxsys.model.shapes` leaves out of a name what says no more.
"""

from typing import Any

from jaxsys.model.config import DecoderConfig

Sizes = tuple[int, int, int, int, int, int]
"""V, D, F, L, N, G."""


def shape(family: str, sizes: Sizes, positions: int, **keys: Any) -> DecoderConfig:
    vocabulary, width, inner, layers, heads, shared = sizes
    return DecoderConfig.from_hf(
        {
            "model_type": family,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": shared,
            "max_position_embeddings": positions,
            **keys,
        }
    )


def llama(sizes: Sizes, positions: int, theta: float, **keys: Any) -> DecoderConfig:
    return shape("llama", sizes, positions, rope_theta=theta, rms_norm_eps=1e-5, **keys)


def _stretched(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _mistral(sizes: Sizes, positions: int, theta: float, **keys: Any) -> DecoderConfig:
    keys = {"sliding_window": None} | keys
    return shape("mistral", sizes, positions, rope_theta=theta, rms_norm_eps=1e-5, **keys)


def _qwen2(sizes: Sizes, positions: int, **keys: Any) -> DecoderConfig:
    return shape("qwen2", sizes, positions, **{"rope_theta": 1e6, **keys})


def _qwen3(
    sizes: Sizes, *, experts: int | None = None, positions: int = 40960, **keys: Any
) -> DecoderConfig:
    family, keys = "qwen3", {"rope_theta": 1e6, "head_dim": 128, **keys}
    if experts is not None:
        family = "qwen3_moe"
        keys = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True} | keys
        keys["moe_intermediate_size"] = experts
    return shape(family, sizes, positions, **keys)


def _gemma2(sizes: Sizes, width: int, scalar: int) -> DecoderConfig:
    return shape("gemma2", sizes, 8192, head_dim=width, query_pre_attn_scalar=scalar)


def _olmo2(sizes: Sizes) -> DecoderConfig:
    return shape("olmo2", sizes, 4096, rope_theta=5e5, rms_norm_eps=1e-6)


def _granite(sizes: Sizes, logits: float, attention: float) -> DecoderConfig:
    return shape(
        "granite",
        sizes,
        131072,
        rope_theta=1e7,
        rms_norm_eps=1e-5,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=logits,
        attention_multiplier=attention,
        **_TIED,
    )


def _starcoder2(sizes: Sizes, theta: float, **keys: Any) -> DecoderConfig:
    return shape("starcoder2", sizes, 16384, rope_theta=theta, sliding_window=4096, **keys)


def _far(sharper: float) -> dict[str, Any]:
    """How DeepSeek's models reach from 4,096 positions to forty times as many."""
    return {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": sharper,
        "mscale_all_dim": sharper,
    }


def _gpt_oss(layers: int, experts: int) -> DecoderConfig:
    sizes = (201088, 2880, 2880, layers, 64, 8)
    return shape("gpt_oss", sizes, 131072, head_dim=64, num_local_experts=experts)


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_LONG_LLAMA: dict[str, Any] = {"rope_scaling": _stretched(8.0)}

PUBLISHED: dict[str, DecoderConfig] = {
    "Llama-2-7b": llama((32000, 4096, 11008, 32, 32, 32), 4096, 1e4),
    "Llama-2-13b": llama((32000, 5120, 13824, 40, 40, 40), 4096, 1e4),
    "Llama-2-70b": llama((32000, 8192, 28672, 80, 64, 8), 4096, 1e4),
    "Llama-3-8B": llama((128256, 4096, 14336, 32, 32, 8), 8192, 5e5),
    "Llama-3-70B": llama((128256, 8192, 28672, 80, 64, 8), 8192, 5e5),
    "Llama-3.1-8B": llama((128256, 4096, 14336, 32, 32, 8), 131072, 5e5, **_LONG_LLAMA),
    "Llama-3.1-70B": llama((128256, 8192, 28672, 80, 64, 8), 131072, 5e5, **_LONG_LLAMA),
    "Llama-3.1-405B": llama((128256, 16384, 53248, 126, 128, 8), 131072, 5e5, **_LONG_LLAMA),
    "Llama-3.2-1B": llama(
        (128256, 2048, 8192, 16, 32, 8),
        131072,
        5e5,
        rope_scaling=_stretched(32.0),
        head_dim=64,
        **_TIED,
    ),
    "Llama-3.2-3B": llama(
        (128256, 3072, 8192, 28, 24, 8),
        131072,
        5e5,
        rope_scaling=_stretched(32.0),
        head_dim=128,
        **_TIED,
    ),
    "Llama-3.3-70B": llama((128256, 8192, 28672, 80, 64, 8), 131072, 5e5, **_LONG_LLAMA),
    "CodeLlama-7b-hf": llama((32016, 4096, 11008, 32, 32, 32), 16384, 1e6),
    "CodeLlama-13b-hf": llama((32016, 5120, 13824, 40, 40, 40), 16384, 1e6),
    "CodeLlama-34b-hf": llama((32000, 8192, 22016, 48, 64, 8), 16384, 1e6),
    "TinyLlama-1.1B-Chat-v1.0": llama((32000, 2048, 5632, 22, 32, 4), 2048, 1e4),
    "DeepSeek-R1-Distill-Llama-8B": llama(
        (128256, 4096, 14336, 32, 32, 8), 131072, 5e5, **_LONG_LLAMA
    ),
    "DeepSeek-R1-Distill-Llama-70B": llama(
        (128256, 8192, 28672, 80, 64, 8), 131072, 5e5, **_LONG_LLAMA
    ),
    "Yi-1.5-6B": llama((64000, 4096, 11008, 32, 32, 4), 4096, 5e6),
    "Yi-1.5-9B": llama((64000, 4096, 11008, 48, 32, 4), 4096, 5e6),
    "Yi-1.5-34B": llama((64000, 7168, 20480, 60, 56, 8), 4096, 5e6),
    "SmolLM2-135M": llama((49152, 576, 1536, 30, 9, 3), 8192, 1e5, **_TIED),
    "SmolLM2-360M": llama((49152, 960, 2560, 32, 15, 5), 8192, 1e5, **_TIED),
    "SmolLM2-1.7B": llama((49152, 2048, 8192, 24, 32, 32), 8192, 1.3e5, **_TIED),
    "SmolLM3-3B": shape(
        "smollm3", (128256, 2048, 11008, 36, 16, 4), 65536, rope_theta=5e6, **_TIED
    ),
    "Mistral-7B-v0.1": _mistral((32000, 4096, 14336, 32, 32, 8), 32768, 1e4, sliding_window=4096),
    "Mistral-7B-Instruct-v0.2": _mistral((32000, 4096, 14336, 32, 32, 8), 32768, 1e6),
    "Mistral-7B-v0.3": _mistral((32768, 4096, 14336, 32, 32, 8), 32768, 1e6),
    "Mistral-Nemo-Base-2407": _mistral((131072, 5120, 14336, 40, 32, 8), 131072, 1e6, head_dim=128),
    "Mistral-Small-24B-Base-2501": _mistral(
        (131072, 5120, 32768, 40, 32, 8), 32768, 1e8, head_dim=128
    ),
    "Mistral-Large-Instruct-2407": _mistral((32768, 12288, 28672, 88, 96, 8), 131072, 1e6),
    "Codestral-22B-v0.1": _mistral((32768, 6144, 16384, 56, 48, 8), 32768, 1e6),
    "Ministral-8B-Instruct-2410": _mistral(
        (131072, 4096, 12288, 36, 32, 8), 32768, 1e8, head_dim=128, sliding_window=32768
    ),
    "Mixtral-8x7B-v0.1": shape("mixtral", (32000, 4096, 14336, 32, 32, 8), 32768, rope_theta=1e6),
    "Mixtral-8x22B-v0.1": shape("mixtral", (32000, 6144, 16384, 56, 48, 8), 65536, rope_theta=1e6),
    "Mixtral-8x22B-Instruct-v0.1": shape(
        "mixtral", (32768, 6144, 16384, 56, 48, 8), 65536, rope_theta=1e6
    ),
    "Qwen2-0.5B": _qwen2((151936, 896, 4864, 24, 14, 2), 131072, **_TIED),
    "Qwen2-1.5B": _qwen2((151936, 1536, 8960, 28, 12, 2), 131072, **_TIED),
    "Qwen2-7B": _qwen2((152064, 3584, 18944, 28, 28, 4), 131072),
    "Qwen2-72B": _qwen2((152064, 8192, 29568, 80, 64, 8), 131072, rms_norm_eps=1e-5),
    "Qwen2.5-0.5B": _qwen2((151936, 896, 4864, 24, 14, 2), 32768, **_TIED),
    "Qwen2.5-1.5B": _qwen2((151936, 1536, 8960, 28, 12, 2), 131072, **_TIED),
    "Qwen2.5-3B": _qwen2((151936, 2048, 11008, 36, 16, 2), 32768, **_TIED),
    "Qwen2.5-7B": _qwen2((152064, 3584, 18944, 28, 28, 4), 131072),
    "Qwen2.5-14B": _qwen2((152064, 5120, 13824, 48, 40, 8), 131072, rms_norm_eps=1e-5),
    "Qwen2.5-32B": _qwen2((152064, 5120, 27648, 64, 40, 8), 131072, rms_norm_eps=1e-5),
    "Qwen2.5-72B": _qwen2((152064, 8192, 29568, 80, 64, 8), 131072, rms_norm_eps=1e-5),
    "Qwen2.5-Coder-0.5B": _qwen2((151936, 896, 4864, 24, 14, 2), 32768, **_TIED),
    "Qwen2.5-Coder-1.5B": _qwen2((151936, 1536, 8960, 28, 12, 2), 32768, **_TIED),
    "Qwen2.5-Coder-3B": _qwen2((151936, 2048, 11008, 36, 16, 2), 32768, **_TIED),
    "Qwen2.5-Coder-7B": _qwen2((152064, 3584, 18944, 28, 28, 4), 32768),
    "Qwen2.5-Coder-14B": _qwen2((152064, 5120, 13824, 48, 40, 8), 32768, rms_norm_eps=1e-5),
    "Qwen2.5-Coder-32B": _qwen2((152064, 5120, 27648, 64, 40, 8), 32768, rms_norm_eps=1e-5),
    "QwQ-32B": _qwen2((152064, 5120, 27648, 64, 40, 8), 40960, rms_norm_eps=1e-5),
    "DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(
        (151936, 1536, 8960, 28, 12, 2), 131072, rope_theta=1e4
    ),
    "DeepSeek-R1-Distill-Qwen-7B": _qwen2((152064, 3584, 18944, 28, 28, 4), 131072, rope_theta=1e4),
    "DeepSeek-R1-Distill-Qwen-14B": _qwen2(
        (152064, 5120, 13824, 48, 40, 8), 131072, rms_norm_eps=1e-5
    ),
    "DeepSeek-R1-Distill-Qwen-32B": _qwen2(
        (152064, 5120, 27648, 64, 40, 8), 131072, rms_norm_eps=1e-5
    ),
    "Qwen3-0.6B": _qwen3((151936, 1024, 3072, 28, 16, 8), **_TIED),
    "Qwen3-1.7B": _qwen3((151936, 2048, 6144, 28, 16, 8), **_TIED),
    "Qwen3-4B": _qwen3((151936, 2560, 9728, 36, 32, 8), **_TIED),
    "Qwen3-8B": _qwen3((151936, 4096, 12288, 36, 32, 8)),
    "Qwen3-14B": _qwen3((151936, 5120, 17408, 40, 40, 8)),
    "Qwen3-32B": _qwen3((151936, 5120, 25600, 64, 64, 8)),
    "Qwen3-30B-A3B": _qwen3((151936, 2048, 6144, 48, 32, 4), experts=768),
    "Qwen3-235B-A22B": _qwen3((151936, 4096, 12288, 94, 64, 4), experts=1536),
    "Qwen3-4B-Instruct-2507": _qwen3(
        (151936, 2560, 9728, 36, 32, 8), positions=262144, rope_theta=5e6, **_TIED
    ),
    "Qwen3-30B-A3B-Instruct-2507": _qwen3(
        (151936, 2048, 6144, 48, 32, 4), experts=768, positions=262144, rope_theta=1e7
    ),
    "Qwen3-235B-A22B-Instruct-2507": _qwen3(
        (151936, 4096, 12288, 94, 64, 4), experts=1536, positions=262144, rope_theta=5e6
    ),
    "Qwen3-Coder-30B-A3B-Instruct": _qwen3(
        (151936, 2048, 6144, 48, 32, 4), experts=768, positions=262144, rope_theta=1e7
    ),
    "Qwen3-Coder-480B-A35B-Instruct": _qwen3(
        (151936, 6144, 8192, 62, 96, 8),
        experts=2560,
        num_experts=160,
        positions=262144,
        rope_theta=1e7,
    ),
    "Qwen1.5-MoE-A2.7B": shape("qwen2_moe", (151936, 2048, 5632, 24, 16, 16), 8192, rope_theta=1e6),
    "gemma-2b": shape("gemma", (256000, 2048, 16384, 18, 8, 1), 8192, head_dim=256),
    "gemma-7b": shape("gemma", (256000, 3072, 24576, 28, 16, 16), 8192, head_dim=256),
    "gemma-2-2b": _gemma2((256000, 2304, 9216, 26, 8, 4), 256, 256),
    "gemma-2-9b": _gemma2((256000, 3584, 14336, 42, 16, 8), 256, 256),
    "gemma-2-27b": _gemma2((256000, 4608, 36864, 46, 32, 16), 128, 144),
    "gemma-3-270m": shape(
        "gemma3_text", (262144, 640, 2048, 18, 4, 1), 32768, head_dim=256, sliding_window=512
    ),
    "gemma-3-1b-pt": shape(
        "gemma3_text", (262144, 1152, 6912, 26, 4, 1), 32768, head_dim=256, sliding_window=512
    ),
    "Phi-3-mini-4k-instruct": shape(
        "phi3", (32064, 3072, 8192, 32, 32, 32), 4096, sliding_window=2047
    ),
    "Phi-3-medium-4k-instruct": shape(
        "phi3", (32064, 5120, 17920, 40, 40, 10), 4096, sliding_window=2047
    ),
    "phi-4": shape(
        "phi3", (100352, 5120, 17920, 40, 40, 10), 16384, rope_theta=2.5e5, sliding_window=None
    ),
    "OLMo-2-0425-1B": _olmo2((100352, 2048, 8192, 16, 16, 16)),
    "OLMo-2-1124-7B": _olmo2((100352, 4096, 11008, 32, 32, 32)),
    "OLMo-2-1124-13B": _olmo2((100352, 5120, 13824, 40, 40, 40)),
    "OLMo-2-0325-32B": _olmo2((100352, 5120, 27648, 64, 40, 8)),
    "Olmo-3-1025-7B": shape(
        "olmo3", (100278, 4096, 11008, 32, 32, 32), 65536, rms_norm_eps=1e-6, sliding_window=4096
    ),
    "granite-3.3-2b-instruct": _granite((49159, 2048, 8192, 40, 32, 8), 8.0, 1 / 64),
    "granite-3.3-8b-instruct": _granite((49159, 4096, 12800, 40, 32, 8), 16.0, 1 / 128),
    "starcoder2-3b": _starcoder2((49152, 3072, 12288, 30, 24, 2), 999999.4420358813),
    "starcoder2-7b": _starcoder2((49152, 4608, 18432, 32, 36, 4), 1e6),
    "starcoder2-15b": _starcoder2((49152, 6144, 24576, 40, 48, 4), 1e5, tie_word_embeddings=False),
    "stablelm-2-1_6b": shape("stablelm", (100352, 2048, 5632, 24, 32, 32), 4096, use_qkv_bias=True),
    "stablelm-3b-4e1t": shape("stablelm", (50304, 2560, 6912, 32, 32, 32), 4096),
    "c4ai-command-r-v01": shape(
        "cohere", (256000, 8192, 22528, 40, 64, 64), 131072, rope_theta=8e6
    ),
    "c4ai-command-r-plus": shape(
        "cohere",
        (256000, 12288, 33792, 64, 96, 8),
        131072,
        rope_theta=7.5e7,
        logit_scale=0.8333333333333334,
        use_qk_norm=True,
    ),
    "aya-expanse-8b": shape("cohere", (256000, 4096, 14336, 32, 32, 8), 8192, logit_scale=0.125),
    "c4ai-command-r7b-12-2024": shape(
        "cohere2", (256000, 4096, 14336, 32, 32, 8), 132096, rope_theta=5e4, logit_scale=0.25
    ),
    "glm-4-9b-chat-hf": shape(
        "glm", (151552, 4096, 13696, 40, 32, 2), 131072, head_dim=128, attention_bias=True
    ),
    "GLM-4-9B-0414": shape(
        "glm4",
        (151552, 4096, 13696, 40, 32, 2),
        32768,
        head_dim=128,
        attention_bias=True,
        rms_norm_eps=1e-5,
    ),
    "GLM-4-32B-0414": shape(
        "glm4",
        (151552, 6144, 23040, 61, 48, 2),
        32768,
        head_dim=128,
        attention_bias=False,
        rms_norm_eps=1e-5,
    ),
    "GLM-4.5": shape(
        "glm4_moe",
        (151552, 5120, 12288, 92, 96, 8),
        131072,
        head_dim=128,
        rope_theta=1e6,
        attention_bias=True,
        use_qk_norm=True,
        first_k_dense_replace=3,
        n_routed_experts=160,
        moe_intermediate_size=1536,
        routed_scaling_factor=2.5,
    ),
    "GLM-4.5-Air": shape(
        "glm4_moe",
        (151552, 4096, 10944, 46, 96, 8),
        131072,
        head_dim=128,
        rope_theta=1e6,
        attention_bias=True,
    ),
    "Seed-OSS-36B-Instruct": shape(
        "seed_oss", (155136, 5120, 27648, 64, 80, 8), 524288, head_dim=128, rope_theta=1e7
    ),
    "EXAONE-4.0-1.2B": shape(
        "exaone4",
        (102400, 2048, 4096, 30, 32, 8),
        65536,
        rope_theta=1e6,
        sliding_window=None,
        layer_types=["full_attention"] * 30,
        **_TIED,
    ),
    "EXAONE-4.0-32B": shape("exaone4", (102400, 5120, 27392, 64, 40, 8), 131072, rope_theta=1e6),
    "ERNIE-4.5-0.3B-PT": shape("ernie4_5", (103424, 1024, 3072, 18, 16, 2), 131072, head_dim=128),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "DeepSeek-V3": shape(
        "deepseek_v3",
        (129280, 7168, 18432, 61, 128, 128),
        163840,
        rope_scaling=_far(1.0),
    ),
    "DeepSeek-V2": shape(
        "deepseek_v2",
        (102400, 5120, 12288, 60, 128, 128),
        163840,
        first_k_dense_replace=1,
        n_routed_experts=160,
        moe_intermediate_size=1536,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
        rope_scaling=_far(0.707),
    ),
    "DeepSeek-V2-Lite": shape(
        "deepseek_v2",
        (102400, 2048, 10944, 27, 16, 16),
        163840,
        q_lora_rank=None,
        first_k_dense_replace=1,
        moe_intermediate_size=1408,
        num_experts_per_tok=6,
        rope_scaling=_far(0.707),
    ),
}

SAME: dict[str, str] = {
    "DeepSeek-V3-0324": "DeepSeek-V3",
    "DeepSeek-V3.1": "DeepSeek-V3",
    "DeepSeek-R1": "DeepSeek-V3",
    "DeepSeek-R1-0528": "DeepSeek-V3",
    "DeepSeek-Coder-V2-Lite": "DeepSeek-V2-Lite",
    "DeepSeek-V2.5": "DeepSeek-V2",
}
"""Other names of a shape."""
