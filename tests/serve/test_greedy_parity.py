"""An engine's greedy text is transformers' `generate`, in three shapes of paging, for every family.

Against texts stored with their origin; with the extra `parity`, against transformers itself.
"""

import asyncio
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsys.model import DecoderConfig, load
from jaxsys.model.assemble import expected_tensors
from jaxsys.model.names import block_tensors, edge_tensors
from jaxsys.model.safetensors_file import TensorToWrite, write_safetensors
from jaxsys.serve.deployment import DeploymentConfig, build_engine
from jaxsys.serve.requests import SamplingParameters

spec = importlib.util.spec_from_file_location(
    "greedy_cases", Path(__file__).parent / "greedy_cases.py"
)
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

TELLING = ("gpt_oss",)
"""Windows, sinks, biases and experts; the others are slow tests."""


def our_texts(model, shape: dict[str, Any]) -> list[list[int]]:
    settings = dict(shape)
    if settings["page_count"] is None:  # as few as one request needs, and a few more
        for count in (14, 20, 28, 40, 56, 80):
            fields: dict[str, Any] = cases.COMMON | settings | {"page_count": count}
            try:
                build_engine(model, DeploymentConfig(**fields))
            except ValueError:  # layers with windows need more
                continue
            settings["page_count"] = count
            break
    engine: Any = build_engine(model, DeploymentConfig(**cases.COMMON, **settings))
    rule = SamplingParameters(max_tokens=cases.TOKENS, temperature=0)

    async def one(prompt):
        return [
            event.token async for event in engine.generate(prompt, rule) if event.token is not None
        ]

    async def run():
        await engine.start()
        try:
            return await asyncio.gather(*[one(prompt) for prompt in cases.prompts()])
        finally:
            await engine.drain(10)

    return asyncio.run(run())


def write_folder(family: str, folder: Path) -> None:
    """The folder that transformers wrote, made anew of its settings and its tensors' names."""
    stored = json.loads(cases.family_cases.STORED.read_text())["families"][family]["config"]
    (folder / "config.json").write_text(json.dumps(stored))
    config = DecoderConfig.from_hf(stored)
    shapes = expected_tensors(
        config, lambda kind: edge_tensors(config) if kind is None else block_tensors(config, kind)
    )
    write_safetensors(
        folder / "model.safetensors",
        [
            TensorToWrite(
                name=name,
                shape=shape,
                dtype=np.dtype(np.float32),
                pieces=lambda n=name, s=shape: [cases.family_cases.weights_of(n, s)],
            )
            for name, shape in sorted(shapes.items())
        ],
    )


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        (family, shape)
        if family in TELLING and shape == "few pages"
        else pytest.param(family, shape, marks=pytest.mark.slow)
        for family in cases.family_cases.CASES
        for shape in cases.SHAPES
    ],
)
def test_greedy_text_is_as_stored(tmp_path, family, shape):
    wanted = json.loads(cases.STORED.read_text())["texts"][family]
    write_folder(family, tmp_path)
    assert our_texts(load(tmp_path), cases.SHAPES[shape]) == wanted


@pytest.mark.parity
@pytest.mark.parametrize("family", cases.family_cases.CASES)
def test_greedy_text_is_theirs(tmp_path, family):
    pytest.importorskip("torch", reason="needs the extra `parity`")
    pytest.importorskip("transformers", reason="needs the extra `parity`")
    theirs = cases.family_cases.their_folder(family, 0, tmp_path)
    wanted = [cases.their_text(theirs, prompt) for prompt in cases.prompts()]
    model = load(tmp_path)
    for name, shape in cases.SHAPES.items():
        assert our_texts(model, shape) == wanted, name
