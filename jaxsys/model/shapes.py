"""One table of model shapes: what `--model NAME` means where no folder is given.

Names are those of the Hugging Face Hub without the owner; case and an owner in front do not matter.
Sizes are as published in each model's config.json there.
"""

from pathlib import Path
from typing import Any

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.model.config import DecoderConfig

BYTE_VOCABULARY = 264
"""256 byte values, then 8 special tokens; `jaxsys.model.ByteTokenizer` names them."""

Sizes = tuple[int, int, int, int, int, int]
"""V, D, F, L, N, G."""


def _shape(family: str, sizes: Sizes, positions: int, **keys: Any) -> DecoderConfig:
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


def _llama(sizes: Sizes, positions: int, theta: float, **keys: Any) -> DecoderConfig:
    return _shape("llama", sizes, positions, rope_theta=theta, rms_norm_eps=1e-5, **keys)


def _stretched(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _qwen2(sizes: Sizes, positions: int, **keys: Any) -> DecoderConfig:
    return _shape("qwen2", sizes, positions, rope_theta=1e6, **keys)


def _qwen3(sizes: Sizes, *, experts: int | None = None, **keys: Any) -> DecoderConfig:
    family = "qwen3"
    if experts is not None:
        family = "qwen3_moe"
        keys |= {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": experts,
            "norm_topk_prob": True,
        }
    return _shape(family, sizes, 40960, rope_theta=1e6, head_dim=128, **keys)


def _gemma2(sizes: Sizes, width: int, scalar: int) -> DecoderConfig:
    return _shape("gemma2", sizes, 8192, head_dim=width, query_pre_attn_scalar=scalar)


def _gpt_oss(layers: int, experts: int) -> DecoderConfig:
    sizes = (201088, 2880, 2880, layers, 64, 8)
    return _shape("gpt_oss", sizes, 131072, head_dim=64, num_local_experts=experts)


def _experts_bench(sizes: Sizes, count: int, active: int, inner: int) -> DecoderConfig:
    return _shape(
        "qwen3_moe",
        sizes,
        131072,
        head_dim=128 if sizes[1] > 64 else 16,
        rope_theta=1e6,
        num_experts=count,
        num_experts_per_tok=active,
        moe_intermediate_size=inner,
        norm_topk_prob=True,
    )


def _bytes(width: int, inner: int, layers: int, heads: int, shared: int) -> DecoderConfig:
    sizes = (BYTE_VOCABULARY, width, inner, layers, heads, shared)
    return _llama(sizes, 2048, 1e4, tie_word_embeddings=True)


_TIED = {"tie_word_embeddings": True}
_LONG_LLAMA = {"rope_scaling": _stretched(8.0)}

PRESETS: dict[str, DecoderConfig] = {
    "Llama-2-7b": _llama((32000, 4096, 11008, 32, 32, 32), 4096, 1e4),
    "Llama-2-13b": _llama((32000, 5120, 13824, 40, 40, 40), 4096, 1e4),
    "Llama-2-70b": _llama((32000, 8192, 28672, 80, 64, 8), 4096, 1e4),
    "Llama-3-8B": _llama((128256, 4096, 14336, 32, 32, 8), 8192, 5e5),
    "Llama-3-70B": _llama((128256, 8192, 28672, 80, 64, 8), 8192, 5e5),
    "Llama-3.1-8B": _llama((128256, 4096, 14336, 32, 32, 8), 131072, 5e5, **_LONG_LLAMA),
    "Llama-3.1-70B": _llama((128256, 8192, 28672, 80, 64, 8), 131072, 5e5, **_LONG_LLAMA),
    "Llama-3.1-405B": _llama((128256, 16384, 53248, 126, 128, 8), 131072, 5e5, **_LONG_LLAMA),
    "Llama-3.2-1B": _llama(
        (128256, 2048, 8192, 16, 32, 8),
        131072,
        5e5,
        rope_scaling=_stretched(32.0),
        head_dim=64,
        **_TIED,
    ),
    "Llama-3.2-3B": _llama(
        (128256, 3072, 8192, 28, 24, 8),
        131072,
        5e5,
        rope_scaling=_stretched(32.0),
        head_dim=128,
        **_TIED,
    ),
    "Llama-3.3-70B": _llama((128256, 8192, 28672, 80, 64, 8), 131072, 5e5, **_LONG_LLAMA),
    "SmolLM2-135M": _llama((49152, 576, 1536, 30, 9, 3), 8192, 1e5, **_TIED),
    "SmolLM2-360M": _llama((49152, 960, 2560, 32, 15, 5), 8192, 1e5, **_TIED),
    "SmolLM2-1.7B": _llama((49152, 2048, 8192, 24, 32, 32), 8192, 1.3e5, **_TIED),
    "SmolLM3-3B": _shape(
        "smollm3", (128256, 2048, 11008, 36, 16, 4), 65536, rope_theta=5e6, **_TIED
    ),
    "Mistral-7B-v0.1": _shape(
        "mistral", (32000, 4096, 14336, 32, 32, 8), 32768, sliding_window=4096, rms_norm_eps=1e-5
    ),
    "Mistral-7B-v0.3": _shape(
        "mistral",
        (32768, 4096, 14336, 32, 32, 8),
        32768,
        sliding_window=None,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
    ),
    "Mixtral-8x7B-v0.1": _shape("mixtral", (32000, 4096, 14336, 32, 32, 8), 32768, rope_theta=1e6),
    "Mixtral-8x22B-v0.1": _shape("mixtral", (32000, 6144, 16384, 56, 48, 8), 65536, rope_theta=1e6),
    "Qwen2.5-0.5B": _qwen2((151936, 896, 4864, 24, 14, 2), 32768, **_TIED),
    "Qwen2.5-1.5B": _qwen2((151936, 1536, 8960, 28, 12, 2), 131072, **_TIED),
    "Qwen2.5-3B": _qwen2((151936, 2048, 11008, 36, 16, 2), 32768, **_TIED),
    "Qwen2.5-7B": _qwen2((152064, 3584, 18944, 28, 28, 4), 131072),
    "Qwen2.5-14B": _qwen2((152064, 5120, 13824, 48, 40, 8), 131072, rms_norm_eps=1e-5),
    "Qwen2.5-32B": _qwen2((152064, 5120, 27648, 64, 40, 8), 131072, rms_norm_eps=1e-5),
    "Qwen2.5-72B": _qwen2((152064, 8192, 29568, 80, 64, 8), 131072, rms_norm_eps=1e-5),
    "Qwen3-0.6B": _qwen3((151936, 1024, 3072, 28, 16, 8), **_TIED),
    "Qwen3-1.7B": _qwen3((151936, 2048, 6144, 28, 16, 8), **_TIED),
    "Qwen3-4B": _qwen3((151936, 2560, 9728, 36, 32, 8), **_TIED),
    "Qwen3-8B": _qwen3((151936, 4096, 12288, 36, 32, 8)),
    "Qwen3-14B": _qwen3((151936, 5120, 17408, 40, 40, 8)),
    "Qwen3-32B": _qwen3((151936, 5120, 25600, 64, 64, 8)),
    "Qwen3-30B-A3B": _qwen3((151936, 2048, 6144, 48, 32, 4), experts=768),
    "Qwen3-235B-A22B": _qwen3((151936, 4096, 12288, 94, 64, 4), experts=1536),
    "gemma-2-2b": _gemma2((256000, 2304, 9216, 26, 8, 4), 256, 256),
    "gemma-2-9b": _gemma2((256000, 3584, 14336, 42, 16, 8), 256, 256),
    "gemma-2-27b": _gemma2((256000, 4608, 36864, 46, 32, 16), 128, 144),
    "gemma-3-1b-pt": _shape(
        "gemma3_text", (262144, 1152, 6912, 26, 4, 1), 32768, head_dim=256, sliding_window=512
    ),
    "Phi-3-mini-4k-instruct": _shape(
        "phi3", (32064, 3072, 8192, 32, 32, 32), 4096, sliding_window=2047
    ),
    "phi-4": _shape(
        "phi3", (100352, 5120, 17920, 40, 40, 10), 16384, rope_theta=2.5e5, sliding_window=None
    ),
    "OLMo-2-1124-7B": _shape(
        "olmo2", (100352, 4096, 11008, 32, 32, 32), 4096, rope_theta=5e5, rms_norm_eps=1e-6
    ),
    "GLM-4.5-Air": _shape(
        "glm4_moe",
        (151552, 4096, 10944, 46, 96, 8),
        131072,
        head_dim=128,
        rope_theta=1e6,
        attention_bias=True,
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "DeepSeek-V3": _shape(
        "deepseek_v3",
        (129280, 7168, 18432, 61, 128, 128),
        163840,
        rope_scaling={
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "DeepSeek-V2-Lite": _shape(
        "deepseek_v2",
        (102400, 2048, 10944, 27, 16, 16),
        163840,
        q_lora_rank=None,
        first_k_dense_replace=1,
        moe_intermediate_size=1408,
        num_experts_per_tok=6,
        rope_scaling={
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    ),
    "byte-llama": _bytes(128, 384, 8, 4, 2),
    "byte-llama-75m": _bytes(768, 2048, 12, 12, 4),
    # A router and eight experts, two a token: what to try --expert with.
    "byte-moe": _shape(
        "qwen3_moe",
        (BYTE_VOCABULARY, 128, 384, 8, 4, 2),
        2048,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
    "tiny": _llama((BYTE_VOCABULARY, 32, 64, 4, 4, 2), 256, 1e4),
    # Of the training benchmarks: the shape of WeiPipe's tables; light compute, so that a slow
    # network of hosts on one machine is what a step waits for; and one to try a script with.
    "bench-1b": _llama((32000, 2048, 5632, 16, 16, 16), 131072, 1e4),
    "bench-network": _llama((256, 64, 171, 8, 4, 4), 131072, 1e4),
    "bench-tiny": _llama((256, 64, 192, 4, 4, 4), 131072, 1e4),
    # Experts: 3 billion parameters of which a token uses 0.48, as Qwen3-MoE lays them out;
    # the dense decoder of as many active parameters; and small ones.
    "bench-moe-3b": _experts_bench((32000, 2048, 768, 12, 16, 4), 48, 4, 768),
    "bench-moe-3b-dense": _shape(
        "qwen3", (32000, 2048, 3072, 12, 16, 4), 131072, head_dim=128, rope_theta=1e6
    ),
    "bench-tiny-moe": _experts_bench((256, 64, 32, 4, 4, 4), 8, 2, 32),
    "bench-tiny-gpt-oss": _shape(
        "gpt_oss",
        (256, 64, 64, 4, 4, 2),
        131072,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=16,
    ),
}

_ALIASES = {"meta-llama-3-": "llama-3-", "meta-llama-3.1-": "llama-3.1-"}


def find_preset(name: str) -> str | None:
    """The name in `PRESETS` that is meant, or None."""
    wanted = name.rpartition("/")[2].casefold()
    for old, new in _ALIASES.items():
        if wanted.startswith(old):
            wanted = new + wanted.removeprefix(old)
    found = {known.casefold(): known for known in PRESETS}
    # What a model was tuned to says nothing of its shape.
    for ending in ("", "-instruct", "-base", "-chat", "-hf", "-it", "-chat-hf"):
        stem = wanted.removesuffix(ending)
        if wanted.endswith(ending) and stem in found:
            return found[stem]
    return None


def preset(name: str) -> DecoderConfig:
    """The configuration of a named model.

    Raises:
        UsageError: if there is no such name; says which is near, and lists those there are.
    """
    found = find_preset(name)
    if found is not None:
        return PRESETS[found]
    near = did_you_mean(name.rpartition("/")[2], PRESETS).strip(" ()")
    if near:
        way_out = f"{near.removesuffix('?')}? presets: {', '.join(PRESETS)}"
    elif Path(name).name != name:
        way_out = "give the folder of a model, its .gguf file, or the name of a preset"
    else:
        way_out = f"presets: {', '.join(PRESETS)}"
    raise UsageError(f"model {name!r}: there is no such folder, file or preset; {way_out}")
