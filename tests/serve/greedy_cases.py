"""Prompts of unlike lengths, what transformers' `generate` answers, and three shapes of paging.

`python tests/serve/greedy_cases.py` (with the extra `parity`) stores the answers of every family's
first configuration in data/greedy.json, which says with which version.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

spec = importlib.util.spec_from_file_location(
    "family_cases", Path(__file__).parents[1] / "jaxsys/family_cases.py"
)
assert spec is not None and spec.loader is not None
family_cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(family_cases)

STORED = Path(__file__).parent / "data" / "greedy.json"
TOKENS = 12
COMMON: dict[str, Any] = {"decode": 0, "max_batch": 4, "max_length": 48}
SHAPES: dict[str, dict[str, Any]] = {
    "large pages": {"page_size": 16, "max_prefill_tokens": 32, "page_count": 24},
    "small pages": {"page_size": 4, "max_prefill_tokens": 8, "page_count": 96},
    "few pages": {"page_size": 4, "max_prefill_tokens": 16, "page_count": None},
}
"""Pieces shorter than prompts, prefixes that are shared, and so few pages that requests are
preempted."""


def prompts() -> list[list[int]]:
    """Every second begins alike."""
    rng = np.random.default_rng(5)
    common = rng.integers(0, 64, 9).tolist()
    return [
        (common if index % 2 else []) + rng.integers(0, 64, 3 + 4 * index).tolist()
        for index in range(5)
    ]


def their_text(model: Any, prompt: list[int]) -> list[int]:
    """What `generate` takes at temperature 0."""
    import torch  # pyright: ignore[reportMissingImports]

    ids = torch.tensor([prompt])
    whole = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        eos_token_id=None,
    )
    return whole[0, len(prompt) :].tolist()


def store() -> None:
    """Generates and writes data/greedy.json."""
    import tempfile

    import transformers  # pyright: ignore[reportMissingImports]

    texts = {}
    for family in family_cases.CASES:
        with tempfile.TemporaryDirectory() as name:
            model = family_cases.their_folder(family, 0, Path(name))
            texts[family] = [their_text(model, prompt) for prompt in prompts()]
    STORED.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f'"{name}": {json.dumps(text)}' for name, text in texts.items())
    version = json.dumps(transformers.__version__)
    STORED.write_text(f'{{"transformers": {version}, "texts": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    store()
