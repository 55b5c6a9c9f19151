"""Configurations of every family drawn at random, as files have them: ours against transformers.

`python tests/jaxsys/family_draws.py --seeds 0:20` (with the extra `parity`) says of each what came
of it: `equal`, `ours refuses` (with the line), `theirs refuses`, or the error that is too large. A
config.json is written as drawn, not as transformers would tidy it, and both read that file.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

spec = importlib.util.spec_from_file_location(
    "family_cases", Path(__file__).parent / "family_cases.py"
)
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

TOLERANCE = 1e-5
"""Of the largest logit."""
TOKENS = cases.TOKENS[:1]

ABSENT = object()
"""A key that is left out."""


class Types:
    """`layer_types`, one for each layer."""


class Layers:
    """Some numbers of layers."""


class Flags:
    """Zeros and ones, one for each layer."""


BOOL = [ABSENT, True, False]
SIZES = [(32, 4, 2), (32, 4, 4), (32, 4, 1), (24, 6, 3), (48, 3, 1), (40, 5, 5), (36, 6, 2)]
"""Width, heads, heads of keys and values."""
ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2"]
WINDOW: dict[str, list[Any]] = {"sliding_window": [ABSENT, ABSENT, None, 8, 8, 8, 5, 100]}
BY_TYPE = WINDOW | {"layer_types": [ABSENT, Types, Types]}
SWITCHED = BY_TYPE | {"use_sliding_window": [*BOOL, True], "max_window_layers": [ABSENT, 0, 1, 2]}
BIAS: dict[str, list[Any]] = {"attention_bias": BOOL}
BIASES = BIAS | {"mlp_bias": BOOL}
PARTIAL: dict[str, list[Any]] = {"partial_rotary_factor": [ABSENT, ABSENT, 0.25, 0.5, 0.75, 1.0]}
WIDTH: dict[str, list[Any]] = {"head_dim": [ABSENT, 8, 8, 16, 12]}
"""Of a head, where the configuration has a field for it."""
CAPS: dict[str, list[Any]] = {
    "attn_logit_softcapping": [ABSENT, None, 2.0, 5.0],
    "final_logit_softcapping": [ABSENT, None, 3.0, 30.0],
    "query_pre_attn_scalar": [ABSENT, 24, 256, 100],
}
EXPERTS: dict[str, list[Any]] = {
    "num_experts_per_tok": [1, 2, 2, 3],
    "moe_intermediate_size": [16, 20],
    "router_aux_loss_coef": [ABSENT, 0.0, 0.01],
    "output_router_logits": [ABSENT, False],
}
LISTED: dict[str, list[Any]] = {
    "decoder_sparse_step": [ABSENT, 1, 2, 3],
    "mlp_only_layers": [ABSENT, None, [], Layers],
    "norm_topk_prob": BOOL,
    **EXPERTS,
}
GROUPED: dict[str, list[Any]] = {
    "n_group": [1, 1, 2, 4],
    "topk_group": [1, 1, 2],
    "routed_scaling_factor": [ABSENT, 1.0, 1.5, 2.5],
    "n_shared_experts": [ABSENT, 1, 2],
    "first_k_dense_replace": [ABSENT, 0, 1, 2],
    "norm_topk_prob": BOOL,
    "n_routed_experts": [8, 8, 4],
    **EXPERTS,
}
LATENT: dict[str, list[Any]] = {
    "q_lora_rank": [None, 24, 12],
    "kv_lora_rank": [16, 20],
    "qk_rope_head_dim": [8, 4],
    "qk_nope_head_dim": [8, 6],
    "v_head_dim": [12, 8, 14],
    **GROUPED,
}
FAMILIES: dict[str, dict[str, list[Any]]] = {
    "llama": BIASES | WIDTH | WINDOW,
    "mistral": WINDOW | WIDTH | {"layer_types": [ABSENT, ABSENT, Types]},
    "ministral": BY_TYPE | {"head_dim": [8, 16, 12]},
    "qwen2": SWITCHED,
    "qwen3": SWITCHED | WIDTH | BIAS,
    "seed_oss": BIASES | WIDTH | {"attention_out_bias": BOOL},
    "hunyuan_v1_dense": BIAS | {"head_dim": [8, 16], "use_qk_norm": [ABSENT, True]},
    "smollm3": SWITCHED
    | BIASES
    | {"no_rope_layers": [ABSENT, None, Flags], "no_rope_layer_interval": [ABSENT, 2, 3]},
    "helium": BIASES | {"head_dim": [8, 16]},
    "ernie4_5": WIDTH | {"use_bias": BOOL},
    "arcee": BIASES | WIDTH,
    "granite": BIASES
    | {
        "embedding_multiplier": [ABSENT, 12.0, 1],
        "logits_scaling": [ABSENT, 8.0, 3, 0.5],
        "residual_multiplier": [ABSENT, 0.22],
        "attention_multiplier": [ABSENT, 0.0078125, 0.3],
    },
    "phi3": WINDOW | {"partial_rotary_factor": [ABSENT, 0.5, 0.75, 1.0]},
    "olmo2": BIAS,
    "olmo3": BIAS | BY_TYPE,
    "exaone4": BY_TYPE | {"sliding_window_pattern": [ABSENT, 2, 4, "LLG"]},
    "gemma": BIAS | {"head_dim": [8, 16], "hidden_activation": [ABSENT, None, "gelu"]},
    "gemma2": BIAS | BY_TYPE | CAPS | {"head_dim": [8, 16]},
    "gemma3_text": BIAS
    | BY_TYPE
    | CAPS
    | {"attn_logit_softcapping": [ABSENT, None]}
    | {"head_dim": [8, 16], "sliding_window_pattern": [ABSENT, 2, 3]}
    | {"rope_local_base_freq": [ABSENT, 500.0, 10000.0]},
    "glm": BIAS | PARTIAL | {"head_dim": [8, 16]},
    "glm4": BIAS | PARTIAL | {"head_dim": [8, 16]},
    "stablelm": PARTIAL
    | {"use_qkv_bias": BOOL, "qk_layernorm": BOOL, "use_parallel_residual": BOOL},
    "starcoder2": WINDOW | {"use_bias": BOOL},
    "nemotron": BIASES | PARTIAL | WIDTH,
    "cohere": BIAS | {"logit_scale": [ABSENT, 0.5, 1.0], "use_qk_norm": BOOL},
    "cohere2": BIAS
    | BY_TYPE
    | {"logit_scale": [ABSENT, 0.5], "sliding_window_pattern": [ABSENT, 2, 3]},
    "mixtral": WINDOW
    | EXPERTS
    | {"num_local_experts": [4, 8], "head_dim": [ABSENT, None, 8, 16]}
    | {"moe_intermediate_size": [ABSENT], "router_jitter_noise": [ABSENT, 0.1]},
    "qwen2_moe": SWITCHED
    | LISTED
    | {"num_experts": [4, 8], "shared_expert_intermediate_size": [24, 16], "qkv_bias": BOOL},
    "qwen3_moe": SWITCHED | LISTED | BIAS | {"num_experts": [4, 8], "head_dim": [ABSENT, 8, 16]},
    "glm4_moe": BIAS | PARTIAL | GROUPED | {"use_qk_norm": BOOL, "head_dim": [ABSENT, 8, 16]},
    "gpt_oss": BIAS
    | BY_TYPE
    | EXPERTS
    | {"num_local_experts": [4, 8], "head_dim": [8, 16], "moe_intermediate_size": [ABSENT]}
    | {"swiglu_limit": [ABSENT, 0.5, 7.0], "swiglu_alpha": [ABSENT, 1.0, 1.702]},
    "deepseek_v3": BIAS | LATENT | {"rope_interleave": BOOL, "topk_method": [ABSENT, "noaux_tc"]},
    "deepseek_v2": BIASES
    | LATENT
    | {"topk_method": [ABSENT, "greedy", "group_limited_greedy"], "n_group": [None, 1, 2, 4]}
    | {"topk_group": [None, 1, 2], "scoring_func": [ABSENT, "softmax"]}
    | {"norm_topk_prob": [ABSENT, False], "num_key_value_heads": [ABSENT]},
}
"""What a family's files say, beside what all say: one of each list, at random."""

