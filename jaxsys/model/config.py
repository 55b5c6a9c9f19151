"""What a decoder is, in numbers: one frozen description that every family of models fills in.

`DecoderConfig` says what differs between published decoders: sizes, kinds of layers (windows,
positions, experts), norms and where they stand, biases, activations, multipliers, caps. Its
defaults are Llama's. `jaxsys.model.families` reads and writes it as a Hugging Face `config.json`;
`jaxsys.model.leaves` says which arrays it needs, `jaxsys.model.block` computes it.

Legend: V vocabulary, D model width, F feed-forward width, L layers, N query heads, G key/value
heads, K head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxsys.errors import UsageError
from jaxsys.model import hf_config, leaves
from jaxsys.model.kinds import (
    Activation,
    BlockKind,
    Experts,
    Latent,
    check_choice,
    check_size,
)
from jaxsys.model.rope import Rope, RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """One decoder; fields left out are as in Llama: RMSNorm, rotary, grouped queries, SwiGLU."""

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
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    """Epsilon of every norm."""
    tie_embeddings: bool = False
    max_positions: int = 2048
    family: str = "llama"
    """The `model_type` whose files it is read from and written as."""

    kinds: tuple[BlockKind, ...] = (BlockKind(),)
    """The kinds of layers there are."""
    pattern: tuple[str, ...] = ()
    """The kind's name of each layer; empty where all are alike."""
    rotary_dim: int | None = None
    """Channels of a head that turn, its first; all if None."""
    rope_interleaved: bool = False
    """Pairs of neighbours turn, instead of the two halves."""

    norm: Literal["rms", "layer"] = "rms"
    norm_plus_one: bool = False
    """Whether scales are kept less one."""
    norm_bias: bool = False
    norm_places: Literal["before", "after", "both"] = "before"
    """Where attention and feed-forward have their norms, on what goes in or what comes out."""
    parallel: bool = False
    """Attention and feed-forward read the same normalised input and are added together."""
    qk_norm: Literal["head", "each", "all"] | None = None
    """Norms of queries and keys: a head at a time with one scale for all, with scales for each, or
    over all heads together."""
    qk_norm_after_rope: bool = False

    qkv_bias: bool = False
    """Of queries, keys and values; in latent attention, of what squeezes them."""
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    """Down(act(Gate x) * Up x) rather than Down(act(Up x))."""
    activation: Activation = "silu"

    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Of what attention and feed-forward add."""
    attention_scale: float | None = None
    """Of the scores; 1 / sqrt(K) if None."""
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    """c: scores become c tanh(scores / c)."""
    logit_softcap: float | None = None
    sinks: bool = False
    """Whether each head has a learned score that takes part in the softmax and adds nothing."""

    experts: Experts | None = None
    latent: Latent | None = None

    in_training: tuple[tuple[str, float], ...] = ()
    """Keys of a config.json that change training alone, and their values: dropout and such. None
    of it is applied here, which `layered` says; files keep it."""

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
            check_size(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        turned = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if turned % 2 and any(kind.rotary for kind in self.kinds):
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise UsageError(f"{name}={turned} must be even: rotary turns pairs")
        if not 0 < turned <= self.head_dim:
            raise UsageError(f"rotary_dim={turned} must be from 2 to head_dim={self.head_dim}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)!r} must be above 0")
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name}={value!r} must be above 0")
        check_choice("activation", self.activation, Activation)
        self._check_kinds()

    def _check_kinds(self) -> None:
        names = [kind.name for kind in self.kinds]
        if not names or len(set(names)) < len(names):
            raise UsageError(f"kinds of layers {names} must be at least one, each named once")
        if self.pattern:
            if len(self.pattern) != self.num_layers:
                raise UsageError(
                    f"the pattern names {len(self.pattern)} layers, num_layers={self.num_layers}"
                )
            if set(self.pattern) != set(names):
                raise UsageError(
                    f"the pattern names kinds {sorted(set(self.pattern))}, there are {names}"
                )
        elif len(names) > 1:
            raise UsageError(f"kinds of layers {names} need a pattern that says which is where")
        for kind in self.kinds:
            if kind.window is not None:
                check_size(f"window of {kind.name} layers", kind.window)
            if kind.experts and self.experts is None:
                raise UsageError(f"{kind.name} layers have experts, which are not described")
            self.rope(kind)

    def kind(self, layer: int) -> BlockKind:
        """The kind of layer number `layer`."""
        if not self.pattern:
            return self.kinds[0]
        return next(kind for kind in self.kinds if kind.name == self.pattern[layer])

    def layers_of(self, kind: BlockKind) -> tuple[int, ...]:
        """The numbers of the layers of one kind, in order."""
        if not self.pattern:
            return tuple(range(self.num_layers))
        return tuple(i for i, name in enumerate(self.pattern) if name == kind.name)

    def rope(self, kind: BlockKind | None = None) -> Rope | None:
        """How one kind of layer turns its heads (the first kind if none is given); None: not."""
        kind = kind or self.kinds[0]
        if not kind.rotary:
            return None
        own = kind.positions
        width = self.head_dim if self.rotary_dim is None else self.rotary_dim
        return Rope(
            theta=self.rope_theta if own is None else own.theta,
            scaling=self.rope_scaling if own is None else own.scaling,
            width=width if self.latent is None else self.latent.rotary_dim,
            interleaved=self.rope_interleaved,
        )

    def not_applied(self) -> str | None:
        """What its files ask of training that is not done here, in a sentence; None: nothing."""
        if not self.in_training:
            return None
        asked = ", ".join(f"{name}={value:g}" for name, value in self.in_training)
        return f"the model's configuration asks for {asked} in training, which is done without"

    def block_parameter_count(self, kind: BlockKind | None = None) -> int:
        """Parameters of one block of a kind; of the first kind if none is given."""
        return sum(leaf.size for leaf in leaves.block_leaves(self, kind or self.kinds[0]))

    def edge_parameter_count(self) -> int:
        """Parameters outside the blocks: embedding, final norm, and the head unless tied."""
        return sum(leaf.size for leaf in leaves.edge_leaves(self))

    def head_parameter_count(self) -> int:
        """Those of them that head and final norm read: all where the head is tied."""
        own = [leaf for leaf in leaves.edge_leaves(self) if leaf.path[0] != "embed"]
        return self.edge_parameter_count() if self.tie_embeddings else sum(x.size for x in own)

    def parameter_count(self) -> int:
        """All parameters; a tied head counts once."""
        blocks = sum(
            len(self.layers_of(kind)) * self.block_parameter_count(kind) for kind in self.kinds
        )
        return blocks + self.edge_parameter_count()

    def active_block_parameter_count(self, kind: BlockKind | None = None) -> float:
        """Parameters of one block that a token uses: its share of the experts."""
        found = leaves.block_leaves(self, kind or self.kinds[0])
        return sum(leaf.size * leaf.active for leaf in found)

    def active_parameter_count(self) -> float:
        """All parameters that a token uses; the embedding counts whole."""
        blocks = sum(
            len(self.layers_of(kind)) * self.active_block_parameter_count(kind)
            for kind in self.kinds
        )
        return blocks + self.edge_parameter_count()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the contents of a `config.json`.

        Raises:
            UsageError: if the family is unknown, a key is missing, or a feature is asked for that
                is not computed.
        """
        return cls(**hf_config.read(config))

    def to_hf(self) -> dict[str, Any]:
        """The keys of a `config.json` that transformers reads.

        Raises:
            UsageError: if the family's files cannot say what this decoder is.
        """
        written = hf_config.write(self)
        again = DecoderConfig.from_hf(written)
        for name in self.__slots__:
            if getattr(again, name) != getattr(self, name):
                raise UsageError(
                    f"family {self.family!r} has no config.json for {name}="
                    f"{getattr(self, name)!r}; it would be read as {getattr(again, name)!r}"
                )
        return written
