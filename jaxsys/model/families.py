"""The families of published decoders: one entry each, in the terms of `DecoderConfig`.

An entry says how a family's `config.json` maps to fields (with that family's own values for absent
keys, those of its configuration class in transformers 5.24), what all its members have in common,
how its layers differ, and the names of its tensors where they are not Llama's. Keys that nothing
here or in `hf_config` understands are refused by name.

To add a family of known building blocks, add an entry with `register`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxsys.errors import UsageError
from jaxsys.files import shown
from jaxsys.model.key_rules import COUNT, NUMBER, POSITIVE, SIZE, WHOLE, Rule

Sizes = tuple[int, int, int, int, int, int | None, int | None, int]
"""Values for absent keys: V, D, F, L, N, G (None: N), K (None: D / N), positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a config.json and the fields it sets."""

    name: str
    fields: tuple[str, ...]
    """`experts.count` is the field `count` of `experts`."""
    default: Any
    """Where the key is absent."""
    read: Callable[[Any], Any] | None = None
    write: Callable[[Any], Any] | None = None
    also: tuple[str, ...] = ()
    """Other names for the same; the first present one counts."""
    rule: Rule | None = None
    """What it must be, checked before it is read."""
    null: bool = False
    """Whether it may be null all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Which layers have a window, by a family's configuration."""

    how: Literal["none", "all", "by_type"] = "none"
    """`none`: transformers reads no window; `all`: all layers where there is one; `by_type`:
    `layer_types` says."""
    default: int | None = None
    """Where `sliding_window` is absent."""
    switch: bool = False
    """Whether `use_sliding_window` must be true for there to be any."""
    types: Callable[[Mapping[str, Any], int], list[bool]] | None = None
    """(configuration, layers) -> which have a window, where `layer_types` is absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family's files say what a decoder is."""

    name: str
    """Its `model_type`."""
    architecture: str
    sizes: Sizes
    keys: tuple[Key, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that all its members have; a function is called with the fields read so far."""
    epsilon: tuple[str, float] = ("rms_norm_eps", 1e-6)
    """The key of the norms' epsilon, and its value where absent."""
    activation: tuple[str, str] = ("hidden_act", "silu")
    activations: Mapping[str, str] = field(default_factory=dict)
    """Names that mean another function here."""
    tied: bool = False
    """`tie_word_embeddings` where absent."""
    theta: float = 10000.0
    """`rope_theta` where absent."""
    partial: float | None = None
    """`partial_rotary_factor` where absent; None: the family has none."""
    scaling: Mapping[str, Any] | None = None
    """Rotary parameters where absent."""
    by_type: tuple[float, float] | None = None
    """Rotary parameters of window and full layers are apart; thetas where absent."""
    windows: Windows = Windows()
    plain_layers: Literal["none", "listed", "full", "full_if_window"] = "none"
    """Which layers have no positions: those a list names, or full ones (where there are windows).
    """
    dense_first: int | None = None
    """Layers before the first with experts, where `first_k_dense_replace` is absent."""
    dense_listed: bool = False
    """Whether `decoder_sparse_step` and `mlp_only_layers` say which layers are dense."""
    ignored: tuple[str, ...] = ()
    """Keys that transformers does not compute with in this family."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Keys that may only say what is computed anyway."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Names of modules that are not Llama's."""
    whole: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that are no module's weight or bias."""
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules that hold several matrices, one below the other."""
    woven: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors whose columns are two matrices' in turn."""
    in_training: Mapping[str, float] = field(default_factory=dict)
    """Values of keys that change training alone, where they are absent and that is not 0."""
    unread_layers: bool = False
    """Whether files hold layers past the last that predict further tokens; they are not read."""


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Adds a family; its files then load, train, plan and serve as those of any other.

    Raises:
        UsageError: if there is one of this name already.
    """
    if family.name in FAMILIES:
        raise UsageError(f"family {family.name!r} is registered already")
    FAMILIES[family.name] = family
    return family


def flag(name: str, value: Any) -> bool:
    """What a key that is true or false says; null is false.

    Raises:
        UsageError: if it is something else, such as the text "false".
    """
    if value not in (None, True, False) or isinstance(value, float):
        raise UsageError(f"{name}={value!r} is neither true nor false")
    return bool(value)


def _cap(name: str, field: str, default: float | None) -> Key:
    return Key(
        name=name,
        fields=(field,),
        default=default,
        rule=POSITIVE,
        null=True,
    )


def _bias(name: str, *fields: str, default: bool = False) -> Key:
    return Key(name=name, fields=fields, default=default, read=lambda value: flag(name, value))


def _norm_of_heads(name: str, form: str) -> Key:
    return Key(
        name=name,
        fields=("qk_norm",),
        default=False,
        read=lambda value: form if flag(name, value) else None,
        write=lambda value: value is not None,
    )


PATTERN = "sliding_window_pattern"


def _every(period: int, *, said: bool = False) -> Callable[[Mapping[str, Any], int], list[bool]]:
    """Windows in all but each `period`-th layer; where it is `said`, the file may say another."""

    def types(config: Mapping[str, Any], layers: int) -> list[bool]:
        size = config.get(PATTERN, period) if said else period
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(
                f"{PATTERN}={shown(size)} without layer_types is not understood; give layer_types"
            )
        return [(index + 1) % size != 0 for index in range(layers)]

    return types


def _max_window_layers(config: Mapping[str, Any]) -> int:
    return WHOLE.read("max_window_layers", config.get("max_window_layers", 28))


def _after_first(config: Mapping[str, Any], layers: int) -> list[bool]:
    first = _max_window_layers(config)
    return [index >= first for index in range(layers)]


def _alternate_first(config: Mapping[str, Any], layers: int) -> list[bool]:
    last = _max_window_layers(config)
    return [index % 2 == 0 and index < last for index in range(layers)]


ATTENTION_BIAS = _bias("attention_bias", "qkv_bias", "out_bias")
MLP_BIAS = _bias("mlp_bias", "mlp_bias")
GATE_UP = {"mlp.gate_up_proj": ("mlp/gate", "mlp/up")}
FOUR_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
QWEN_SIZES: Sizes = (151936, 4096, 22016, 32, 32, 32, None, 32768)
ROOT_WIDTH = {"embedding_scale": lambda fields: float(fields["hidden_size"] ** 0.5)}
QUERY_SCALAR = Key(
    name="query_pre_attn_scalar",
    fields=("attention_scale",),
    default=256,
    rule=POSITIVE,
    read=lambda value: value**-0.5,
    write=lambda value: _inverted(value, lambda guess: guess**-0.5, value**-2),
)
FINAL_CAP = _cap("final_logit_softcapping", "logit_softcap", None)


def _inverted(value: float, of: Callable[[float], float], guess: float) -> float:
    """The round number near `guess` whose function is exactly `value`, where there is one."""
    for candidate in (round(guess), guess):
        if candidate and of(candidate) == value:
            return candidate
    return guess


def _experts(
    count: Key, active: int, *, size: Key, renormalise: bool | None, **more: Any
) -> tuple[Key, ...]:
    keys = [
        count,
        size,
        Key(name="num_experts_per_tok", fields=("experts.active",), default=active, rule=SIZE),
        Key(
            name="router_aux_loss_coef",
            fields=("experts.balance",),
            default=more.get("balance", 0.001),
            rule=NUMBER,
        ),
    ]
    if renormalise is not None:
        keys.append(_bias("norm_topk_prob", "experts.renormalise", default=renormalise))
    return tuple(keys)


def _count(name: str, default: int, *, also: str) -> Key:
    return Key(name=name, fields=("experts.count",), default=default, also=(also,), rule=SIZE)


def _inner(name: str, default: int) -> Key:
    return Key(name=name, fields=("experts.intermediate_size",), default=default, rule=SIZE)


def _shared(default: int) -> Key:
    return Key(
        name="n_shared_experts",
        fields=("experts.shared_count",),
        default=default,
        rule=COUNT,
        null=True,
    )


LATENT = (
    Key(
        name="q_lora_rank",
        fields=("latent.query_rank",),
        default=1536,
        rule=SIZE,
        null=True,
    ),
    Key(name="kv_lora_rank", fields=("latent.rank",), default=512, rule=SIZE),
    Key(name="qk_nope_head_dim", fields=("latent.plain_dim",), default=128, rule=SIZE),
    Key(name="qk_rope_head_dim", fields=("latent.rotary_dim",), default=64, rule=SIZE),
    Key(name="v_head_dim", fields=("latent.value_dim",), default=128, rule=SIZE),
)
"""Of DeepSeek's attention."""
GROUPED_SIGMOID = {
    "experts.router": "sigmoid",
    "experts.correction": True,
}
"""DeepSeek-V3's router."""

# Dense families -----------------------------------------------------------------------------------

register(
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        sizes=(32000, 4096, 11008, 32, 32, None, None, 2048),
        keys=(ATTENTION_BIAS, MLP_BIAS),
        ignored=("sliding_window", "use_sliding_window", "rope_interleaved", "is_llama_config"),
    )
)
register(
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        sizes=(32000, 4096, 14336, 32, 32, 8, None, 131072),
        windows=Windows(how="all", default=4096),
    )
)
register(
    Family(
        name="ministral",
        architecture="MinistralForCausalLM",
        sizes=(32000, 4096, 14336, 32, 32, 8, None, 131072),
        windows=Windows(how="by_type", default=4096, types=lambda _, layers: [True] * layers),
    )
)
register(
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        sizes=QWEN_SIZES,
        fixed={"qkv_bias": True},
        windows=Windows(how="by_type", default=4096, switch=True, types=_after_first),
    )
)
register(
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        sizes=(151936, 4096, 22016, 32, 32, 32, 128, 32768),
        keys=(ATTENTION_BIAS,),
        fixed={"qk_norm": "head"},
        windows=Windows(how="by_type", default=4096, switch=True, types=_after_first),
    )
)
register(
    Family(
        name="seed_oss",
        architecture="SeedOssForCausalLM",
        sizes=(155136, 4096, 27648, 64, 80, 8, 128, 524288),
        in_training={"attention_dropout": 0.1, "residual_dropout": 0.1},
        keys=(
            _bias("attention_bias", "qkv_bias", default=True),
            _bias("attention_out_bias", "out_bias"),
            MLP_BIAS,
        ),
    )
)
register(
    Family(
        name="hunyuan_v1_dense",
        architecture="HunYuanDenseV1ForCausalLM",
        sizes=(290943, 4096, 11008, 32, 32, None, None, 2048),
        epsilon=("rms_norm_eps", 1e-5),
        keys=(ATTENTION_BIAS,),
        fixed={"qk_norm": "head", "qk_norm_after_rope": True},
        ignored=("use_qk_norm", "use_rotary_pos_emb", "norm_type", "org_vocab_size")
        + ("attention_head_dim", "cla_share_factor", "mask_init_id", "num_experts", "moe_topk")
        + ("class_num", "dense_list", "im_newline_id", "num_media_embeds", "pad_id", "pool_type")
        + ("text_end_id", "text_start_id"),
        modules={
            "attention/query_norm": "self_attn.query_layernorm",
            "attention/key_norm": "self_attn.key_layernorm",
        },
    )
)
register(
    Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        sizes=(128256, 2048, 11008, 36, 16, 4, None, 32768),
        keys=(ATTENTION_BIAS, MLP_BIAS),
        tied=True,
        theta=2_000_000.0,
        windows=Windows(
            how="by_type", switch=True, types=lambda config, layers: _windows_of_smollm3(config)
        ),
        plain_layers="listed",
    )
)
register(
    Family(
        name="helium",
        architecture="HeliumForCausalLM",
        sizes=(48000, 2560, 7040, 24, 20, 20, 128, 4096),
        epsilon=("rms_norm_eps", 1e-8),
        keys=(_bias("attention_bias", "qkv_bias"), MLP_BIAS),
        fixed={"rope_interleaved": True},
        theta=100_000.0,
    )
)
register(
    Family(
        name="ernie4_5",
        architecture="Ernie4_5ForCausalLM",
        sizes=(103424, 1024, 3072, 18, 16, 2, 128, 131072),
        epsilon=("rms_norm_eps", 1e-5),
        keys=(_bias("use_bias", "qkv_bias", "out_bias", "mlp_bias"),),
        fixed={"rope_interleaved": True},
        tied=True,
        theta=500_000.0,
        ignored=("compression_ratio",),
    )
)
register(
    Family(
        name="arcee",
        architecture="ArceeForCausalLM",
        sizes=(32000, 2560, 18432, 32, 32, None, None, 4096),
        epsilon=("rms_norm_eps", 1e-5),
        activation=("hidden_act", "relu2"),
        keys=(ATTENTION_BIAS, MLP_BIAS),
        fixed={"gated": False},
    )
)
register(
    Family(
        name="granite",
        architecture="GraniteForCausalLM",
        sizes=(32000, 4096, 11008, 32, 32, None, None, 2048),
        keys=(
            ATTENTION_BIAS,
            MLP_BIAS,
            Key(name="embedding_multiplier", fields=("embedding_scale",), default=1.0, rule=NUMBER),
            Key(name="residual_multiplier", fields=("residual_scale",), default=1.0, rule=NUMBER),
            Key(
                name="attention_multiplier", fields=("attention_scale",), default=1.0, rule=POSITIVE
            ),
            Key(
                name="logits_scaling",
                fields=("logit_scale",),
                default=1.0,
                rule=POSITIVE,
                read=lambda value: 1.0 / value,
                write=lambda value: _inverted(value, lambda guess: 1.0 / guess, 1.0 / value),
            ),
        ),
    )
)
register(
    Family(
        name="phi3",
        architecture="Phi3ForCausalLM",
        sizes=(32064, 3072, 8192, 32, 32, None, None, 4096),
        epsilon=("rms_norm_eps", 1e-5),
        partial=1.0,
        windows=Windows(how="all"),
        ignored=("full_attn_mod", "interpolate_factor", "original_max_position_embeddings"),
        joined={
            "self_attn.qkv_proj": ("attention/query", "attention/key", "attention/value"),
            **GATE_UP,
        },
    )
)
register(
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        sizes=(50304, 4096, 11008, 32, 32, None, None, 2048),
        epsilon=("rms_norm_eps", 1e-5),
        keys=(ATTENTION_BIAS,),
        fixed={"qk_norm": "all", "norm_places": "after"},
    )
)
register(
    Family(
        name="olmo3",
        architecture="Olmo3ForCausalLM",
        sizes=(50304, 4096, 11008, 32, 32, None, None, 2048),
        epsilon=("rms_norm_eps", 1e-5),
        keys=(ATTENTION_BIAS,),
        fixed={"qk_norm": "all", "norm_places": "after"},
        theta=500_000.0,
        by_type=(500_000.0, 500_000.0),
        windows=Windows(how="by_type", default=4096, types=_every(4)),
    )
)
register(
    Family(
        name="exaone4",
        architecture="Exaone4ForCausalLM",
        sizes=(102400, 4096, 16384, 32, 32, 32, None, 2048),
        epsilon=("rms_norm_eps", 1e-5),
        fixed={"qk_norm": "head", "norm_places": "after"},
        windows=Windows(how="by_type", default=4096, types=_every(4, said=True)),
        plain_layers="full_if_window",
        ignored=(PATTERN,),
    )
)
register(
    Family(
        name="gemma",
        architecture="GemmaForCausalLM",
        sizes=(256000, 3072, 24576, 28, 16, 16, 256, 8192),
        activation=("hidden_act", "gelu_pytorch_tanh"),
        activations={"gelu": "gelu_pytorch_tanh"},  # as the first files called it
        keys=(ATTENTION_BIAS,),
        fixed={"norm_plus_one": True, **ROOT_WIDTH},
        tied=True,
        ignored=("hidden_activation",),
    )
)
register(
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        sizes=(256000, 2304, 9216, 26, 8, 4, 256, 8192),
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        keys=(
            ATTENTION_BIAS,
            QUERY_SCALAR,
            _cap("attn_logit_softcapping", "attention_softcap", 50.0),
            _cap("final_logit_softcapping", "logit_softcap", 30.0),
        ),
        fixed={"norm_plus_one": True, "norm_places": "both", **ROOT_WIDTH},
        tied=True,
        windows=Windows(how="by_type", default=4096, types=_every(2)),
        ignored=("hidden_act",),
        modules=FOUR_NORMS,
    )
)
register(
    Family(
        name="gemma3_text",
        architecture="Gemma3ForCausalLM",
        sizes=(262208, 2304, 9216, 26, 8, 4, 256, 131072),
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        keys=(ATTENTION_BIAS, QUERY_SCALAR, FINAL_CAP),
        fixed={
            "norm_plus_one": True,
            "norm_places": "both",
            "qk_norm": "head",
            **ROOT_WIDTH,
        },
        tied=True,
        theta=1_000_000.0,
        by_type=(10_000.0, 1_000_000.0),
        windows=Windows(how="by_type", default=4096, types=_every(6, said=True)),
        ignored=("hidden_act", PATTERN),
        # transformers caps scores in one of its attentions, not in the one it takes unasked.
        required={"attn_logit_softcapping": None},
        modules=FOUR_NORMS,
    )
)
register(
    Family(
        name="glm",
        architecture="GlmForCausalLM",
        sizes=(151552, 4096, 13696, 40, 32, 2, 128, 131072),
        epsilon=("rms_norm_eps", 1.5625e-07),
        keys=(_bias("attention_bias", "qkv_bias", default=True),),
        fixed={"rope_interleaved": True},
        partial=0.5,
        joined=GATE_UP,
    )
)
register(
    Family(
        name="glm4",
        architecture="Glm4ForCausalLM",
        sizes=(151552, 4096, 13696, 40, 32, 2, 128, 131072),
        epsilon=("rms_norm_eps", 1.5625e-07),
        keys=(_bias("attention_bias", "qkv_bias", default=True),),
        fixed={"rope_interleaved": True, "norm_places": "both"},
        partial=0.5,
        modules={
            "attention_post_norm": "post_self_attn_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
        joined=GATE_UP,
    )
)
register(
    Family(
        name="stablelm",
        architecture="StableLmForCausalLM",
        sizes=(50304, 2560, 6912, 32, 32, 32, None, 4096),
        epsilon=("layer_norm_eps", 1e-5),
        keys=(
            _bias("use_qkv_bias", "qkv_bias"),
            _bias("use_parallel_residual", "parallel"),
            _norm_of_heads("qk_layernorm", "each"),
        ),
        fixed={"norm": "layer", "norm_bias": True},
        partial=0.25,
        whole={
            "attention/query_norm": "self_attn.q_layernorm.norms.{item}.weight",
            "attention/key_norm": "self_attn.k_layernorm.norms.{item}.weight",
        },
    )
)
register(
    Family(
        name="starcoder2",
        architecture="Starcoder2ForCausalLM",
        sizes=(49152, 3072, 12288, 30, 24, 2, None, 4096),
        epsilon=("norm_epsilon", 1e-5),
        activation=("hidden_act", "gelu_pytorch_tanh"),
        keys=(_bias("use_bias", "qkv_bias", "out_bias", "mlp_bias", default=True),),
        fixed={"norm": "layer", "norm_bias": True, "gated": False},
        tied=True,
        windows=Windows(how="all"),
        ignored=("activation_function", "layer_norm_epsilon", "mlp_type", "norm_type")
        + ("scale_attention_softmax_in_fp32", "attention_softmax_in_fp32", "scale_attn_weights"),
        modules={"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"},
    )
)
register(
    Family(
        name="nemotron",
        architecture="NemotronForCausalLM",
        sizes=(256000, 6144, 24576, 32, 48, None, None, 4096),
        epsilon=("norm_eps", 1e-5),
        activation=("hidden_act", "relu2"),
        keys=(ATTENTION_BIAS, MLP_BIAS),
        fixed={"norm": "layer", "norm_bias": True, "norm_plus_one": True, "gated": False},
        partial=0.5,
        ignored=("kv_channels",),
    )
)
register(
    Family(
        name="cohere",
        architecture="CohereForCausalLM",
        sizes=(256000, 8192, 22528, 40, 64, None, None, 8192),
        epsilon=("layer_norm_eps", 1e-5),
        keys=(
            ATTENTION_BIAS,
            Key(name="logit_scale", fields=("logit_scale",), default=0.0625, rule=NUMBER),
            _norm_of_heads("use_qk_norm", "each"),
        ),
        fixed={"norm": "layer", "parallel": True, "rope_interleaved": True},
        tied=True,
        theta=500_000.0,
        ignored=("model_max_length",),
    )
)
register(
    Family(
        name="cohere2",
        architecture="Cohere2ForCausalLM",
        sizes=(256000, 8192, 22528, 40, 64, None, None, 8192),
        epsilon=("layer_norm_eps", 1e-5),
        keys=(
            ATTENTION_BIAS,
            Key(name="logit_scale", fields=("logit_scale",), default=0.0625, rule=NUMBER),
        ),
        fixed={"norm": "layer", "parallel": True, "rope_interleaved": True},
        tied=True,
        windows=Windows(how="by_type", default=4096, types=_every(4, said=True)),
        plain_layers="full",
        ignored=("order_of_interleaved_layers", "position_embedding_type", "rotary_pct")
        + ("use_embedding_sharing", "use_gated_activation", "use_parallel_block", "layer_switch")
        + (PATTERN, "model_max_length"),
    )
)


def _windows_of_smollm3(config: Mapping[str, Any]) -> list[bool]:
    turned = listed_positions(config, config["num_hidden_layers"])
    return [not rotary for rotary in turned]


def listed_positions(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers have positions, by SmolLM3's keys."""
    listed = config.get("no_rope_layers")
    if listed is None:
        name = "no_rope_layer_interval"
        interval = SIZE.read(name, config.get(name, 4))
        return [(index + 1) % interval != 0 for index in range(layers)]
    if not isinstance(listed, list) or len(listed) < layers:
        raise UsageError(f"no_rope_layers must list each of {layers} layers")
    return [flag("no_rope_layers", entry) for entry in listed[:layers]]


# Experts ------------------------------------------------------------------------------------------

register(
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        sizes=(32000, 4096, 14336, 32, 32, 8, None, 131072),
        epsilon=("rms_norm_eps", 1e-5),
        keys=_experts(
            _count("num_local_experts", 8, also="num_experts"),
            2,
            size=_inner("intermediate_size", 14336),
            renormalise=None,
        ),
        fixed={"experts.router": "softmax", "experts.renormalise": True},
        theta=1_000_000.0,
        windows=Windows(how="all"),
        dense_first=0,
        ignored=("first_k_dense_replace",),
        modules={
            "experts/router": "block_sparse_moe.gate",
            "experts/gate": "block_sparse_moe.experts.{item}.w1",
            "experts/up": "block_sparse_moe.experts.{item}.w3",
            "experts/down": "block_sparse_moe.experts.{item}.w2",
        },
    )
)
register(
    Family(
        name="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        sizes=(151936, 2048, 5632, 24, 16, 16, None, 32768),
        keys=(
            _bias("qkv_bias", "qkv_bias", default=True),
            *_experts(
                _count("num_experts", 60, also="num_local_experts"),
                4,
                size=_inner("moe_intermediate_size", 1408),
                renormalise=False,
            ),
            Key(
                name="shared_expert_intermediate_size",
                fields=("experts.shared_size",),
                default=5632,
                rule=COUNT,
            ),
        ),
        fixed={"experts.shared_gate": True},
        windows=Windows(how="by_type", default=4096, switch=True, types=_alternate_first),
        dense_listed=True,
        modules={
            "shared/gate": "mlp.shared_expert.gate_proj",
            "shared/up": "mlp.shared_expert.up_proj",
            "shared/down": "mlp.shared_expert.down_proj",
        },
    )
)
register(
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        sizes=(151936, 2048, 6144, 24, 32, 4, None, 32768),
        keys=(
            ATTENTION_BIAS,
            *_experts(
                _count("num_experts", 128, also="num_local_experts"),
                8,
                size=_inner("moe_intermediate_size", 768),
                renormalise=False,
            ),
        ),
        fixed={"qk_norm": "head"},
        windows=Windows(how="all", default=4096, switch=True),
        dense_listed=True,
    )
)
register(
    Family(
        name="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        sizes=(151552, 4096, 10944, 46, 96, 8, None, 131072),
        epsilon=("rms_norm_eps", 1e-5),
        keys=(
            _bias("attention_bias", "qkv_bias"),
            _norm_of_heads("use_qk_norm", "head"),
            *_experts(
                _count("n_routed_experts", 128, also="num_local_experts"),
                8,
                size=_inner("moe_intermediate_size", 1408),
                renormalise=True,
                balance=0.0,
            ),
            Key(name="routed_scaling_factor", fields=("experts.scale",), default=1.0, rule=NUMBER),
            Key(name="n_group", fields=("experts.groups",), default=1, rule=SIZE),
            Key(name="topk_group", fields=("experts.active_groups",), default=1, rule=SIZE),
            _shared(1),
        ),
        fixed=GROUPED_SIGMOID,
        partial=0.5,
        dense_first=1,
        ignored=("num_nextn_predict_layers", "num_mtp_layers"),
        unread_layers=True,
    )
)
register(
    Family(
        name="gpt_oss",
        architecture="GptOssForCausalLM",
        sizes=(201088, 2880, 2880, 36, 64, 8, 64, 131072),
        epsilon=("rms_norm_eps", 1e-5),
        keys=(
            _bias("attention_bias", "qkv_bias", "out_bias", default=True),
            *_experts(
                _count("num_local_experts", 128, also="num_experts"),
                4,
                size=_inner("intermediate_size", 2880),
                renormalise=None,
            ),
            Key(name="swiglu_limit", fields=("experts.clamp",), default=7.0, rule=POSITIVE),
            Key(name="swiglu_alpha", fields=("experts.slope",), default=1.702, rule=NUMBER),
        ),
        fixed={"sinks": True, "experts.router": "chosen_softmax", "experts.bias": True},
        theta=150_000.0,
        scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        windows=Windows(how="by_type", default=128, types=_every(2)),
        dense_first=0,
        ignored=("experts_per_token", "initial_context_length", "first_k_dense_replace"),
        modules={"experts/router": "mlp.router"},
        whole={
            "experts/down": "mlp.experts.down_proj",
            "experts/down_bias": "mlp.experts.down_proj_bias",
        },
        woven={"mlp.experts.gate_up_proj": ("experts/gate", "experts/up")},
    )
)
register(
    Family(
        name="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        sizes=(129280, 7168, 18432, 61, 128, 128, None, 4096),
        keys=(
            *_experts(
                _count("n_routed_experts", 256, also="num_local_experts"),
                8,
                size=_inner("moe_intermediate_size", 2048),
                renormalise=True,
                balance=0.0,
            ),
            Key(name="routed_scaling_factor", fields=("experts.scale",), default=2.5, rule=NUMBER),
            Key(name="n_group", fields=("experts.groups",), default=8, rule=SIZE),
            Key(name="topk_group", fields=("experts.active_groups",), default=4, rule=SIZE),
            _shared(1),
            *LATENT,
            ATTENTION_BIAS,
            _bias("rope_interleave", "rope_interleaved", default=True),
        ),
        fixed=GROUPED_SIGMOID,
        dense_first=3,
        ignored=("num_nextn_predict_layers", "num_mtp_layers", "qk_head_dim", "head_dim")
        + ("seq_aux", "ep_size", "num_key_value_heads"),
        required={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        unread_layers=True,
    )
)
GROUP_WORTH = {"greedy": 0, "group_limited_greedy": 1}


def _or_one(value: Any) -> Any:
    return 1 if value is None else value


def _group_worth(method: Any) -> int:
    if not isinstance(method, str) or method not in GROUP_WORTH:
        raise UsageError(
            f"topk_method={shown(method)} is not computed; known: "
            f"{', '.join(map(repr, GROUP_WORTH))}"
        )
    return GROUP_WORTH[method]


register(
    Family(
        name="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        sizes=(102400, 4096, 11008, 32, 32, None, None, 2048),
        keys=(
            _count("n_routed_experts", 64, also="num_experts"),
            _inner("moe_intermediate_size", 1407),
            Key(name="num_experts_per_tok", fields=("experts.active",), default=None, rule=SIZE),
            Key(name="routed_scaling_factor", fields=("experts.scale",), default=1.0, rule=NUMBER),
            Key(
                name="n_group",
                fields=("experts.groups",),
                default=None,
                rule=SIZE,
                null=True,
                read=_or_one,
            ),
            Key(
                name="topk_group",
                fields=("experts.active_groups",),
                default=None,
                rule=SIZE,
                null=True,
                read=_or_one,
            ),
            Key(
                name="topk_method",
                fields=("experts.group_worth",),
                default="greedy",
                read=_group_worth,
                write=lambda worth: "group_limited_greedy" if worth else "greedy",
            ),
            _shared(2),
            *LATENT,
            ATTENTION_BIAS,
        ),
        fixed={"rope_interleaved": True},
        dense_first=0,
        ignored=("qk_head_dim", "head_dim", "num_key_value_heads") + ("seq_aux", "ep_size"),
        # transformers reads no norm_topk_prob here, the first code did: neither is wrong.
        required={"scoring_func": "softmax", "moe_layer_freq": 1, "norm_topk_prob": False},
    )
)