EPSILON = {"stablelm": "layer_norm_eps", "starcoder2": "norm_epsilon", "nemotron": "norm_eps"}
EPSILON |= dict.fromkeys(("cohere", "cohere2"), "layer_norm_eps")
ACTIVATION: dict[str, str] = dict.fromkeys(("gemma2", "gemma3_text"), "hidden_activation")
NESTED = ("olmo3", "gemma3_text")
"""Families whose rotary settings are apart by kind of layer."""

STRANGERS: dict[str, list[Any]] = {
    "attention_bias": [True, False],
    "mlp_bias": [True],
    "use_bias": [True],
    "qkv_bias": [True],
    "clip_qkv": [None, 0.5],
    "attn_logit_softcapping": [None, 3.0],
    "final_logit_softcapping": [3.0],
    "logit_scale": [0.5],
    "logits_scaling": [4.0],
    "embedding_multiplier": [3.0],
    "residual_multiplier": [0.5],
    "query_pre_attn_scalar": [100],
    "use_qk_norm": [True],
    "qk_layernorm": [True],
    "norm_topk_prob": [True, False],
    "routed_scaling_factor": [2.0],
    "first_k_dense_replace": [1],
    "rope_interleave": [False, True],
    "rope_interleaved": [True],
    "no_rope_layers": [[1, 0, 1, 0, 1]],
    "sliding_window": [6],
    "use_sliding_window": [True],
    "layer_types": [Types],
    "use_parallel_residual": [True],
    "partial_rotary_factor": [0.5],
    "use_bidirectional_attention": [True, False, None],
    "is_causal": [False],
    "head_dim": [None, 8, 16],
    "original_max_position_embeddings": [16],
    "scale_attn_by_inverse_layer_idx": [True],
    "per_layer_config": [{"1": {"intermediate_size": 24}}],
    "num_experts": [6],
    "num_local_experts": [6],
    "tie_word_embeddings": [None],
    "torch_dtype": ["bfloat16"],
    "initializer_range": [0.5],
    "attention_dropout": [0.1],
}
"""Keys that may stand in any file; a family either knows one, or does nothing with it."""


