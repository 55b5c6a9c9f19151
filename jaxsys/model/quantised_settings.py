"""What a `quantization_config` says of the weights of quantised modules.

A file may say several things, each of some modules (`config_groups` of compressed-tensors,
`dynamic` of GPTQ): a module's tensors show which of them is its own. What changes numbers and is
not computed is refused: another layout, rotations that are applied while a model runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxsys.errors import UsageError
from jaxsys.files import shown

_METHODS = "fp8, compressed-tensors (float, int, pack), gptq, awq, and mxfp4 of gpt_oss"
_CT_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense")
_CT_STRATEGIES = ("tensor", "channel", "group", "block")
_GPTQ_FORMATS = ("gptq", "gptq_v2")
WHOLE = -1
"""A group of all inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How some modules are quantised; what is not said is None."""

    bits: int | None = None
    group: int | None = None
    """Inputs that share a scale of an output; `WHOLE`: all of them."""
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale."""
    zeros: bool = False
    """Whether numbers have zero points, without which they mean something else."""
    ordered: bool = False
    """Whether a tensor says which group an input is of."""

    def inputs_of_group(self, inputs: int, count: int) -> int | None:
        """Inputs of each of `count` groups, the last maybe of fewer; None: there are others."""
        if self.group is None:
            return inputs // count if count and inputs % count == 0 else None
        size = inputs if self.group == WHOLE else self.group
        return size if -(-inputs // size) == count else None


def check(settings: Any) -> None:
    """Raises UsageError for a `quantization_config` that is not read."""
    if not isinstance(settings, Mapping):
        raise UsageError(f"quantization_config={shown(settings)} is no object")
    _check_block("weight_block_size", settings.get("weight_block_size"))
    method = settings.get("quant_method")
    if method == "gptq":
        _check_gptq(settings)
    elif method == "awq":
        _among(settings, "bits", (4,), 4)
        _among(settings, "w_bit", (4,), 4)
        _one_of_two(settings, "version", "format", ("gemm",))
        if settings.get("backend") == "llm-awq":  # another layout
            raise _unread("backend", settings["backend"])
        _check_group(settings)
    elif method == "compressed-tensors":
        _check_compressed(settings)
    elif method == "fp8":
        _among(settings, "fmt", ("e4m3",), "e4m3")
        if settings.get("expert_dtype") not in (None, "fp8"):
            raise _unread("expert_dtype", settings["expert_dtype"])
    else:
        raise _unread("quant_method", method)


def schemes(settings: Mapping[str, Any]) -> list[Scheme]:
    """All that settings which `check` takes say of modules; one of them is true of each."""
    method = settings["quant_method"]
    if method == "gptq":
        return [_of_gptq({**settings, **more}) for more in ({}, *_dynamic(settings).values())]
    if method == "awq":
        return [Scheme(bits=4, group=settings.get("group_size"), zeros=True)]
    if method == "compressed-tensors":
        groups = settings["config_groups"].values()
        return [_of_compressed(group["weights"]) for group in groups] or [Scheme()]
    return [Scheme(block=_pair(settings.get("weight_block_size")))]


def one_more(settings: Mapping[str, Any]) -> bool:
    """Whether zero points of GPTQ are stored less one, as its first format does."""
    return _one_of_two(settings, "checkpoint_format", "format", _GPTQ_FORMATS) != "gptq_v2"


def _of_gptq(settings: Mapping[str, Any]) -> Scheme:
    return Scheme(
        bits=settings["bits"],
        group=settings.get("group_size"),
        zeros=True,
        ordered=bool(settings.get("desc_act")),
    )


def _of_compressed(weights: Mapping[str, Any]) -> Scheme:
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if strategy == "channel" or group == WHOLE:
        group = WHOLE
    elif strategy is not None and strategy != "group":
        group = None
    return Scheme(
        bits=weights["num_bits"],
        group=group,
        block=_pair(weights.get("block_structure")),
        zeros=weights.get("symmetric") is False,
        ordered=weights.get("actorder") in ("group", "dynamic", True),
    )


def _check_gptq(settings: Mapping[str, Any]) -> None:
    _one_of_two(settings, "checkpoint_format", "format", _GPTQ_FORMATS)
    for name in ("is_marlin_format", "rotation"):
        if settings.get(name):
            raise _unread(name, settings[name])
    for more in ({}, *_dynamic(settings).values()):
        _among({**settings, **more}, "bits", (2, 4, 8), None)
        _check_group({**settings, **more})


def _dynamic(settings: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """What GPTQ says of some modules alone; false where they are not quantised."""
    found = settings.get("dynamic") or {}
    if not isinstance(found, Mapping):
        raise _unread("dynamic", found)
    for more in found.values():
        if more and not isinstance(more, Mapping):
            raise _unread("dynamic", found)
    return {name: more or {} for name, more in found.items()}


def _check_compressed(settings: Mapping[str, Any]) -> None:
    _among(settings, "format", (*_CT_FORMATS, "mixed-precision"), "dense")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping):
        raise _unread("config_groups", groups)
    for group in groups.values():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise _unread("config_groups", group)
        if group.get("format") is not None:
            _among(group, "format", _CT_FORMATS, None)
        weights = group["weights"]
        _among(weights, "num_bits", (2, 4, 8), None)
        _among(weights, "strategy", _CT_STRATEGIES, "group")
        _check_group(weights)
        _check_block("block_structure", weights.get("block_structure"))
    sparsity = settings.get("sparsity_config")
    # Weights that are merely known to have zeros lie as any others.
    if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        raise _unread("sparsity_config", sparsity)
    if settings.get("transform_config"):
        raise _unread("transform_config", settings["transform_config"])


def _check_group(settings: Mapping[str, Any]) -> None:
    size = settings.get("group_size")
    if size is not None and (type(size) is not int or (size < 1 and size != WHOLE)):
        raise _unread("group_size", size)


def _check_block(name: str, block: Any) -> None:
    try:
        pair = _pair(block)
    except (TypeError, ValueError):
        raise _unread(name, block) from None
    if pair is not None and not all(type(size) is int and size > 0 for size in pair):
        raise _unread(name, block)


def _pair(block: Any) -> tuple[int, int] | None:
    """Two sizes, a list or a text such as "128x128"."""
    if block is None:
        return None
    rows, columns = map(int, block.split("x")) if isinstance(block, str) else block
    return rows, columns


def _one_of_two(settings: Mapping[str, Any], first: str, second: str, known: tuple) -> Any:
    """What two names of one thing say; the first that is known where neither does."""
    for name in (first, second):
        _among(settings, name, known, known[0])
    said = {str(settings[name]).lower() for name in (first, second) if settings.get(name)}
    if len(said) > 1:
        raise UsageError(
            f"quantization_config's {first}={shown(settings[first])} and {second}="
            f"{shown(settings[second])} disagree; remove the one that is wrong"
        )
    return said.pop() if said else known[0]


def _among(settings: Mapping[str, Any], name: str, known: tuple, default: Any) -> None:
    value = settings.get(name)
    value = default if value is None else value
    if isinstance(value, str):
        value = value.lower()
    if type(value) not in (str, int) or value not in known:
        raise _unread(name, settings.get(name))


def _unread(name: str, value: Any) -> UsageError:
    return UsageError(
        f"quantization_config's {name}={shown(value)} is not supported; read are {_METHODS}. Use "
        "the model's files in one of these or in bfloat16"
    )
