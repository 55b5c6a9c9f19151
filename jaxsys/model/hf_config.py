"""Reads and writes a Hugging Face `config.json`, by a family's entry in `families`.

Absent keys mean what transformers' configuration class of that family says. Rotary settings stand
in one of three places: `rope_scaling` where it is not empty, else `rope_parameters`; theta and the
partial factor may stand beside them. A key that is neither understood nor known to change nothing
is refused by name, unless it is off (null or false).
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxsys.errors import UsageError
from jaxsys.files import shown
from jaxsys.model import quantised_settings
from jaxsys.model.families import FAMILIES, Family, Key, flag, listed_positions
from jaxsys.model.key_rules import NUMBER, PART, POSITIVE, SIZE, WHOLE, Rule, listed
from jaxsys.model.kinds import Activation, BlockKind, Experts, Latent, Positions
from jaxsys.model.rope import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeScaling,
    YarnRopeScaling,
)

if TYPE_CHECKING:
    from jaxsys.model.config import DecoderConfig

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""transformers' names; the last of a function's names that is first here is written."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eod_token_id",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "im_end_id",
        "im_start_id",
        "initializer_range",
        "is_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "max_window_layers",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)
"""Keys of any config.json that change no number, neither in inference nor in training."""

IN_TRAINING = (
    "activation_dropout",
    "attention_dropout",
    "attn_pdrop",
    "aux_loss_alpha",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "layerdrop",
    "resid_pdrop",
    "residual_dropout",
    "router_jitter_noise",
    "router_z_loss_coef",
)
"""Keys that change training alone, unless they are 0: noise, and losses beside that of tokens."""

NOT_DECODER = ("add_cross_attention", "is_encoder_decoder", "pruned_heads")
"""Keys that make another model than a decoder of its family, unless they are false or empty."""

ROPE_HARMLESS = frozenset({"finetuned", "max_position_embeddings"})


class _Reader:
    """A config.json that remembers which of its keys were asked for."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.asked: set[str] = set()
        self.last = ""
        """The key asked for last."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` where the key is absent; null is a value."""
        self.asked.add(name)
        self.last = name
        return self.config.get(name, default)

    def number(self, name: str, default: Any, rule: Rule) -> Any:
        """The number that a key must be; `default` may be None, a key may not be null."""
        value = self.get(name, default)
        return value if name not in self.config else rule.read(name, value)

    def value(self, key: Key) -> Any:
        """What a family's key says, in the field's terms."""
        names = (key.name, *key.also)
        self.asked.update(names)
        given = [name for name in names if name in self.config]
        found = self.config[given[0]] if given else key.default
        for other in given[1:]:
            if self.config[other] != found:
                raise UsageError(
                    f"{given[0]}={found!r} and {other}={self.config[other]!r} are names of one "
                    "number and disagree; remove the one that is wrong"
                )
        name = self.last = given[0] if given else key.name
        if found is None and not given and key.rule is not None and not key.null:
            raise UsageError(f"the configuration lacks {name}")
        if key.rule is not None and not (found is None and key.null):
            found = key.rule.read(name, found)
        return found if key.read is None else key.read(found)


