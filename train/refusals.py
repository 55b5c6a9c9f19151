"""Optimizers that a step cannot run, refused by name."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxsys.errors import UsageError


def asking(optimizer: optax.GradientTransformation, call: Callable[[], Any]) -> Any:
    """What `call` returns; what it raises as a UsageError that names the optimizer's parts."""
    try:
        return call()
    except UsageError:
        raise
    except Exception as error:
        names = ", ".join(part_names(optimizer)) or "of your own"
        lacking = re.findall(r"'(\w+)'", str(error)) if "missing" in str(error) else []
        if isinstance(error, TypeError) and lacking:
            raise UsageError(
                f"the optimizer ({names}) needs {', '.join(lacking)} at every update, which a "
                "scheduled step does not have: use one that takes gradients, state and parameters"
            ) from error
        text = str(error).strip().split("\n")[0][:300]
        raise UsageError(
            f"the optimizer ({names}) does not take the model's parameters: "
            f"{type(error).__name__}: {text}"
        ) from error


def part_names(optimizer: optax.GradientTransformation) -> list[str]:
    """The optax functions that an optimizer is made of, as far as its closures show them."""
    names: dict[str, None] = {}
    seen: set[int] = set()
    waiting: list[Any] = [optimizer.update, optimizer.init]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, tuple | list):
            waiting += value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif callable(value) and hasattr(value, "__qualname__"):
            if ".<locals>." in value.__qualname__ and value.__name__ in ("init_fn", "update_fn"):
                names[value.__qualname__.split(".<locals>.")[0]] = None
            for cell in getattr(value, "__closure__", None) or ():
                waiting.append(cell.cell_contents)
    return sorted(names)


def check_same(optimizer: optax.GradientTransformation, given: Any, out: Any) -> None:
    """Raises UsageError if an update returns another tree than it was given."""
    if jax.tree.structure(given) == jax.tree.structure(out):
        unlike = next(
            (
                (jax.tree_util.keystr(path), a, b)
                for (path, a), b in zip(
                    jax.tree_util.tree_leaves_with_path(given), jax.tree.leaves(out), strict=True
                )
                if (a.shape, a.dtype) != (b.shape, b.dtype)
            ),
            None,
        )
        if unlike is None:
            return
        what = f"{unlike[0]}: {unlike[1].dtype}{list(unlike[1].shape)} became "
        what += f"{unlike[2].dtype}{list(unlike[2].shape)}"
    else:
        what = "another structure than its own init made"
    raise UsageError(
        f"the optimizer ({', '.join(part_names(optimizer))}) returns {what}; a step's state must "
        "keep its shapes"
    )
