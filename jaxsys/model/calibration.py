"""Rounding that knows what a matrix will be multiplied by.

    minimise |x W - x Q|^2 over some tokens' x,  H = x^T x

Weights are rounded input by input, the most used first; what one loses, those that are not rounded
yet make good (GPTQ, Frantar et al., 2210.17323): with U^T U = H^-1, U upper triangular,

    e = (w_i - q_i) / U_ii,   w_j -= e U_ij for all j behind i

Tokens go through the layers once, each matrix being rounded when the tokens first reach it, so that
it sees inputs as they will be. Codes and scales of four bits are then refined by turns
(`jaxsys.model.refining`). To round what makes of these inputs what the kernel makes of exact ones
(GPTAQ, Li et al., 2504.02692) lost a third more of SmolLM2, by 6,144 tokens.

Legend: T tokens, K inputs, N outputs, g inputs that share a scale.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxsys.errors import UsageError
from jaxsys.forms import GROUP, Form, form_of, nearest, scales
from jaxsys.layered import PyTree
from jaxsys.model.assemble import Checkpoint, Leaves
from jaxsys.model.block import BoundBlock, HeldTree
from jaxsys.model.config import DecoderConfig
from jaxsys.model.decoder import bind_edge, nest
from jaxsys.model.leaves import Path, block_leaves, edge_leaves
from jaxsys.model.packed import Packed
from jaxsys.model.refining import refined
from jaxsys.model.tokenizer import Tokenizer

SEQUENCES, LENGTH = 64, 512
"""Of the tokens that go through the layers."""
DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: what tokens say nothing of is not trusted."""
TURNS = 4
"""Of refining; of random matrices the first gives over half of what there is, eight hardly more
than four."""
_BLOCK = 128
"""Inputs whose errors meet those behind them at once."""


def compensated(
    rows: Float[Array, "N K"],
    scales: Float[Array, "N K"],
    products: Float[Array, "K K"],
    form: Form,
) -> Float[Array, "N K"]:
    """The rounded matrix, in units of its scales.

    Args:
        rows: float32.
        scales: of each number.
        products: H.
        form: of the numbers.
    """
    order = jnp.argsort(-jnp.diagonal(products))
    damped = _damped(products)[order][:, order]
    # The inverse's upper factor by way of the lower one, as LAPACK has it.
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(len(damped)))
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T
    found = _in_order(rows[:, order], scales[:, order], upper, form)
    return found[:, jnp.argsort(order)]


def _damped(products: Float[Array, "K K"]) -> Float[Array, "K K"]:
    used = jnp.diagonal(products)
    return products + jnp.diag(jnp.where(used > 0, 0.0, 1.0) + DAMPING * jnp.mean(used))


