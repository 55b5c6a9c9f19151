"""A matrix as the server holds it, in one of some forms, and the product with it.

    y = x W^T,  W ~ values * scale

Quantised matrices lie outputs first, [N, K]: a GPU reads the numbers of one output in a row, and
its products of two float8 matrices want them so (inputs first took 11 to 17 times as long on an
H200). Their scales:

    fp8   e4m3fn, one a row of outputs
    int8  one a row of outputs
    int4  one a group of inputs of each output; eight numbers a word

A product runs by the matrix's `Way`: values widened, exactly, to what the pass computes in; or
both sides in float8, where x gets a scale for each of its rows; one row as a sum of numbers
times numbers, which XLA makes one reading kernel of, or `one_row` does; int4's few rows by a kernel
that multiplies them as integers (`few_rows`). The first is everywhere; the others are for devices
that compute them, chosen by `way` from what was measured (results/products_h200.json).

Legend: M rows of x, N outputs, K inputs, E experts, g numbers that share a scale.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys import float8, forms
from jaxsys.errors import UsageError
from jaxsys.mesh import Device
from jaxsys.serve import few_rows, one_row

Quantisation = forms.Form

QUANTISATIONS = forms.FORMS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a device multiplies by a matrix."""

    summed_row: bool = False
    """Whether one row of x is multiplied as a sum, not as a product."""
    one_row: bool = False
    """Whether that sum is made by the kernel for one row, where that is quicker."""
    few_rows: int = 0
    """Up to so many rows of x are cast to int8, a scale a group, where a matrix is int4."""
    both: bool = False
    """Whether more rows are cast to float8, a scale each, where a matrix is."""
    reason: str = "values widened on their way into products"


WIDENED = Way()


