"""Decoders by description: configurations, mathematics, plain pytrees, files and tokenizers."""

from jaxsys.model.attention import attend, choose_implementation
from jaxsys.model.block import BoundBlock
from jaxsys.model.config import DecoderConfig
from jaxsys.model.decoder import (
    Decoder,
    Edge,
    abstract_parameters,
    bind_block,
    bind_edge,
    build,
    forward,
    initial_parameters,
    parameters,
)
from jaxsys.model.families import FAMILIES, Family, register
from jaxsys.model.kinds import BlockKind, Experts, Latent, Positions
from jaxsys.model.layers import layered
from jaxsys.model.load import LoadedModel, default_model_path, load
from jaxsys.model.rope import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    Rope,
    YarnRopeScaling,
)
from jaxsys.model.save import save_safetensors
from jaxsys.model.shapes import preset
from jaxsys.model.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer

__all__ = [
    "FAMILIES",
    "BlockKind",
    "BoundBlock",
    "ByteTokenizer",
    "Decoder",
    "DecoderConfig",
    "DynamicRopeScaling",
    "Edge",
    "Experts",
    "Family",
    "Latent",
    "LinearRopeScaling",
    "Llama3RopeScaling",
    "LoadedModel",
    "LongRopeScaling",
    "Positions",
    "Rope",
    "StreamDecoder",
    "Tokenizer",
    "YarnRopeScaling",
    "abstract_parameters",
    "attend",
    "bind_block",
    "bind_edge",
    "build",
    "choose_implementation",
    "default_model_path",
    "forward",
    "initial_parameters",
    "layered",
    "load",
    "parameters",
    "preset",
    "register",
    "save_safetensors",
]
