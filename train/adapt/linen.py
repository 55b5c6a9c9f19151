"""Linen models."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import errors, linen

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


def from_linen(
    module: linen.Module,
    variables: Mapping[str, Any],
    example: PyTree,
    *,
    blocks: str | Sequence[str],
    loss: Loss = next_token_loss,
    inputs: Inputs = first_argument,
    rngs: str | Sequence[str] = "dropout",
    evaluation: Mapping[str, Any] | None = None,
    **options: Any,
) -> Adapted:
    """Adapts a Linen model.

    Args:
        module: the whole model.
        variables: what `module.init` returned. Collections beside "params" are constants.
        example: one microbatch, arrays or shapes.
        blocks: where blocks are among the parameters: "Block_" for Block_0, Block_1, ...;
            "decoder.layers" for a scan's stacked ones; several such for several groups.
        loss: from the model's output and the microbatch.
        inputs: the model's arguments from the microbatch.
        rngs: names of the random streams that the call may draw from. Where it does, a microbatch
            has its own key in its leaf "key": the model is called with rngs={"dropout": that key}.
        evaluation: options that `Trainer.evaluate` passes instead ({"deterministic": True}).
        **options: passed to the model's call, such as deterministic=False or mutable=["losses"].

    Raises:
        UsageError: if the model cannot be cut; says why.
    """
    params = variables["params"]
    others = {name: value for name, value in variables.items() if name != "params"}
    written = options.get("mutable") or ()
    written = (written,) if isinstance(written, str) else written
    kept = [name for name in others if written is True or name in written]
    if kept:
        raise UsageError(
            f"the call writes to {', '.join(kept)}, which the variables hold; only parameters can "
            "be trained, so hand over {'params': ...} without them"
        )
    streams = (rngs,) if isinstance(rngs, str) else tuple(rngs)

    def adapt(options: Mapping[str, Any], numbers: Any = None) -> Adapted:
        def whole(params: PyTree, microbatch: PyTree) -> Any:
            output = _called(
                module, {"params": params, **others}, microbatch, inputs, streams, options
            )
            return loss(named_output(output), microbatch)

        return from_function(whole, params, example, blocks=blocks, numbers=numbers)

    adapted = adapt(options)
    if evaluation is not None:
        still = adapt({**options, **evaluation}, adapted.numbers)
        adapted = with_evaluation(adapted, still)

    def rebuild(parameters: Parameters) -> dict[str, Any]:
        return {"params": adapted.rebuild(parameters), **others}

    return dataclasses.replace(adapted, rebuild=rebuild)


def _called(
    module: linen.Module,
    variables: Mapping[str, Any],
    microbatch: PyTree,
    inputs: Inputs,
    streams: Sequence[str],
    options: Mapping[str, Any],
) -> Any:
    """The model's output on a microbatch; what a schedule has no place for is refused."""
    drawn = {}
    if isinstance(microbatch, Mapping) and KEY in microbatch:
        key = microbatch[KEY]
        keys = (
            [key]
            if len(streams) == 1
            else [jax.random.fold_in(key, n) for n in range(len(streams))]
        )
        drawn = {"rngs": dict(zip(streams, keys, strict=True))}
    try:
        return module.apply(variables, *inputs(microbatch), **drawn, **options)
    except errors.ModifyScopeVariableError as error:
        raise UsageError(
            "the model's call writes to variables beside its parameters (batch statistics, a "
            "cache); a schedule has no place for them: call it so that it only reads them "
            f"(use_running_average=True, decode=False). Flax says: {_first_line(error)}"
        ) from None
    except errors.InvalidRngError as error:
        raise UsageError(
            "the model draws random numbers from a stream that is not among "
            f"rngs={tuple(streams)}; name all of them. Flax says: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
