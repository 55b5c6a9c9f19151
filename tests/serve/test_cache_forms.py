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
    preset,
    save_safetensors,
)
from jaxsys.model.contract import cache_numbers, layer_cache
from jaxsys.serve.cache_groups import cache_groups
from jaxsys.serve.deployment import DeploymentConfig, build_engine
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.scheduler import Scheduler

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
    changes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
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
    kept = load(packed_folder, leafwise=True)
    found, engine = served(kept, prefill=1, decode=0, page_count=40)
    assert found == [expected(expanded, prompt) for prompt in prompts(kept.config.vocab_size)]
    numbers = 0
    held = 0
    for layer in engine.instances[0].executor.weights.layers:
        matrices = layer.experts.up.values, layer.experts.down.values
        numbers += sum(2 * matrix.codes.size for matrix in matrices)
        held += sum(leaf.nbytes for leaf in jax.tree.leaves(matrices))
    experts = expanded.config.experts
    assert experts is not None
    assert numbers == 2 * experts.count * 3 * 32 * experts.intermediate_size
    assert held == numbers / 2 + numbers / 32


@pytest.fixture(scope="module")
def windows():
    """Three layers, two of which see eight tokens; and two that both do."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "mixed": model_of("gpt_oss", num_hidden_layers=3, layer_types=types),
        "all": model_of("mistral", num_hidden_layers=2),
    }


@pytest.mark.parametrize(
    ("which", "form"),
    [
        ("mixed", {"prefill": 1, "decode": 1}),
        pytest.param("mixed", {"prefill": 1, "decode": 0}, marks=pytest.mark.slow),
        pytest.param("all", {"prefill": 1, "decode": 1}, marks=pytest.mark.slow),
        pytest.param("all", {"prefill": 1, "decode": 0}, marks=pytest.mark.slow),
    ],
)
def test_pages_before_every_window_are_given_back_and_the_text_stays(windows, which, form):
    model = windows[which]
    groups = cache_groups(model.config)
    assert groups.windows == ((None, 8, 8) if which == "mixed" else (8,))
    pages = 34 if which == "mixed" else 16
    found, engine = served(model, **form, page_count=pages)
    assert found == [expected(model, prompt) for prompt in prompts(model.config.vocab_size)]
    if which == "mixed" and form["decode"]:
        assert sum(one.scheduler.preemptions for one in engine.instances) > 0
    pools = engine.instances[-1].executor._cache
    assert len(pools) == groups.depth == (1 if which == "mixed" else 2)


def test_pages_held_are_bounded_by_the_window(windows):
    """A sequence of any length holds what `cache_numbers` prices, and a page or two a group."""
    config = windows["mixed"].config
    groups = cache_groups(config)
    scheduler = Scheduler(
        SchedulerConfig(
            page_count=200, page_size=4, max_length=400, max_prefill_tokens=16,
            windows=groups.windows,
        )
    )  # fmt: skip
    rule = SamplingParameters(max_tokens=250, temperature=0)
    scheduler.add(Request("long", sampling=rule, arrival_s=0.0, prompt_tokens=list(range(100))))
    most = 0
    for now in range(270):
        iteration = scheduler.next_iteration(float(now))
        if iteration is None:
            break
        scheduler.complete(iteration, now + 0.5, [5] * len(iteration.sampling))
        scheduler.check()
        held = scheduler.allocator.held
        for request in scheduler.running:
            length = request.computed
            priced = (
                cache_numbers(config, length) / layer_cache(config, config.kinds[0]).token_numbers
            )
            # Pages of four tokens.
            assert 4 * groups.depth * held <= priced + groups.depth * 4 * 2 * len(groups.windows)
        most = max(most, held)
    assert scheduler.requests == 0
    assert 350 / 4 <= most <= 350 / 4 + 2 * (8 + 16) / 4 + 6
    # A second prompt finds what is left of the first, though most of its windows' pages went.
    tokens = list(range(100))
    again = Request("again", sampling=rule, arrival_s=0.0, prompt_tokens=[*tokens[:60], 7])
    scheduler.add(again)
    scheduler.next_iteration(300.0)
    assert again.cached_tokens == 60


def test_prefixes_whose_window_is_gone_are_found_no_further(windows):
    groups = cache_groups(windows["mixed"].config)
    config = SchedulerConfig(
        page_count=40, page_size=4, max_length=120, max_prefill_tokens=16, windows=groups.windows
    )
    scheduler = Scheduler(config)
    rule = SamplingParameters(max_tokens=2, temperature=0)
    tokens = list(range(64))

    def run(request):
        scheduler.add(request)
        while (iteration := scheduler.next_iteration(0.0)) is not None:
            scheduler.complete(iteration, 0.0, [9] * len(iteration.sampling))
            scheduler.check()

    run(Request("first", sampling=rule, arrival_s=0.0, prompt_tokens=tokens))
    # Takes what was let go first: pages of the first groups' windows.
    run(Request("other", sampling=rule, arrival_s=0.0, prompt_tokens=list(range(100, 140))))
    second = Request("second", sampling=rule, arrival_s=0.0, prompt_tokens=[*tokens[:32], 1])
    run(second)
    assert second.cached_tokens % 4 == 0 and second.cached_tokens <= 32
    third = Request("third", sampling=rule, arrival_s=0.0, prompt_tokens=[*tokens[:32], 2])
    run(third)
    assert third.cached_tokens == 32


def test_layers_are_grouped_by_what_they_keep():
    for name, windows, depth in (
        ("gpt-oss-20b", (None, 128), 12),
        ("gemma-3-1b-pt", (None, *[512] * 6), 4),
        ("Qwen3-8B", (None,), 36),
        ("Mistral-7B-v0.1", (4096,), 32),
    ):
        groups = cache_groups(preset(name))
        assert (groups.windows, groups.depth) == (windows, depth), name
        assert len(set(groups.places)) == preset(name).num_layers
