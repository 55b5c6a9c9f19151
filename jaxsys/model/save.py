"""Writes a model folder that `load` and transformers read, whole or not at all.

Everything is written to a hidden folder beside the target, synced, and renamed into place, so a
target is never half-written. Replacing a folder takes two renames: a crash between them leaves the
old one beside the target under a hidden name ending in `.old`.
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters, PyTree
from jaxsys.model import folder as names
from jaxsys.model.assemble import Leaves, not_finite
from jaxsys.model.config import DecoderConfig
from jaxsys.model.decoder import abstract_parameters, kind_of_blocks
from jaxsys.model.leaves import Path as LeafPath
from jaxsys.model.names import FileTensor, block_tensors, edge_tensors
from jaxsys.model.packed import Expanded, Packed
from jaxsys.model.rows import all_finite, spans
from jaxsys.model.safetensors_file import TensorToWrite, write_safetensors
from jaxsys.model.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000
"""The size above which weights are cut into several files, that of transformers."""


def save_safetensors(
    folder: str | Path,
    config: DecoderConfig,
    parameters: Parameters | Leaves,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    generation: Mapping[str, float] | None = None,
) -> None:
    """Saves a model; dtypes are kept, values are exact.

    Args:
        folder: made by this call; its parent too.
        config: the model.
        parameters: as `parameters(model)` returns them, or the `Leaves` of an open checkpoint,
            which are read and written tensor by tensor.
        tokenizer: saved along, with its chat template.
        max_shard_bytes: largest weights file; a larger single tensor gets a file of its own.
        overwrite: replace a model folder that is there already.
        generation: how its makers sample from it, by the names of generation_config.json.

    Raises:
        UsageError: if the folder is in use, the family's files cannot say what this model is, or
            the parameters are not the configuration's.
    """
    target = Path(folder).absolute()
    check_target(target, overwrite=overwrite)
    config.to_hf()  # what no config.json says is refused before anything is written
    if not isinstance(parameters, Leaves):
        _check_parameters(config, parameters)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    held = os.open(partial, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # says to `_sweep` that somebody is at work on it
    try:
        tensors = list(_tensors(config, parameters))
        _write_weights(partial, tensors, max_shard_bytes)
        dtype = str(max(tensors, key=lambda tensor: tensor.size_bytes).dtype)
        _write_settings(partial, config, dtype, tokenizer, dict(generation or {}))
        _sync(partial)
        _move(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(held)


def _sweep(target: Path) -> None:
    """Removes what a killed save left beside `target`; puts back a model that it had moved."""
    for left in sorted(target.parent.glob(f".{target.name}.????????.partial*")):
        handle = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if left.name.endswith(".old") and not target.exists():
                os.replace(left, target)
            else:
                shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            continue  # at work
        finally:
            os.close(handle)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises UsageError if a model folder may not be written there."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file; give a folder to save to")
    if any(target.iterdir()):
        if not overwrite:
            raise UsageError(
                f"{target} is not empty; choose another folder (from Python overwrite=True "
                "replaces a model)"
            )
        if not (target / names.CONFIG).is_file():
            raise UsageError(f"{target} is no model folder, and will not be replaced by one")


def _check_parameters(config: DecoderConfig, parameters: Parameters) -> None:
    wanted = jax.tree_util.tree_flatten_with_path(abstract_parameters(config))[0]
    given = dict(jax.tree_util.tree_flatten_with_path(parameters)[0])
    for path, leaf in wanted:
        name = jax.tree_util.keystr(path)
        if path not in given:
            raise UsageError(f"parameters lack {name}")
        shape = given.pop(path).shape
        if shape != leaf.shape:
            raise UsageError(f"parameters{name} is {shape}, the configuration says {leaf.shape}")
    if given:
        raise UsageError(f"parameters hold {jax.tree_util.keystr(next(iter(given)))}, not expected")


def _tensors(config: DecoderConfig, parameters: Parameters | Leaves) -> Iterator[TensorToWrite]:
    read = parameters if isinstance(parameters, Leaves) else _Stacked(config, parameters)
    for tensor in edge_tensors(config):
        yield from _written(tensor, read, None)
    for layer in range(config.num_layers):
        for tensor in block_tensors(config, config.kind(layer)):
            yield from _written(tensor, read, layer)


class _Stacked:
    """Leaves of parameters, by layer."""

    def __init__(self, config: DecoderConfig, parameters: Parameters) -> None:
        self._config, self._parameters = config, parameters
        self._places: dict[int, int] = {}
        for kind in config.kinds:
            places = {layer: place for place, layer in enumerate(config.layers_of(kind))}
            self._places |= places
        self._held: tuple[Any, np.ndarray] | None = None

    def dtype(self, layer: int | None, path: LeafPath) -> np.dtype:
        return np.dtype(self._leaf(layer, path).dtype)

    def read(self, layer: int | None, path: LeafPath) -> np.ndarray:
        if layer is None:
            return np.asarray(self._leaf(layer, path))
        if self._held is None or self._held[0] != (layer, path):  # many items ask for one leaf
            self._held = None  # before the next one is there
            found = self._leaf(layer, path)[self._places[layer]]
            self._held = (layer, path), np.asarray(found)
        return self._held[1]

    def _leaf(self, layer: int | None, path: LeafPath) -> Any:
        if layer is None:
            return _at(self._parameters["edge"], path)
        kind = self._config.kind(layer)
        return _at(kind_of_blocks(self._config, self._parameters["blocks"], kind), path)


def _written(
    tensor: FileTensor, read: "_Stacked | Leaves", layer: int | None
) -> Iterator[TensorToWrite]:
    """The entries of one tensor: one, or one for each item; in its leaf's dtype."""
    in_files = isinstance(read, Leaves)  # where damage is found
    dtype = read.dtype if in_files else read.dtype(layer, tensor.leaves[0].path)
    for item in [None] if tensor.items is None else range(tensor.items):
        name = tensor.name
        for key, value in (("layer", layer), ("item", item)):
            name = name if value is None else name.replace(f"{{{key}}}", str(value))

        def pieces(item: int | None = item, name: str = name) -> Iterator[np.ndarray]:
            values = [_item(read.read(layer, leaf.path), item) for leaf in tensor.leaves]
            for start, stop in spans(tensor.shape, 0, tensor.shape[0]):
                for piece in tensor.rows(values, start, stop):
                    with np.errstate(over="ignore"):
                        made = piece.astype(dtype, copy=False)
                    if in_files and not all_finite(made):
                        raise not_finite(name, dtype)
                    yield made

        yield TensorToWrite(name=name, shape=tensor.shape, dtype=dtype, pieces=pieces)


