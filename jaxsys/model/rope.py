"""Rotary position embedding: pairs of a head's channels turn by position times a frequency.

    y[a] = x[a] cos(p w_i) - x[b] sin(p w_i)
    y[b] = x[b] cos(p w_i) + x[a] sin(p w_i),    w_i = theta^(-2i/W)

The pair i is (i, i + W/2) or, where `interleaved`, (2i, 2i + 1); W <= K channels turn, the rest of
the head stays. Su et al., arXiv 2104.09864. How long contexts stretch the wavelengths is one of
the scalings below; each reproduces transformers' `rope_type` of that name. Cosines and sines are
float32 whatever the model's dtype, and right to 1e-6 at any int32 position: a float32 product p w_i
would be off by 0.004 in the cosine at position 100,000 and by 0.3 at 10,000,000, so the turns that
do not count are taken off in integers first (`_angles`).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsys.errors import UsageError


def _check_factor(factor: float) -> None:
    if not factor >= 1:
        raise UsageError(f"rope scaling factor={factor} must be at least 1")


def _check_original(positions: int) -> None:
    if positions < 1:
        raise UsageError(f"rope scaling original_max_positions={positions} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRopeScaling:
    """All frequencies divided by `factor`. Chen et al., 2306.15595."""

    factor: float
    attention_factor: float = 1.0
    """Of cosines and sines."""

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UsageError(f"rope scaling factor={self.factor} must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRopeScaling:
    """Theta grows with the sequence once that is past the trained positions ("dynamic NTK").

    theta (factor S / P - (factor - 1))^(W / (W - 2)),  S the sequence, P the trained positions.
    """

    factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original(self.original_max_positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRopeScaling:
    """Slow frequencies divided by `factor`, fast ones kept, a ramp between.

    The ramp runs between the pairs that turn `beta_fast` and `beta_slow` times over the trained
    positions; cosines and sines are multiplied by `attention_factor`. Peng et al., 2309.00071.
    """

    factor: float
    original_max_positions: int
    attention_factor: float | None = None
    """Of cosines and sines; by `mscale` and `mscale_all_dim`, or 0.1 ln(factor) + 1, if None."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Whether the ramp's ends are whole pairs."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original(self.original_max_positions)
        if not self.beta_fast >= self.beta_slow > 0:
            raise UsageError(
                f"rope scaling needs beta_fast={self.beta_fast} >= beta_slow={self.beta_slow} > 0"
            )

    def magnitude(self, scale: float | None = 1.0) -> float:
        """0.1 scale ln(factor) + 1, what attention is sharpened by."""
        return 1.0 if self.factor <= 1 else 0.1 * (scale or 0.0) * math.log(self.factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """A divisor of its own for each frequency, another set past the trained positions.

    Ding et al., 2402.13753.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    attention_factor: float
    """Of cosines and sines."""

    def __post_init__(self) -> None:
        _check_original(self.original_max_positions)
        for name in ("short_factor", "long_factor"):
            if not all(value > 0 for value in getattr(self, name)):
                raise UsageError(f"rope scaling {name} must hold numbers above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the long rotary wavelengths.

    Frequencies whose wavelength is below `original_max_positions / high_freq_factor` stay, those
    above `original_max_positions / low_freq_factor` are divided by `factor`, and those between are
    blended linearly in the inverse wavelength.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UsageError(
                f"rope scaling needs 0 < low_freq_factor={self.low_freq_factor} < "
                f"high_freq_factor={self.high_freq_factor}"
            )
        _check_original(self.original_max_positions)


RopeScaling = (
    LinearRopeScaling | DynamicRopeScaling | YarnRopeScaling | LongRopeScaling | Llama3RopeScaling
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """How the positions of one kind of layer turn its heads."""

    theta: float
    width: int
    """W: the channels of a head that turn, its first ones; even."""
    scaling: RopeScaling | None = None
    interleaved: bool = False
    """Pairs (2i, 2i + 1) instead of (i, i + W/2)."""

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise UsageError(f"rope_theta={self.theta!r} must be above 0")
        if self.width < 2 or self.width % 2:
            raise UsageError(f"rotary width {self.width} must be even: rotary turns pairs")
        scaling = self.scaling
        if isinstance(scaling, YarnRopeScaling) and self.theta == 1:
            raise UsageError("rope_theta=1.0 must be another than 1 in yarn: no pair is slower")
        if isinstance(scaling, LongRopeScaling):
            for name in ("short_factor", "long_factor"):
                found = len(getattr(scaling, name))
                if found != self.width // 2:
                    raise UsageError(
                        f"rope scaling {name} holds {found} numbers, not one for each of "
                        f"{self.width // 2} pairs"
                    )

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies change with the length of the whole sequence."""
        return isinstance(self.scaling, DynamicRopeScaling | LongRopeScaling)

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        scaling = self.scaling
        if isinstance(scaling, LongRopeScaling | LinearRopeScaling):
            return scaling.attention_factor
        if not isinstance(scaling, YarnRopeScaling):
            return 1.0
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        if scaling.mscale and scaling.mscale_all_dim:
            return scaling.magnitude(scaling.mscale) / scaling.magnitude(scaling.mscale_all_dim)
        return scaling.magnitude()


def inverse_frequencies(rope: Rope, length: int | None = None) -> np.ndarray:
    """w_i in radians a position, [W/2], float64 on the host: a constant of the compiled step.

    Args:
        rope: theta, width, scaling.
        length: tokens of the whole sequence, where frequencies depend on it; within the trained
            positions if None.
    """
    exponents = np.arange(0, rope.width, 2, dtype=np.float64) / rope.width
    scaling, theta = rope.scaling, rope.theta
    if isinstance(scaling, DynamicRopeScaling):
        most = max(length or 0, scaling.original_max_positions)
        stretch = scaling.factor * most / scaling.original_max_positions - (scaling.factor - 1)
        theta *= stretch ** (rope.width / (rope.width - 2)) if rope.width > 2 else 1.0
    frequencies = theta**-exponents
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, LongRopeScaling):
        past = length is not None and length > scaling.original_max_positions
        return frequencies / np.asarray(scaling.long_factor if past else scaling.short_factor)
    if isinstance(scaling, YarnRopeScaling):
        return _yarn(rope, scaling, frequencies)
    if isinstance(scaling, Llama3RopeScaling):
        wavelengths = 2 * math.pi / frequencies
        # 0 where the wavelength exceeds original/low, 1 below original/high, linear between.
        keep = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        keep = np.clip(keep, 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / scaling.factor
    return frequencies


def _yarn(rope: Rope, scaling: YarnRopeScaling, frequencies: np.ndarray) -> np.ndarray:
    def pair_of(turns: float) -> float:
        over = scaling.original_max_positions / (turns * 2 * math.pi)
        return rope.width * math.log(over) / (2 * math.log(rope.theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = np.clip((np.arange(rope.width // 2) - low) / (high - low), 0.0, 1.0)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def rotary_tables(
    positions: Int[Array, "B T"], rope: Rope, length: int | jax.Array | None = None
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """Cosines and sines of every position, float32 [B, T, 1, W/2], ready to meet [B, T, N, K].

    Args:
        positions: of the tokens.
        rope: the layer's.
        length: tokens of the whole sequence, for scalings that depend on it: an int, an int32
            array [] or [B], or None for one past the largest position (transformers' rule).
    """
    if not rope.depends_on_length or isinstance(length, int):
        known = length if isinstance(length, int) else None
        words = _turns(inverse_frequencies(rope, known))
        angles = _angles(positions, words)
    else:
        found = jnp.max(positions) + 1 if length is None else length
        if isinstance(rope.scaling, LongRopeScaling):
            most = rope.scaling.original_max_positions
            short, past = (_turns(inverse_frequencies(rope, size)) for size in (most, most + 1))
            is_past = (jnp.asarray(found) > most).reshape(-1, 1, 1, 1)
            words = [jnp.where(is_past, b, a) for a, b in zip(short, past, strict=True)]
            angles = _angles(positions, words)
        else:
            frequencies = _frequencies_at(rope, jnp.asarray(found, jnp.float32))
            frequencies = frequencies.reshape(-1, 1, 1, rope.width // 2)
            angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    if rope.magnitude != 1.0:
        cosines, sines = cosines * rope.magnitude, sines * rope.magnitude
    return cosines, sines


def _turns(frequencies: np.ndarray) -> list[jax.Array]:
    """Radians a position -> turns a position less whole ones, a binary fraction of 64 digits.

    Returns:
        Its upper and its lower 32 digits, uint32 [1, 1, 1, W/2] each.
    """
    upper = np.mod(frequencies / (2 * np.pi), 1.0) * 2.0**32
    lower = (upper - np.floor(upper)) * 2.0**32
    words = (np.floor(upper).astype(np.uint64), np.floor(lower).astype(np.uint64))
    return [jnp.asarray(word.astype(np.uint32))[None, None, None] for word in words]


def _angles(positions: Int[Array, "B T"], words: list[jax.Array]) -> Float[Array, "B T 1 H"]:
    """Positions times turns, whole turns taken off, in radians from -pi to pi, float32.

    The product of 32 and 64 digits is formed modulo a turn in unsigned arithmetic, which wraps: the
    upper word's product drops what is whole turns, of the lower word's only the upper half counts.
    What carries would add to that is less than 1e-9 of a turn.
    """
    upper, lower = words
    place = positions.astype(jnp.int32)[..., None, None]
    p = lax.bitcast_convert_type(place, jnp.uint32)
    high, low = p >> 16, p & 0xFFFF
    lower_high, lower_low = lower >> 16, lower & 0xFFFF
    carried = high * lower_high + ((high * lower_low) >> 16) + ((low * lower_high) >> 16)
    # A negative position is 2^32 too much in unsigned digits, and its product `lower`.
    carried = carried - jnp.where(place < 0, lower, jnp.uint32(0))
    turn = lax.bitcast_convert_type(p * upper + carried, jnp.int32)
    return turn.astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)


def _frequencies_at(rope: Rope, length: jax.Array) -> jax.Array:
    """`inverse_frequencies` of lengths [...] known only when running: float32 [..., W/2].

    Of scalings whose theta depends on the length; right to float32, so that angles are as good as
    float32 products are.
    """
    scaling, length = rope.scaling, length[..., None]
    assert isinstance(scaling, DynamicRopeScaling)
    most = scaling.original_max_positions
    stretch = scaling.factor * jnp.maximum(length, most) / most - (scaling.factor - 1)
    exponents = np.arange(0, rope.width, 2) / rope.width
    power = exponents * (rope.width / (rope.width - 2) if rope.width > 2 else 0.0)
    base = inverse_frequencies(rope)
    shape = (1,) * (length.ndim - 1) + (-1,)
    power, base = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (power, base))
    return base * stretch**-power


def rotate(
    x: Float[Array, "B T *N K"], cosines: jax.Array, sines: jax.Array, *, interleaved: bool = False
) -> Float[Array, "B T *N K"]:
    """Turns the heads of `x` [B, T, ..., K]; computed in float32, returned in the dtype of `x`.

    Tables of W/2 columns turn the first W channels of each head.
    """
    for _ in range(x.ndim - cosines.ndim):
        cosines, sines = cosines[:, :, None], sines[:, :, None]
    width = 2 * cosines.shape[-1]
    whole = width == x.shape[-1]
    wide = (x if whole else x[..., :width]).astype(jnp.float32)
    if interleaved:
        pairs = wide.reshape(*wide.shape[:-1], width // 2, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    if interleaved:
        done = jnp.stack(turned, axis=-1).reshape(wide.shape).astype(x.dtype)
    else:
        done = jnp.concatenate(turned, axis=-1).astype(x.dtype)
    return done if whole else jnp.concatenate([done, x[..., width:]], axis=-1)
