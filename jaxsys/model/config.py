"""What a Llama-family decoder is, in numbers: sizes, rotary scaling, presets.

`DecoderConfig` reads and writes the keys of a Hugging Face `config.json`, of version 4
(`rope_theta` and `rope_scaling`) and 5 (`rope_parameters`). Members of the family whose
mathematics differ (sliding windows, biases, other activations) are refused, never computed wrongly.

Legend: V vocabulary, D model width, F feed-forward width, L layers, N query heads, G key/value
heads, K head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxsys.errors import UsageError

ARCHITECTURES: dict[str, str] = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""Known `model_type`s and the name that `architectures` gives each; their mathematics are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the long rotary wavelengths.

    Frequencies whose wavelength is below `original_max_positions / high_freq_factor` stay, those
    above `original_max_positions / low_freq_factor` are divided by `factor`, and those between are
    blended linearly in the inverse wavelength.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UsageError(f"rope scaling factor={self.factor} must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UsageError(
                f"rope scaling needs 0 < low_freq_factor={self.low_freq_factor} < "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.original_max_positions < 1:
            raise UsageError(
                f"rope scaling original_max_positions={self.original_max_positions} must be "
                "at least 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder: RMSNorm, rotary positions, grouped queries, SwiGLU."""

    vocab_size: int
    """V."""
    hidden_size: int
    """D."""
    intermediate_size: int
    """F."""
    num_layers: int
    """L."""
    num_heads: int
    """N."""
    num_kv_heads: int
    """G; divides N."""
    head_dim: int
    """K; N * K need not equal D."""
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_positions: int = 2048

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}={value!r} must be a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"head_dim={self.head_dim} must be even: rotary turns pairs")
        for name in ("rope_theta", "rms_norm_eps"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)!r} must be above 0")

    def block_parameter_count(self) -> int:
        """Parameters of one block: attention D*K*(2N + 2G), SwiGLU 3*D*F, two norms."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    def edge_parameter_count(self) -> int:
        """Parameters outside the blocks: embedding, final norm, and the head unless tied."""
        tables = 1 if self.tie_embeddings else 2
        return tables * self.vocab_size * self.hidden_size + self.hidden_size

    def parameter_count(self) -> int:
        """All parameters; a tied head counts once."""
        return self.num_layers * self.block_parameter_count() + self.edge_parameter_count()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the contents of a `config.json`.

        Raises:
            UsageError: if the architecture is unknown, a key is missing, or a feature is asked for
                that this model does not compute.
        """
        try:
            return _from_hf(config)
        except UsageError:
            raise
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UsageError(f"a value is of the wrong kind ({error})") from error

    def to_hf(self) -> dict[str, Any]:
        """The keys of a `config.json` that transformers 4 and 5 both read."""
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.rope_scaling is not None:
            rope |= {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_positions,
            }
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else scaling,
            "rope_parameters": rope,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
        }


def _from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    _check_family(config)
    missing = [
        key
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        if config.get(key) is None
    ]
    if missing:
        raise UsageError(f"the configuration lacks {', '.join(missing)}")
    heads = config["num_attention_heads"]
    theta, scaling = _read_rope(config)
    # Absent keys mean the defaults of transformers' LlamaConfig.
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=config.get("max_position_embeddings", 2048),
    )


def _check_family(config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    named = (config.get("architectures") or [None])[0]
    if kind not in ARCHITECTURES or (named and named not in ARCHITECTURES.values()):
        known = ", ".join(f"{name} ({kind})" for kind, name in ARCHITECTURES.items())
        raise UsageError(
            f"architecture {named or kind!r} (model_type {kind!r}) is not known; known: {known}"
        )
    positions = config.get("max_position_embeddings", 2048)
    window = config.get("sliding_window")
    # A window as long as the context never cuts anything off.
    if window is not None and config.get("use_sliding_window", True) and window < positions:
        raise UsageError(
            f"sliding_window={window} is below max_position_embeddings={positions}; only full "
            "causal attention is computed: set sliding_window to null or use another model"
        )
    for key, wanted in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
        ("partial_rotary_factor", 1.0),
        ("quantization_config", None),
    ):
        value = config.get(key, wanted)
        if value != wanted and value is not None:
            raise UsageError(f"{key}={value!r} is not supported; only {wanted!r} is computed")


def _read_rope(config: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported; whole heads "
            "are turned"
        )
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UsageError(f"rope_type={kind!r} is not supported; use 'default' or 'llama3'")
    try:
        return theta, Llama3RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise UsageError(f"rope scaling of type llama3 lacks {error.args[0]}") from None


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
