#!/usr/bin/env python
"""Measures how much memory reading and writing a model takes beside the result.

Each case runs in a process of its own, which says when it begins and when it is done, while this
one looks at its anonymous memory (RssAnon: what a file maps is not counted) every two milliseconds.
What may lie beside the result is one layer, or a leaf outside the layers if that is larger, in the
result's dtype.

    scripts/bench_loading.py                    # some 500 MB of float32; results/loading.json
    scripts/bench_loading.py --layers 2 --width 128 --out /tmp

Exits with 1 if a case took more than the largest layer and `--spare` MiB.
"""

import argparse
import dataclasses
import gc
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from jaxsys.model import ByteTokenizer, DecoderConfig, Experts, load, save_safetensors
from jaxsys.model.convert import convert
from jaxsys.model.decoder import layer_of
from jaxsys.model.gguf_names import gguf_tensors
from jaxsys.model.kinds import BlockKind
from jaxsys.model.layers import layered
from jaxsys.model.leaves import block_leaves, edge_leaves
from jaxsys.model.load import open_model
from jaxsys.model.names import block_tensors
from jaxsys.model.safetensors_file import STORED, SafetensorsFile
from jaxsys.results import table, write_result
from jaxsys.serve.weights import serving_weights
from jaxsys.train import Trainer
from jaxsys.train.lora import add_adapters
from jaxsys.train.start import start_of
from studies.random_weights import random_parameters

MIB = 2**20
LOOK_S = 0.002
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": "0"}
"""For glibc: arrays that are freed leave the process at once, and are not counted as held."""
BLOCK, GROUP = 128, 128
"""Of FP8 scales, and of GPTQ."""


