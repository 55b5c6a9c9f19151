"""Published checkpoints whose matrices are quantised, read as the matrices they stand for.

A config.json says how in `quantization_config`; each quantised module has tensors in place of its
weight [N, K]:

    fp8 (DeepSeek, Qwen)   weight F8_E4M3, weight_scale_inv: one, or one a block; values * scale
    compressed-tensors     weight F8_E4M3 or I8, weight_scale: one, [N, 1], [N, K / g] or blocks;
                           or weight_packed I32, lowest bits first, stored plus 2^(bits - 1), with
                           weight_scale, weight_zero_point, weight_g_idx, weight_shape
    gptq                   qweight I32 [K / n, N], qzeros, scales [K / g, N], g_idx: (q - z) * s
    awq                    qweight I32 [K, N / 8] in the order 0 2 4 6 1 3 5 7, qzeros, scales

Layouts as files of those libraries have them (compressed-tensors 0.20, transformers 5.24, auto-gptq
0.7.1, autoawq 0.2.9). Scales of activations, queries, keys and values say how others round while
they compute; weights do not depend on them, and they are not read.

Legend: N outputs, K inputs, g inputs of a group, n numbers in a word of 32 bits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.model.quantised_settings import WHOLE, Scheme, one_more, schemes
from jaxsys.model.rows import Rows
from jaxsys.model.safetensors_file import SafetensorsFile

Shapes = dict[str, tuple[int, ...]]
Fetch = Callable[[str], Rows]

WEIGHT = ".weight"
_UNREAD = (
    ".input_scale", ".activation_scale", ".input_global_scale", ".k_scale", ".v_scale", ".q_scale",
    ".kv_scale",
    ".output_scale", ".input_zero_point", ".k_zero_point", ".v_zero_point",
)  # fmt: skip
"""Of activations and caches."""
MARKS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
"""Of tensors that no other weights have."""
_WORD = 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble that holds each of eight columns."""


def present(
    settings: Mapping[str, Any], home: Mapping[str, SafetensorsFile], found: Shapes
) -> tuple[Shapes, dict[str, Fetch]]:
    """Shapes with each quantised module's tensors as the one weight [N, K] that they stand for.

    Args:
        settings: a `quantization_config` that `quantised_settings.check` takes.
        home: the file of each tensor.
        found: shapes of all tensors as stored.

    Returns:
        Shapes as an unquantised file would have them, and how to read those that are quantised:
        name -> rows in float32.

    Raises:
        UsageError: if a module's tensors do not fit together, or a scale is missing.
    """
    files = _Files(home, found)
    method = settings["quant_method"]
    shapes, fetch = dict(found), {}
    for name in found:
        if name.endswith(_UNREAD):
            del shapes[name]
    for name in found:
        module, _, kind = name.rpartition(".")
        made: tuple[tuple[int, int], Fetch, tuple[str, ...]] | None = None
        if kind == "weight" and files.dtype(name) in ("F8_E4M3", "I8"):
            made = _of_bytes(files, settings, module)
        elif kind == "weight_packed" and method == "compressed-tensors":
            made = _of_words(files, settings, module)
        elif kind == "qweight" and method in ("gptq", "awq"):
            made = (_of_gptq if method == "gptq" else _of_awq)(files, settings, module)
        if made is not None:
            shape, read, parts = made
            for part in parts:
                shapes.pop(module + part, None)
            shapes[module + WEIGHT], fetch[module + WEIGHT] = shape, read
    return shapes, fetch


