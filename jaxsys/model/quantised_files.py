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

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.files import shown
from jaxsys.model.rows import Rows
from jaxsys.model.safetensors_file import SafetensorsFile

Shapes = dict[str, tuple[int, ...]]
Fetch = Callable[[str], Rows]

WEIGHT = ".weight"
_UNREAD = (
    ".input_scale", ".activation_scale", ".input_global_scale", ".k_scale", ".v_scale", ".q_scale",
    ".output_scale", ".input_zero_point", ".k_zero_point", ".v_zero_point",
)  # fmt: skip
"""Of activations and caches."""
_WORD = 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble that holds each of eight columns."""
_METHODS = "fp8, compressed-tensors (float, int, pack), gptq, awq, and mxfp4 of gpt_oss"
_CT_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense")


def check(settings: Any) -> None:
    """Raises UsageError for a `quantization_config` that is not read."""
    if not isinstance(settings, Mapping):
        raise UsageError(f"quantization_config={shown(settings)} is no object")
    _check_block("weight_block_size", settings.get("weight_block_size"))
    method = settings.get("quant_method")
    if method == "gptq":
        _among(settings, "bits", (2, 4, 8), None)
        _among(settings, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    elif method == "awq":
        _among(settings, "bits", (4,), 4)
        _among(settings, "version", ("gemm",), "gemm")
    elif method == "compressed-tensors":
        _among(settings, "format", (*_CT_FORMATS, "mixed-precision"), "dense")
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping):
            raise _unread("config_groups", groups)
        for group in groups.values():
            if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
                raise _unread("config_groups", group)
            if group.get("format") is not None:
                _among(group, "format", _CT_FORMATS, None)
            _among(group["weights"], "num_bits", (2, 4, 8), None)
            _check_block("block_structure", group["weights"].get("block_structure"))
        if settings.get("sparsity_config"):
            raise _unread("sparsity_config", settings["sparsity_config"])
    elif method == "fp8":
        _among(settings, "fmt", ("e4m3",), "e4m3")
        if settings.get("expert_dtype") not in (None, "fp8"):
            raise _unread("expert_dtype", settings["expert_dtype"])
    else:
        raise _unread("quant_method", method)


def _check_block(name: str, block: Any) -> None:
    if block is None:
        return
    whole = isinstance(block, list | tuple) and [type(n) is int and n > 0 for n in block]
    if whole != [True, True]:
        raise _unread(name, block)


def _among(settings: Mapping[str, Any], name: str, known: tuple, default: Any) -> None:
    value = settings.get(name, default)
    if isinstance(value, str):
        value = value.lower()
    if type(value) not in (str, int) or value not in known:
        raise _unread(name, value)


def _unread(name: str, value: Any) -> UsageError:
    return UsageError(
        f"quantization_config's {name}={shown(value)} is not supported; read are {_METHODS}. Use "
        "the model's files in one of these or in bfloat16"
    )


def present(
    settings: Mapping[str, Any], home: Mapping[str, SafetensorsFile], found: Shapes
) -> tuple[Shapes, dict[str, Fetch]]:
    """Shapes with each quantised module's tensors as the one weight [N, K] that they stand for.

    Args:
        settings: a `quantization_config` that `check` takes.
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


