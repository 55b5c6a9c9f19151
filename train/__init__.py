"""Training: weights travel round a ring while data stays; the trainer, its data and checkpoints."""

if __name__ != "jaxsys.train":
    raise ImportError(f"import jaxsys.train, not {__name__}")