class _Files:
    """Tensors of a folder, by name, with the faults of what goes with them."""

    def __init__(self, home: Mapping[str, SafetensorsFile], found: Shapes) -> None:
        self._home, self._found = home, found

    def dtype(self, name: str) -> str:
        return self._home[name].stored_dtype(name)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UsageError naming the tensor where it is missing."""
        if name not in self._found:
            raise UsageError(
                f"tensor {name!r} is missing, without which its module's weights are not known; "
                "fetch the model again"
            )
        return self._found[name]

    def words(self, name: str) -> np.ndarray:
        """Tensors of 32-bit integers, as unsigned; a view."""
        self.shape(name)
        return self._home[name].read_as(name, "I32").view("<u4")

    def integers(self, name: str, dtype: str) -> np.ndarray:
        self.shape(name)
        return self._home[name].read_as(name, dtype)

    def numbers(self, name: str) -> np.ndarray:
        """Quantised values; a view."""
        return self._home[name].read_as(name, "F8_E4M3", "I8")

    def scales(self, name: str) -> np.ndarray:
        """Scales in float32.

        Raises:
            UsageError: naming the tensor where one is not finite.
        """
        self.shape(name)
        values = self._home[name].read_as(name, "F32", "BF16", "F16", "F8_E8M0", "U8")
        if values.dtype == np.uint8:  # exponents
            values = np.ldexp(np.where(values == 255, np.nan, 1.0), values.astype(np.int32) - 127)
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise UsageError(
                f"tensor {name!r} holds a scale that is not finite; the checkpoint is damaged"
            )
        return values


def _check_zeros(
    files: _Files,
    name: str,
    said: list[Scheme],
    integers: bool,
    wanted: tuple[int, ...],
    shape: tuple[int, ...],
) -> None:
    """Raises UsageError where zero points are said to be and are not, or do not fit."""
    if name in files or (integers and all(scheme.zeros for scheme in said)):
        found = files.shape(name)
        if found != wanted:
            raise _misfit(name, found, shape)


def _misfit(
    name: str, shape: tuple[int, ...], weight: tuple[int, ...], said: Sequence[Scheme] = ()
) -> UsageError:
    groups = next((scheme.group for scheme in said if scheme.group is not None), None)
    more = "" if groups is None else f" with a scale {_a_group(groups)}, as its settings say"
    return UsageError(
        f"tensor {name!r} of shape {shape} does not fit a weight of shape {weight}{more}"
    )


def _a_group(size: int) -> str:
    return "an output" if size == WHOLE else f"for {size} inputs of an output"


def _of_bytes(files: _Files, settings: Mapping[str, Any], module: str):
    """weight F8_E4M3 or I8, and its scale or scales."""
    name = module + WEIGHT
    shape = files.shape(name)
    scale = module + ".weight_scale"
    if settings["quant_method"] == "fp8" and scale not in files:
        scale += "_inv"
    of_scale = files.shape(scale)
    zero = module + ".weight_zero_point"
    said = schemes(settings)
    if len(shape) != 2:
        raise _misfit(scale, of_scale, shape)
    block = _block(said, shape, of_scale)
    if block is None:
        raise _misfit(scale, of_scale, shape, said)
    _check_zeros(files, zero, said, files.dtype(name) == "I8", of_scale, shape)

    def read(_: str) -> Rows:
        values, scales = files.numbers(name), files.scales(scale)
        zeros = files.integers(zero, "I8").astype(np.float32) if zero in files else None

        def some(start: int, stop: int) -> np.ndarray:
            made = values[start:stop].astype(np.float32)
            if zeros is not None:
                made -= _spread(zeros, block, shape, start, stop)
            made *= _spread(scales, block, shape, start, stop)
            return made

        return Rows(shape=shape, read=some)

    return shape, read, (WEIGHT, scale.removeprefix(module), ".weight_zero_point")


def _block(
    said: list[Scheme], shape: tuple[int, ...], of_scale: tuple[int, ...]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the scales are not as is said."""
    outputs, inputs = shape
    if int(np.prod(of_scale)) == 1:
        return outputs, inputs
    if of_scale == (outputs,):
        of_scale = (outputs, 1)
    if len(of_scale) != 2:
        return None
    for scheme in said:
        if scheme.block is not None:
            rows, columns = scheme.block
            # The last block of a row or column may be cut short.
            if of_scale == (-(-outputs // rows), -(-inputs // columns)):
                return rows, columns
        elif of_scale[0] == outputs:
            group = scheme.inputs_of_group(inputs, of_scale[1])
            if group is not None:
                return 1, group
    # A scale an output is what it is, also of modules that a file of blocks says nothing of.
    alone = of_scale == (outputs, 1) and all(scheme.group is None for scheme in said)
    return (1, inputs) if alone else None


def _spread(
    scales: np.ndarray, block: tuple[int, int], shape: tuple[int, ...], start: int, stop: int
) -> np.ndarray:
    """Scales of blocks [.., ..] as those of some rows' numbers, or such as broadcast to them."""
    outputs, inputs = shape
    rows, columns = block
    grid = scales.reshape(-(-outputs // rows), -(-inputs // columns))
    own = grid[np.arange(start, stop) // rows]
    return own if columns == inputs else np.repeat(own, columns, axis=1)[:, :inputs]


def _of_words(files: _Files, settings: Mapping[str, Any], module: str):
    """weight_packed of compressed-tensors."""
    packed, scale = module + ".weight_packed", module + ".weight_scale"
    shape = tuple(files.integers(module + ".weight_shape", "I64").reshape(-1).tolist())
    words, of_scale = files.shape(packed), files.shape(scale)
    if len(shape) != 2 or len(words) != 2 or words[0] != shape[0] or min(shape) < 1:
        raise _misfit(packed, words, shape)
    fitting = [b for b in (2, 4, 8) if words[1] == -(-shape[1] * b // _WORD)]
    said = [bits for bits in fitting if bits in {one.bits for one in schemes(settings)}]
    if not said:
        raise _misfit(packed, words, shape)
    bits = min(said)
    order, zero = module + ".weight_g_idx", module + ".weight_zero_point"
    own = [scheme for scheme in schemes(settings) if scheme.bits == bits]
    if len(of_scale) != 2 or of_scale[0] != shape[0]:
        raise _misfit(scale, of_scale, shape)
    size = _size(own, shape[1], of_scale[1])
    if size is None:
        raise _misfit(scale, of_scale, shape, own)
    _need_order(files, order, own, of_scale[1])
    _check_zeros(files, zero, own, True, (-(-shape[0] * bits // _WORD), of_scale[1]), shape)
    middle = 2 ** (bits - 1)

    def read(_: str) -> Rows:
        held, scales = files.words(packed), files.scales(scale)
        groups = _groups(files, order, shape[1], scales.shape[1], size)
        zeros = None
        if zero in files:
            zeros = _unpack(files.words(zero), bits, axis=0)[: shape[0]] - middle

        def some(start: int, stop: int) -> np.ndarray:
            values = _unpack(held[start:stop], bits, axis=1)[:, : shape[1]] - middle
            if zeros is not None:
                values -= zeros[start:stop][:, groups]
            return values.astype(np.float32) * scales[start:stop][:, groups]

        return Rows(shape=shape, read=some)

    parts = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")
    return shape, read, (*parts, ".weight_g_idx")


def _size(said: list[Scheme], inputs: int, count: int) -> int | None:
    """Inputs of a group, by the first of some schemes that has so many groups."""
    sizes = [scheme.inputs_of_group(inputs, count) for scheme in said]
    return next((size for size in sizes if size is not None), None)


def _need_order(files: _Files, name: str, said: list[Scheme], count: int) -> None:
    """Raises UsageError where groups are not in a row and no tensor says how they are."""
    if count > 1 and all(scheme.ordered for scheme in said):
        files.shape(name)


def _groups(files: _Files, name: str, inputs: int, count: int, size: int) -> np.ndarray:
    """The group of each input: as a tensor says, else `size` of them in a row.

    Raises:
        UsageError: if a tensor that says so names groups that there are not.
    """
    if name not in files:
        return np.arange(inputs) // size
    groups = files.integers(name, "I32").astype(np.int64)
    if groups.shape != (inputs,) or groups.min() < 0 or groups.max() >= count:
        raise UsageError(f"tensor {name!r} does not name one of {count} groups for {inputs} inputs")
    return groups


def _unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Numbers of so many bits out of words, the lowest first, along an axis; int32."""
    shifts = np.arange(0, _WORD, bits, dtype=np.uint32)
    apart = np.moveaxis(words, axis, -1)[..., None] >> shifts
    flat = (apart & np.uint32(2**bits - 1)).astype(np.int32).reshape(*apart.shape[:-2], -1)
    return np.moveaxis(flat, -1, axis)


def _of_gptq(files: _Files, settings: Mapping[str, Any], module: str):
    """qweight of GPTQ: inputs along the words of a column."""
    names = [module + part for part in (".qweight", ".qzeros", ".scales")]
    order = module + ".g_idx"
    words, of_zeros, of_scales = (files.shape(name) for name in names)
    if len(words) != 2 or len(of_scales) != 2 or of_scales[1] != words[1]:
        raise _misfit(names[2], of_scales, words)
    # Modules may have other bits than most: zero points show how many.
    own = [
        scheme
        for scheme in schemes(settings)
        if of_zeros == (of_scales[0], -(-words[1] * (scheme.bits or 0) // _WORD))
    ]
    if not own:
        raise _misfit(names[1], of_zeros, words)
    bits = own[0].bits
    assert bits is not None
    own = [scheme for scheme in own if scheme.bits == bits]
    shape = (words[1], words[0] * _WORD // bits)
    size = _size(own, shape[1], of_scales[0])
    if size is None:
        raise _misfit(names[2], of_scales, shape, own)
    _need_order(files, order, own, of_scales[0])
    more = 1 if one_more(settings) else 0
    mask = 2**bits - 1

    def read(_: str) -> Rows:
        held, scales = files.words(names[0]), files.scales(names[2])
        zeros = (_unpack(files.words(names[1]), bits, axis=1)[:, : shape[0]] + more) & mask
        groups = _groups(files, order, shape[1], scales.shape[0], size)

        def some(start: int, stop: int) -> np.ndarray:
            values = _unpack(held[:, start:stop], bits, axis=0)
            values -= zeros[:, start:stop][groups]
            return (values.astype(np.float32) * scales[:, start:stop][groups]).T

        return Rows(shape=shape, read=some)

    return shape, read, (".qweight", ".qzeros", ".scales", ".g_idx")


def _of_awq(files: _Files, settings: Mapping[str, Any], module: str):
    """qweight of AWQ: outputs along the words of a row, in an order of their own."""
    names = [module + part for part in (".qweight", ".qzeros", ".scales")]
    words, of_zeros, of_scales = (files.shape(name) for name in names)
    if len(words) != 2 or of_scales[1:] != (8 * words[1],):
        raise _misfit(names[2], of_scales, words)
    shape, said = (8 * words[1], words[0]), schemes(settings)
    size = _size(said, shape[1], of_scales[0])
    if size is None:
        raise _misfit(names[2], of_scales, shape, said)
    if of_zeros != (of_scales[0], words[1]):
        raise _misfit(names[1], of_zeros, words)

    def columns(words: np.ndarray) -> np.ndarray:
        apart = _unpack(words, 4, axis=1)
        return apart.reshape(apart.shape[0], -1, 8)[..., _AWQ_ORDER].reshape(apart.shape)

    def read(_: str) -> Rows:
        held, scales = files.words(names[0]), files.scales(names[2])
        zeros = files.words(names[1])
        groups = np.arange(shape[1]) // size

        def some(start: int, stop: int) -> np.ndarray:
            words = slice(start // 8, -(-stop // 8))  # of eight outputs each
            own = slice(8 * words.start, min(8 * words.stop, shape[0]))
            values = columns(held[:, words]) - columns(zeros[:, words])[groups]
            made = values.astype(np.float32) * scales[:, own][groups]
            return made[:, start - own.start :][:, : stop - start].T

        return Rows(shape=shape, read=some)

    return shape, read, (".qweight", ".qzeros", ".scales")
