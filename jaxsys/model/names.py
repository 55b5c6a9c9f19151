"""Where each leaf of the parameters lives in checkpoint files, stated once for reading and writing.

A leaf is a path into {"edge": ..., "blocks": ...}. Checkpoints keep kernels [out, in], we keep them
[in, out]; blocks are one tensor a layer there and stacked here.
"""

from dataclasses import dataclass

from jaxsys.model.config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One array of the parameters and its names elsewhere.

    Names of blocks hold `{layer}`.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    shape: tuple[int, ...]
    """In the checkpoint, of one layer."""
    transposed: bool = False
    """Whether the checkpoint's [out, in] is our [in, out]."""
    rotary_heads: int | None = None
    """Heads whose rows llama.cpp stores with rotary pairs side by side."""


def edge_leaves(config: DecoderConfig) -> list[Leaf]:
    """Leaves outside the blocks."""
    table = (config.vocab_size, config.hidden_size)
    leaves = [
        Leaf(
            path=("embed", "table"),
            hf="model.embed_tokens.weight",
            gguf="token_embd.weight",
            shape=table,
        ),
        Leaf(
            path=("norm", "scale"),
            hf="model.norm.weight",
            gguf="output_norm.weight",
            shape=(config.hidden_size,),
        ),
    ]
    if not config.tie_embeddings:
        leaves.append(
            Leaf(
                path=("head", "kernel"),
                hf="lm_head.weight",
                gguf="output.weight",
                shape=table,
                transposed=True,
            )
        )
    return leaves


def block_leaves(config: DecoderConfig) -> list[Leaf]:
    """Leaves of one block."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def norm(name: str, hf: str, gguf: str) -> Leaf:
        return Leaf(
            path=(name, "scale"),
            hf=f"model.layers.{{layer}}.{hf}.weight",
            gguf=f"blk.{{layer}}.{gguf}.weight",
            shape=(width,),
        )

    def kernel(
        path: tuple[str, str], hf: str, gguf: str, shape: tuple[int, int], rotary: int | None = None
    ) -> Leaf:
        return Leaf(
            path=path,
            hf=f"model.layers.{{layer}}.{hf}.weight",
            gguf=f"blk.{{layer}}.{gguf}.weight",
            shape=shape,
            transposed=True,
            rotary_heads=rotary,
        )

    return [
        norm("attention_norm", "input_layernorm", "attn_norm"),
        norm("mlp_norm", "post_attention_layernorm", "ffn_norm"),
        kernel(
            ("attention", "query"), "self_attn.q_proj", "attn_q", (heads, width), config.num_heads
        ),
        kernel(
            ("attention", "key"), "self_attn.k_proj", "attn_k", (shared, width), config.num_kv_heads
        ),
        kernel(("attention", "value"), "self_attn.v_proj", "attn_v", (shared, width)),
        kernel(("attention", "out"), "self_attn.o_proj", "attn_output", (width, heads)),
        kernel(("mlp", "gate"), "mlp.gate_proj", "ffn_gate", (inner, width)),
        kernel(("mlp", "up"), "mlp.up_proj", "ffn_up", (inner, width)),
        kernel(("mlp", "down"), "mlp.down_proj", "ffn_down", (width, inner)),
    ]
