"""Takes a user's own model, as it is, apart into embed, blocks, head and loss.

The whole model with its loss is traced once and written out flat (`program`), each operation given
to the block whose parameters it needs (`flow`, `stages`), blocks that do the same are told from
others (`kinds`), and what one part makes for another is put into x (`carry`). So every use is seen:
what adapts computes just what the model does, whatever framework it is written in.
"""

from jaxsys.train.adapt.function import (
    KEY,
    Adapted,
    Inputs,
    Loss,
    LossFunction,
    first_argument,
    from_function,
    next_token_loss,
)
from jaxsys.train.adapt.linen import from_linen
from jaxsys.train.adapt.nnx import from_nnx

__all__ = [
    "KEY",
    "Adapted",
    "Inputs",
    "Loss",
    "LossFunction",
    "first_argument",
    "from_function",
    "from_linen",
    "from_nnx",
    "next_token_loss",
]