@functools.partial(jax.jit, static_argnums=3)
def _in_order(rows: jax.Array, scales: jax.Array, upper: jax.Array, form: Form) -> jax.Array:
    inputs = rows.shape[1]
    spare = -inputs % _BLOCK
    rows = jnp.pad(rows, ((0, 0), (0, spare)))
    scales = jnp.pad(scales, ((0, 0), (0, spare)), constant_values=1.0)
    upper = jnp.pad(upper, ((0, spare), (0, spare)))
    # A weight of its own behind the others: it loses nothing.
    upper = upper + jnp.diag(jnp.arange(inputs + spare) >= inputs)

    def block(number: jax.Array, carry: tuple[jax.Array, jax.Array]):
        rows, found = carry
        first = number * _BLOCK
        part, of_part = (
            jax.lax.dynamic_slice_in_dim(one, first, _BLOCK, 1) for one in (rows, scales)
        )
        factor = jax.lax.dynamic_slice_in_dim(upper, first, _BLOCK, 0)
        own = jax.lax.dynamic_slice_in_dim(factor, first, _BLOCK, 1)

        def column(index: jax.Array, state: tuple[jax.Array, ...]):
            part, made, errors = state
            code = nearest(part[:, index] / of_part[:, index], form)
            error = (part[:, index] - code * of_part[:, index]) / own[index, index]
            part = part - error[:, None] * own[index][None]
            return part, made.at[:, index].set(code), errors.at[:, index].set(error)

        none = jnp.zeros_like(part)
        _, made, errors = jax.lax.fori_loop(0, _BLOCK, column, (part, none, none))
        found = jax.lax.dynamic_update_slice_in_dim(found, made, first, 1)
        return rows - errors @ factor, found

    start = rows, jnp.zeros_like(rows)
    _, found = jax.lax.fori_loop(0, rows.shape[1] // _BLOCK, block, start)
    return found[:, :inputs]


class _Rounding(HeldTree):
    """One layer whose matrices are rounded when something is first multiplied by them."""

    def __init__(self, config: DecoderConfig, tree: PyTree, form: Form) -> None:
        super().__init__(config, tree)
        self._form: Form = form
        self._done: set[Path] = set()
        self._last: tuple[jax.Array, jax.Array] | None = None

    def product(self, x: jax.Array, *path: str) -> jax.Array:
        """As any layer's, by the rounded matrix."""
        if path not in self._done:
            node = self._tree
            for name in path[:-1]:
                node = node[name]
            node[path[-1]] = rounded(node[path[-1]], self._products(x), form_of(path, self._form))
            self._done.add(path)
        return super().product(x, *path)

    def _products(self, x: jax.Array) -> jax.Array:
        """H, once for all matrices that read x."""
        if self._last is None or self._last[0] is not x:
            rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            self._last = x, jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
        return self._last[1]


def rounded(
    kernel: Float[Array, "K N"], products: Float[Array, "K K"], form: Form
) -> Float[Array, "K N"]:
    """The kernel in numbers that a form has, times their scales; float32.

    int8 is so near that it is rounded as a server would.
    """
    rows = kernel.T.astype(jnp.float32)
    whole = form != "int4" or rows.shape[1] % GROUP
    groups = rows.reshape(len(rows), -1, rows.shape[1] if whole else GROUP)
    if form == "int8":
        scale = scales(groups, form)
        return (nearest(groups / scale, form) * scale).reshape(rows.shape).T
    used = jnp.diagonal(products).reshape(1, *groups.shape[1:])
    scale = scales(groups, form, used)[..., 0]
    size = groups.shape[2]
    codes = compensated(rows, jnp.repeat(scale, size, axis=1), products, form)
    if form == "int4":
        codes, scale = refined(rows, codes, scale, _damped(products), turns=TURNS)
    return (codes * jnp.repeat(scale, size, axis=1)).T


class Rounded(Leaves):
    """Leaves of an open checkpoint, matrices rounded for a form; asked for layer after layer."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: DTypeLike, form: Form, tokens: Int[np.ndarray, "B T"]
    ) -> None:
        """
        Args:
            checkpoint: where they lie.
            dtype: of what `read` gives.
            form: that a server will be asked for.
            tokens: of sequences to round by.

        Raises:
            UsageError: if the model has experts.
        """
        super().__init__(checkpoint, dtype)
        config = checkpoint.config
        if any(kind.experts for kind in config.kinds):
            raise UsageError(
                f"{config.family} of this folder has experts, which are not calibrated; leave "
                "--round out and serve it with --quantise"
            )
        self._form: Form = form
        self._config, self._exact = config, Leaves(checkpoint, jnp.float32)
        self._x: jax.Array | None = None
        self._tokens, self._layer, self._tree = tokens, -1, {}

    def read(self, layer: int | None, path: Path) -> np.ndarray | Packed:
        """As `Leaves.read`; layers before the last that was asked for are gone."""
        if layer is None:
            return super().read(layer, path)
        while self._layer < layer:
            self._go_on()
        assert self._layer == layer, f"layer {layer} is asked for after layer {self._layer}"
        node = self._tree
        for name in path:
            node = node[name]
        with np.errstate(over="ignore"):
            return np.asarray(node).astype(self.dtype)

    def take(self, layer: int | None, path: Path) -> np.ndarray | Packed:
        """The same."""
        return super().take(layer, path) if layer is None else self.read(layer, path)

    def _go_on(self) -> None:
        """Takes the tokens through one more layer."""
        if self._x is None:
            paths = [leaf.path for leaf in edge_leaves(self._config)]
            edge = nest((path, jnp.asarray(self._exact.take(None, path))) for path in paths)
            self._x = bind_edge(self._config, edge).embed(jnp.asarray(self._tokens))
        self._layer += 1
        kind = self._config.kind(self._layer)
        paths = [leaf.path for leaf in block_leaves(self._config, kind)]
        self._tree = nest(
            (path, jnp.asarray(self._exact.take(self._layer, path))) for path in paths
        )
        held = _Rounding(self._config, self._tree, self._form)
        self._x = BoundBlock(self._config, kind, held)(self._x)


def sequences(
    text: str, tokenizer: Tokenizer, length: int, count: int = SEQUENCES
) -> Int[np.ndarray, "B T"]:
    """Up to `count` sequences of so many tokens, from all over a text.

    Raises:
        UsageError: if the text is shorter than one.
    """
    tokens = np.array(tokenizer.encode(text), np.int32)
    whole = len(tokens) // length
    if whole == 0:
        raise UsageError(
            f"the text to calibrate by has {len(tokens)} tokens; give one of {length} at least, "
            f"better of {length * SEQUENCES:,}"
        )
    rows = tokens[: whole * length].reshape(whole, length)
    return rows[np.linspace(0, whole - 1, min(whole, count)).astype(int)]
