"""How many floating-point operations a trained token costs, counted in one way everywhere.

    FLOP / token = 6 N + L * 6 S H        S tokens a sequence, H = heads * head width

6 N: two per parameter forward, four backward, over all N parameters (the embedding too, as in
PaLM's and Chinchilla's count). Attention over the full square would be 12 S H per layer and token,
forward and backward; a causal mask halves it. Recomputation is not counted, so that
MFU = FLOP / token * tokens / s / peak FLOP/s says what reached the model, not how busy a chip was.
"""

from dataclasses import dataclass
from typing import Any

import jax

from jaxsys.hardware import DEVICES, device_called
from jaxsys.layered import Parameters

CONVENTION = "6 x parameters + 6 x sequence x heads x head width per layer (causal), a token"


def training_flops_per_token(
    *, parameters: float, layers: float = 0, sequence_length: int = 0, attention_width: float = 0
) -> float:
    """FLOP to train on one token; see the module's text.

    Args:
        parameters: N, those that a token uses.
        layers: L, of causal attention; one that sees a part of it counts as that part.
        sequence_length: S.
        attention_width: H, heads times head width (the mean of keys' and values'); 0 leaves
            attention out.
    """
    return 6.0 * parameters + 6.0 * layers * sequence_length * attention_width


def count_parameters(parameters: Parameters) -> int:
    """N, over all leaves (arrays or shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """A device's peak rate, or why there is none to compare with."""

    flops_per_s: float | None
    """Dense peak of one device in the compute dtype."""
    reason: str
    """Where the number is from, or why it is missing."""


def device_peak(device: Any, compute_dtype: str) -> Peak:
    """The peak of a device, from `jaxsys.hardware`'s presets (which are for 16-bit products)."""
    if device.platform == "cpu":
        return Peak(flops_per_s=None, reason="n/a, a CPU's peak is not stated")
    name = preset_of(device)
    if name is None:
        return Peak(flops_per_s=None, reason=f"n/a, no preset for {device.device_kind}")
    if compute_dtype not in ("bfloat16", "float16"):
        return Peak(flops_per_s=None, reason=f"n/a, no {compute_dtype} peak for {name}")
    peak = DEVICES[name].peak_flops_per_s
    return Peak(flops_per_s=peak, reason=f"of {peak / 1e12:.0f} TFLOP/s ({name})")


def preset_of(device: Any) -> str | None:
    """The name in `jaxsys.hardware.DEVICES` of a JAX device, or None."""
    if device.platform == "cpu":
        return "cpu" if "cpu" in DEVICES else None
    known = device_called(device.device_kind)
    return None if known is None else known.name
