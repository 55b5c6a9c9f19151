"""One table of model shapes: what `--model NAME` means where no folder is given."""

from jaxsys.errors import UsageError
from jaxsys.model.config import DecoderConfig
from jaxsys.model.rope import Llama3RopeScaling

BYTE_VOCABULARY = 264
"""256 byte values, then 8 special tokens; `jaxsys.model.ByteTokenizer` names them."""

# Sizes as published in each model's config.json on the Hugging Face Hub.
PRESETS: dict[str, DecoderConfig] = {
    "llama-3-8b": DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        max_positions=8192,
    ),
    "llama-3-70b": DecoderConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        max_positions=8192,
    ),
    "llama-3.2-1b": DecoderConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rope_theta=500000.0,
        rope_scaling=Llama3RopeScaling(
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        ),
        tie_embeddings=True,
        max_positions=131072,
    ),
    "llama-2-7b": DecoderConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_positions=4096,
    ),
    "smollm2-135m": DecoderConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        tie_embeddings=True,
        max_positions=8192,
    ),
    "byte-llama": DecoderConfig(
        vocab_size=BYTE_VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        tie_embeddings=True,
        max_positions=2048,
    ),
    "byte-llama-75m": DecoderConfig(
        vocab_size=BYTE_VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        tie_embeddings=True,
        max_positions=2048,
    ),
    "tiny": DecoderConfig(
        vocab_size=BYTE_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=256,
    ),
}


def preset(name: str) -> DecoderConfig:
    """The configuration of a named model.

    Raises:
        UsageError: if there is no such name; lists those there are.
    """
    if name not in PRESETS:
        raise UsageError(f"model {name!r} is not known; known: {', '.join(PRESETS)}")
    return PRESETS[name]
