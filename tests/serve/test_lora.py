"""Many adapters on one base in one batch are the merged models, token by token."""

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxsys.errors import UsageError
from jaxsys.model import (
    DecoderConfig,
    abstract_parameters,
    forward,
)
from jaxsys.model.peft import read_layers
from jaxsys.serve import paged_model
from jaxsys.serve.adapters import KnownAdapter, UnknownAdapter
from jaxsys.serve.cache_groups import cache_groups
from jaxsys.serve.deployment import DeploymentConfig, adapter_buckets, build_engine
from jaxsys.serve.expert_weights import grouped_over
from jaxsys.serve.lora import Adapted, AdapterSlots, Pair, grouped
from jaxsys.serve.paged_attention import choose_kernels
from jaxsys.serve.requests import SamplingParameters
from jaxsys.serve.weights import HeldFused, serving_weights

SMALL: dict[str, Any] = {
    "max_batch": 4,
    "max_length": 96,
    "max_prefill_tokens": 16,
    "page_size": 4,
    "page_count": 40,
    "max_requests": 1000,
    "max_loras": 3,
    "max_lora_rank": 4,
}
STORED = json.loads((Path(__file__).parents[1] / "jaxsys/data/families.json").read_text())[
    "families"
]
LINEAR = ("query", "key", "value", "attention/out", "mlp/gate", "mlp/up", "mlp/down")


@pytest.fixture(scope="module", autouse=True)
def _once(compiled_once):
    """Engines of one shape share their steps."""


@pytest.fixture(scope="module")
def adapters(model, write_adapter, tmp_path_factory):
    """Three adapters of unlike ranks and targets: their folders and the merged models."""
    made = {}
    for seed, (rank, targets) in enumerate(
        ((2, LINEAR), (4, ("query", "value")), (1, ("mlp/up",)))
    ):
        folder = tmp_path_factory.mktemp("adapters") / f"a{seed}"
        kind = {"rank": rank, "targets": targets, "seed": seed}
        merged = write_adapter(folder, model.config, model.parameters, **kind)
        made[f"a{seed}"] = str(folder), merged
    return made


@pytest.fixture(scope="module")
def continuation(model, adapters):
    """Greedy continuation by the whole merged model."""
    run = jax.jit(functools.partial(forward, model.config))

    @functools.cache
    def found(name, prompt, count):
        parameters = model.parameters if name is None else adapters[name][1]
        tokens, padded = list(prompt), np.zeros((1, 128), np.int32)
        for _ in range(count):
            padded[0, : len(tokens)] = tokens
            tokens.append(int(np.asarray(run(parameters, padded))[0, len(tokens) - 1].argmax()))
        return tokens[len(prompt) :]

    return found


def described(family):
    """Two layers of a family's stored sizes, of both kinds where it has two."""
    settings = STORED[family]["config"] | {"num_hidden_layers": 2}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][:2]
    return DecoderConfig.from_hf(settings)


def filled(config, rng):
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), abstract_parameters(config)
    )


async def collect(engine, prompt, adapter, count=14):
    rule = SamplingParameters(max_tokens=count, temperature=0)
    tokens = []
    async for event in engine.generate(prompt, rule, adapter=adapter):
        assert event.finish_reason != "error", event.message
        if event.token is not None:
            tokens.append(event.token)
    return tokens


def prompts(count):
    rng = np.random.default_rng(7)
    common = rng.integers(0, 264, 12).tolist()
    return [
        tuple(common[: 4 * (i % 4)] + rng.integers(0, 264, 1 + 5 * (i % 4)).tolist())
        for i in range(count)
    ]


def run(engine, work):
    async def whole():
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.drain(10)
            for one in engine.instances:
                one.scheduler.check()
                assert one.scheduler.allocator.held == 0

    return asyncio.run(whole())