def way(quantisation: Quantisation, device: Device) -> Way:
    """The way of a form on a device, and in words why."""
    if device.platform not in ("gpu", "cuda"):
        return Way(reason=f"{quantisation} values widened: {device.platform} computes wider only")
    if quantisation == "fp8":
        computes, reason = float8.answer(device)
        if not computes:
            return Way(reason=f"fp8 values widened: {reason}")
        both = f"both sides in fp8: {reason}"
        return Way(summed_row=True, one_row=True, both=True, reason=both)
    if quantisation == "int4":
        widened = f"int4 with activations in int8, widened past {few_rows.MOST} rows"
        return Way(few_rows=few_rows.MOST, reason=widened)
    # Activations in int8 too would be faster, and cost the most quality of all forms but int4.
    return Way(summed_row=True, reason="int8 values widened: activations keep their bits")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale"],
    meta_fields=["outputs", "outputs_first", "way"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
    """Weights of one product; an expert's are [E, K, N] with scales [E, N]."""

    values: jax.Array
    """[K, N], or [N, K] where outputs come first; int4 as `few_rows.packed` has it, int32
    [N, K / g, g / 8]."""
    scale: jax.Array | None = None
    """float32 [N], of int4 bfloat16 [N, K / g]."""
    outputs: tuple[int, ...] = ()
    """The shape that N stands for."""
    outputs_first: bool = False
    way: Way = WIDENED

    @property
    def packed(self) -> bool:
        """Whether numbers share words."""
        return self.values.dtype == jnp.int32

    def wide(self, dtype: jnp.dtype) -> jax.Array:
        """The values [N, K] or [K, N] without their scale of rows; of int4 with that of groups."""
        if not self.packed:
            return self.values.astype(dtype)
        assert self.scale is not None
        pair = few_rows.unpacked(self.values)
        both = jnp.concatenate(pair, axis=-1).astype(dtype)
        return (both * self.scale[..., None].astype(dtype)).reshape(both.shape[0], -1)


def plain(values: jax.Array, outputs: tuple[int, ...] | None = None) -> Matrix:
    """A matrix [K, N] that is not quantised."""
    return Matrix(values, outputs=values.shape[1:] if outputs is None else outputs)


def quantised(
    values: jax.Array, quantisation: Quantisation, way: Way = WIDENED, devices: int = 1
) -> Matrix:
    """A matrix [K, N] in a small form, of which no output knows of another.

    Args:
        devices: over which its inputs may be split.
    """
    if quantisation == "int4":
        small, scale = _grouped(values.T, devices)
    else:
        rows = values.T.astype(jnp.float32)
        dtype = float8.E4M3 if quantisation == "fp8" else jnp.int8
        scale = forms.scales(rows, quantisation)
        small, scale = forms.nearest(rows / scale, quantisation).astype(dtype), scale[:, 0]
    return Matrix(small, scale, values.shape[1:], True, way)


def group_of(inputs: int, ways: int = 1) -> int:
    """Inputs that share a scale in int4, such that each of `ways` devices has whole groups.

    Raises:
        UsageError: if no group fits.
    """
    fits = inputs % (forms.GROUP * ways) == 0
    if not fits and ways > 1:
        raise UsageError(
            f"int4 weights of {inputs} inputs are not whole groups of {forms.GROUP} on each of "
            f"{ways} devices; use fewer devices, int8 or fp8"
        )
    return forms.GROUP if fits else inputs + -inputs % 8


def _grouped(rows: Float[Array, "N K"], ways: int) -> tuple[jax.Array, jax.Array]:
    """int4 as `few_rows.packed` has it, and scales [N, K / g]."""
    outputs, inputs = rows.shape
    group = group_of(inputs, ways)
    wide = jnp.pad(rows.astype(jnp.float32), ((0, 0), (0, -inputs % group)))
    wide = wide.reshape(outputs, -1, group)
    scale = forms.scales(wide, "int4")
    whole = forms.nearest(wide / scale, "int4")
    return few_rows.packed(whole + 8), scale[..., 0].astype(jnp.bfloat16)


def matmul(
    x: Float[Array, "B T *inputs"],
    matrix: Matrix,
    *,
    inputs: int = 1,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "B T *outputs"]:
    """x times a matrix, over the last `inputs` axes of `x`; accumulated in float32 at least.

    Args:
        dtype: of the result; that of `x` if None.
    """
    lead = x.shape[: x.ndim - inputs]
    rows = x.reshape(math.prod(lead), -1)
    product = _product(rows, matrix, jnp.dtype(dtype or x.dtype))
    return product.reshape(*lead, *matrix.outputs)


def _product(x: Float[Array, "M K"], matrix: Matrix, dtype: jnp.dtype) -> Float[Array, "M N"]:
    scale, how = matrix.scale, matrix.way
    if scale is None:
        return _dot(x, matrix.values, matrix.outputs_first, dtype)
    if matrix.packed:
        spare = 8 * math.prod(matrix.values.shape[1:]) - x.shape[1]
        if x.shape[0] <= how.few_rows and few_rows.fits(matrix.values) and not spare:
            return few_rows.product(x, matrix.values, scale, dtype)
        return _dot(jnp.pad(x, ((0, 0), (0, spare))), matrix.wide(x.dtype), True, dtype)
    if how.summed_row and x.shape[0] == 1:
        if how.one_row and one_row.fits(matrix.values):
            return one_row.product(x, matrix.values, scale, dtype)
        return _summed(x, matrix.values, scale, dtype)
    if how.both and matrix.values.dtype == float8.E4M3:
        small, of_rows = float8.scaled(x, matrix.values.dtype, axis=1)
        # Sums in bfloat16 halve what the product writes, and are rounded as the result is.
        sums = _dot(small, matrix.values, True, dtype)
        return (sums.astype(jnp.float32) * of_rows * scale[None]).astype(dtype)
    product = _dot(x, matrix.wide(x.dtype), True, dtype)
    return (product * scale[None]).astype(dtype)


def _summed(
    x: Float[Array, "1 K"], values: Array, scale: Array, dtype: jnp.dtype
) -> Float[Array, "1 N"]:
    """One row, in float32."""
    sums = jnp.sum(values.astype(jnp.float32) * x.astype(jnp.float32), axis=1)
    return (sums * scale)[None].astype(dtype)


def _dot(x: jax.Array, w: jax.Array, outputs_first: bool, dtype: jnp.dtype) -> jax.Array:
    axes = (((1,), (1 if outputs_first else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, axes, preferred_element_type=dtype)
