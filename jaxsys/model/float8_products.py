"""Training products in float8: y = x W, and the two products of its gradients.

    y  = (x8 W8) s_x s_w        x8, W8 e4m3
    dx = (d8 W8^T) s_d s_w      d8 e5m2 (or e4m3)
    dW = (x8^T d8) s_x s_d

Each s is one number, from the array at hand (`jaxsys.float8`): a device's own part of it where it
is split. Masters, optimizer and sums stay as they are. GPUs want both factors of a float8 product
with the summed axis last, and turn single bytes slowly, so an array that is needed both ways is
cast twice, the second time from its 16-bit transpose. The cast x8 is what is kept for the backward
pass: half the bytes.

Rounding the forward product is what a step's own loss rises by, most of all the head's, whose
errors go straight into logits. So which products run forward in float8 is said apart: with y = x W
in 16 bits that loss is what it is without float8, and two of three products still run in it. What
flows back may have three bits (e4m3) and s_d a number for each row of d for dx, for each of its
columns for dW: the axis that a product keeps.

Hopper's tensor cores sum float8 products in some 14 bits unless a program adds parts of a sum up
elsewhere (DeepSeek-V3, 2412.19437, 3.3.2: errors near 2 % over 4096 terms); XLA asks cuBLAS for
that where a product's precision is HIGHEST. dW sums over all tokens and the head's dx over the
vocabulary, so gradients are summed exactly unless told otherwise, as in Transformer Engine and
Flax.

With `transfers` the matrices of blocks travel in float8 as well (`jaxsys.lowering.eight_bits`), and
s_w is a power of two.

Legend: M rows, K inputs, N outputs.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys import float8
from jaxsys.errors import UsageError
from jaxsys.model.leaves import HEAD, Path

Backward = Literal["e5m2", "e4m3", "e4m3-rows"]
BACKWARD = {"e5m2": float8.E5M2, "e4m3": float8.E4M3, "e4m3-rows": float8.E4M3}
Exact = Literal["none", "backward", "all"]
EXACT: tuple[Exact, ...] = get_args(Exact)

GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""XLA tries each float8 product with kernels of its own beside cuBLAS's: on an H200 (JAX 0.11.2) a
step of four layers was not compiled in 130 s, and one of sixteen took 18 s without them."""


FORWARD = ("attention/.*", "mlp/.*", "shared/(gate|up|down)")
PATHS = (*FORWARD, "head/.*")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Float8:
    """Which products of a decoder train in float8."""

    paths: tuple[str, ...] = PATHS
    """Regular expressions for whole paths of matrices, such as `mlp/down` or `head/kernel`. Experts
    and what chooses among them are not multiplied in float8."""
    forward: tuple[str, ...] = FORWARD
    """Of those, the ones whose forward product is in float8 too, not their gradients' alone."""
    backward: Backward = "e5m2"
    """Of gradients that flow back; `e4m3-rows`: with a scale a token for dx, an output for dW."""
    exact: Exact = "backward"
    """Which products are summed in float32 throughout, on GPUs that would sum float8 in less."""
    transfers: bool = False
    """Whether the matrices of blocks whose forward product is in float8 go from device to device
    so, a byte a number. Scales of all matrices are then powers of two, whether they travel or not
    (`jaxsys.float8.power_of_two`): where a matrix arrives it is the one that was sent."""

    def __post_init__(self) -> None:
        """Raises UsageError if an expression or a form is none."""
        if self.backward not in BACKWARD:
            raise UsageError(f"backward={self.backward!r} must be one of {', '.join(BACKWARD)}")
        if self.exact not in EXACT:
            raise UsageError(f"exact={self.exact!r} must be one of {', '.join(EXACT)}")
        for path in (*self.paths, *self.forward):
            try:
                re.compile(path)
            except re.error as error:
                raise UsageError(f"float8 path {path!r} is no expression: {error}") from error

    def of(self, *path: str) -> "Sides | None":
        """How the matrix at `path` is multiplied; None where nothing of it is in float8."""
        name = "/".join(path)
        if not _fits(self.paths, name):
            return None
        return Sides(_fits(self.forward, name), self.backward, self.exact, self.transfers)

    def travels(self, *path: str) -> bool:
        """Whether a block's matrix at `path` goes from device to device in float8.

        One whose forward product is wide is needed wide.
        """
        sides = self.of(*path)
        return self.transfers and sides is not None and sides.forward

    def check(self, matrices: Iterable[Path]) -> None:
        """Raises UsageError for a rule that names nothing, if none of the rules names anything, or
        for one that names experts.

        What was not asked for is made for every model and may name nothing of this one. That it was
        not is seen by which tuple it is: the same rules, written out by a user, are asked for.
        """
        matrices = list(matrices)
        names = ["/".join(path) for path in matrices]
        some = [name for name in names if _fits(self.paths, name)]
        for rule in self.paths:
            taken = [name for name in names if re.fullmatch(rule, name)]
            wrong = [name for name in taken if name.startswith("experts/") or "weight" in name]
            if wrong:
                raise UsageError(
                    f"float8 path {rule!r} names {wrong[0]}, which is not multiplied in float8; "
                    "use paths of attention, mlp, shared and head"
                )
            if not taken and self.paths is not PATHS:
                raise UsageError(
                    f"float8 path {rule!r} names none of the model's matrices: {', '.join(names)}"
                )
        if not some:
            raise UsageError(f"float8 takes none of the model's matrices: {', '.join(names)}")
        for rule in self.forward:
            if self.forward is not FORWARD and not _fits_any(rule, some):
                raise UsageError(
                    f"float8 path {rule!r} of forward products names none of the matrices that are "
                    f"multiplied in float8: {', '.join(some)}"
                )
        blocks = [path for path in matrices if path != HEAD]
        if self.transfers and not any(self.travels(*path) for path in blocks):
            raise UsageError(
                "transfers in float8 are of matrices whose forward product is in float8, which no "
                f"block has; give forward paths such as {FORWARD[0]!r}, or leave transfers out"
            )


