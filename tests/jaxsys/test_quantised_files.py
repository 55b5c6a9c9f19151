"""Quantised checkpoints are read as the matrices that their numbers and scales stand for.

Files are made here by the layouts as their libraries write them; what a matrix is meant to be is
computed beside, from its numbers and scales.
"""

import dataclasses
import json
import struct
import tracemalloc
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.model import initial_parameters, load, preset
from jaxsys.model.assemble import Leaves
from jaxsys.model.load import open_model
from jaxsys.model.quantised_settings import check
from jaxsys.model.safetensors_file import STORED, SafetensorsFile
from jaxsys.model.save import save_safetensors

# 96 and 40 are no multiples of the blocks of 64 below.
CONFIG = dataclasses.replace(
    preset("tiny"), num_layers=1, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2
)
RANDOM = np.random.default_rng(0)
E4M3 = ml_dtypes.float8_e4m3fn
AWQ = [0, 2, 4, 6, 1, 3, 5, 7]


def write(path, tensors):
    """A safetensors file of arrays, or of (dtype's name, array)."""
    names = {dtype: name for name, dtype in STORED.items()}
    header, chunks, end = {}, [], 0
    for name, values in tensors.items():
        data = np.ascontiguousarray(values).tobytes()
        header[name] = {
            "dtype": names[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [end, end + len(data)],
        }
        chunks.append(data)
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def words(numbers, bits, axis):
    """Numbers packed into int32, the lowest bits first, along an axis."""
    count = 32 // bits
    moved = np.moveaxis(numbers.astype(np.int64), axis, -1)
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % count)])
    apart = moved.reshape(*moved.shape[:-1], -1, count)
    packed = np.zeros(apart.shape[:-1], np.int64)
    for place in range(count):
        packed |= apart[..., place] << (bits * place)
    return np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis)


def e4m3(shape):
    return (RANDOM.normal(size=shape) * 50).astype(E4M3)


def scales(*shape, dtype: Any = np.float32) -> Any:
    return (RANDOM.uniform(0.5, 2, shape) / 500).astype(dtype)


def wide(values):
    return np.asarray(values).astype(np.float32)


def per_channel(n, k):
    values, scale = e4m3((n, k)), scales(n, 1, dtype=ml_dtypes.bfloat16)
    return {"weight": values, "weight_scale": scale}, wide(values) * wide(scale)


def per_tensor(n, k):
    """Static activations: their scale is not the weight's business."""
    values, scale = e4m3((n, k)), scales(1)
    tensors = {"weight": values, "weight_scale": scale, "input_scale": scales(1)}
    return tensors, wide(values) * scale


