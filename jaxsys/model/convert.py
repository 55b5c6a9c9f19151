"""`jaxsys convert`: a model's folder or .gguf file to a folder that transformers reads too.

Read and written tensor by tensor: memory holds one at a time. Quantised numbers become those that
they stand for.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jax.typing import DTypeLike

from jaxsys.errors import RunError
from jaxsys.model.assemble import Leaves
from jaxsys.model.load import OpenModel, open_model
from jaxsys.model.save import check_target, save_safetensors
from jaxsys.options import Parser

DTYPES = ("float32", "bfloat16", "float16")


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of `jaxsys convert`."""
    result = Parser(
        prog=prog, description="Write a model of any form that is read as a Hugging Face folder."
    )
    add = result.add_argument
    add("--model", type=Path, required=True, help="folder or .gguf file")
    add("--out", type=Path, required=True, help="folder to write, new or empty")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of all numbers (default: bfloat16)")
    return result


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command."""
    options = parser(prog).parse_args(argv)
    check_target(options.out, overwrite=False)
    model = open_model(options.model)
    try:
        convert(model, options.out, options.dtype)
    except OSError as error:
        raise RunError(f"{options.out} could not be written: {error.strerror or error}") from None
    count = model.config.parameter_count()
    print(f"{options.out}: {model.config.family}, {count:,} parameters in {options.dtype}")
    return 0


def convert(model: OpenModel, folder: Path, dtype: DTypeLike, *, overwrite: bool = False) -> None:
    """Writes an open model as a folder, whole or not at all.

    Args:
        model: of any form.
        folder: as of `save_safetensors`.
        dtype: of all numbers.
        overwrite: replace a model folder that is there already.

    Raises:
        UsageError: if a tensor holds NaN or infinity, or values beyond the dtype.
    """
    save_safetensors(
        folder,
        model.config,
        Leaves(model.checkpoint, dtype),
        model.tokenizer,
        overwrite=overwrite,
        generation=model.generation,
    )
