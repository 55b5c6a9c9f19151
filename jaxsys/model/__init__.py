"""The Llama-family decoder: its configuration, module, plain pytree, files and tokenizers."""

from jaxsys.model.attention import attend, choose_implementation
from jaxsys.model.config import DecoderConfig, Llama3RopeScaling, preset
from jaxsys.model.decoder import (
    Block,
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
from jaxsys.model.layers import layered
from jaxsys.model.load import LoadedModel, default_model_path, load
from jaxsys.model.save import save_safetensors
from jaxsys.model.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer

__all__ = [
    "Block",
    "ByteTokenizer",
    "Decoder",
    "DecoderConfig",
    "Edge",
    "Llama3RopeScaling",
    "LoadedModel",
    "StreamDecoder",
    "Tokenizer",
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
    "save_safetensors",
]
