"""One table of model shapes: what `--model NAME` means where no folder is given.

Names are those of the Hugging Face Hub (`jaxsys.model.published`), and a few of our own. Case, an
owner in front, and words that say what a model was tuned to or how its numbers are kept do not
matter.
"""

from pathlib import Path

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.model.config import DecoderConfig
from jaxsys.model.published import PUBLISHED, SAME, Sizes, llama, shape

BYTE_VOCABULARY = 264
"""256 byte values, then 8 special tokens; `jaxsys.model.ByteTokenizer` names them."""


def _experts_bench(sizes: Sizes, count: int, active: int, inner: int) -> DecoderConfig:
    return shape(
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
    return llama(sizes, 2048, 1e4, tie_word_embeddings=True)


PRESETS: dict[str, DecoderConfig] = {
    **PUBLISHED,
    "byte-llama": _bytes(128, 384, 8, 4, 2),
    "byte-llama-75m": _bytes(768, 2048, 12, 12, 4),
    # A router and eight experts, two a token: what to try --expert with.
    "byte-moe": shape(
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
    "tiny": llama((BYTE_VOCABULARY, 32, 64, 4, 4, 2), 256, 1e4),
    # Of the training benchmarks: the shape of WeiPipe's tables; few and narrow layers, whose
    # activations outweigh them at long contexts; light compute, so that a slow network of hosts
    # on one machine is what a step waits for; and one to try a script with.
    "bench-1b": llama((32000, 2048, 5632, 16, 16, 16), 131072, 1e4),
    "bench-narrow": llama((32000, 1024, 2816, 4, 8, 8), 131072, 1e4),
    "bench-network": llama((256, 64, 171, 8, 4, 4), 131072, 1e4),
    "bench-tiny": llama((256, 64, 192, 4, 4, 4), 131072, 1e4),
    # Experts: 3 billion parameters of which a token uses 0.48, as Qwen3-MoE lays them out;
    # the dense decoder of as many active parameters; and small ones.
    "bench-moe-3b": _experts_bench((32000, 2048, 768, 12, 16, 4), 48, 4, 768),
    "bench-moe-3b-dense": shape(
        "qwen3", (32000, 2048, 3072, 12, 16, 4), 131072, head_dim=128, rope_theta=1e6
    ),
    "bench-tiny-moe": _experts_bench((256, 64, 32, 4, 4, 4), 8, 2, 32),
    "bench-tiny-gpt-oss": shape(
        "gpt_oss",
        (256, 64, 64, 4, 4, 2),
        131072,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=16,
    ),
}

_KEPT = frozenset(
    ("fp8", "bf16", "awq", "gptq", "gguf", "mlx", "bnb", "int4", "int8", "4bit", "8bit", "dynamic")
    + ("block", "unsloth", "quantized.w4a16", "quantized.w8a8", "quantized.w8a16")
)
"""Words of a name that say how numbers are kept."""
_TUNED = frozenset(("instruct", "base", "chat", "thinking", "hf", "it", "pt"))
"""Words of a name that say what a model was tuned to, or whose files they are."""


def find_preset(name: str) -> str | None:
    """The name in `PRESETS` that is meant, or None."""
    known = {one: one for one in PRESETS} | SAME
    wanted = name.rpartition("/")[2].removeprefix("Meta-").removeprefix("meta-")
    # A name as it stands wins: a few models have another vocabulary once they are tuned.
    for dropped in (frozenset(), _KEPT, _KEPT | _TUNED):
        stem = _without(wanted, dropped)
        for one, meant in known.items():
            if stem and stem in (one.casefold(), _without(one, dropped)):
                return meant
    return None


def _without(name: str, dropped: frozenset[str]) -> str:
    words = name.casefold().replace("_", "-").split("-")
    return "-".join(word for word in words if word not in dropped)


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
        way_out = near
    elif Path(name).name != name:
        way_out = "give the folder of a model, its .gguf file, or the name of a preset"
    else:
        way_out = f"presets: {', '.join(PRESETS)}"
    raise UsageError(f"model {name!r}: there is no such folder, file or preset; {way_out}")
