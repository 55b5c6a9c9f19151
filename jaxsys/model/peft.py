"""Adapters in PEFT's layout, so that transformers, vLLM and others load what was trained here.

A folder of adapter_config.json and adapter_model.safetensors. A kernel's A [in, r] is there
`base_model.model.MODULE.lora_A.weight` [r, in], its B [r, out] `lora_B.weight` [out, r], and
W += (lora_alpha / r) B A. Where a checkpoint joins kernels (Phi-3's qkv_proj), so do its adapters:
A one below the other, B in the corners of zeros, of as many times the rank and alpha.

What is read is what PEFT computes: tensors say which modules have an adapter and of what rank,
`alpha_pattern` whose alpha differs. A setting that changes the numbers and is not computed, or is
not known, is refused by name.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.errors import UsageError
from jaxsys.fields import Fields, read_fields
from jaxsys.files import shown
from jaxsys.model.config import DecoderConfig
from jaxsys.model.families import FAMILIES
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import block_leaves
from jaxsys.model.names import LAYER, hf_name
from jaxsys.model.safetensors_file import SafetensorsFile

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

Adapters = dict[str, dict[str, jax.Array]]
"""A kernel's path in a block -> {"a": [L, in, rank], "b": [L, rank, out]}, experts' [L, E, ...]."""
LayerAdapters = dict[str, tuple[np.ndarray, np.ndarray]]
"""Of one layer, a kernel's path -> float32 A [in, rank] and B [rank, out], its weight in B."""

UNDERSTOOD = {
    "alpha_pattern",
    "bias",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "use_rslora",
}
CHANGE_NOTHING = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",  # of embeddings, which are refused
    "eva_config",
    "exclude_modules",  # tensors say it
    "fan_in_fan_out",  # PEFT drops it for linear modules, which all of these are
    "inference_mode",
    "init_lora_weights",  # see INITIAL
    "layers_pattern",
    "loftq_config",
    "lora_dropout",  # of training
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",  # tensors say it
    "target_parameters",  # likewise
    "task_type",
}
INITIAL = (None, True, False, "eva", "gaussian", "orthogonal")
"""Ways in which adapters began that left the model's own matrices as they were."""