def _item(array: np.ndarray | Packed, item: int | None) -> Any:
    """One item of what is kept together; what is packed is expanded as it is sliced."""
    if not isinstance(array, Packed):
        return array if item is None else array[item]
    whole = Expanded(array)
    return whole if item is None else whole[item : item + 1][0]


def _write_weights(folder: Path, tensors: list[TensorToWrite], max_shard_bytes: int) -> None:
    shards: list[list[TensorToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size_bytes
    if len(shards) == 1:
        write_safetensors(folder / names.WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.size_bytes for tensor in tensors)
    _write_json(folder / names.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_settings(
    folder: Path,
    config: DecoderConfig,
    dtype: str,
    tokenizer: Tokenizer | None,
    generation: dict[str, Any],
) -> None:
    # transformers 5 reads `dtype`, 4 reads `torch_dtype`.
    settings = config.to_hf() | {"dtype": dtype, "torch_dtype": dtype}
    # Absent ids would be those of the family's configuration class.
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        ends = list(tokenizer.eos_ids)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if ends else None}
        settings |= ids
        generation = ids | {"eos_token_id": ends or None} | generation
        tokenizer.backend.save(str(folder / names.TOKENIZER))
        described: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_positions,
            **tokenizer.special_tokens,
        }
        if tokenizer.chat_template is not None:
            described["chat_template"] = tokenizer.chat_template
            # transformers 5 looks here first.
            (folder / names.CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
        if tokenizer.tool_template is not None:
            more = folder / names.MORE_TEMPLATES
            more.mkdir()
            path = more / f"{names.TOOL_TEMPLATE}.jinja"
            path.write_text(tokenizer.tool_template, encoding="utf-8")
        _write_json(folder / names.TOKENIZER_CONFIG, described)
    if generation:
        _write_json(folder / names.GENERATION_CONFIG, _as_transformers_samples(generation))
    _write_json(folder / names.CONFIG, settings)


def _as_transformers_samples(generation: dict[str, Any]) -> dict[str, Any]:
    """With the word on whether it samples at all, without which it takes the likeliest token."""
    if generation.get("temperature") == 0:
        rest = {name: value for name, value in generation.items() if name != "temperature"}
        return rest | {"do_sample": False}
    samples = any(name in generation for name in names.SAMPLING if name != "repetition_penalty")
    return generation | ({"do_sample": True} if samples else {})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move(partial: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.replace(partial, target)
        return
    # A folder with content cannot be replaced in one call: step aside, move in, remove.
    aside = target.parent / f"{partial.name}.old"
    os.replace(target, aside)
    try:
        os.replace(partial, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside)


def _at(tree: PyTree, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
