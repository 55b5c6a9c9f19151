#!/usr/bin/env python
"""Writes docs/models.md's table: what can be done with each family of published models.

scripts/table_models.py [--check]

Every cell is tried on a tiny model of the family: it is loaded from a folder's settings, its loss
is differentiated as one layered model, it is planned, and its weights are laid out for serving.
Parity is what the stored logits of transformers in tests/jaxsys/data/families.json cover.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxsys.errors import UsageError
from jaxsys.layered import reference_loss
from jaxsys.model import FAMILIES, DecoderConfig, abstract_parameters, initial_parameters, layered
from jaxsys.model.gguf_config import ARCHITECTURES
from jaxsys.model.gguf_names import gguf_tensors
from jaxsys.model.shapes import PRESETS
from jaxsys.planner.workload import decoder_workload
from jaxsys.serve.weights import serving_weights

ROOT = Path(__file__).parents[1]
STORED = ROOT / "tests/jaxsys/data/families.json"
PAGE = ROOT / "docs/models.md"
BEGIN, END = "<!-- table of families -->", "<!-- end of the table -->"
IN_GGUF = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "olmo3": "olmo2",
    "cohere": "command-r",
    "hunyuan_v1_dense": "hunyuan-dense",
    "gpt_oss": "gpt-oss",
    "mistral": "llama",
    "glm": "chatglm",
    "glm4_moe": "glm4moe",
    "deepseek_v3": "deepseek2",
    "deepseek_v2": "deepseek2",
}
"""Families whose architecture in GGUF is called otherwise."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the table of docs/models.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args().check
    page = PAGE.read_text()
    head, rest = page.split(BEGIN)
    wanted = f"{head}{BEGIN}\n{table()}{END}{rest.split(END)[1]}"
    if check:
        print(
            "up to date" if wanted == page else f"{PAGE} is not what scripts/table_models.py says"
        )
        return int(wanted != page)
    PAGE.write_text(wanted)
    print(f"wrote {PAGE}")
    return 0


def table() -> str:
    """The rows, in Markdown."""
    stored = json.loads(STORED.read_text())["families"]
    lines = [
        "| family | folder | GGUF | trains | plans | serves | parity | presets |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        config = DecoderConfig.from_hf(stored[name]["config"])
        presets = [preset for preset, shape in PRESETS.items() if shape.family == name]
        gguf = IN_GGUF.get(name, name)
        cells = [
            f"{family.architecture.removesuffix('ForCausalLM')} (`{name}`)",
            _tried(lambda c=config: abstract_parameters(c)),
            f"`{gguf}`" if gguf in ARCHITECTURES and _named(config) else "",
            _tried(lambda c=config: _train(c)),
            _tried(
                lambda n=name, c=config: decoder_workload(
                    n, c, sequence_length=16, microbatch_size=1
                )
            ),
            _tried(lambda c=config: serving_weights(c, initial_parameters(c))),
            "yes" if name in stored else "",
            ", ".join(_shown(presets)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _tried(action: Callable[[], object]) -> str:
    try:
        action()
    except UsageError:
        return ""
    return "yes"


def _train(config: DecoderConfig) -> object:
    """Traces a step's loss and gradients; nothing is computed."""
    ids = jax.ShapeDtypeStruct((1, 1, 12), jnp.int32)
    batch = {"inputs": ids, "targets": ids}
    model = layered(config)
    return jax.eval_shape(
        jax.grad(lambda weights, rows: reference_loss(model, weights, rows)),
        abstract_parameters(config),
        batch,
    )


def _named(config: DecoderConfig) -> bool:
    """Whether GGUF has names for all its tensors."""
    return _tried(lambda: [gguf_tensors(config, kind) for kind in (None, *config.kinds)]) == "yes"


def _shown(presets: list[str]) -> list[str]:
    named = [f"`{name}`" for name in presets if not name.startswith(("bench-", "byte-", "tiny"))]
    return named if len(named) < 4 else [*named[:3], f"{len(named) - 3} more"]


if __name__ == "__main__":
    sys.exit(main())
