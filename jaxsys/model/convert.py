"""`jaxsys convert`: a model's folder or .gguf file to a folder that transformers reads too.

Read and written tensor by tensor: memory holds one at a time. Quantised numbers become those that
they stand for.

`--round int4 --calibrate TEXT` rounds matrices to numbers that a form has, with care that a server
has no time for: served with `--quantise int4` they come back as they are.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jax.typing import DTypeLike

from jaxsys.errors import RunError, UsageError
from jaxsys.files import read_text
from jaxsys.model.assemble import Leaves
from jaxsys.model.calibration import LENGTH, Rounded, sequences
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
    add(
        "--round",
        choices=("int4", "fp8"),
        dest="form",
        help="round matrices for `jaxsys serve --quantise` of this form, by --calibrate",
    )
    add("--calibrate", type=Path, metavar="TEXT", help="file of text like what the model will see")
    return result


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command."""
    options = parser(prog).parse_args(argv)
    check_target(options.out, overwrite=False)
    if (options.form is None) != (options.calibrate is None):
        raise UsageError("--round and --calibrate go together: a form, and a text to round by")
    model = open_model(options.model)
    leaves = None if options.form is None else _rounded(model, options)
    try:
        convert(model, options.out, options.dtype, leaves=leaves)
    except OSError as error:
        raise RunError(f"{options.out} could not be written: {error.strerror or error}") from None
    count = model.config.parameter_count()
    more = "" if options.form is None else f", rounded for --quantise {options.form}"
    print(f"{options.out}: {model.config.family}, {count:,} parameters in {options.dtype}{more}")
    return 0


def _rounded(model: OpenModel, options: argparse.Namespace) -> Leaves:
    if model.tokenizer is None:
        raise UsageError(f"{model.source} has no tokenizer, which --calibrate needs")
    text = read_text(options.calibrate)
    length = min(LENGTH, model.config.max_positions)
    tokens = sequences(text, model.tokenizer, length)
    return Rounded(model.checkpoint, options.dtype, options.form, tokens)


def convert(
    model: OpenModel,
    folder: Path,
    dtype: DTypeLike,
    *,
    overwrite: bool = False,
    leaves: Leaves | None = None,
) -> None:
    """Writes an open model as a folder, whole or not at all.

    Args:
        model: of any form.
        folder: as of `save_safetensors`.
        dtype: of all numbers.
        overwrite: replace a model folder that is there already.
        leaves: to write in place of the model's own.

    Raises:
        UsageError: if a tensor holds NaN or infinity, or values beyond the dtype.
    """
    save_safetensors(
        folder,
        model.config,
        leaves or Leaves(model.checkpoint, dtype),
        model.tokenizer,
        overwrite=overwrite,
        generation=model.generation,
    )