def made(layers: int, width: int, family: str = "llama") -> DecoderConfig:
    """A dense decoder; of another family with experts, as gpt-oss or Qwen3-MoE have them."""
    heads = max(1, width // 64)
    config = DecoderConfig(
        vocab_size=8 * width,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        max_positions=256,
    )
    if family == "llama":
        return config
    is_oss = family == "gpt_oss"
    experts = Experts(
        count=16,
        active=2,
        intermediate_size=width // 2,
        router="chosen_softmax" if is_oss else "softmax",
        bias=is_oss,
        clamp=7.0 if is_oss else None,
    )
    biased = {"qkv_bias": True, "out_bias": True, "sinks": True} if is_oss else {"qk_norm": "head"}
    more: dict[str, Any] = biased | ({"intermediate_size": width // 2} if is_oss else {})
    return dataclasses.replace(
        config, family=family, experts=experts, kinds=(BlockKind(experts=True),), **more
    )


def stacked(config: DecoderConfig, dtype: Any) -> Any:
    found = random_parameters(config, dtype)
    each = [found["blocks"](layer) for layer in range(config.num_layers)]
    return {"edge": found["edge"], "blocks": jax.tree.map(lambda *one: jnp.stack(one), *each)}


def write_gguf(path: Path, config: DecoderConfig, parameters: Any) -> None:
    """All matrices in Q8_0."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # As many tokens as rows, of no use but to be counted.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    named = [f"<{index}>" for index in range(3, config.vocab_size)]
    writer.add_token_list(["a", "b", "ab", *named])
    writer.add_token_types([3] * config.vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for layer in (None, *range(config.num_layers)):
        tree = (
            parameters["edge"] if layer is None else layer_of(config, parameters["blocks"], layer)
        )
        for tensor in gguf_tensors(config, None if layer is None else config.kind(layer)):
            values = [np.asarray(tree[leaf.path[0]][leaf.path[1]]) for leaf in tensor.leaves]
            value = np.ascontiguousarray(tensor.give(values), np.float32)
            form = gguf.GGMLQuantizationType.F32
            if value.ndim == 2:
                form = gguf.GGMLQuantizationType.Q8_0
                value = gguf.quants.quantize(value, form)
            name = tensor.name.replace("{layer}", str(layer))
            writer.add_tensor(name, value, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of any dtype that is read."""
    names = {dtype: name for name, dtype in STORED.items()}
    header, end = {}, 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": names[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [end, end + values.nbytes],
        }
        end += values.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())


def write_quantised(source: Path, target: Path, config: DecoderConfig, method: str) -> None:
    """A folder whose blocks' matrices are FP8 with scales of blocks, GPTQ or MXFP4; any numbers."""
    rng = np.random.default_rng(0)
    file = SafetensorsFile(source / "model.safetensors")
    layers = range(config.num_layers)
    matrices = {
        tensor.name.replace("{layer}", str(layer))
        for layer in layers
        for tensor in block_tensors(config, config.kind(layer))
        if tensor.leaves[0].is_matrix and tensor.leaves[0].path[-1] != "router"
    }
    tensors: dict[str, np.ndarray] = {}

    def words(*shape: int) -> np.ndarray:
        return rng.integers(0, 2**31 - 1, shape, np.int32)

    for name in file.shapes:
        value, module = np.array(file.read(name)), name.removesuffix(".weight")
        if method == "mxfp4" and value.ndim == 3:
            experts, inputs, outputs = value.shape
            size = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = rng.integers(0, 256, (*size, 16), np.uint8)
            tensors[f"{name}_scales"] = np.full(size, 120, np.uint8)
        elif method == "mxfp4" or name not in matrices:
            tensors[name] = value
        elif method == "fp8":
            outputs, inputs = value.shape
            tensors[name] = value.astype(ml_dtypes.float8_e4m3fn)
            grid = (-(-outputs // BLOCK), -(-inputs // BLOCK))
            tensors[f"{module}.weight_scale_inv"] = np.full(grid, 0.01, np.float32)
        else:
            outputs, inputs = value.shape
            groups = max(1, inputs // GROUP)
            tensors[f"{module}.qweight"] = words(inputs // 8, outputs)
            tensors[f"{module}.qzeros"] = words(groups, outputs // 8)
            tensors[f"{module}.scales"] = np.full((groups, outputs), 0.01, np.float16)
    settings: dict[str, Any] = {"quant_method": method}
    settings |= {"weight_block_size": [BLOCK, BLOCK]} if method == "fp8" else {}
    settings |= {"bits": 4, "group_size": GROUP} if method == "gptq" else {}
    target.mkdir()
    written = json.loads((source / "config.json").read_text()) | {"quantization_config": settings}
    (target / "config.json").write_text(json.dumps(written))
    write_tensors(target / "model.safetensors", tensors)


def served(folder: Path, dtype: str, form: Any = None) -> Any:
    model = load(folder, jnp.dtype(dtype), leafwise=True)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return serving_weights(model.config, model.parameters, quantisation=form, placement=device)


def trainer_of(folder: Path) -> Trainer:
    """Over two devices, of a rule without a state of its own."""
    start = start_of(str(folder), seed=0, float8=None, lora=None)
    return Trainer(
        start.model,
        start.parameters,
        optax.sgd(1e-3),
        schedule="zero-3",
        devices=2,
        microbatches=2,
    )


def saved(root: Path, model: Any) -> Any:
    save_safetensors(root / "out", model.config, model.parameters, overwrite=True)
    return ()


def converted(root: Path, source: str, dtype: str) -> Any:
    """From file to file."""
    convert(open_model(root / source), root / "out", dtype, overwrite=True)
    return ()


def merged(root: Path, model: Any) -> Any:
    del root
    _, start, merge = add_adapters(
        layered(model.config), model.parameters, rank=8, targets=("query", "mlp/up", "mlp/down")
    )
    return [
        leaf
        for leaf in jax.tree.leaves(merge(start))
        if not any(leaf is one for one in jax.tree.leaves(model.parameters))
    ]


def exported(root: Path, trainer: Any) -> Any:
    config = open_model(root / "float32").config
    save_safetensors(root / "out", config, trainer.parameters(), overwrite=True)
    return ()


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured."""

    run: Callable[..., Any]
    """Of the folder of files, and of what `before` made of it; gives what is new in memory."""
    dtype: str = "float32"
    family: str = "llama"
    before: Callable[[Path], Any] | None = None


CASES: dict[str, Case] = {
    "float32 folder, float32": Case(lambda root: load(root / "float32").parameters),
    "bfloat16 folder, float32": Case(lambda root: load(root / "bfloat16").parameters),
    "bfloat16 folder, bfloat16": Case(
        lambda root: load(root / "bfloat16", jnp.bfloat16).parameters, "bfloat16"
    ),
    "GGUF Q8_0, float32": Case(lambda root: load(root / "model.gguf").parameters),
    "GGUF Q8_0, bfloat16": Case(
        lambda root: load(root / "model.gguf", jnp.bfloat16).parameters, "bfloat16"
    ),
    "FP8 folder, bfloat16": Case(
        lambda root: load(root / "fp8", jnp.bfloat16).parameters, "bfloat16"
    ),
    "GPTQ folder, bfloat16": Case(
        lambda root: load(root / "gptq", jnp.bfloat16).parameters, "bfloat16"
    ),
    "experts, float32": Case(lambda root: load(root / "qwen3_moe").parameters, family="qwen3_moe"),
    "MXFP4 experts, bfloat16": Case(
        lambda root: load(root / "mxfp4", jnp.bfloat16).parameters, "bfloat16", "gpt_oss"
    ),
    "float32 folder, served": Case(lambda root: served(root / "float32", "float32")),
    "float32 folder, served int8": Case(lambda root: served(root / "float32", "float32", "int8")),
    "GPTQ folder, served int4": Case(
        lambda root: served(root / "gptq", "bfloat16", "int4"), "bfloat16"
    ),
    "experts, served fp8": Case(
        lambda root: served(root / "qwen3_moe", "float32", "fp8"), family="qwen3_moe"
    ),
    "MXFP4 experts, served packed": Case(
        lambda root: served(root / "mxfp4", "bfloat16"), "bfloat16", "gpt_oss"
    ),
    "float32 folder, trained": Case(lambda root: trainer_of(root / "float32").state),
    "float32, written": Case(saved, before=lambda root: load(root / "float32")),
    "trained, exported": Case(exported, before=lambda root: trainer_of(root / "float32")),
    "GGUF Q8_0 to a bfloat16 folder": Case(
        lambda root: converted(root, "model.gguf", "bfloat16"), "bfloat16"
    ),
    "MXFP4 experts to a bfloat16 folder": Case(
        lambda root: converted(root, "mxfp4", "bfloat16"), "bfloat16", "gpt_oss"
    ),
    "adapters merged": Case(merged, before=lambda root: load(root / "float32")),
}


def child(case: Case, root: Path) -> None:
    """Does it once, so that what is made once is there, such as programs; then waits for a word."""
    jax.config.update("jax_num_cpu_devices", 2)

    def given(where: Path) -> tuple[Any, ...]:
        return () if case.before is None else (case.before(where),)

    def work(where: Path, made: tuple[Any, ...]) -> Any:
        return jax.block_until_ready(case.run(where, *made))

    work(root, given(root))
    gc.collect()
    large = given(root)
    print("ready", flush=True)
    sys.stdin.readline()
    result = work(root, large)
    print(sum(leaf.nbytes for leaf in jax.tree.leaves(result)), flush=True)
    sys.stdin.readline()


def anonymous(pid: int) -> int:
    """Bytes of a process that no file maps."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel tells no RssAnon")


def measured(name: str, root: Path, layer_bytes: float) -> dict[str, Any]:
    """Runs one case."""
    command = [sys.executable, __file__, "--child", name, "--root", str(root)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=os.environ | GIVEN_BACK,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name}: the process ended")
        base = peak = anonymous(process.pid)
        process.stdin.write("go\n")
        started_s = time.perf_counter()
        lines: list[str] = []
        read = process.stdout.readline
        reader = threading.Thread(target=lambda: lines.append(read()), daemon=True)
        reader.start()
        while reader.is_alive():
            peak = max(peak, anonymous(process.pid))
            time.sleep(LOOK_S)
        seconds = time.perf_counter() - started_s
        result = int(lines[0])
        return {
            "case": name,
            "result_mib": round(result / MIB, 1),
            "peak_mib": round((peak - base) / MIB, 1),
            "beside_mib": round((peak - base - result) / MIB, 1),
            "largest_layer_mib": round(layer_bytes / MIB, 1),
            "seconds": round(seconds, 2),
        }
    finally:
        process.kill()
        process.wait()


def write_models(root: Path, layers: int, width: int) -> dict[str, DecoderConfig]:
    """Every folder and file."""
    configs = {name: made(layers, width, name) for name in ("llama", "qwen3_moe", "gpt_oss")}
    dense = configs["llama"]
    parameters = stacked(dense, jnp.float32)
    save_safetensors(root / "float32", dense, parameters, ByteTokenizer())
    write_gguf(root / "model.gguf", dense, parameters)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters)
    save_safetensors(root / "bfloat16", dense, small)
    for name in ("qwen3_moe", "gpt_oss"):
        save_safetensors(root / name, configs[name], stacked(configs[name], jnp.float32))
    for method in ("fp8", "gptq"):
        write_quantised(root / "float32", root / method, dense, method)
    write_quantised(root / "gpt_oss", root / "mxfp4", configs["gpt_oss"], "mxfp4")
    return configs


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_loading.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--case", action="append", choices=CASES, help="only this; may be repeated")
    parser.add_argument("--spare", type=float, default=24.0, help="MiB (default: 24)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(CASES[arguments.child], arguments.root)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        configs = write_models(root, arguments.layers, arguments.width)
        for case in arguments.case or CASES:
            config, dtype = configs[CASES[case].family], jnp.dtype(CASES[case].dtype)
            layer = sum(leaf.size for leaf in block_leaves(config, config.kinds[0]))
            numbers = max(layer, *(leaf.size for leaf in edge_leaves(config)))
            rows.append(measured(case, root, numbers * dtype.itemsize))
            print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    path = write_result(
        arguments.out / "loading.json",
        benchmark="loading",
        kind="measured",
        config={"layers": arguments.layers, "width": arguments.width, "look_s": LOOK_S},
        rows=rows,
    )
    print(table(rows))
    print(f"written to {path}", file=sys.stderr)
    spare = arguments.spare
    over = [row["case"] for row in rows if row["beside_mib"] > row["largest_layer_mib"] + spare]
    if over:
        print(f"more than a layer beside the result: {', '.join(over)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
