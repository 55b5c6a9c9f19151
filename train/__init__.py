"""Training: weights travel round a ring while data stays; the trainer, its data and checkpoints.

`from_nnx` or `from_linen` takes your model, `Batches` your samples, and `Trainer` the model and an
optimizer; `Trainer.fit` trains, saves and resumes. `jaxsys.train.lora` adds adapters.
"""

if __name__ != "jaxsys.train":
    raise ImportError(f"import jaxsys.train, not {__name__}")

from jaxsys.train.adapt import Adapted, from_function, from_linen, from_nnx, next_token_loss
from jaxsys.train.checkpoint import CheckpointStore
from jaxsys.train.corpus import Corpus
from jaxsys.train.loader import Batches
from jaxsys.train.loop import Report, fit
from jaxsys.train.options import About, Compute, Memory
from jaxsys.train.recipe import Recipe
from jaxsys.train.samples import whole_documents, windows
from jaxsys.train.step import StepParts, StepResult, Updates
from jaxsys.train.trainer import Trainer

__all__ = [
    "About",
    "Adapted",
    "Batches",
    "CheckpointStore",
    "Compute",
    "Corpus",
    "Memory",
    "Recipe",
    "Report",
    "StepParts",
    "StepResult",
    "Trainer",
    "Updates",
    "fit",
    "from_function",
    "from_linen",
    "from_nnx",
    "next_token_loss",
    "whole_documents",
    "windows",
]