class Sides(NamedTuple):
    """Which products with one matrix are in float8: those of its gradients are."""

    forward: bool = True
    """Whether the forward one is too."""
    backward: Backward = "e5m2"
    """The form of gradients that flow back."""
    exact: Exact = "backward"
    """Which products are summed in float32 throughout."""
    powers: bool = False
    """Whether the matrix' scale is a power of two."""


def _fits(rules: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(rule, name) for rule in rules)


def _fits_any(rule: str, names: Iterable[str]) -> bool:
    return any(re.fullmatch(rule, name) for name in names)


def multiply(
    x: Float[Array, "*lead K"],
    kernel: Float[Array, "K N"],
    sides: Sides = Sides(),  # noqa: B008  (a tuple)
) -> Float[Array, "*lead N"]:
    """x times a kernel, in the dtype of x; which products are in float8 `sides` says."""
    rows, kernel = alike(x.reshape(-1, x.shape[-1]), kernel)
    y: Any = _product(rows, kernel, sides)
    return y.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(
    x: Float[Array, "M K"], kernel: Float[Array, "K N"], sides: Sides
) -> Float[Array, "M N"]:
    return _forward(x, kernel, sides)[0]


def _forward(x: jax.Array, kernel: jax.Array, sides: Sides):
    (x8, x8_turned), of_x = both_ways(x, float8.E4M3)
    (w8, w8_turned), of_w = both_ways(kernel, float8.E4M3, powers=sides.powers)
    if sides.forward:
        y = scaled_dot(x8, w8_turned, of_x * of_w, x.dtype, exact=sides.exact == "all")
    else:
        y = x @ kernel  # x8 and w8_turned are then not made
    # Empty arrays say the dtypes that gradients have.
    like = jnp.zeros((0,), x.dtype), jnp.zeros((0,), kernel.dtype)
    return y, (x8_turned, of_x, w8, of_w, like)


def _backward(sides: Sides, kept, gradient: jax.Array):
    x8_turned, of_x, w8, of_w, like = kept
    (d8, d8_turned), (of_rows, of_columns) = flowing_back(gradient, sides.backward)
    exact = sides.exact != "none"
    to_x = scaled_dot(d8, w8, of_rows * of_w, like[0].dtype, exact=exact)
    to_kernel = scaled_dot(x8_turned, d8_turned, of_x * of_columns, like[1].dtype, exact=exact)
    return to_x, to_kernel


_product.defvjp(_forward, _backward)


def both_ways(
    x: Float[Array, "M K"], dtype: jnp.dtype, *, powers: bool = False
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """x in float8 as it is [M, K] and turned [K, M], and its scale, a scalar."""
    values, scale = float8.scaled(x, dtype, powers=powers)
    turned = float8.cast(x.T.astype(jnp.float32) / scale, dtype)
    return (values, turned), scale.reshape(())


def flowing_back(
    d: Float[Array, "M N"], backward: Backward
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """d in float8 as it is [M, N] and turned [N, M], and what products with these are times."""
    dtype = BACKWARD[backward]
    if backward != "e4m3-rows":
        both, scale = both_ways(d, dtype)
        return both, (scale, scale)
    # Scales go along with the axis that a product keeps: of each turn its own.
    (rows, of_rows), (columns, of_columns) = (float8.scaled(one, dtype, axis=1) for one in (d, d.T))
    return (rows, columns), (of_rows, of_columns.T)


def scaled_dot(
    a: Float[Array, "M K"],
    b: Float[Array, "N K"],
    scale: jax.Array,
    dtype: jnp.dtype,
    *,
    exact: bool,
) -> Float[Array, "M N"]:
    """scale * a b^T; one scale, or some [M, 1] or [1, N].

    Args:
        a: in float8.
        b: in float8.
        scale: float32.
        dtype: of the result.
        exact: whether it is summed in float32 throughout.
    """
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    sums = jax.lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype
    )
    return (sums.astype(jnp.float32) * scale).astype(dtype)


def alike(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both varying over a checked shard_map's axes as either is: custom rules must see to it."""
    axes = [_varying_axes(x) for x in (a, b)]
    both = axes[0] | axes[1]
    a, b = (
        jax.lax.pcast(x, tuple(both - has), to="varying") if both - has else x
        for x, has in zip((a, b), axes, strict=True)
    )
    return a, b


def _varying_axes(x: jax.Array) -> frozenset[str]:
    kind = jax.typeof(x)
    axes = getattr(kind, "manual_axis_type", None)  # `vma` where JAX has it under that name
    return frozenset(getattr(kind, "vma", ()) if axes is None else axes.varying)