def draw(family: str, seed: int) -> dict[str, Any]:
    """A config.json."""
    rng = np.random.default_rng([seed, *family.encode()])

    def one(choices: list[Any]) -> Any:
        return choices[int(rng.integers(len(choices)))]

    width, heads, groups = one(SIZES)
    layers = int(rng.integers(1, 6))
    config: dict[str, Any] = cases.BASE | {
        "model_type": family,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if "kv_lora_rank" in FAMILIES[family] else groups,
        "num_hidden_layers": layers,
        "vocab_size": one([64, 67]),
        "tie_word_embeddings": one(BOOL),
        "max_position_embeddings": one([64, 64, 24, ABSENT]),
        EPSILON.get(family, "rms_norm_eps"): one([ABSENT, 1e-5, 1e-2]),
    }
    if family != "gpt_oss":
        config[ACTIVATION.get(family, "hidden_act")] = one([ABSENT, *ACTIVATIONS])
    for name, choices in FAMILIES[family].items():
        config[name] = one(choices)
    head = config.get("head_dim", ABSENT)
    head = config.get("qk_rope_head_dim", width // heads if head in (ABSENT, None) else head)
    partial = config.get("partial_rotary_factor", ABSENT)
    partial = (
        {"glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5, "nemotron": 0.5, "stablelm": 0.25}.get(
            family, 1.0
        )
        if partial is ABSENT
        else partial
    )
    config |= _rope(family, int(head * partial) // 2, one)
    if rng.random() < 0.15:
        name = one(list(STRANGERS))
        if config.get(name, ABSENT) is ABSENT:
            config[name] = one(STRANGERS[name])

    def filled(value: Any) -> Any:
        if value is Types:
            return [one(["sliding_attention", "full_attention"]) for _ in range(layers)]
        if value is Layers:
            return sorted({int(rng.integers(layers)) for _ in range(2)})
        if value is Flags:
            return [int(rng.integers(2)) for _ in range(layers)]
        return value

    return {name: filled(value) for name, value in config.items() if value is not ABSENT}


def _rope(family: str, pairs: int, one: Any) -> dict[str, Any]:
    """Rotary settings, in one of the places where they may stand."""
    theta = one([ABSENT, 10000.0, 500000.0, 777.0])
    kind = one(["absent", "default", "linear", "dynamic", "yarn", "llama3", "longrope"])
    if kind == "absent":
        return {"rope_theta": theta}
    settings: dict[str, Any] = {one(["rope_type", "type"]): kind}
    if kind != "default":
        settings["factor"] = one([4.0, 8.0, 2])
    if kind == "yarn":
        settings |= {
            "original_max_position_embeddings": one([16, 32, ABSENT]),
            "attention_factor": one([ABSENT, ABSENT, None, 1.3]),
            "beta_fast": one([ABSENT, 32, 16.0]),
            "beta_slow": one([ABSENT, 1, 2.0]),
            "mscale": one([ABSENT, 1.0, 0.707]),
            "mscale_all_dim": one([ABSENT, 1.0, 0.8]),
            "truncate": one([ABSENT, False, True]),
        }
    elif kind == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        settings["original_max_position_embeddings"] = one([16, 32, ABSENT])
    elif kind == "longrope":
        settings |= {
            "short_factor": [1.0 + 0.1 * pair for pair in range(one([pairs] * 9 + [3]))],
            "long_factor": [2.0 + pair for pair in range(pairs)],
            "original_max_position_embeddings": one([16, 48, ABSENT]),
            "attention_factor": one([ABSENT, 1.2]),
            "factor": one([ABSENT, 4.0]),
        }
    settings = {name: value for name, value in settings.items() if value is not ABSENT}
    place = one(["parameters", "scaling", "scaling", "both"])
    if place == "scaling":
        return {"rope_theta": theta, "rope_scaling": settings}
    inside = settings | ({} if theta is ABSENT else {"rope_theta": theta})
    if family in NESTED:
        other = {"rope_type": "default", "rope_theta": one([10000.0, 300.0])}
        inside = {"full_attention": inside, "sliding_attention": other}
    if place == "parameters":
        return {"rope_parameters": inside}
    scaling = {"rope_type": "linear", "factor": 3.0}
    return {"rope_parameters": inside, "rope_scaling": scaling, "rope_theta": theta}


class TheirsRefuses(Exception):
    """transformers has no such model."""


def their_folder(config: dict[str, Any], folder: Path, *, head: bool = False) -> Any:
    """Writes the folder as drawn; returns transformers' model.

    Args:
        head: of a tied model, written to the file all the same, another one than the embedding.
    """
    import safetensors.numpy
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    try:
        read = transformers.AutoConfig.from_pretrained(folder)
        transformers.AutoModelForCausalLM.from_config(read, dtype=torch.float32).save_pretrained(
            folder
        )
        path = folder / "model.safetensors"
        tensors = {
            name: cases.weights_of(name, value.shape)
            for name, value in safetensors.numpy.load_file(path).items()
        }
        if head:
            shape = tensors["model.embed_tokens.weight"].shape
            tensors.setdefault("lm_head.weight", cases.weights_of("lm_head.weight", shape))
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
        (folder / "config.json").write_text(text)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = model.eval()
        cases.their_logits(model, TOKENS)
        return model
    except Exception as error:
        raise TheirsRefuses(f"{type(error).__name__}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one configuration."""

    what: str
    """equal, different, ours refuses, theirs refuses."""
    said: str = ""
    error: float = 0.0


def compare(family: str, seed: int, folder: Path) -> Outcome:
    """Draws a configuration and has both compute it."""
    return compared(draw(family, seed), folder, head=seed % 4 == 0)


def compared(config: dict[str, Any], folder: Path, *, head: bool = False) -> Outcome:
    """Has both compute a configuration; `head` as of `their_folder`."""
    import jax
    import jax.numpy as jnp

    from jaxsys.errors import UsageError
    from jaxsys.model import forward, load

    refused, wanted = None, np.zeros(0)
    try:
        theirs = their_folder(config, folder, head=head)
        wanted = cases.their_logits(theirs, TOKENS)
    except TheirsRefuses as error:
        refused = str(error)
    try:
        if refused is not None:
            from jaxsys.model.folder import read_config

            read_config(folder)  # whatever it says, it is no traceback
            return Outcome("theirs refuses", refused)
        model = load(folder)
        run = jax.jit(functools.partial(forward, model.config))
        ours = run(model.parameters, jnp.asarray(TOKENS, jnp.int32))
    except UsageError as error:
        return Outcome("theirs refuses" if refused else "ours refuses", refused or str(error))
    error = float(np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max())
    return Outcome("equal" if error < TOLERANCE else "different", error=error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:10", help="FIRST:END (default: 0:10)")
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    arguments = parser.parse_args()
    first, end = map(int, arguments.seeds.split(":"))
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for seed in range(first, end):
        for family in arguments.family or FAMILIES:
            with tempfile.TemporaryDirectory() as name:
                found = compare(family, seed, Path(name))
            counts[found.what] += 1
            said = found.said.replace(name, "").replace("\n", " ")[:300]
            print(f"{family} {seed} {found.what} {found.error:.1e} {said}", flush=True)
    print(dict(counts))
    return int(counts["different"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
