"""WeiPipe-Interleave written out by hand for the decoder: what the generic lowering is held to.

Nothing here comes from a schedule: P workers, turn t, worker r. All streams go r -> r + 1.

    forward weights   worker r holds chunk (t - r) mod P
    backward weights  chunk (r - 1 - t) mod P, from turn P on
    gradients         ride with the backward weights; a sum is taken in at the end of the turn

Worker r's n-th F is in turn r + n and its n-th B in turn r + P + n, both of microbatch
(n // P) P + r; F takes chunk n mod P and B chunk P - 1 - n mod P.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxsys.axes import RING
from jaxsys.layered import Layer, LayeredModel


def ring_loss_and_gradients(
    model: LayeredModel,
    mesh: Mesh,
    *,
    microbatches: int,
    recompute: bool,
    compute_dtype=jnp.float32,
    gradient_dtype=jnp.float32,
):
    """The function (parameters, batch) -> (loss, gradients), to be traced inside a jit.

    Parameters and gradients are {"edge", "blocks"}, float32, layers in the order of `rest_order`
    and cut over the ring; edge leaves are cut along their first axis. L, the vocabulary and the
    hidden size must be multiples of P, microbatches M too. Batch leaves are [M, B, ...].

    Args:
        recompute: keep each layer's input alone, or all that backward needs but the weights.
    """
    p = mesh.shape[RING]
    layers = model.layers // p

    def step(parameters, batch):
        r = lax.axis_index(RING)
        onward = functools.partial(
            lax.ppermute, axis_name=RING, perm=[(i, (i + 1) % p) for i in range(p)]
        )
        edge = jax.tree.map(
            lambda e: lax.all_gather(e.astype(compute_dtype), RING, tiled=True), parameters["edge"]
        )
        # One array for each stream: [K, elements of a layer].
        leaves, tree = jax.tree.flatten(parameters["blocks"])
        shapes = [leaf.shape[1:] for leaf in leaves]
        home = jnp.concatenate(
            [leaf.astype(compute_dtype).reshape(layers, -1) for leaf in leaves], axis=1
        )
        cuts = [0]
        for leaf in leaves:
            cuts.append(cuts[-1] + leaf[0].size)

        def unpack(flat):
            pieces = zip(cuts, cuts[1:], shapes, strict=False)
            return jax.tree.unflatten(tree, [flat[a:b].reshape(s) for a, b, s in pieces])

        def of(n):  # a worker's n-th turn -> its microbatch
            return jax.tree.map(lambda leaf: leaf[n // p], batch)

        (block,) = model.kinds.values()
        layer = Layer(index=jnp.int32(0))  # the decoder's blocks do not ask

        def pull_back(flat, x, microbatch):
            """A layer's output and `jax.vjp`'s second value; and its weights."""
            weights = unpack(flat)
            return *jax.vjp(lambda w, v: block(w, v, microbatch, layer), weights, x), weights

        def forward_layer(flat, x, microbatch):
            """The layer's output, and what backward needs beside its weights."""
            y, vjp, weights = pull_back(flat, x, microbatch)
            return y, [x] if recompute else _without(vjp, weights)

        def backward_layer(flat, kept, dy, microbatch):
            # Without recompute the zeros are not used: only where the residuals belong is.
            x = kept[0] if recompute else jnp.zeros(dy.shape, dy.dtype)
            _, vjp, weights = pull_back(flat, x, microbatch)
            dw, dx = (vjp if recompute else _with(vjp, weights, kept))(dy)
            return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(dw)]), dx

        micro = of(0)
        x0 = jax.eval_shape(model.embed, edge, micro)
        specs = jax.eval_shape(
            lambda f: forward_layer(f, jnp.zeros(x0.shape, x0.dtype), micro)[1], home[0]
        )
        residuals = [jnp.zeros((p, layers, *s.shape), s.dtype) for s in specs]

        def forward(turn, weights, x, residuals):
            microbatch = of(turn)
            x = lax.cond(turn % p == 0, lambda: model.embed(edge, microbatch), lambda: x)
            # Every second microbatch fills the slots from the other end: B has just freed them.
            slot = jnp.where(turn // p % 2 == 0, turn % p, p - 1 - turn % p)

            def layer(carry, inputs):
                x, residuals = carry
                flat, k = inputs
                y, kept = forward_layer(flat, x, microbatch)
                residuals = [b.at[slot, k].set(v) for b, v in zip(residuals, kept, strict=True)]
                return (y, residuals), None

            return lax.scan(layer, (x, residuals), (weights, jnp.arange(layers)))[0]

        def backward(turn, weights, y, dy, residuals, d_edge, loss, count):
            microbatch = of(turn)

            def head():
                (part, n), vjp = jax.vjp(lambda e, v: model.head_loss(e, v, microbatch), edge, y)
                d, dx = vjp((jnp.ones_like(part), jnp.zeros_like(n)))
                return dx, _add(d_edge, d), loss + part, count + n

            dy, d_edge, loss, count = lax.cond(
                turn % p == 0, head, lambda: (dy, d_edge, loss, count)
            )
            chunk = p - 1 - turn % p
            slot = jnp.where(turn // p % 2 == 0, chunk, p - 1 - chunk)

            def layer(carry, inputs):
                dy, residuals = carry
                flat, k = inputs
                dw, dx = backward_layer(flat, [b[slot, k] for b in residuals], dy, microbatch)
                # Handed on, or F could not write in place.
                return (dx, lax.optimization_barrier(residuals)), dw

            (dx, residuals), dw = lax.scan(
                layer, (dy, residuals), (weights, jnp.arange(layers)), reverse=True
            )

            def embed():
                _, vjp = jax.vjp(lambda e: model.embed(e, microbatch), edge)
                return _add(d_edge, vjp(dx)[0])

            d_edge = lax.cond(chunk == 0, embed, lambda: d_edge)
            return dx, dw, residuals, d_edge, loss, count

        def turn(carry, t):
            w_f, w_b, total, x, dy, residuals, d_edge, loss, count = carry
            next_f, next_b, arrived = onward(w_f), onward(w_b), onward(total)
            n_f, n_b = t - r, t - r - p
            y = x
            dw = jnp.zeros(home.shape, home.dtype)
            dy, dw, residuals, d_edge, loss, count = lax.cond(
                (n_b >= 0) & (n_b < microbatches),
                lambda: backward(n_b, w_b, y, dy, residuals, d_edge, loss, count),
                lambda: (dy, dw, residuals, d_edge, loss, count),
            )
            # Residuals are read by now; F may write the slot that B has freed.
            residuals, dw, dy = lax.optimization_barrier((residuals, dw, dy))
            x, residuals = lax.cond(
                (n_f >= 0) & (n_f < microbatches),
                lambda: forward(n_f, w_f, x, residuals),
                lambda: (x, residuals),
            )
            total = arrived + dw.astype(gradient_dtype)
            return (next_f, next_b, total, x, dy, residuals, d_edge, loss, count), None

        # The backward stream starts as the mirror of the forward one.
        mirrored = lax.ppermute(home, RING, [(i, (1 - i) % p) for i in range(p)])
        zero = jnp.zeros(x0.shape, x0.dtype)
        carry = (
            home,
            mirrored,
            jnp.zeros(home.shape, gradient_dtype),
            zero,
            zero,
            residuals,
            jax.tree.map(lambda e: jnp.zeros(e.shape, jnp.float32), edge),
            jnp.float32(0),
            jnp.float32(0),
        )
        carry, _ = lax.scan(turn, carry, jnp.arange(microbatches + 2 * p - 1))
        total, d_edge, loss, count = carry[2], *carry[6:]
        total = lax.ppermute(total, RING, [(i, p - 1 - i) for i in range(p)])
        loss, count = lax.psum(loss, RING), lax.psum(count, RING)
        gradients = [
            total[:, a:b].reshape(layers, *s).astype(jnp.float32) / count
            for a, b, s in zip(cuts, cuts[1:], shapes, strict=False)
        ]
        d_edge = jax.tree.map(lambda g: lax.psum_scatter(g, RING, tiled=True) / count, d_edge)
        return loss / count, {"edge": d_edge, "blocks": jax.tree.unflatten(tree, gradients)}

    cut = PartitionSpec(RING)
    ring = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(cut, cut),
        out_specs=(PartitionSpec(), cut),
        check_vma=False,
    )

    def loss_and_gradients(parameters, batch):
        # Worker r takes microbatches r, P + r, ...
        mine = jax.tree.map(
            lambda leaf: leaf.reshape(-1, p, *leaf.shape[1:]).swapaxes(0, 1).reshape(leaf.shape),
            batch,
        )
        return ring(parameters, mine)

    return loss_and_gradients


def rest_order(layers: int, workers: int) -> list[int]:
    """Layers as they rest: worker r owns chunk -r mod P."""
    size = layers // workers
    return [(-r % workers) * size + k for r in range(workers) for k in range(size)]


def _add(sums, more):
    return jax.tree.map(lambda s, m: s + m.astype(s.dtype), sums, more)


def _without(vjp, weights):
    ours = {id(leaf) for leaf in jax.tree.leaves(weights)}
    return [leaf for leaf in jax.tree.leaves(vjp) if id(leaf) not in ours]


def _with(vjp, weights, kept):
    ours = {id(leaf) for leaf in jax.tree.leaves(weights)}
    leaves, tree = jax.tree.flatten(vjp)
    rest = iter(kept)
    return jax.tree.unflatten(tree, [leaf if id(leaf) in ours else next(rest) for leaf in leaves])
