"""Adapters in PEFT's layout, so that transformers, vLLM and others load what was trained here.

A folder of adapter_config.json and adapter_model.safetensors. A kernel's A [in, r] is there
`base_model.model.MODULE.lora_A.weight` [r, in], its B [r, out] `lora_B.weight` [out, r], and
W += (lora_alpha / r) B A. Where a checkpoint joins kernels (Phi-3's qkv_proj), so do its adapters:
A one below the other, B in the corners of zeros, of as many times the rank and alpha.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.errors import UsageError
from jaxsys.fields import read_fields
from jaxsys.model import DecoderConfig
from jaxsys.model.families import FAMILIES
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import block_leaves
from jaxsys.model.names import LAYER, hf_name
from jaxsys.model.safetensors_file import SafetensorsFile
from jaxsys.train.lora import Adapters

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class _Module:
    """A module of a checkpoint's layer, and the kernels that it holds, in order."""

    def __init__(self, name: str, kernels: tuple[str, ...], columns: tuple[int, ...]) -> None:
        self.name, self.kernels, self.columns = name, kernels, columns


def write_adapters(
    folder: str | Path,
    config: DecoderConfig,
    adapters: Mapping[str, Adapters],
    *,
    scale: float,
    base: str = "",
) -> None:
    """Writes trained adapters.

    Args:
        folder: made if it is not there.
        config: the base model's.
        adapters: of each kind of block, stacked over its layers, as
            `model.stacks(trained["blocks"])[kind]["adapters"]` has them.
        scale: as `add_adapters` was given it.
        base: what the base model is called.

    Raises:
        UsageError: if one is of experts, for which PEFT's layout differs between its versions.
    """
    import safetensors.numpy

    tensors: dict[str, np.ndarray] = {}
    targets: dict[str, None] = {}
    ranks: dict[str, int] = {}
    base_rank = 1
    for kind in config.kinds:
        own = adapters[kind.name] if config.pattern else next(iter(adapters.values()))
        for module in _modules(config, kind):
            held = [own[kernel] for kernel in module.kernels if kernel in own]
            if not held:
                continue
            if held[0]["a"].ndim != 3:
                raise UsageError(
                    f"adapters of {module.kernels[0]} are an expert's each, which PEFT lays out "
                    "otherwise from version to version; merge them into the model instead"
                )
            base_rank = held[0]["a"].shape[-1]
            short = module.name.rpartition(".")[2]
            targets[short] = None
            if len(module.kernels) > 1:
                ranks[short] = base_rank * len(module.kernels)
            for place, layer in enumerate(config.layers_of(kind)):
                a, b = _joined(module, own, place)
                name = f"{PREFIX}{LAYER.replace('{layer}', str(layer))}{module.name}"
                tensors[f"{name}.lora_A.weight"] = a
                tensors[f"{name}.lora_B.weight"] = b
    if not tensors:
        raise UsageError("there are no adapters to write")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": base_rank,
        "lora_alpha": scale,
        "rank_pattern": ranks,
        # Joined kernels have a rank each: alpha / r stays.
        "alpha_pattern": {name: scale * rank / base_rank for name, rank in ranks.items()},
        "target_modules": list(targets),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