def blocks(n, k):
    values, scale = e4m3((n, k)), scales(-(-n // 64), -(-k // 64))
    meant = np.empty((n, k), np.float32)
    for row in range(n):
        for column in range(k):
            meant[row, column] = wide(values[row, column]) * scale[row // 64, column // 64]
    return {"weight": values, "weight_scale_inv": scale}, meant


def exponents(n, k):
    values = e4m3((n, k))
    scale = RANDOM.integers(-12, -6, (-(-n // 64), -(-k // 64)))
    meant = wide(values) * np.exp2(np.kron(scale, np.ones((64, 64)))[:n, :k])
    stored = np.exp2(scale).astype(ml_dtypes.float8_e8m0fnu)
    return {"weight": values, "weight_scale_inv": stored}, meant


def integers(n, k):
    values, scale = RANDOM.integers(-127, 128, (n, k)).astype(np.int8), scales(n, 1)
    return {"weight": values, "weight_scale": scale}, values * scale


def packed(n, k, asymmetric=False):
    """compressed-tensors, 4 bits, groups of 32."""
    values, scale = RANDOM.integers(-8, 8, (n, k)), scales(n, k // 32)
    zero = RANDOM.integers(-8, 8, (n, k // 32)) if asymmetric else np.zeros((n, k // 32), int)
    meant = (values - zero.repeat(32, 1)) * scale.repeat(32, 1)
    tensors = {
        "weight_packed": words(values + 8, 4, 1),
        "weight_scale": scale,
        "weight_shape": np.array([n, k], np.int64),
    }
    if asymmetric:
        tensors["weight_zero_point"] = words(zero + 8, 4, 0)
    return tensors, meant


def gptq(n, k, version=1, ordered=True):
    values, zero = RANDOM.integers(0, 16, (n, k)), RANDOM.integers(0, 16, (n, k // 32))
    scale = scales(n, k // 32, dtype=np.float16)
    groups = np.arange(k) // 32
    if not ordered:
        groups = RANDOM.permutation(groups)
    meant = (values - zero[:, groups]) * wide(scale)[:, groups]
    stored = (zero.T - 1) & 15 if version == 1 else zero.T
    return {
        "qweight": words(values.T, 4, 0),
        "qzeros": words(stored, 4, 1),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": groups.astype(np.int32),
    }, meant


def gptq_in_eight_bits(n, k):
    """Some modules have more bits than the others, and zeros for biases that are not there."""
    if n != 96:
        return gptq(n, k)
    values, zero = RANDOM.integers(0, 256, (n, k)), RANDOM.integers(0, 256, (n, k // 32))
    scale = scales(n, k // 32, dtype=np.float16)
    return {
        "qweight": words(values.T, 8, 0),
        "qzeros": words((zero.T - 1) & 255, 8, 1),
        "scales": np.ascontiguousarray(scale.T),
        "bias": np.zeros(n, np.float16),
    }, (values - zero.repeat(32, 1)) * wide(scale).repeat(32, 1)


def gptq_with_short_groups(n, k):
    """Groups of 40 inputs, the last of them shorter; no tensor says which input is of which."""
    values, count = RANDOM.integers(0, 16, (n, k)), -(-k // 40)
    zero, scale = RANDOM.integers(0, 16, (n, count)), scales(n, count, dtype=np.float16)
    groups = np.arange(k) // 40
    return {
        "qweight": words(values.T, 4, 0),
        "qzeros": words((zero.T - 1) & 15, 4, 1),
        "scales": np.ascontiguousarray(scale.T),
    }, (values - zero[:, groups]) * wide(scale)[:, groups]


def awq(n, k):
    values, zero = RANDOM.integers(0, 16, (n, k)), RANDOM.integers(0, 16, (n, k // 32))
    scale = scales(n, k // 32, dtype=np.float16)

    def ordered(numbers):
        return words(
            numbers.reshape(numbers.shape[0], -1, 8)[..., AWQ].reshape(numbers.shape), 4, 1
        )

    return {
        "qweight": ordered(values.T),
        "qzeros": ordered(zero.T),
        "scales": np.ascontiguousarray(scale.T),
    }, (values - zero.repeat(32, 1)) * wide(scale).repeat(32, 1)


def compressed(form, **weights):
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def renamed(made, old, new):
    tensors, meant = made
    return {new if name == old else name: value for name, value in tensors.items()}, meant


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
CASES = {
    "compressed-tensors, a channel": (compressed("float-quantized", num_bits=8), per_channel),
    "compressed-tensors, static": (compressed("float-quantized", num_bits=8), per_tensor),
    "compressed-tensors, int8": (compressed("int-quantized", num_bits=8), integers),
    "compressed-tensors, 4 bits": (compressed("pack-quantized", num_bits=4), packed),
    "compressed-tensors, zeros": (
        compressed("pack-quantized", num_bits=4, group_size=32, symmetric=False),
        lambda n, k: packed(n, k, asymmetric=True),
    ),
    "compressed-tensors, blocks": (
        compressed("float-quantized", num_bits=8, strategy="block", block_structure="64x64")
        | {"sparsity_config": {"format": "dense"}},
        lambda n, k: renamed(blocks(n, k), "weight_scale_inv", "weight_scale"),
    ),
    "fp8 blocks": (FP8, blocks),
    "fp8 blocks, exponents": (FP8 | {"scale_fmt": "ue8m0"}, exponents),
    "gptq": (GPTQ, gptq),
    "gptq_v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda n, k: gptq(n, k, version=2)),
    "gptq_v2 by its other name": (GPTQ | {"format": "gptq_v2"}, lambda n, k: gptq(n, k, version=2)),
    "gptq, bits by module": (
        GPTQ | {"dynamic": {"+:.*up_proj": {"bits": 8}, "-:lm_head": {}}}, gptq_in_eight_bits
    ),
    "gptq, short groups": (GPTQ | {"group_size": 40}, gptq_with_short_groups),
    "gptq, by act order": (GPTQ | {"desc_act": True}, lambda n, k: gptq(n, k, ordered=False)),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch):
    """Pieces of few rows, as those of large matrices are; no multiple of words or blocks."""
    monkeypatch.setattr("jaxsys.model.rows.AT_ONCE", 1000)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return plain_of(CONFIG, tmp_path_factory.mktemp("plain"))


def plain_of(config, folder):
    save_safetensors(folder, config, initial_parameters(config))
    file = SafetensorsFile(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    return settings, {name: np.array(file.read(name)) for name in file.shapes}


def made(plain, folder, settings, quantise, change=None):
    """A folder whose projections are quantised, and their meant matrices by name."""
    config, tensors = plain
    stored, meant = {}, {}
    for name, values in tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name] = values
            continue
        parts, meant[name] = quantise(*values.shape)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": array for part, array in parts.items()}
    if change is not None:
        change(stored)
    folder.mkdir(exist_ok=True)
    write(folder / "model.safetensors", stored)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return meant


@pytest.mark.parametrize("case", CASES)
def test_matrices_are_those_meant(case, plain, tmp_path):
    meant = made(plain, tmp_path, *CASES[case])
    found = load(tmp_path).parameters["blocks"]
    for ours, theirs in (
        (("attention", "query"), "self_attn.q_proj"),
        (("attention", "key"), "self_attn.k_proj"),
        (("mlp", "up"), "mlp.up_proj"),
        (("mlp", "down"), "mlp.down_proj"),
    ):
        wanted = meant[f"model.layers.0.{theirs}.weight"].T
        value = np.asarray(found[ours[0]][ours[1]][0])
        if ours[1] in ("query", "key"):  # rotary pairs lie as they do here
            assert value.shape == wanted.shape
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def wide_plain(tmp_path_factory):
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=2048)
    return plain_of(config, tmp_path_factory.mktemp("wide"))


AS_OTHERS = ("fp8 blocks", "compressed-tensors, blocks", "gptq_v2 by its other name")
"""Read by the code of other cases."""


@pytest.mark.parametrize("case", [case for case in CASES if case not in AS_OTHERS])
def test_a_matrix_is_never_there_whole_in_another_dtype(case, wide_plain, tmp_path):
    """Its 1 MiB in bfloat16 would be 2 MiB in float32."""
    made(wide_plain, tmp_path, *CASES[case])
    read = Leaves(open_model(tmp_path).checkpoint, jnp.bfloat16)
    tracemalloc.start()
    try:
        values = np.asarray(read.read(0, ("mlp", "down")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert values.nbytes == 2**20
    assert peak < 1.6 * 2**20


DAMAGED = {
    "a scale is missing": (
        "fp8 blocks", lambda t: t.pop("model.layers.0.mlp.down_proj.weight_scale_inv"),
        "'model.layers.0.mlp.down_proj.weight_scale_inv' is missing",
    ),
    "scales are missing": (
        "gptq", lambda t: t.pop("model.layers.0.mlp.up_proj.scales"),
        "'model.layers.0.mlp.up_proj.scales' is missing",
    ),
    "a shape is missing": (
        "compressed-tensors, 4 bits", lambda t: t.pop("model.layers.0.mlp.up_proj.weight_shape"),
        "'model.layers.0.mlp.up_proj.weight_shape' is missing",
    ),
    "a scale is NaN": (
        "awq", lambda t: t["model.layers.0.mlp.up_proj.scales"].__setitem__((0, 3), np.nan),
        "'model.layers.0.mlp.up_proj.scales' holds a scale that is not finite",
    ),
    "a scale is infinite": (
        "compressed-tensors, int8",
        lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].__setitem__((5, 0), np.inf),
        "'model.layers.0.mlp.up_proj.weight_scale' holds a scale that is not finite",
    ),
    "a number is NaN": (
        "fp8 blocks",
        lambda t: t["model.layers.0.mlp.up_proj.weight"].__setitem__((5, 0), np.nan),
        "tensor 'model.layers.0.mlp.up_proj.weight' holds NaN",
    ),
    "a grid is too small": (
        "fp8 blocks",
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": scales(1, 1, 1)[0]
                            .repeat(3, 0)}),
        r"weight_scale_inv' of shape \(3, 1\) does not fit a weight of shape \(96, 64\)",
    ),
    "numbers have no zero points": (
        "compressed-tensors, zeros",
        lambda t: t.pop("model.layers.0.mlp.up_proj.weight_zero_point"),
        "'model.layers.0.mlp.up_proj.weight_zero_point' is missing",
    ),
    "zero points are too few": (
        "compressed-tensors, zeros",
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight_zero_point":
                            t["model.layers.0.mlp.up_proj.weight_zero_point"][:, :1]}),
        r"weight_zero_point' of shape \(12, 1\) does not fit a weight of shape \(96, 64\)",
    ),
    "the order is missing": (
        "gptq, by act order", lambda t: t.pop("model.layers.0.mlp.up_proj.g_idx"),
        "'model.layers.0.mlp.up_proj.g_idx' is missing",
    ),
    "groups are of another size": (
        "gptq, short groups",
        lambda t: t.update({"model.layers.0.mlp.up_proj.scales":
                            t["model.layers.0.mlp.up_proj.scales"][:1],
                            "model.layers.0.mlp.up_proj.qzeros":
                            t["model.layers.0.mlp.up_proj.qzeros"][:1]}),
        r"scales' of shape \(1, 96\) does not fit a weight of shape \(96, 64\) with a scale for 40",
    ),
    "there are two scales": (
        "fp8 blocks",
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": scales(1)}),
        "first 'model.layers.0.mlp.up_proj.weight_scale_inv'",
    ),
    "a bias is not zero": (
        "gptq, bits by module",
        lambda t: t["model.layers.0.mlp.up_proj.bias"].__setitem__(3, 1),
        "first 'model.layers.0.mlp.up_proj.bias'",
    ),
    "an index is out of range": (
        "gptq", lambda t: t["model.layers.0.mlp.up_proj.g_idx"].__setitem__(0, 2),
        "up_proj.g_idx' does not name one of 2 groups for 64 inputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_named(case, plain, tmp_path):
    form, change, message = DAMAGED[case]
    made(plain, tmp_path, *CASES[form], change=change)
    with pytest.raises(UsageError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("case", "tensor"),
    [("gptq", "down_proj.qweight"), ("fp8 blocks", "down_proj.weight_scale_inv")],
)
def test_a_configuration_that_does_not_say_how_is_refused(case, tensor, plain, tmp_path):
    made(plain, tmp_path, *CASES[case])
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=f"{tensor}' is of quantised weights.*quantize_config.j"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported; read"),
        (GPTQ | {"bits": 3}, "bits=3 is not"),
        (GPTQ | {"bits": True}, "bits=true is not|bits=True is not"),
        ({"quant_method": "awq", "version": "gemv"}, "version='gemv' is not"),
        (compressed("nvfp4-pack-quantized", num_bits=4), "format='nvfp4-pack-quantized' is not"),
        (compressed("pack-quantized", num_bits=3), "num_bits=3 is not"),
        (GPTQ | {"format": "gptq_p"}, "format='gptq_p' is not"),
        (GPTQ | {"format": "gptq_v2", "checkpoint_format": "gptq"}, "disagree"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format=true is not|=True is not"),
        (GPTQ | {"rotation": "hadamard"}, "rotation='hadamard' is not"),
        (GPTQ | {"dynamic": {"+:x": {"bits": 3}}}, "bits=3 is not"),
        (GPTQ | {"group_size": 0}, "group_size=0 is not"),
        ({"quant_method": "awq", "w_bit": 8}, "w_bit=8 is not"),
        ({"quant_method": "awq", "format": "gemv"}, "format='gemv' is not"),
        ({"quant_method": "awq", "backend": "llm-awq"}, "backend='llm-awq' is not"),
        (compressed("pack-quantized", num_bits=4, strategy="tensor_group"), "strategy='tensor_gr"),
        (
            compressed("pack-quantized", num_bits=4) | {"transform_config": {"config_groups": {}}},
            "transform_config={'config_groups': {}} is not",
        ),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size=\[128\] is not"),
        (FP8 | {"expert_dtype": "fp4"}, "expert_dtype='fp4' is not"),
        ("fp8", "quantization_config='fp8' is no object"),
    ],
)
def test_what_is_not_read_is_said(settings, message):
    with pytest.raises(UsageError, match=message):
        check(settings)


def test_scales_a_channel_come_back_exactly_when_served(plain, tmp_path):
    """Read in bfloat16 and quantised again to serve: the same numbers, scales within rounding."""
    from jaxsys.serve.weights import serving_weights

    def full(n, k):
        values, scale = e4m3((n, k)), scales(n, 1, dtype=ml_dtypes.bfloat16)
        values[:, 0] = 448
        return {"weight": values, "weight_scale": scale}, (values, scale)

    meant = made(plain, tmp_path, compressed("float-quantized", num_bits=8), full)
    model = load(tmp_path, jnp.bfloat16)
    served = serving_weights(model.config, model.parameters, quantisation="fp8")
    matrix = served.layers[0].matrices["mlp/down"]
    values, scale = meant["model.layers.0.mlp.down_proj.weight"]
    assert np.array_equal(wide(matrix.values), wide(values))
    np.testing.assert_allclose(np.asarray(matrix.scale), wide(scale)[:, 0], rtol=2**-8)
