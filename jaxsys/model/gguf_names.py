"""Where GGUF files keep the leaves of a decoder, by llama.cpp's tensor names.

Kernels lie [out, in] as in Hugging Face checkpoints, all experts of a layer in one tensor. Families
whose positions turn halves of a head but which llama.cpp turns by neighbours have the rows of
query and key kernels in that order, (2i, 2i + 1); they are put back to (i, i + K/2) here. Norms
that multiply by one more than their scale are kept with that one added.
"""

import dataclasses
from collections.abc import Mapping

from jaxsys.errors import UsageError
from jaxsys.model.config import DecoderConfig
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import Leaf, block_leaves, edge_leaves
from jaxsys.model.names import FileTensor, join

MODULES: Mapping[str, str] = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
    "attention/query": "attn_q",
    "attention/key": "attn_k",
    "attention/value": "attn_v",
    "attention/out": "attn_output",
    "attention/query_norm": "attn_q_norm",
    "attention/key_norm": "attn_k_norm",
    "attention/sinks": "attn_sinks",
    "attention/query_down": "attn_q_a",
    "attention/query_down_norm": "attn_q_a_norm",
    "attention/query_up": "attn_q_b",
    "attention/latent_down": "attn_kv_a_mqa",
    "attention/latent_norm": "attn_kv_a_norm",
    "attention/latent_up": "attn_kv_b",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "experts/router": "ffn_gate_inp",
    "experts/gate": "ffn_gate_exps",
    "experts/up": "ffn_up_exps",
    "experts/down": "ffn_down_exps",
    "shared/gate": "ffn_gate_shexp",
    "shared/up": "ffn_up_shexp",
    "shared/down": "ffn_down_shexp",
    "shared/weight": "ffn_gate_inp_shexp",
}

BY_NEIGHBOURS = frozenset({"llama", "mistral", "mixtral", "granite", "arcee", "smollm3"})
"""Families whose halves llama.cpp turns as neighbours."""

JOINED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "phi3": {
        "attn_qkv": ("attention/query", "attention/key", "attention/value"),
        "ffn_up": ("mlp/gate", "mlp/up"),
    },
    "glm": {"ffn_up": ("mlp/gate", "mlp/up")},
    "glm4": {"ffn_up": ("mlp/gate", "mlp/up")},
}

OTHER: Mapping[str, Mapping[str, str]] = {
    "gpt_oss": {"mlp_norm": "post_attention_norm"},
    "glm4_moe": {"mlp_norm": "post_attention_norm"},
    "seed_oss": {"mlp_norm": "post_attention_norm"},
}
"""Names that a family has otherwise."""


QKV = {"attn_qkv": ("attention/query", "attention/key", "attention/value")}


def gguf_tensors(
    config: DecoderConfig, kind: BlockKind | None, *, joined_qkv: bool = False
) -> list[FileTensor]:
    """The tensors of one block of a kind; of the edge where it is None.

    Args:
        joined_qkv: whether this file has queries, keys and values in one tensor, which files of
            some families have and others not.
    """
    halves = config.family in BY_NEIGHBOURS
    if kind is None:
        return [_alone(config, leaf, "") for leaf in edge_leaves(config)]
    prefix = "blk.{layer}."
    leaves = {"/".join(leaf.path): leaf for leaf in block_leaves(config, kind)}
    joined = {**JOINED.get(config.family, {}), **(QKV if joined_qkv else {})}
    tensors = join(leaves, joined, {}, prefix)
    tensors += [_alone(config, leaf, prefix) for leaf in leaves.values()]
    if not halves:
        return tensors
    return [
        dataclasses.replace(tensor, halves=True)
        if any(leaf.turning_heads is not None for leaf in tensor.leaves)
        else tensor
        for tensor in tensors
    ]


def _alone(config: DecoderConfig, leaf: Leaf, prefix: str) -> FileTensor:
    part, suffix = "/".join(leaf.path), ".weight"
    last = leaf.path[-1]
    if part == "experts/correction":
        name = f"{prefix}exp_probs_b.bias"
        return FileTensor(name=name, leaves=(leaf,))
    if last in ("scale", "kernel", "table"):
        part = "/".join(leaf.path[:-1])
    elif last == "bias":
        part, suffix = "/".join(leaf.path[:-1]), ".bias"
    elif last.endswith("_bias"):
        part, suffix = part.removesuffix("_bias"), ".bias"
    module = OTHER.get(config.family, {}).get(part, MODULES.get(part))
    if module is None:
        raise UsageError(f"GGUF has no name for {part} of family {config.family}")
    form = "turned" if leaf.is_matrix else "plain"
    # Scales that are kept less one elsewhere are whole here.
    scale = last == "scale" or last.endswith("_norm")
    more = 1.0 if config.norm_plus_one and scale else 0.0
    return FileTensor(name=f"{prefix}{module}{suffix}", leaves=(leaf,), form=form, more=more)
