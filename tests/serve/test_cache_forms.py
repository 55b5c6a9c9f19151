"""Engines whose layers keep something else than all keys and values: the text is the model's own.

Greedy tokens equal those of the whole forward pass, with prompts in pieces, shared prefixes, pages
so few that requests are preempted, prefill and decode apart, and heads split over devices.
"""

import asyncio
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxsys.model import (
    DecoderConfig,
    LoadedModel,
    abstract_parameters,
    forward,
    load,
    save_safetensors,
)
from jaxsys.model.contract import cache_numbers
from jaxsys.serve.deployment import DeploymentConfig, build_engine
from jaxsys.serve.requests import SamplingParameters

CASES = Path(__file__).parents[1] / "jaxsys/family_cases.py"
spec = importlib.util.spec_from_file_location("family_cases", CASES)
assert spec is not None and spec.loader is not None
family_cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(family_cases)
STORED = json.loads(family_cases.STORED.read_text())["families"]

SMALL: dict[str, Any] = {
    "max_batch": 4,
    "max_length": 64,
    "max_prefill_tokens": 16,
    "page_size": 4,
    "page_count": 16,
}
COUNT = 12
"""Tokens asked for."""


def model_of(family: str, **changes) -> LoadedModel:
    config = DecoderConfig.from_hf(STORED[family]["config"] | changes)
    generator = np.random.default_rng(1)

    def made(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        start = "_norm" in jax.tree_util.keystr(path) or "scale" in jax.tree_util.keystr(path)
        return jax.numpy.asarray(generator.normal(start, 0.15, leaf.shape), leaf.dtype)

    parameters = jax.tree_util.tree_map_with_path(made, abstract_parameters(config))
    return LoadedModel(
        config=config,
        parameters=parameters,
        tokenizer=None,
        chat_template=None,
        source=family,
    )


def prompts(vocabulary: int) -> list[list[int]]:
    generator = np.random.default_rng(7)
    common = generator.integers(0, vocabulary, 20).tolist()
    return [
        common[: 5 * (i % 5)] + generator.integers(0, vocabulary, 1 + 4 * (i % 6)).tolist()
        for i in range(7)
    ]


def expected(model: LoadedModel, prompt: list[int]) -> list[int]:
    """By computing the whole sequence again for each token."""
    whole = _compiled(model.config)
    tokens, padded = list(prompt), np.zeros((1, 64), np.int32)
    for _ in range(COUNT):
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(whole(model.parameters, padded))
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@functools.cache
def _compiled(config: DecoderConfig):
    return jax.jit(functools.partial(forward, config))


def served(model: LoadedModel, **settings: Any) -> tuple[list[list[int]], Any]:
    """The tokens of all prompts, each asked for twice, and the engine that gave them."""
    engine: Any = build_engine(model, DeploymentConfig(**(SMALL | settings)))
    rule = SamplingParameters(max_tokens=COUNT, temperature=0)

    async def one(prompt: list[int]) -> list[int]:
        return [e.token async for e in engine.generate(prompt, rule) if e.token is not None]

    async def everything() -> list[list[int]]:
        await engine.start()
        try:
            asked = prompts(model.config.vocab_size)
            first = await asyncio.gather(*map(one, asked))
            again = await asyncio.gather(*map(one, asked))
            assert first == again  # the second time out of kept pages
            return list(first)
        finally:
            await engine.drain(10)

    found = asyncio.run(everything())
    for instance in engine.instances:
        instance.scheduler.check()
        assert instance.scheduler.allocator.held == 0
    return found, engine


FORMS = [
    pytest.param({"prefill": 1, "decode": 1}, id="apart"),
    pytest.param({"prefill": 1, "decode": 0}, id="together", marks=pytest.mark.slow),
    pytest.param(
        {"prefill": 1, "decode": 0, "tensor_parallel": 2}, id="split", marks=pytest.mark.slow
    ),
]


@pytest.fixture(scope="module")
def latent():
    return model_of("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=1)


@pytest.mark.parametrize("form", FORMS)
def test_latent_attention_serves_the_models_text(latent, form):
    found, engine = served(latent, **form)
    assert found == [expected(latent, prompt) for prompt in prompts(latent.config.vocab_size)]
    assert sum(one.scheduler.preemptions for one in engine.instances) > 0
    executor = engine.instances[0].executor
    held = sum(pool.nbytes for pool in jax.tree.leaves(executor._cache))
    tokens = SMALL["page_count"] * SMALL["page_size"]
    assert held == 4 * cache_numbers(latent.config, tokens)
    rank, turning = latent.config.latent.rank, latent.config.latent.rotary_dim
    assert held == 4 * tokens * 2 * (rank + turning)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    """gpt-oss as it is published: experts in MXFP4, gate and up woven."""
    import safetensors.numpy

    folder = tmp_path_factory.mktemp("packed")
    changes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    changes["layer_types"] = ["sliding_attention", "full_attention"]
    model = model_of("gpt_oss", **changes)
    save_safetensors(folder, model.config, model.parameters)
    path = next(folder.glob("*.safetensors"))
    tensors = safetensors.numpy.load_file(path)
    generator = np.random.default_rng(5)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        size = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = generator.integers(0, 256, (*size, 16)).astype(np.uint8)
        tensors[f"{name}_scales"] = generator.integers(122, 125, size).astype(np.uint8)
    safetensors.numpy.save_file(tensors, path)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_experts_in_mxfp4_are_served_as_they_are(packed_folder):
    """Half a byte a number and one for 32 of them are held; the text is that of what they mean."""
    expanded = load(packed_folder)
    kept = load(packed_folder, layerwise=True)
    found, engine = served(kept, prefill=1, decode=0)
    assert found == [expected(expanded, prompt) for prompt in prompts(kept.config.vocab_size)]
    numbers = 0
    held = 0
    for layer in engine.instances[0].executor.weights.layers:
        matrices = layer.experts.up.values, layer.experts.down.values
        numbers += sum(2 * matrix.codes.size for matrix in matrices)
        held += sum(leaf.nbytes for leaf in jax.tree.leaves(matrices))
    experts = expanded.config.experts
    assert numbers == 2 * experts.count * 3 * 32 * experts.intermediate_size
    assert held == numbers / 2 + numbers / 32