@pytest.mark.parametrize("decode", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_batch_of_adapters_is_the_merged_models(model, adapters, continuation, decode):
    """Three and the base in one batch, prefixes shared by all, few pages; apart, handed over."""
    engine: Any = build_engine(
        model, DeploymentConfig(prefill=1, decode=decode, **dict(SMALL, page_count=26))
    )
    names = [None, "a0", "a1", "a2"]
    asked = [(names[i % 4], p) for i, p in enumerate(prompts(4) * 3)]
    asked += [(name, asked[3][1]) for name in names]  # one prompt, by all

    async def work(engine):
        for name, (folder, _) in adapters.items():
            await engine.adapters.load(name, folder)
        found = await asyncio.gather(*[collect(engine, p, name) for name, p in asked])
        return found, sum(one.scheduler.preemptions for one in engine.instances)

    found, preemptions = run(engine, work)
    assert preemptions > 0
    for (name, prompt), tokens in zip(asked, found, strict=True):
        assert tokens == continuation(name, prompt, 14), name
    assert len({tuple(tokens) for tokens in found[-4:]}) == 4  # adapters matter
    kinds = {key[0] for one in engine.instances for key in one.executor.steps._compiled}
    assert "decode_adapted" in kinds and "prefill_adapted" in kinds


def test_slots_come_and_go_while_others_decode(model, adapters, continuation):
    """A name loaded anew is another adapter; what runs ends with what it began with."""
    engine: Any = build_engine(model, DeploymentConfig(decode=1, **SMALL))
    prompt = prompts(4)[3]

    async def work(engine):
        base = asyncio.create_task(collect(engine, prompt, None, 60))
        await engine.adapters.load("x", adapters["a0"][0])
        with pytest.raises(KnownAdapter, match="'x' is loaded already"):
            await engine.adapters.load("x", adapters["a1"][0])
        long = asyncio.create_task(collect(engine, prompt, "x", 50))
        await asyncio.sleep(0)  # submitted
        while not engine.uses("x@1"):
            await asyncio.sleep(0.001)
        engine.adapters.unload("x")
        with pytest.raises(UnknownAdapter, match="'x' is not loaded"):
            engine.submit(prompt, SamplingParameters(), adapter="x")
        with pytest.raises(UnknownAdapter, match="'x' is not loaded"):
            engine.adapters.unload("x")
        await engine.adapters.load("x", adapters["a1"][0])
        other = await collect(engine, prompt, "x")
        first = await long
        await engine.adapters.load("w", adapters["a2"][0])
        await engine.adapters.load("y", adapters["a2"][0])  # in the slot of the first
        with pytest.raises(UsageError, match="3 adapter.s. are loaded, as many as --max-loras"):
            await engine.adapters.load("z", adapters["a2"][0])
        third = await collect(engine, prompt, "y")
        engine.adapters.unload("y")
        await engine.adapters.load("x", adapters["a0"][0], in_place=True)
        again = await collect(engine, prompt, "x")
        return await base, first, other, third, again

    base, first, other, third, again = run(engine, work)
    assert base == continuation(None, prompt, 60)
    assert first == continuation("a0", prompt, 50)
    assert other == continuation("a1", prompt, 14)
    assert third == continuation("a2", prompt, 14)
    assert again == continuation("a0", prompt, 14)


def test_what_is_no_adapter_of_the_model_is_refused(model, adapters, write_adapter, tmp_path):
    engine: Any = build_engine(model, DeploymentConfig(decode=0, **dict(SMALL, max_lora_rank=2)))
    other = described("qwen3")
    parameters = filled(other, np.random.default_rng(0))
    write_adapter(tmp_path / "other", other, parameters, rank=1, targets=("query",), seed=0)

    async def work(engine):
        for folder, text in (
            (
                adapters["a1"][0],
                "adapters of rank 4; at most 2 is served: start with --max-lora-rank 4",
            ),
            (tmp_path, "has no adapter_config.json"),
            (tmp_path / "other", "do not fit a module of"),
        ):
            with pytest.raises(UsageError, match=text):
                await engine.adapters.load("x", str(folder))
        assert len(engine.adapters) == 0
        # Nothing of what failed keeps a slot.
        for name in ("a", "b", "c"):
            await engine.adapters.load(name, adapters["a0"][0])

    run(engine, work)


def test_without_adapters_nothing_of_them_is_compiled(model):
    engine: Any = build_engine(model, DeploymentConfig(decode=0, **dict(SMALL, max_loras=0)))
    (instance,) = engine.instances
    steps = instance.executor.steps
    keys = [*steps.essential(), *steps.others()]
    assert not [key for key in keys if "adapted" in key[0]]

    async def work(engine):
        with pytest.raises(UsageError, match="no adapters are served"):
            await engine.adapters.load("x", "anywhere")

    run(engine, work)


def test_a_row_without_adapter_gets_an_exact_zero():
    """Whatever the others' hold; and each row what its own gives."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3, 8)), rng.normal(size=(5, 3, 6))
    pair = Pair(*(jnp.asarray(one, jnp.float32) for one in (a, b)))
    x = rng.normal(size=(4, 2, 8))
    for slots, rows in (([0, 1, 2, 3, 4], [3, -1, 0, 3]), ([3, 0], [0, -1, 1, 0])):
        found = grouped(
            jnp.asarray(x, jnp.float32), pair, jnp.asarray(slots), jnp.asarray(rows)
        ).reshape(4, 2, 6)
        assert (np.asarray(found[1]) == 0).all()
        for row, slot in ((0, 3), (2, 0), (3, 3)):
            np.testing.assert_allclose(found[row], x[row] @ a[slot].T @ b[slot], atol=1e-5)


def test_buckets_of_adapters():
    assert adapter_buckets(0, few=False) == ()
    assert adapter_buckets(20, few=False) == (1, 4, 16, 20)
    assert adapter_buckets(20, few=True) == (20,)


FAMILIES = {
    "qwen3": LINEAR,
    "phi3": ("query", "value", "mlp/up", "mlp/down"),
    "gpt_oss": ("query", "key", "value", "attention/out"),
    "deepseek_v3": (
        "query_up",
        "query_down",
        "latent_down",
        "attention/out",
        "mlp/up",
        "shared/up",
    ),
    "glm4_moe": ("query", "mlp/gate", "shared/gate", "shared/down"),
    "starcoder2": ("query", "mlp/up", "mlp/down"),
    "gemma2": LINEAR,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("devices", [1, 2])
def test_logits_of_families_are_the_merged_models(write_adapter, tmp_path, family, devices):
    """Prompts and single steps; split over two devices as the matrices are."""
    config = described(family)
    rng = np.random.default_rng(3)
    parameters = filled(config, rng)
    merged = write_adapter(tmp_path, config, parameters, rank=3, targets=FAMILIES[family], seed=1)
    one = jax.devices()[0]
    place: Any = jax.sharding.SingleDeviceSharding(one)
    mesh = None
    if devices == 2:
        auto = jax.sharding.AxisType.Auto
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",), axis_types=(auto,))
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    weights = serving_weights(config, parameters, placement=place)
    slots = AdapterSlots(config, jnp.dtype("float32"), count=2, rank=4, placement=place)
    slots.put("first", slots.read(tmp_path))
    slots.drop("first")
    slots.put("second", slots.read(tmp_path))
    kernels = choose_kernels(
        dtype=jnp.dtype("float32"), head_dim=config.head_dim, device=one, mesh=mesh, axis="tensor"
    )
    groups = len(cache_groups(config).windows)
    cache = paged_model.empty_cache(config, 8 * groups, 4, jnp.dtype("float32"), place)
    table = np.concatenate([np.arange(4) + 8 * g for g in range(groups)]).astype(np.int32)
    tokens = rng.integers(0, config.vocab_size, 12).astype(np.int32)
    adapted = Adapted(slots.tables, jnp.asarray([0]), jnp.asarray([0]))
    logits, cache = jax.jit(functools.partial(paged_model.prefill_pass, config, kernels, True))(
        weights, cache, tokens[:11], np.int32(0), np.int32(11), table, adapted
    )
    whole = np.asarray(jax.jit(functools.partial(forward, config))(merged, tokens[None])[0])
    bound = 2e-4 * np.abs(whole).max()
    assert np.abs(logits[0] - whole[10]).max() < bound
    both = Adapted(slots.tables, jnp.asarray([0, 1]), jnp.asarray([0, -1]))
    logits, cache = jax.jit(functools.partial(paged_model.decode_pass, config, kernels))(
        weights,
        cache,
        tokens[[11, 11]],
        np.array([11, 11], np.int32),
        np.stack([table, np.full_like(table, 8 * groups)]),
        both,
    )
    assert np.abs(logits[0] - whole[11]).max() < bound


def test_experts_and_absorbed_matrices_are_refused_by_name(write_adapter, tmp_path):

    config = described("deepseek_v3")
    parameters = filled(config, np.random.default_rng(0))
    write_adapter(tmp_path, config, parameters, rank=1, targets=("latent_up",), seed=0)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    slots = AdapterSlots(config, jnp.dtype("float32"), count=1, rank=4, placement=place)
    with pytest.raises(UsageError, match="adapters of 'attention/latent_up', which are not served"):
        slots.read(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    tensors = {
        "base_model.model.model.layers.1.mlp.experts.lora_A.weight": np.zeros((2, 4), np.float32)
    }
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UsageError, match="no low-rank adapter of a linear module.*mlp.experts"):
        slots.read(tmp_path)
    tensors = {name: np.full((1, 48), np.nan, np.float32)}
    tensors[name.replace("lora_A", "lora_B")] = np.zeros((32, 1), np.float32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UsageError, match="o_proj.lora_A.weight' is not finite"):
        slots.read(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
def test_a_quantised_base_has_the_adapters_sums_added(model, write_adapter, tmp_path, form):
    """Whatever the base's products are: each part of a fused matrix gets its own."""
    config = model.config
    write_adapter(tmp_path, config, model.parameters, rank=3, targets=LINEAR, seed=4)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = serving_weights(config, model.parameters, quantisation=form, placement=place)
    slots = AdapterSlots(config, weights.dtype, count=2, rank=4, placement=place)
    slots.put("a", slots.read(tmp_path))
    adapted = Adapted(slots.tables, jnp.asarray([0, 1]), jnp.asarray([0, -1]))
    walk = grouped_over("walk", None, "")
    plain, own = (
        HeldFused(config, weights.layers[1], walk, one) for one in (None, adapted.layer(1))
    )
    layer = read_layers(tmp_path, config)[1]
    x = jax.random.normal(jax.random.key(0), (2, 5, config.hidden_size))

    def added(name):
        a, b = layer[name]
        return np.asarray(x[0]) @ a @ b

    names = ("attention/query", "attention/key", "attention/value")
    for name, with_, without in zip(
        names, own.query_key_value(x), plain.query_key_value(x), strict=True
    ):
        found = np.asarray(with_ - without)
        assert (found[1] == 0).all()
        np.testing.assert_allclose(found[0].reshape(5, -1), added(name), atol=2e-5)
    for name, with_, without in zip(
        ("mlp/gate", "mlp/up"), own.up(x, "mlp"), plain.up(x, "mlp"), strict=True
    ):
        assert with_ is not None and without is not None
        found = np.asarray(with_ - without)
        assert (found[1] == 0).all()
        np.testing.assert_allclose(found[0], added(name), atol=2e-5)
