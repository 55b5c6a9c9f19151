"""One table of model shapes: what `--model NAME` means where no folder is given.

Names are those of the Hugging Face Hub (`jaxsys.model.published`), and a few of our own. Case, an
owner in front, and words that say what a model was tuned to or how its numbers are kept do not
matter. Everywhere what lies here by a name is meant before the preset of that name; a path, such as
./NAME, is never a preset.
"""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxsys.errors import FileError, UsageError, did_you_mean
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
_SIZE = re.compile(r"[a-z]?(\d+x)?\d+(\.\d+)?[bmt]")
"""A word of a name that says how large a model is: 8B, 0.6B, 8x7B, A3B, 135M."""
_ALMOST = 0.75
"""How like a word of `_KEPT` or `_TUNED` one is that was meant to be it."""


def find_preset(name: str) -> str | None:
    """The name in `PRESETS` that is meant, or None; a path means none."""
    if _is_path(name):
        return None
    known = {one: one for one in PRESETS} | SAME
    wanted = name.rpartition("/")[2].removeprefix("Meta-").removeprefix("meta-")
    # A name as it stands wins: a few models have another vocabulary once they are tuned.
    for dropped in (frozenset(), _KEPT, _KEPT | _TUNED):
        stem = _without(wanted, dropped)
        for one, meant in known.items():
            if stem and stem in (one.casefold(), _without(one, dropped)):
                return meant
    return None


def _is_path(name: str) -> bool:
    """Whether it can only be a path: the Hub's names have an owner in front at most."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def lies_here(name: str) -> bool:
    """Whether a name means what lies here by it. That of a preset does where it is a model: a .gguf
    file, or a folder with a config.json or weights; a run's folder may be called as its model is.
    """
    path = Path(name)
    if find_preset(name) is None:
        return path.exists()
    if path.is_dir():
        found = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf", "*.bin")
        return any(any(path.glob(pattern)) for pattern in found)
    return path.exists() and path.suffix == ".gguf"


def preset_beside(name: str) -> str | None:
    """What to say where a plain name is that of a preset, and something else lies here by it."""
    found = find_preset(name)
    if found is None or Path(name).name != name or not lies_here(name):
        return None
    return f"{name} is ./{name}, which lies here; the preset is --model preset/{found}"


@contextmanager
def telling_preset(name: str) -> Iterator[None]:
    """Says in a refusal of what lies here that a preset may have been meant."""
    try:
        yield
    except UsageError as error:
        beside = preset_beside(name)
        if beside is None:
            raise
        kind = FileError if isinstance(error, FileError) else UsageError
        raise kind(f"{error}; {beside}") from error


def path_of(name: str) -> str:
    """What lies here by a name, spelt as a path, which is no preset's name anywhere."""
    return name if _is_path(name) else f"./{name}"


def _near(name: str) -> str:
    """Known names that are near one that is none, of the sizes that it has if any is, or nothing.

    What a model was tuned to changes no shape, and its size does: Qwen3-8B-Instrct is Qwen3-8B,
    though more letters are those of Qwen3-4B-Instruct-2507.
    """
    words = name.rpartition("/")[2].casefold().replace("_", "-").split("-")[:20]
    dropped = _KEPT | _TUNED
    words = [w for w in words if not difflib.get_close_matches(w, dropped, 1, _ALMOST)]
    stem, sizes = "-".join(words), {word for word in words if _SIZE.fullmatch(word)}
    meant = find_preset(stem)
    if meant is not None:
        return f"did you mean {meant!r}?"
    alike = {one: len(sizes.intersection(one.casefold().split("-"))) for one in PRESETS}
    most = max(alike.values())
    sized = [one for one in PRESETS if alike[one] == most]
    family = stem[:4]
    near = did_you_mean(stem, sized)
    if not near and not any(one.casefold().startswith(family) for one in sized):
        near = did_you_mean(stem, PRESETS)
    return near.strip(" ()")


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
    near = _near(name)
    if near:
        way_out = near
    elif Path(name).name != name:
        way_out = "give the folder of a model, its .gguf file, or the name of a preset"
    else:
        way_out = f"presets: {', '.join(PRESETS)}"
    raise UsageError(f"model {name!r}: there is no such folder, file or preset; {way_out}")