def _misfit(name: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> UsageError:
    return UsageError(f"tensor {name!r} of shape {shape} does not fit a weight of shape {weight}")


def _of_bytes(files: _Files, settings: Mapping[str, Any], module: str):
    """weight F8_E4M3 or I8, and its scale or scales."""
    name = module + WEIGHT
    shape = files.shape(name)
    scale = module + ".weight_scale"
    if settings["quant_method"] == "fp8" and scale not in files:
        scale += "_inv"
    of_scale = files.shape(scale)
    zero = module + ".weight_zero_point"
    if len(shape) != 2:
        raise _misfit(scale, of_scale, shape)
    block = _block(settings, shape, of_scale)
    if block is None:
        raise _misfit(scale, of_scale, shape)

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

    parts = (WEIGHT, ".weight_scale", ".weight_scale_inv", ".weight_zero_point")
    return shape, read, parts


def _block(
    settings: Mapping[str, Any], shape: tuple[int, ...], of_scale: tuple[int, ...]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the scales do not fit."""
    outputs, inputs = shape
    if int(np.prod(of_scale)) == 1:
        return outputs, inputs
    if of_scale in ((outputs,), (outputs, 1)):
        return 1, inputs
    if len(of_scale) != 2:
        return None
    wanted = settings.get("weight_block_size")
    if wanted is None:
        found = [weights.get("block_structure") for weights in _weights(settings)]
        wanted = next((block for block in found if block), None)
    if wanted is None:  # groups of inputs
        group = -(-inputs // of_scale[1])
        return (1, group) if of_scale[0] == outputs and inputs % of_scale[1] == 0 else None
    rows, columns = (int(size) for size in wanted)
    # The last block of a row or column may be cut short.
    grid = (-(-outputs // rows), -(-inputs // columns))
    return (rows, columns) if of_scale == grid else None


def _weights(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [group["weights"] for group in settings.get("config_groups", {}).values()]


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
    said = {int(weights["num_bits"]) for weights in _weights(settings)} & set(fitting)
    if not said:
        raise _misfit(packed, words, shape)
    bits = min(said)
    order = module + ".weight_g_idx"
    zero = module + ".weight_zero_point"
    if len(of_scale) != 2 or of_scale[0] != shape[0] or shape[1] % of_scale[1]:
        raise _misfit(scale, of_scale, shape)
    middle = 2 ** (bits - 1)

    def read(_: str) -> Rows:
        held, scales = files.words(packed), files.scales(scale)
        groups = _groups(files, order, shape[1], scales.shape[1])
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


def _groups(files: _Files, name: str, inputs: int, count: int) -> np.ndarray:
    """The group of each input.

    Raises:
        UsageError: if a tensor that says so names groups that there are not.
    """
    if name not in files:
        return np.arange(inputs) // (inputs // count)
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
    bits = int(settings["bits"])
    names = [module + part for part in (".qweight", ".qzeros", ".scales")]
    words, of_zeros, of_scales = (files.shape(name) for name in names)
    count = _WORD // bits
    if len(words) != 2 or len(of_scales) != 2 or of_scales[1] != words[1]:
        raise _misfit(names[2], of_scales, words)
    shape = (words[1], words[0] * count)
    if of_zeros != (of_scales[0], -(-words[1] // count)) or shape[1] % of_scales[0]:
        raise _misfit(names[1], of_zeros, shape)
    # The first format stores zeros less one.
    more = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    mask = 2**bits - 1

    def read(_: str) -> Rows:
        held, scales = files.words(names[0]), files.scales(names[2])
        zeros = (_unpack(files.words(names[1]), bits, axis=1)[:, : shape[0]] + more) & mask
        groups = _groups(files, module + ".g_idx", shape[1], scales.shape[0])

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
    if len(words) != 2 or of_scales[1:] != (8 * words[1],) or words[0] % of_scales[0]:
        raise _misfit(names[2], of_scales, words)
    if of_zeros != (of_scales[0], words[1]):
        raise _misfit(names[1], of_zeros, words)
    shape = (8 * words[1], words[0])

    def columns(words: np.ndarray) -> np.ndarray:
        apart = _unpack(words, 4, axis=1)
        return apart.reshape(apart.shape[0], -1, 8)[..., _AWQ_ORDER].reshape(apart.shape)

    def read(_: str) -> Rows:
        held, scales = files.words(names[0]), files.scales(names[2])
        zeros = files.words(names[1])
        groups = np.arange(shape[1]) // (shape[1] // scales.shape[0])

        def some(start: int, stop: int) -> np.ndarray:
            words = slice(start // 8, -(-stop // 8))  # of eight outputs each
            own = slice(8 * words.start, min(8 * words.stop, shape[0]))
            values = columns(held[:, words]) - columns(zeros[:, words])[groups]
            made = values.astype(np.float32) * scales[:, own][groups]
            return made[:, start - own.start :][:, : stop - start].T

        return Rows(shape=shape, read=some)

    return shape, read, (".qweight", ".qzeros", ".scales")