class _Module:
    """A module of a checkpoint's layer, and the kernels that it holds, in order."""

    def __init__(
        self, name: str, kernels: tuple[str, ...], rows: int, columns: tuple[int, ...]
    ) -> None:
        self.name, self.kernels, self.rows, self.columns = name, kernels, rows, columns


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
        UsageError: as `read_layers`.
    """
    layers = read_layers(folder, config)
    stacked: dict[str, Adapters] = {}
    for kind in config.kinds:
        numbers = config.layers_of(kind)
        found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        for place, number in enumerate(numbers):
            for kernel, pair in layers[number].items():
                found.setdefault(kernel, {})[place] = pair
        stacked[kind.name] = _stacked(found, len(numbers))
    most = max(one["a"].shape[-1] for own in stacked.values() for one in own.values())
    return stacked, float(most)


def read_layers(folder: str | Path, config: DecoderConfig) -> list[LayerAdapters]:
    """The adapters of a folder, layer by layer.

    Raises:
        UsageError: if the folder holds something else than low-rank adapters of this model's
            linear modules: DoRA, biases, embeddings, whole modules, experts; or numbers that are
            not finite.
    """
    folder = Path(folder)
    _check_files(folder)
    settings = read_fields(folder / SETTINGS, hint="give a folder that PEFT writes")
    _check_settings(settings)
    file = SafetensorsFile(folder / WEIGHTS)
    alpha, rooted = float(settings.number("lora_alpha")), bool(settings.value.get("use_rslora"))
    alphas, ranks = _own(settings, "alpha_pattern"), _own(settings, "rank_pattern")
    kept = settings.value.get("layers_to_transform")
    if kept is not None:
        kept = [kept] if isinstance(kept, int) else settings.array("layers_to_transform", of=int)
    unread = set(file.shapes)
    layers: list[LayerAdapters] = []
    for layer in range(config.num_layers):
        own: LayerAdapters = {}
        layers.append(own)
        if kept is not None and layer not in kept:
            continue
        for module in _modules(config, config.kind(layer)):
            name = f"{LAYER.replace('{layer}', str(layer))}{module.name}"
            names = [f"{PREFIX}{name}.lora_{part}.weight" for part in "AB"]
            if not unread.issuperset(names):
                continue
            unread.difference_update(names)
            a, b = (_finite(file, one).T for one in names)
            _check(folder, name, module, a, b)
            weight = next((value for key, value in alphas if _means(name, key)), alpha)
            rank = a.shape[1]
            said = next((value for key, value in ranks if _means(name, key)), settings.number("r"))
            if rank != said:
                raise UsageError(
                    f"{folder}: tensors of {name} have rank {rank}, and {SETTINGS} says {said:g}; "
                    "alpha / r would be another weight: give the two files of one training"
                )
            b = b * np.float32(weight / (math.sqrt(rank) if rooted else rank))
            ends = np.cumsum(module.columns)[:-1]
            for kernel, part in zip(module.kernels, np.split(b, ends, axis=1), strict=True):
                own[kernel] = a, part
    if unread and kept is not None:
        raise UsageError(
            f"{folder}: layers_to_transform={kept} leaves out layers or modules that {len(unread)} "
            f"tensor(s) are of, first {min(unread)!r}; give the two files of one training"
        )
    if unread:
        raise UsageError(
            f"{folder} holds {len(unread)} tensor(s) that are no low-rank adapter of a linear "
            f"module of this {config.family} model, first {min(unread)!r}"
        )
    if not any(layers):
        raise UsageError(f"{folder} holds no adapters")
    return layers


def largest_rank(folder: str | Path) -> int:
    """The largest rank in a folder, without reading its numbers.

    Raises:
        UsageError: if it holds no adapters.
    """
    _check_files(Path(folder))
    shapes = SafetensorsFile(Path(folder) / WEIGHTS).shapes
    ranks = [shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape]
    if not ranks:
        raise UsageError(f"{folder} holds no adapters")
    return max(ranks)


def _check_files(folder: Path) -> None:
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} has no {name}; give a folder that PEFT writes, of safetensors"
            )


def _check_settings(settings: Fields) -> None:
    """Raises UsageError for what changes the numbers and is not computed."""
    name = settings.name
    if settings.text("peft_type", "LORA") != "LORA":
        raise UsageError(f"{name}: peft_type={settings.text('peft_type')!r} is not LORA")
    if settings.value.get("bias", "none") != "none":
        raise UsageError(f"{name}: bias={settings.value['bias']!r} is not computed; only 'none'")
    begun = settings.value.get("init_lora_weights")
    if begun not in INITIAL:
        raise UsageError(
            f"{name}: init_lora_weights={shown(begun)} changes the model's own matrices too, which "
            "is not computed; save the adapter as a plain one (PEFT's "
            "path_initial_model_for_weight_conversion)"
        )
    for key, value in settings.value.items():
        if value and key not in UNDERSTOOD and key not in CHANGE_NOTHING:
            raise UsageError(f"{name}: {key}={shown(value)} is not computed")


def _own(settings: Fields, pattern: str) -> list[tuple[str, float]]:
    """Which modules have an alpha or a rank of their own, in the order they are looked through."""
    found = []
    fields = settings.fields(pattern) if settings.value.get(pattern) else None
    for key in fields or ():
        assert fields is not None
        try:
            re.compile(key)
        except re.error:
            raise fields.fault(f"its key {shown(key)} is no regular expression") from None
        found.append((key, float(fields.number(key))))
    return found


def _finite(file: SafetensorsFile, name: str) -> np.ndarray:
    value = file.read(name).astype(np.float32)
    if not np.isfinite(value).all():
        raise UsageError(f"{file.path}: tensor {name!r} is not finite; the adapter is broken")
    return value


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
    wanted = module.rows, sum(module.columns)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or (a.shape[0], b.shape[1]) != wanted:
        raise UsageError(
            f"{folder}: adapters of {name} of shapes {a.T.shape} and {b.T.shape} do not fit a "
            f"module of {wanted[0]} inputs and {wanted[1]} outputs; is it of another model?"
        )


def _means(name: str, pattern: str) -> bool:
    """Whether a key of a pattern, a module's name or the end of one, means `name`, as for PEFT."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


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
            held = [leaves.pop(part) for part in parts]
            columns = tuple(leaf.shape[-1] for leaf in held)
            found.append(_Module(name, tuple(parts), held[0].shape[-2], columns))
    for key, leaf in leaves.items():
        if leaf.path[0] == "experts":
            # A router is no module that PEFT adapts by default, and experts are laid out apart.
            found.append(_Module(f"experts.{key}", (key,), leaf.shape[-2], (leaf.shape[-1],)))
            continue
        name = hf_name(family, leaf.path).removesuffix(".weight")
        found.append(_Module(name, (key,), leaf.shape[-2], (leaf.shape[-1],)))
    return found
