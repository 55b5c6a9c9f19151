"""Where samples lie in all that a loss is made of; see `samples`.

Legend: B samples in the microbatch.
"""

from jaxsys.train.adapt.samples import (
    Along,
    Followed,
    Same,
    State,
    Unknown,
    everything_uneven,
    of_constant,
)
from jaxsys.train.adapt.values import BatchLeaf, Constant, Value

OUTPUT = "jaxsys_model_output"
"""The name of a model's outputs: in what cannot be followed up to there, samples are believed to
lie along the first axis."""


def states_of(
    loss: Value, samples: int, key: int | None, followed: Followed | None = None
) -> dict[Value, State]:
    """Of all that a loss is made of, where samples lie.

    Args:
        loss: a value of a program.
        samples: B.
        key: the microbatch's leaf that is its key.
        followed: what follows operations.
    """
    followed = followed or Followed(samples)
    states: dict[Value, State] = {}

    def leaf(value: Value) -> State:
        if isinstance(value, Constant):
            shape = value.aval.shape  # keys made here would belong to whatever traces this
            return of_constant(value.words) if value.keys is None else everything_uneven(shape)
        if isinstance(value, BatchLeaf):
            if value.number == key:
                return Same(drawn=True)
            return Along(0) if value.aval.shape[:1] == (samples,) else Unknown()
        return everything_uneven(value.aval.shape)

    waiting = [loss]
    while waiting:
        value = waiting[-1]
        maker = value.maker
        if value in states:
            waiting.pop()
        elif maker is None:
            states[waiting.pop()] = leaf(value)
        elif ahead := [one for one in maker.inputs if one not in states]:
            waiting += ahead
        else:
            name = maker.primitive.name
            found = followed.operation(
                maker,
                [states[one] for one in maker.inputs],
                [one.aval.shape for one in maker.inputs],
                [one.aval.shape for one in maker.outputs],
            )
            if name == "name" and maker.parameters.get("name") == OUTPUT:
                first = value.aval.shape[:1] == (samples,)
                found = [Along(0) if isinstance(s, Unknown) and first else s for s in found]
            states.update(zip(maker.outputs, found, strict=True))
            states.setdefault(value, found[value.place])
    return states