MOST_LAYERS = 10_000
"""Of a configuration in a file."""


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DecoderConfig` that a config.json says.

    Raises:
        UsageError: if the family is unknown, or a feature is asked for that is not computed.
    """
    family = _family_of(config)
    reader = _Reader(config)
    try:
        return _read(reader, family)
    except UsageError:  # it says more
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        name = reader.last
        raise UsageError(
            f"{name}={shown(config.get(name))}, or a number read with it, is not one that can be "
            f"computed with in {family.name}; compare it with a published file of that family"
        ) from error


def _read(reader: _Reader, family: Family) -> dict[str, Any]:
    config = reader.config
    reader.asked |= HARMLESS | set(NOT_DECODER) | set(family.ignored)
    _check_harmless(config)
    fields: dict[str, Any] = {"family": family.name}
    fields["in_training"] = _read_in_training(reader, family)
    _read_sizes(reader, family, fields)
    for key in family.keys:
        value = reader.value(key)
        fields |= dict.fromkeys(key.fields, value)
    for name, value in family.fixed.items():
        fields[name] = value(fields) if callable(value) else value
    name, default = family.epsilon
    fields["rms_norm_eps"] = reader.number(name, default, POSITIVE)
    name, default = family.activation
    named = reader.get(name, default)
    if isinstance(named, str):
        named = family.activations.get(named, named)
    fields["activation"] = _activation(name, named)
    fields["tie_embeddings"] = flag(
        "tie_word_embeddings", reader.get("tie_word_embeddings", family.tied)
    )
    _gather(fields)
    rope = _read_rope(reader, family, fields)
    _read_layers(reader, family, fields, rope)
    _check_rest(reader, family)
    return fields


def _read_in_training(reader: _Reader, family: Family) -> tuple[tuple[str, float], ...]:
    """Those of the keys that change training alone which are not 0."""
    found = {name: reader.get(name, family.in_training.get(name)) for name in IN_TRAINING}
    return tuple(
        (name, value)
        for name, value in found.items()
        if value is not None and value is not False and NUMBER.read(name, value)
    )


def _check_harmless(config: Mapping[str, Any]) -> None:
    for name in NOT_DECODER:
        if config.get(name):
            raise UsageError(
                f"{name}={shown(config[name])} is not computed: models are decoders, with all of "
                "their heads; use another model"
            )
    ends = config.get("eos_token_id")
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and type(token) is not int:
            raise UsageError(f"eos_token_id={shown(ends)} must be a token id or a list of them")


def _family_of(config: Mapping[str, Any]) -> Family:
    kind, listed = config.get("model_type"), config.get("architectures") or [None]
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list) or not isinstance(listed[0], str | None):
        raise UsageError(f"architectures={shown(listed)} must be a list of names")
    named = listed[0]
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is not None and named and named != family.architecture:
        others = [one.name for one in FAMILIES.values() if one.architecture == named]
        if others:
            raise UsageError(
                f"architecture {named!r} and model_type {kind!r} disagree: one is of model_type "
                f"{others[0]!r}, the other of {family.architecture!r}; correct what is wrong"
            )
    if family is None or (named and named != family.architecture):
        # A fine-tune of another head is another model.
        known = ", ".join(f"{one.architecture} ({one.name})" for one in FAMILIES.values())
        raise UsageError(
            f"architecture {named or kind!r} (model_type {kind!r}) is not known; known: {known}"
        )
    if kind == "mistral" and "layer_types" in config:
        # As transformers reads it: what tells its layers apart is a Ministral.
        return FAMILIES["ministral"]
    return family


def _read_sizes(reader: _Reader, family: Family, fields: dict[str, Any]) -> None:
    values = {
        name: reader.get(name, default) for name, default in zip(SIZES, family.sizes, strict=True)
    }
    missing = [
        name
        for name, value in values.items()
        if value is None and name not in ("num_key_value_heads", "head_dim")
    ]
    if missing:
        raise UsageError(f"the configuration lacks {', '.join(missing)}")
    refuse_many_layers("num_hidden_layers", values["num_hidden_layers"])
    for name, value in values.items():
        if value is not None and name not in family.ignored:
            SIZE.read(name, value)
    heads = values["num_attention_heads"]
    if values["head_dim"] is None and values["hidden_size"] < heads:
        raise UsageError(
            f"hidden_size={values['hidden_size']} holds no num_attention_heads={heads}; give "
            "head_dim, or correct one of them"
        )
    fields |= {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": _first(values["num_key_value_heads"], heads),
        "head_dim": _first(values["head_dim"], values["hidden_size"] // heads),
        "max_positions": values["max_position_embeddings"],
    }


def refuse_many_layers(key: str, layers: Any) -> None:
    """Raises UsageError for more layers than can be meant, before each is described."""
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UsageError(f"{key}={layers} is more than {MOST_LAYERS} layers, the most that is read")


def _activation(key: str, name: Any) -> Activation:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UsageError(
            f"{key}={shown(name)} is not computed; known: {', '.join(map(repr, ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


def _gather(fields: dict[str, Any]) -> None:
    """Fields `experts.count` and such to one `Experts`, `latent.rank` to one `Latent`."""
    parts: dict[str, dict[str, Any]] = {"experts": {}, "latent": {}}
    for name in [name for name in fields if "." in name]:
        part, _, inner = name.partition(".")
        parts[part][inner] = fields.pop(name)
    if parts["experts"]:
        shared = parts["experts"].pop("shared_count", None)
        if shared is not None:
            parts["experts"]["shared_size"] = shared * parts["experts"]["intermediate_size"]
        fields["experts"] = Experts(**parts["experts"])
    if parts["latent"]:
        latent = Latent(**parts["latent"])
        fields["latent"] = latent
        fields["head_dim"] = latent.plain_dim + latent.rotary_dim
        fields["num_kv_heads"] = fields["num_heads"]


# Rotary settings ----------------------------------------------------------------------------------


def _read_rope(reader: _Reader, family: Family, fields: dict[str, Any]) -> Positions | None:
    """Fills in the model's rotary settings; returns those of window layers where they differ."""
    given = _mapping("rope_parameters", reader.get("rope_parameters"))
    scaling = _mapping("rope_scaling", reader.get("rope_scaling"))
    top = reader.get("rope_theta")
    if top is not None:
        POSITIVE.read("rope_theta", top)
    original = reader.config.get("original_max_position_embeddings")
    reader.asked.add("original_max_position_embeddings")
    partial = reader.get("partial_rotary_factor")
    if family.by_type is None:
        # An empty object is a word too: no scaling.
        said = reader.config.get("rope_parameters") is not None
        rope = dict(scaling or (given if said else family.scaling or {}))
        theta = _first(rope.get("rope_theta"), top, family.theta)
        partial = _first(rope.get("partial_rotary_factor"), partial, family.partial)
        _set_partial(family, fields, partial)
        found = _positions(family, fields, rope, theta, original)
        fields |= {"rope_theta": found.theta, "rope_scaling": found.scaling}
        return None
    _set_partial(family, fields, partial)
    thetas = family.by_type
    local = reader.get("rope_local_base_freq") if thetas[0] != thetas[1] else None
    if local is not None:
        POSITIVE.read("rope_local_base_freq", local)
    full = dict(_mapping("full_attention", given.get("full_attention")))
    named = full.get("rope_type", None if "full_attention" in given else "default")
    old = scaling.get("type")
    if "rope_type" not in scaling and named is not None and old not in (None, named):
        # Its older versions took either name; it now has a type already where it reads this one.
        raise UsageError(
            f"rope_scaling's type={old!r} is not read by transformers in {family.name}; call it "
            "rope_type"
        )
    full |= scaling
    sliding = dict(_mapping("sliding_attention", given.get("sliding_attention")))
    flat = set(given) - {"full_attention", "sliding_attention"}
    if flat:
        raise UsageError(
            f"rope_parameters of {family.name} holds {', '.join(sorted(flat))}; its settings stand "
            "under full_attention and sliding_attention"
        )
    for name, settings in (("full_attention", full), ("sliding_attention", sliding)):
        if settings.get("truncate") is False:
            # transformers looks for it beside the kinds of layers, not under them.
            raise UsageError(f"truncate=False under {name} is not computed; only true is")
    window = _positions(
        family, fields, sliding, _first(sliding.get("rope_theta"), local, thetas[0]), None
    )
    whole = _positions(family, fields, full, _first(full.get("rope_theta"), top, thetas[1]), None)
    fields |= {"rope_theta": whole.theta, "rope_scaling": whole.scaling}
    return window


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"{name}={shown(value)} must be a JSON object of rotary settings")
    return value


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _set_partial(family: Family, fields: dict[str, Any], partial: Any) -> None:
    if partial is None or PART.read("partial_rotary_factor", partial) == 1.0:
        return
    if family.partial is None:
        raise UsageError(
            f"partial_rotary_factor={partial} is not supported in {family.name}; whole heads are "
            "turned"
        )
    fields["rotary_dim"] = int(fields["head_dim"] * partial)


def _positions(
    family: Family, fields: dict[str, Any], rope: dict[str, Any], theta: Any, original: Any
) -> Positions:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if family.name == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # what its first files called it
    theta = POSITIVE.read("rope_theta", theta)
    most = fields["max_positions"]
    asked = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

    def need(name: str) -> Any:
        asked.add(name)
        if rope.get(name) is None:
            raise UsageError(f"rope scaling of type {kind} lacks {name}")
        return rope[name]

    def get(name: str, default: Any = None) -> Any:
        asked.add(name)
        return default if rope.get(name) is None else rope[name]

    def get_number(name: str) -> float | None:
        value = get(name)
        return None if value is None else NUMBER.read(f"rope setting {name}", value)

    trained = _positions_trained(get("original_max_position_embeddings"))
    original = _positions_trained(original)
    scaling: RopeScaling | None = None
    if kind == "linear":
        scaling = LinearRopeScaling(factor=NUMBER.read("rope setting factor", need("factor")))
    elif kind == "dynamic" and family.name == "hunyuan_v1_dense" and get("alpha"):
        # A fixed stretch of theta; the other keys beside it are not computed with.
        asked |= {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
        width = fields["head_dim"]
        if width == 2:
            raise UsageError("rope setting alpha needs head_dim=2 to be 4 or more; remove alpha")
        theta *= POSITIVE.read("rope setting alpha", rope["alpha"]) ** (width / (width - 2))
    elif kind == "dynamic":
        factor = NUMBER.read("rope setting factor", need("factor"))
        scaling = DynamicRopeScaling(factor=factor, original_max_positions=most)
    elif kind == "yarn":
        trained = _first(original, trained, most)
        factor = get_number("factor")
        scaling = YarnRopeScaling(
            factor=float(most / trained if factor is None else factor),
            original_max_positions=int(trained),
            attention_factor=get_number("attention_factor"),
            beta_fast=get_number("beta_fast") or 32.0,
            beta_slow=get_number("beta_slow") or 1.0,
            mscale=get_number("mscale"),
            mscale_all_dim=get_number("mscale_all_dim"),
            truncate=flag("truncate", get("truncate", True)),
        )
        if "latent" in fields and scaling.mscale_all_dim:
            sharper = scaling.magnitude(scaling.mscale_all_dim) ** 2
            fields["attention_scale"] = fields["head_dim"] ** -0.5 * sharper
    elif kind == "longrope":
        if family.name == "phi3" and original is None:
            original = 4096  # of its configuration class
        trained = _first(original, trained, most)
        factor = get_number("factor")
        factor = float(most / trained if factor is None else factor)
        magnitude = get_number("attention_factor")
        if magnitude is None:
            if trained == 1 and factor > 1:
                raise UsageError("original_max_position_embeddings=1 must be 2 or more in longrope")
            magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
        scaling = LongRopeScaling(
            short_factor=tuple(listed("short_factor", need("short_factor"), POSITIVE)),
            long_factor=tuple(listed("long_factor", need("long_factor"), POSITIVE)),
            original_max_positions=int(trained),
            attention_factor=float(magnitude),
        )
    elif kind == "llama3":
        scaling = Llama3RopeScaling(
            factor=NUMBER.read("rope setting factor", need("factor")),
            low_freq_factor=NUMBER.read("rope setting low_freq_factor", need("low_freq_factor")),
            high_freq_factor=NUMBER.read("rope setting high_freq_factor", need("high_freq_factor")),
            original_max_positions=int(_first(original, trained, most)),
        )
    elif kind != "default":
        raise UsageError(
            f"rope_type={shown(kind)} is not supported; known: default, linear, dynamic, yarn, "
            "longrope and llama3"
        )
    if kind == "default":
        asked.add("factor")  # without a type it does nothing, in transformers too
    unknown = sorted(
        name for name in set(rope) - asked - ROPE_HARMLESS if rope[name] not in (None, False)
    )
    if unknown:
        raise UsageError(
            f"rope settings of type {kind} hold {unknown[0]}={rope[unknown[0]]!r}, which is not "
            f"understood in {family.name}; remove it if it changes nothing"
        )
    return Positions(theta=theta, scaling=scaling)


def _positions_trained(value: Any) -> int | None:
    """Of one of its two keys; 4096.0 is 4096, as it is for transformers."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else SIZE.read("original_max_position_embeddings", value)


def _rope_keys(positions: Positions) -> dict[str, Any]:
    scaling = positions.scaling
    keys: dict[str, Any] = {"rope_theta": positions.theta, "rope_type": "default"}
    if isinstance(scaling, LinearRopeScaling):
        if scaling.attention_factor != 1.0:
            raise UsageError(
                f"a config.json has no attention_factor={scaling.attention_factor} of linear rope "
                "scaling"
            )
        keys |= {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, DynamicRopeScaling):
        keys |= {"rope_type": "dynamic", "factor": scaling.factor}
    elif isinstance(scaling, YarnRopeScaling):
        keys |= {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(scaling, name) is not None:
                keys[name] = getattr(scaling, name)
    elif isinstance(scaling, LongRopeScaling):
        keys |= {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factor),
            "long_factor": list(scaling.long_factor),
            "original_max_position_embeddings": scaling.original_max_positions,
            "attention_factor": scaling.attention_factor,
        }
    elif isinstance(scaling, Llama3RopeScaling):
        keys |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return keys


# Kinds of layers ----------------------------------------------------------------------------------


def _read_layers(
    reader: _Reader, family: Family, fields: dict[str, Any], local: Positions | None
) -> None:
    layers = fields["num_layers"]
    windows = _read_windows(reader, family, layers)
    turned = [True] * layers
    if family.plain_layers == "listed":
        reader.asked |= {"no_rope_layers", "no_rope_layer_interval"}
        turned = listed_positions(reader.config, layers)
    elif family.plain_layers == "full":
        turned = [window is not None for window in windows]
    elif family.plain_layers == "full_if_window":
        # Without a window in the file all layers have positions.
        any_window = _first(reader.config.get("sliding_window", family.windows.default))
        turned = [window is not None or any_window is None for window in windows]
    dense = _read_dense(reader, family, layers)
    own = Positions(theta=fields["rope_theta"], scaling=fields["rope_scaling"])
    made = []
    for window, rotary, is_dense in zip(windows, turned, dense, strict=True):
        apart = local if window is not None and local != own else None
        made.append((window, rotary, apart if rotary else None, not is_dense))
    kinds, pattern = name_kinds(made)
    fields |= {"kinds": kinds, "pattern": pattern}


Described = tuple[int | None, bool, Positions | None, bool]
"""A layer's window, whether it has positions, its own rotary settings, whether it has experts."""


def name_kinds(layers: list[Described]) -> tuple[tuple[BlockKind, ...], tuple[str, ...]]:
    """Kinds and pattern of described layers; kinds are named by what tells them apart."""
    unlike = list(dict.fromkeys(layers))

    def differs(place: int) -> bool:
        return len({layer[place] for layer in unlike}) > 1

    def name(layer: Described) -> str:
        window, rotary, _, experts = layer
        words = []
        if differs(0):
            words.append("full" if window is None else "window")
        if differs(1) and (not differs(0) or len({(w is None, r) for w, r, *_ in unlike}) > 2):
            words.append("rotary" if rotary else "plain")
        if differs(3):
            words.append("experts" if experts else "dense")
        return "_".join(words) or "block"

    kinds = tuple(
        BlockKind(
            name=name(layer), window=layer[0], rotary=layer[1], positions=layer[2], experts=layer[3]
        )
        for layer in unlike
    )
    if len(kinds) == 1:
        return kinds, ()
    return kinds, tuple(name(layer) for layer in layers)


def _read_windows(reader: _Reader, family: Family, layers: int) -> list[int | None]:
    rule = family.windows
    if rule.how == "none":
        return [None] * layers
    window = reader.get("sliding_window", rule.default)
    if rule.switch and not flag("use_sliding_window", reader.get("use_sliding_window", False)):
        window = None
    if rule.how == "all":
        # transformers reads it of every layer alike here, whatever the file calls them.
        reader.asked.add("layer_types")
        return [None if window is None else SIZE.read("sliding_window", window)] * layers
    types = reader.get("layer_types")
    if types is None:
        if window is None:
            return [None] * layers
        assert rule.types is not None
        with_window = rule.types({**reader.config, "num_hidden_layers": layers}, layers)
    else:
        if not isinstance(types, list | tuple):
            raise UsageError(f"layer_types={shown(types)} must be a list, a name for each layer")
        unknown = [one for one in types if one not in ("full_attention", "sliding_attention")]
        if unknown:
            raise UsageError(
                f"layer_types holds {unknown[0]!r}; computed are full_attention and "
                "sliding_attention"
            )
        if len(types) != layers:
            raise UsageError(
                f"layer_types holds {len(types)} entries, num_hidden_layers is {layers}"
            )
        with_window = [one == "sliding_attention" for one in types]
        if any(with_window) and window is None:
            raise UsageError("layer_types names sliding_attention, but there is no sliding_window")
    if any(with_window):
        SIZE.read("sliding_window", window)
    return [window if has else None for has in with_window]


def _read_dense(reader: _Reader, family: Family, layers: int) -> list[bool]:
    """Which layers have a dense feed-forward."""
    if family.dense_first is not None:
        first = 0
        if family.dense_first or "first_k_dense_replace" not in family.ignored:
            name = "first_k_dense_replace"
            first = reader.number(name, family.dense_first, WHOLE)
        return [index < first for index in range(layers)]
    if family.dense_listed:
        step = reader.number("decoder_sparse_step", 1, SIZE)
        given = reader.get("mlp_only_layers")
        dense = [] if given is None else listed("mlp_only_layers", given, WHOLE)
        return [index in dense or (index + 1) % step != 0 for index in range(layers)]
    return [True] * layers


def _check_rest(reader: _Reader, family: Family) -> None:
    config = reader.config
    if config.get("quantization_config") is not None and not _is_packed(family, config):
        quantised_settings.check(config["quantization_config"])
    if config.get("is_causal", True) is not True:
        raise UsageError(f"is_causal={config['is_causal']!r} is not computed; only true is")
    for name, wanted in family.required.items():
        if config.get(name, wanted) not in (wanted, None):
            raise UsageError(f"{name}={config[name]!r} is not computed; only {wanted!r} is")
    known = reader.asked | set(family.required) | {"quantization_config", "is_causal"}
    unknown = [
        name
        for name, value in config.items()
        if name not in known and not name.startswith("_") and not (value is None or value is False)
    ]
    if unknown:
        name = unknown[0]
        raise UsageError(
            f"{name}={config[name]!r} is not understood in {family.name}; what it changes is not "
            "computed. Remove the key if it changes nothing"
        )


def _is_packed(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether a quantised file is one of those that are expanded while loading."""
    settings = config.get("quantization_config")
    return (
        family.name == "gpt_oss"
        and isinstance(settings, Mapping)
        and settings.get("quant_method") == "mxfp4"
    )


# Writing ------------------------------------------------------------------------------------------


def write(config: "DecoderConfig") -> dict[str, Any]:
    """The config.json of a decoder, as its family's configuration class reads it."""
    family = FAMILIES.get(config.family)
    if family is None:
        raise UsageError(f"family {config.family!r} is not known; known: {', '.join(FAMILIES)}")
    written: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim if config.latent is None else config.latent.rotary_dim,
        family.activation[0]: next(k for k, v in ACTIVATIONS.items() if v == config.activation),
        family.epsilon[0]: config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
    }
    for key in family.keys:
        value = _field(config, key.fields[0])
        written[key.name] = value if key.write is None else key.write(value)
    written |= dict.fromkeys(family.in_training, 0.0) | dict(config.in_training)
    written |= _write_layers(config, family)
    return written | _write_rope(config, family)


def _field(config: "DecoderConfig", name: str) -> Any:
    part, _, inner = name.partition(".")
    value = getattr(config, part)
    if not inner:
        return value
    if value is None:
        raise UsageError(f"family {config.family!r} needs {part}, which are not described")
    if inner == "shared_count":
        return value.shared_size // value.intermediate_size
    return getattr(value, inner)


def _write_rope(config: "DecoderConfig", family: Family) -> dict[str, Any]:
    own = Positions(theta=config.rope_theta, scaling=config.rope_scaling)
    rope = _rope_keys(own)
    written: dict[str, Any] = {"rope_theta": config.rope_theta}
    # transformers 4 reads `rope_theta` and `rope_scaling`, 5 `rope_parameters`.
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    written["rope_scaling"] = None if config.rope_scaling is None else scaling
    trained = getattr(config.rope_scaling, "original_max_positions", None)
    if family.name == "phi3" and isinstance(config.rope_scaling, LongRopeScaling):
        written["original_max_position_embeddings"] = trained
    if family.partial is not None:
        partial = 1.0
        if config.rotary_dim is not None:
            partial = _partial_factor(config.rotary_dim, config.head_dim)
        written["partial_rotary_factor"] = partial
        rope["partial_rotary_factor"] = partial
        if written["rope_scaling"] is not None:
            written["rope_scaling"]["partial_rotary_factor"] = partial
    if family.by_type is None:
        return written | {"rope_parameters": rope}
    window = next((kind.positions for kind in config.kinds if kind.positions is not None), own)
    written["rope_parameters"] = {"full_attention": rope, "sliding_attention": _rope_keys(window)}
    if family.by_type[0] != family.by_type[1]:
        written["rope_local_base_freq"] = window.theta
    return written


def _partial_factor(turned: int, width: int) -> float:
    """The factor whose product with `width` is truncated to `turned`."""
    factor = turned / width
    return factor if int(width * factor) == turned else math.nextafter(factor, 1.0)


def _write_layers(config: "DecoderConfig", family: Family) -> dict[str, Any]:
    kinds = [config.kind(layer) for layer in range(config.num_layers)]
    written: dict[str, Any] = {}
    rule = family.windows
    windows = [kind.window for kind in kinds]
    window = next((size for size in windows if size is not None), None)
    if rule.how != "none":
        written["sliding_window"] = window
        if rule.switch:
            written["use_sliding_window"] = window is not None
    if rule.how == "by_type":
        types = ["full_attention" if one is None else "sliding_attention" for one in windows]
        written["layer_types"] = types
        if window is None and not rule.switch:
            # A window that no layer has: transformers makes its mask all the same, and takes none
            # for positions in all layers where only window layers have them.
            absent = family.plain_layers == "full_if_window" and all(k.rotary for k in kinds)
            written["sliding_window"] = None if absent else rule.default
    if family.plain_layers == "listed":
        written["no_rope_layers"] = [int(kind.rotary) for kind in kinds]
    dense = [not kind.experts for kind in kinds]
    if family.dense_first is not None and "first_k_dense_replace" not in family.ignored:
        written["first_k_dense_replace"] = dense.index(False) if False in dense else len(dense)
    if family.dense_listed:
        listed = [index for index, is_dense in enumerate(dense) if is_dense]
        written |= {"decoder_sparse_step": 1, "mlp_only_layers": listed}
    return written
