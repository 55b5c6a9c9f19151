"""Takes a user's own Flax model, as it is, apart into embed, block, head and loss.

The model's forward pass is run with its blocks replaced. To embed, the first block's input is
caught and the pass ends there. For the head, every block hands on what it is given, so only what
follows the last one counts; what comes before is dead code that the compiler drops. A block is
called by itself, with the extra arguments it would have had. Nothing of the model is rewritten:
nn.compact and loops over lists of modules work, tied embeddings too.

What cannot be cut this way is refused with its reason: blocks of unlike shapes, something done to x
between blocks, state beside the parameters (batch statistics), extra arguments that depend on
parameters.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.extend import core as jax_core

from jaxsys.errors import UsageError
from jaxsys.layered import Layer, LayeredModel, Parameters, PyTree

Loss = Callable[[Any, PyTree], tuple[Any, Any]]
"""(the model's output, microbatch) -> (summed loss, weight), scalars."""

Inputs = Callable[[PyTree], tuple[Any, ...]]
"""Microbatch -> the model's positional arguments."""

_Block = Callable[..., jax.Array]
"""Stands in for block `index`: (index, x, *extra, **options) -> x."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A user's model in the form schedules run."""

    model: LayeredModel
    parameters: Parameters
    rebuild: Callable[[Parameters], Any]
    """Trained parameters back in the user's own form: Linen variables, or the NNX model."""


def next_token_loss(logits: jax.Array, microbatch: PyTree) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy of logits [B, T, V] with microbatch["targets"] [B, T], -1 ignored."""
    targets = microbatch["targets"]
    counted = targets >= 0
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]
    return jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(counted).astype(jnp.float32)


def first_argument(microbatch: PyTree) -> tuple[Any, ...]:
    """The usual `inputs`: the microbatch's "inputs" alone."""
    return (microbatch["inputs"],)


def from_linen(
    module: linen.Module,
    variables: Mapping[str, Any],
    example: PyTree,
    *,
    blocks: str,
    loss: Loss = next_token_loss,
    inputs: Inputs = first_argument,
    **options: Any,
) -> Adapted:
    """Adapts a Linen model.

    Args:
        module: the whole model.
        variables: what `module.init` returned.
        example: one microbatch, arrays or shapes.
        blocks: how the blocks' names begin: "Block_" for Block_0, Block_1, ...
        loss: from the model's output and the microbatch.
        inputs: the model's arguments from the microbatch.
        **options: passed to the model's call, such as deterministic=True.

    Raises:
        UsageError: if the model cannot be cut; says why.
    """
    others = [name for name in variables if name != "params"]
    if others:
        raise UsageError(f"the model keeps {', '.join(others)}; only parameters can be trained")
    params = dict(variables["params"])
    pattern = re.compile(re.escape(blocks) + r"(\d+)")
    numbered = {int(m[1]): name for name in params if (m := pattern.fullmatch(name))}
    if not numbered or sorted(numbered) != list(range(len(numbered))):
        raise UsageError(
            f"no parameters named {blocks}0, {blocks}1, ... ; the model has {', '.join(params)}"
        )
    names = [numbered[index] for index in range(len(numbered))]
    place = {name: index for index, name in enumerate(names)}
    edge = {name: value for name, value in params.items() if name not in place}
    seen: dict[int, linen.Module] = {}

    def run(edge: PyTree, microbatch: PyTree, block: _Block) -> Any:
        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path = context.module.path
            if context.method_name != "__call__" or len(path) != 1 or path[0] not in place:
                return call(*args, **kwargs)
            seen[place[path[0]]] = context.module.clone(parent=None, name=None)
            return block(place[path[0]], *args, **kwargs)

        with linen.intercept_methods(intercept):
            return module.apply({"params": edge}, *inputs(microbatch), **options)

    def apply(layer: PyTree, x: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return seen[0].apply({"params": layer}, x, *args, **kwargs)

    layers = [params[name] for name in names]
    model = _cut(run, apply, loss, layers=len(layers), edge=edge, example=example)
    _check_alike([_fields(seen[index]) for index in range(len(layers))], names)

    def rebuild(parameters: Parameters) -> dict[str, Any]:
        unstacked = {
            name: jax.tree.map(lambda leaf, i=index: leaf[i], parameters["blocks"])
            for name, index in place.items()
        }
        return {"params": {**parameters["edge"], **unstacked}}

    return Adapted(
        model=model,
        parameters={"edge": edge, "blocks": _stack(layers, names)},
        rebuild=rebuild,
    )


def from_nnx(
    module: nnx.Module,
    example: PyTree,
    *,
    blocks: str,
    loss: Loss = next_token_loss,
    inputs: Inputs = first_argument,
    **options: Any,
) -> Adapted:
    """Adapts an NNX model.

    Args:
        module: the whole model; left as it is.
        example: one microbatch, arrays or shapes.
        blocks: the attribute that holds the list of blocks.
        loss: from the model's output and the microbatch.
        inputs: the model's arguments from the microbatch.
        **options: passed to the model's call.

    Raises:
        UsageError: if the model cannot be cut; says why.
    """
    held = getattr(module, blocks, None)
    if held is None or not hasattr(held, "__iter__"):
        raise UsageError(f"the model has no list of blocks {blocks!r}")
    parts = [nnx.split(block, nnx.Param, ...) for block in held]
    names = [f"{blocks}[{index}]" for index in range(len(parts))]
    if not parts:
        raise UsageError(f"the model's list of blocks {blocks!r} is empty")
    _check_alike([graph for graph, _, _ in parts], names)
    shell = nnx.clone(module)
    setattr(shell, blocks, nnx.List([]))
    graph, params, rest = nnx.split(shell, nnx.Param, ...)
    for name, other in [("the model", rest), *zip(names, (p[2] for p in parts), strict=True)]:
        kept = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(other))[0]
        if kept:
            raise UsageError(
                f"{name} keeps {jax.tree_util.keystr(kept[0][0])} beside its parameters; "
                "only parameters can be trained (no dropout keys, no batch statistics)"
            )
    edge = nnx.to_pure_dict(params)
    block_graph = parts[0][0]

    def run(edge: PyTree, microbatch: PyTree, block: _Block) -> Any:
        whole = nnx.merge(graph, edge)

        def stand_in(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: block(index, *args, **kwargs)

        # Past NNX's own bookkeeping: this copy lives for one call.
        object.__setattr__(whole, blocks, [stand_in(index) for index in range(len(parts))])
        return whole(*inputs(microbatch), **options)

    def apply(layer: PyTree, x: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return nnx.merge(block_graph, layer)(x, *args, **kwargs)

    layers = [nnx.to_pure_dict(state) for _, state, _ in parts]
    model = _cut(run, apply, loss, layers=len(layers), edge=edge, example=example)

    def rebuild(parameters: Parameters) -> nnx.Module:
        trained = nnx.clone(module)
        for index, block in enumerate(getattr(trained, blocks)):
            nnx.update(block, jax.tree.map(lambda leaf, i=index: leaf[i], parameters["blocks"]))
        nnx.update(trained, parameters["edge"])
        return trained

    return Adapted(
        model=model,
        parameters={"edge": edge, "blocks": _stack(layers, names)},
        rebuild=rebuild,
    )


class _Reached(Exception):
    """The first block was reached: carries what it was given."""

    def __init__(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("a block was called outside a run of the adapter")
        self.x, self.args_, self.kwargs_ = x, args, kwargs


def _cut(
    run: Callable[[PyTree, PyTree, _Block], Any],
    apply: Callable[[PyTree, jax.Array, tuple[Any, ...], dict[str, Any]], Any],
    loss: Loss,
    *,
    layers: int,
    edge: PyTree,
    example: PyTree,
) -> LayeredModel:
    """The layered model, after a trace of the whole with all that is assumed of it checked."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), edge)

    def reach(edge: PyTree, microbatch: PyTree) -> _Reached:
        def catch(_: int, x: Any, *args: Any, **kwargs: Any) -> Any:
            raise _Reached(x, args, kwargs)

        try:
            run(edge, microbatch, catch)
        except _Reached as reached:
            return reached
        raise UsageError("the model's call does not reach any of its blocks")

    def extras(microbatch: PyTree) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # They do not depend on the parameters (checked below), so any values will do.
        blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        reached = reach(blank, microbatch)
        return reached.args_, reached.kwargs_

    def embed(edge: PyTree, microbatch: PyTree) -> jax.Array:
        return reach(edge, microbatch).x

    def block(weights: PyTree, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
        args, kwargs = extras(microbatch)
        return apply(weights, x, args, kwargs)

    def head_loss(edge: PyTree, x: jax.Array, microbatch: PyTree) -> tuple[jax.Array, jax.Array]:
        output = run(edge, microbatch, lambda *_, **__: x)
        total, weight = loss(output, microbatch)
        return jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)

    _check_order(run, shapes, example, layers)
    _check_extras(reach, shapes, example)
    x = jax.eval_shape(embed, shapes, example)
    out = jax.eval_shape(head_loss, shapes, x, example)
    if [leaf.shape for leaf in out] != [(), ()]:
        raise UsageError(f"loss must return two scalars (sum, weight), not {out}")
    return LayeredModel(embed=embed, block=block, head_loss=head_loss, layers=layers)


def _check_order(run: Callable[..., Any], edge: PyTree, example: PyTree, layers: int) -> None:
    """Traces the whole and sees that each block is given just what the one before returned."""
    calls: list[tuple[Any, ...]] = []

    def whole(edge: PyTree, microbatch: PyTree) -> Any:
        last: list[Any] = []

        def block(index: int, x: Any, *args: Any, **kwargs: Any) -> Any:
            if index != len(last):
                raise UsageError(
                    f"block {index} runs in place {len(last)}; blocks must run once each, in order"
                )
            if last and x is not last[-1]:
                raise UsageError(
                    f"the model changes x between block {index - 1} and block {index}; "
                    "move that into the block"
                )
            calls.append((args, tuple(sorted(kwargs.items()))))
            mine, first = jax.tree.flatten(calls[-1]), jax.tree.flatten(calls[0])
            same = mine[1] == first[1] and all(
                a is b or (not _is_array(a) and a == b)
                for a, b in zip(mine[0], first[0], strict=True)
            )
            if not same:
                raise UsageError(f"block {index} is called with other arguments than block 0")
            last.append(x + jnp.zeros_like(x))
            return last[-1]

        result = run(edge, microbatch, block)
        if len(last) != layers:
            raise UsageError(f"only {len(last)} of {layers} blocks run")
        return result

    jax.eval_shape(whole, edge, example)


def _check_extras(reach: Callable[..., _Reached], edge: PyTree, example: PyTree) -> None:
    """Sees that what blocks get besides x does not depend on parameters outside them."""

    def arrays(edge: PyTree, microbatch: PyTree) -> list[Any]:
        reached = reach(edge, microbatch)
        return [
            leaf for leaf in jax.tree.leaves((reached.args_, reached.kwargs_)) if _is_array(leaf)
        ]

    closed = jax.make_jaxpr(arrays)(edge, example)
    outputs = {v for v in closed.jaxpr.outvars if not isinstance(v, jax_core.Literal)}
    needed = set(outputs)
    for equation in reversed(closed.jaxpr.eqns):
        if needed & set(equation.outvars):
            needed |= {v for v in equation.invars if not isinstance(v, jax_core.Literal)}
    count = len(jax.tree.leaves(edge))
    if needed & set(closed.jaxpr.invars[:count]):
        raise UsageError(
            "the blocks get an array, besides x, that depends on parameters outside them; "
            "compute it inside the block, or carry it in x"
        )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _fields(module: linen.Module) -> Any:
    skip = {"parent", "name"}
    values = {f.name: getattr(module, f.name) for f in dataclasses.fields(module)}
    return type(module), {name: value for name, value in values.items() if name not in skip}


def _check_alike(kinds: list[Any], names: list[str]) -> None:
    for kind, name in zip(kinds, names, strict=True):
        if kind != kinds[0]:
            raise UsageError(
                f"{name} is made unlike {names[0]}; all blocks must share one configuration"
            )


def _stack(layers: list[PyTree], names: list[str]) -> PyTree:
    """Stacks the blocks' parameters [L, ...]."""
    first = jax.tree_util.tree_flatten_with_path(layers[0])[0]
    for layer, name in zip(layers, names, strict=True):
        flat = jax.tree_util.tree_flatten_with_path(layer)[0]
        unlike = [path for path, _ in flat] != [path for path, _ in first] or any(
            (a.shape, a.dtype) != (b.shape, b.dtype)
            for (_, a), (_, b) in zip(flat, first, strict=True)
        )
        if unlike:
            raise UsageError(f"the parameters of {name} are not shaped like those of {names[0]}")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
