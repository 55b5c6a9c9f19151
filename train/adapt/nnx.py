"""NNX models."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters, PyTree
from jaxsys.train.adapt.function import (
    KEY,
    Adapted,
    Inputs,
    Loss,
    first_argument,
    from_function,
    named_output,
    next_token_loss,
    with_evaluation,
)
from jaxsys.train.adapt.program import is_still, values_of


def from_nnx(
    module: nnx.Module,
    example: PyTree,
    *,
    blocks: str | Sequence[str],
    loss: Loss = next_token_loss,
    inputs: Inputs = first_argument,
    **options: Any,
) -> Adapted:
    """Adapts an NNX model.

    What it holds beside nnx.Param (tables, frozen statistics) is constant. Where its call draws
    random numbers (dropout), every microbatch has its own key in its leaf "key", which is folded
    into each of the model's own keys; `Trainer.evaluate` runs the model after its `eval()`.

    Args:
        module: the whole model; left as it is.
        example: one microbatch, arrays or shapes.
        blocks: where blocks are: the attribute that holds their list ("layers", "body.layers"), or
            one module whose parameters are stacked for nnx.scan; several for several groups.
        loss: from the model's output and the microbatch.
        inputs: the model's arguments from the microbatch.
        **options: passed to the model's call.

    Raises:
        UsageError: if the model cannot be cut; says why.
    """
    adapted = _adapt(module, example, blocks, loss, inputs, options)
    if adapted.draws:
        still = nnx.clone(module)
        still.eval()
        evaluated = _adapt(still, example, blocks, loss, inputs, options, adapted.numbers)
        adapted = with_evaluation(adapted, evaluated)

    def rebuild(parameters: Parameters) -> nnx.Module:
        trained = nnx.clone(module)
        nnx.update(trained, adapted.rebuild(parameters))
        return trained

    return dataclasses.replace(adapted, rebuild=rebuild)


def _adapt(
    module: nnx.Module,
    example: PyTree,
    blocks: str | Sequence[str],
    loss: Loss,
    inputs: Inputs,
    options: dict[str, Any],
    numbers: Any = None,
) -> Adapted:
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    keys = nnx.to_pure_dict(nnx.state(module, nnx.RngKey))

    def called(params: PyTree, microbatch: PyTree) -> tuple[Any, dict[str, Any]]:
        """The call's output, and what it leaves otherwise in what is kept beside parameters."""
        mine = nnx.clone(module)
        nnx.update(mine, params)
        if isinstance(microbatch, Mapping) and KEY in microbatch:
            words = _words(microbatch[KEY])
            nnx.update(mine, jax.tree.map(lambda key: _folded(key, words), keys))
        before = _kept(mine)
        output = mine(*inputs(microbatch), **options)
        after = _kept(mine)
        return output, {k: v for k, v in after.items() if v is not before.get(k, v)}

    # nnx.remat and nnx.scan hand back all that they are given: written is what is another value.
    start = _kept(module)
    left = values_of(lambda params, microbatch: called(params, microbatch)[1], params, example)
    for path, value in left.items():
        if not is_still(value, start[path]):
            raise UsageError(
                f"the model's call writes to {path}, beside its parameters; a schedule has no "
                "place for that. Switch it off (model.eval() uses stored statistics) or use a "
                "layer that keeps nothing (LayerNorm, GroupNorm)"
            )

    def whole(params: PyTree, microbatch: PyTree) -> Any:
        return loss(named_output(called(params, microbatch)[0]), microbatch)

    paths: dict[int, list[tuple[str, ...]]] = {}
    for path, variable in _variables(module):
        paths.setdefault(id(variable), []).append(path)
    aliases = {path: several for several in paths.values() for path in several}
    return from_function(whole, params, example, blocks=blocks, aliases=aliases, numbers=numbers)


def _folded(key: jax.Array, words: list[jax.Array]) -> jax.Array:
    """A key of the model's own with a microbatch's words folded in; a stack of keys one by one."""
    if key.ndim:
        return jax.vmap(lambda one: _folded(one, words))(key)
    for word in words:
        key = jax.random.fold_in(key, word)
    return key


def _words(key: jax.Array) -> list[jax.Array]:
    typed = jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    return list(jax.random.key_data(key) if typed else key)


def _kept(module: nnx.Module) -> dict[str, Any]:
    """What a module keeps beside parameters, by its path; random numbers and sown values aside."""
    skip = nnx.Param | nnx.RngState | nnx.Intermediate
    return {
        ".".join(path): variable.get_value()
        for path, variable in _variables(module)
        if not isinstance(variable, skip)
    }


def _variables(
    node: Any, path: tuple[str, ...] = (), above: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[str, ...], nnx.Variable]]:
    """All variables by all paths that lead to them."""
    if isinstance(node, nnx.Variable):
        yield path, node
    elif id(node) not in above:
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(node, nnx.Pytree):
            items = [(k, v) for k, v in vars(node).items() if not k.startswith("_pytree__")]
        elif isinstance(node, dict):
            items = node.items()
        elif isinstance(node, list | tuple):
            items = enumerate(node)
        for name, value in items:
            yield from _variables(value, (*path, str(name)), (*above, id(node)))