def read_adapters(folder: str | Path, config: DecoderConfig) -> tuple[dict[str, Adapters], float]:
    """Adapters of a folder, by kind of block and stacked, and the scale that they take.

    Each kernel's own weight is in its B: with `add_adapters(scale=s)`, s is what is returned. A
    kernel that the folder leaves out in some layers has zeros there.

    Raises:
        UsageError: if the folder holds something else than low-rank adapters of this model's
            linear modules: DoRA, biases, embeddings, whole modules, experts.
    """
    folder = Path(folder)
    settings = read_fields(folder / SETTINGS, hint="give a folder that PEFT writes")
    if settings.text("peft_type", "LORA") != "LORA":
        raise UsageError(f"{folder}: peft_type={settings.text('peft_type')!r} is not LORA")
    for name in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices"):
        if settings.value.get(name):
            raise UsageError(f"{folder}: {name}={settings.value[name]!r} is not computed")
    if settings.value.get("bias", "none") != "none":
        raise UsageError(f"{folder}: bias={settings.value['bias']!r} is not computed; only 'none'")
    file = SafetensorsFile(folder / WEIGHTS)
    alpha, rooted = float(settings.number("lora_alpha")), bool(settings.value.get("use_rslora"))
    alphas: Mapping[str, Any] = settings.value.get("alpha_pattern") or {}
    unread = set(file.shapes)
    found: dict[str, dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]] = {}
    for kind in config.kinds:
        of_kind = found.setdefault(kind.name, {})
        for module in _modules(config, kind):
            for place, layer in enumerate(config.layers_of(kind)):
                name = f"{PREFIX}{LAYER.replace('{layer}', str(layer))}{module.name}"
                names = [f"{name}.lora_{part}.weight" for part in "AB"]
                if not unread.issuperset(names):
                    continue
                unread.difference_update(names)
                a, b = (file.read(one).astype(np.float32).T for one in names)
                _check(folder, name, module, a, b)
                weight = next((v for k, v in alphas.items() if _means(name, k)), alpha)
                rank = a.shape[1]
                b = b * (float(weight) / (math.sqrt(rank) if rooted else rank))
                ends = np.cumsum(module.columns)[:-1]
                for kernel, part in zip(module.kernels, np.split(b, ends, axis=1), strict=True):
                    of_kind.setdefault(kernel, {})[place] = (a, part)
    if unread:
        raise UsageError(
            f"{folder} holds {len(unread)} tensor(s) that are no low-rank adapter of a linear "
            f"module of this {config.family} model, first {min(unread)!r}"
        )
    stacked = {
        kind.name: _stacked(found[kind.name], len(config.layers_of(kind))) for kind in config.kinds
    }
    most = max((one["a"].shape[-1] for own in stacked.values() for one in own.values()), default=0)
    if not most:
        raise UsageError(f"{folder} holds no adapters")
    return stacked, float(most)


def _stacked(
    kernels: Mapping[str, Mapping[int, tuple[np.ndarray, np.ndarray]]], layers: int
) -> Adapters:
    """Ranks of a kind are made alike by zeros, so that scale / rank is 1 for all."""
    every = [a.shape[1] for own in kernels.values() for a, _ in own.values()]
    rank = max(every, default=0)
    result: Adapters = {}
    for name, own in kernels.items():
        (rows, _), (_, columns) = (part.shape for part in next(iter(own.values())))
        a, b = np.zeros((layers, rows, rank)), np.zeros((layers, rank, columns))
        for place, (left, right) in own.items():
            a[place, :, : left.shape[1]], b[place, : left.shape[1]] = left, right
        result[name] = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return result


def _check(folder: Path, name: str, module: _Module, a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1] != b.shape[0] or b.shape[1] != sum(module.columns):
        raise UsageError(
            f"{folder}: adapters of {name} of shapes {a.T.shape} and {b.T.shape} do not fit "
            f"{sum(module.columns)} outputs"
        )


def _means(name: str, pattern: str) -> bool:
    """Whether a key of a pattern, a module's name or the end of one, means `name`."""
    return name == pattern or name.endswith(f".{pattern}")


def _joined(module: _Module, own: Adapters, place: int) -> tuple[np.ndarray, np.ndarray]:
    """[r, in] and [out, r] of one layer's module; kernels without an adapter have zeros."""
    some = next(own[kernel] for kernel in module.kernels if kernel in own)
    rows, rank = some["a"].shape[1:]
    a = np.zeros((len(module.kernels) * rank, rows), np.float32)
    b = np.zeros((sum(module.columns), len(module.kernels) * rank), np.float32)
    start = 0
    for number, (kernel, columns) in enumerate(zip(module.kernels, module.columns, strict=True)):
        if kernel in own:
            span = slice(number * rank, (number + 1) * rank)
            left, right = (np.asarray(jax.device_get(own[kernel][part][place])) for part in "ab")
            a[span] = left.T
            b[start : start + columns, span] = right.T
        start += columns
    return a, b


def _modules(config: DecoderConfig, kind: BlockKind) -> list[_Module]:
    """The linear modules of one block in its family's checkpoints."""
    family = FAMILIES[config.family]
    leaves = {"/".join(leaf.path): leaf for leaf in block_leaves(config, kind) if leaf.is_matrix}
    found = []
    for name, parts in family.joined.items():
        if all(part in leaves for part in parts):
            columns = tuple(leaves.pop(part).shape[-1] for part in parts)
            found.append(_Module(name, tuple(parts), columns))
    for key, leaf in leaves.items():
        if leaf.path[0] == "experts":
            # A router is no module that PEFT adapts by default, and experts are laid out apart.
            found.append(_Module(f"experts.{key}", (key,), (leaf.shape[-1],)))
            continue
        name = hf_name(family, leaf.path).removesuffix(".weight")
        found.append(_Module(name, (key,), (leaf.shape[-1],)))
    return found
