"""Keys and values in float8 pages: attention over them, and their way from page to page."""

import asyncio
import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys import float8
from jaxsys.model import forward, initial_parameters, preset
from jaxsys.serve import paged_kernel, paged_model
from jaxsys.serve.deployment import DeploymentConfig, build_engine
from jaxsys.serve.paged_attention import Rule, attend_pages, choose_kernels, portable_decode
from jaxsys.serve.requests import SamplingParameters
from jaxsys.serve.weights import serving_weights

CONFIG = dataclasses.replace(preset("tiny"), num_layers=2)
H200 = paged_kernel.Device(shared_bytes=227 << 10, float8=True)
PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
POSITIONS: Any = np.array([63, 20, 0], np.int32)
TABLES: Any = np.array([[1, 2, 3, 4], [5, 6, 99, 99], [7, 99, 99, 99]], np.int32)


@pytest.fixture(scope="module")
def pages():
    """Queries [3, 2, 4, 32], pools [12, 16, 2, 32] and their scales."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, 2, 4, 32)).astype(jnp.bfloat16)
    k, v = (jax.random.normal(key, (12, 16, 2, 32)) for key in keys[1:])
    # What lies behind a request's last token, or in no table, may be anything.
    k, v = k.at[6, 6:].set(jnp.nan), v.at[6, 6:].set(jnp.nan)
    (k, of_k), (v, of_v) = (float8.scaled(pool, float8.E4M3, axis=-1) for pool in (k, v))
    return q, k, v, (of_k[..., 0], of_v[..., 0])


def plainly(q, k, v, scales):
    """Attention of each request over the numbers that its pages stand for."""
    wide = [
        np.asarray(pool.astype(jnp.float32)) * np.asarray(scale)[..., None]
        for pool, scale in zip((k, v), scales, strict=True)
    ]
    found = []
    for one, table, position in zip(np.asarray(q, np.float32), TABLES, POSITIONS, strict=True):
        own = [page for page in table if page < 12]
        keys, values = (np.concatenate(pool[own])[: position + 1] for pool in wide)
        scores = np.einsum("grk,sgk->grs", one, keys) / np.sqrt(32)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        found.append(np.einsum("grs,sgk->grk", weights, values))
    return np.stack(found)


@pytest.mark.parametrize(("programs", "tokens"), [(1, None), (4, None), (4, 8)])
def test_the_kernel_attends_to_the_numbers_that_pages_stand_for(pages, programs, tokens):
    q, k, v, scales = pages
    tile = paged_kernel.tile_for(4, k, True, H200)
    assert tile is not None
    tile = tile._replace(tokens=tokens)
    found = paged_kernel.attend(
        q[:, None], k, v, TABLES, POSITIONS[:, None], scale=32**-0.5, scales=scales,
        tile=tile, programs=programs, interpret=True,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(found[:, 0], np.float32), plainly(*pages), atol=0.02)


def test_the_portable_walk_attends_to_them_too(pages):
    q, k, v, scales = pages
    found = portable_decode(q.astype(jnp.float32), k, v, TABLES, POSITIONS, scales=scales)
    np.testing.assert_allclose(np.asarray(found), plainly(*pages), atol=1e-5)


def test_programs_fill_a_device_and_never_outnumber_pages():
    found = [paged_kernel.programs_of(batch * 8, 32) for batch in (1, 16, 64, 512)]
    assert found == [16, 2, 1, 1]
    assert paged_kernel.programs_of(8, 3) == 4 and paged_kernel.programs_of(8, 512) == 32
    narrow = [paged_kernel.programs_of(batch * 8, 32, warps=2) for batch in (1, 8, 16, 64)]
    assert narrow == [16, 8, 4, 1]


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize(
    ("width", "values", "form", "rule"),
    [
        (96, 96, "bfloat16", {"window": 100, "softcap": 30.0}),
        (576, 512, "bfloat16", {"value_channels": 512}),
        (128, 128, "float8_e4m3fn", {}),
        (128, 128, "int8", {}),
    ],
)
def test_the_kernel_lowers_for_a_gpu(width, values, form, rule, programs):
    """Whether Triton takes what the interpreter does: no GPU is needed to see that."""
    apart = "value_channels" not in rule

    def of(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    q, pages = of((2, 3, 2, 5, width), "bfloat16"), of((9, 64, 2, width), form)
    given: dict[str, Any] = {"sinks": of((2, 5), "bfloat16")}
    if form != "bfloat16":
        given["scales"] = (of((9, 64, 2), "float32"),) * 2
    as_pages: Any = pages
    tile = paged_kernel.tile_for(15, as_pages, apart, H200)
    assert tile is not None
    attend = functools.partial(
        paged_kernel.attend, scale=0.1, tile=tile, programs=programs, interpret=False, **rule
    )
    places = (of((2, 4), "int32"), of((2, 3), "int32"))
    run = jax.jit(lambda q, k, v, tables, at, more: attend(q, k, v, tables, at, **more))
    traced = run.trace(q, pages, pages if apart else None, *places, given)
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        pytest.skip(f"this JAX lowers for a GPU that is there: {error}")
    assert "paged_attention" in text
    assert traced.out_info.shape == (2, 3, 2, 5, values)


def test_pages_that_a_device_has_no_room_for_are_walked():
    def tile(page_size, width, dtype="bfloat16", capability="9.0", apart=True, heads=1):
        device = paged_kernel.device_of(types.SimpleNamespace(
            platform="gpu", compute_capability=capability
        ))  # fmt: skip
        pages: Any = jax.ShapeDtypeStruct((10, page_size, 2, width), jnp.dtype(dtype))
        return device and paged_kernel.tile_for(16, pages, apart, device, heads)

    assert tile(64, 128) == (16, 4, 3, None)
    assert tile(64, 256) == (16, 4, 2, None)
    assert tile(64, 256, capability="8.6") == (16, 4, 1, None)
    assert tile(64, 576, apart=False) == (16, 8, 2, None)
    assert tile(64, 576, capability="8.9", apart=False) == (16, 8, 1, None)
    assert tile(128, 256, capability="12.0") is None
    assert tile(64, 128, "float8_e4m3fn", "8.9") == (16, 2, 2, None)
    assert tile(64, 128, "float8_e4m3fn", heads=1024) == (16, 1, 3, 32)
    assert tile(64, 128, "float8_e4m3fn", "8.0") is None
    assert tile(64, 128, "int8", "8.0") is not None
    assert tile(64, 128, capability="7.5") is None
    assert tile(48, 128) is None and tile(8, 128) is None and tile(64, 72) is None


@pytest.mark.parametrize(
    ("width", "rule", "steps", "sunk", "form"),
    [
        (32, Rule(window=20), 1, True, None),
        (32, Rule(window=1), 5, False, None),
        (48, Rule(softcap=2.0, scale=0.3), 40, True, None),
        (32, Rule(window=7, softcap=3.0), 70, True, "fp8"),
        (48, Rule(value_channels=32, scale=0.2), 3, False, None),
        (48, Rule(value_channels=32, scale=0.2), 1, False, "fp8"),
        (32, Rule(), 3, True, "int8"),
    ],
)
def test_the_kernel_attends_as_the_portable_walk_does(width, rule, steps, sunk, form):
    """Prompts, a few tokens and single ones; programs that share pages, and that do not."""
    keys = jax.random.split(jax.random.key(5), 4)
    groups = 2 if rule.value_channels is None else 1
    pools: Any = [jax.random.normal(key, (12, 16, groups, width)) for key in keys[:2]]
    ends: Any = np.array([[79], [33]], np.int32)
    positions = np.maximum(ends - np.arange(steps, dtype=np.int32)[::-1], 0)
    tables: Any = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 99, 99]], np.int32)
    pools = [pool.at[8, 2:].set(jnp.nan).at[0].set(jnp.nan) for pool in pools]
    scales: Any = None
    if form is not None:
        small = float8.E4M3 if form == "fp8" else jnp.int8
        pools, scales = zip(*(float8.scaled(p, small, axis=-1) for p in pools), strict=True)
        scales = [scale[..., 0] for scale in scales]
    k, v = pools
    if rule.value_channels is not None:
        v, scales = None, None if scales is None else (scales[0], None)
    q = jax.random.normal(keys[2], (2, steps, groups, 3, width))
    sinks = jax.random.normal(keys[3], (groups, 3)) if sunk else None
    wanted = attend_pages(q, k, v, tables, jnp.asarray(positions), rule, sinks, scales)
    tile = paged_kernel.tile_for(3 * steps, k, v is not None, H200)
    assert tile is not None
    for programs in (1, 4):
        found = paged_kernel.attend(
            q, k, v, tables, jnp.asarray(positions), scale=rule.of_width(width),
            window=rule.window, softcap=rule.softcap, value_channels=rule.value_channels,
            sinks=sinks, scales=scales, tile=tile, programs=programs, interpret=True,
        )  # fmt: skip
        atol = 2e-6 if form is None else 2e-3  # float8 is multiplied in float16
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=atol)


@pytest.fixture(scope="module")
def parameters():
    return initial_parameters(CONFIG, seed=1)


@pytest.mark.parametrize(("form", "most"), [("fp8", 0.02), ("int8", 0.004)])
def test_passes_over_small_pages_move_logits_little(parameters, form, most):
    """A prompt in two pieces, pages handed to another cache, then two tokens decoded there."""
    kernels = choose_kernels(
        dtype=jnp.dtype("float32"), head_dim=CONFIG.head_dim, device=jax.devices()[0]
    )
    weights = serving_weights(CONFIG, parameters)
    empty = functools.partial(
        paged_model.empty_cache, CONFIG, 10, 4, jnp.dtype("float32"), PLACE, form
    )
    prefill = jax.jit(functools.partial(paged_model.prefill_pass, CONFIG, kernels, True))
    decode = jax.jit(functools.partial(paged_model.decode_pass, CONFIG, kernels))
    tokens = np.arange(3, 25, dtype=np.int32)
    table: Any = np.arange(6, dtype=np.int32)
    cache = empty()
    for start, end in ((0, 12), (12, 20)):
        piece = np.pad(tokens[start:end], (0, 12 - (end - start)))
        found, cache = prefill(weights, cache, piece, np.int32(start), np.int32(end - start), table)
    contents = paged_model.extract_pages(cache, table)
    like = paged_model.contents_shape(cache, 6)
    assert (contents.shape, contents.dtype) == (like.shape, like.dtype)
    elsewhere = paged_model.insert_pages(empty(), contents, table[::-1] + 4)
    again = paged_model.extract_pages(elsewhere, table[::-1] + 4)
    assert np.array_equal(np.asarray(again), np.asarray(contents))
    logits = [found[0]]
    for pool, at in ((cache, table), (elsewhere, table[::-1] + 4)):
        for position in (20, 21):
            found, pool = decode(
                weights, pool, tokens[None, position], np.array([position], np.int32), at[None]
            )
            logits.append(found[0])
    logits = np.stack([np.asarray(row) for row in logits])
    np.testing.assert_array_equal(logits[1:3], logits[3:5])
    whole = np.asarray(forward(CONFIG, parameters, jnp.asarray(tokens)[None])[0])[[19, 20, 21]]
    ratio = np.sqrt(((logits[:3] - whole) ** 2).mean() / (whole**2).mean())
    assert 1e-5 < ratio < most


def test_a_number_takes_half_the_bytes_and_its_part_of_a_scale():
    assert paged_model.number_bytes(CONFIG, "bfloat16") == 2
    for form in paged_model.CACHE_FORMS:
        assert paged_model.number_bytes(CONFIG, "bfloat16", form) == 1 + 4 / CONFIG.head_dim


def test_engines_hand_float8_pages_over(model):
    """Apart as together, prompts that share a prefix. Not to the last token: pieces differ, and a
    sum rounded otherwise may fall to the next number of float8."""
    settings: dict[str, Any] = {
        "max_batch": 4, "max_length": 96, "max_prefill_tokens": 16, "page_size": 4,
        "page_count": 60,
    }  # fmt: skip
    common = list(range(20, 36))
    prompts = [common + [40 + n] * (n + 1) for n in range(6)]

    async def one(engine, prompt):
        rule = SamplingParameters(max_tokens=12, temperature=0)
        return [
            event.token async for event in engine.generate(prompt, rule) if event.token is not None
        ]

    async def all_of(engine):
        await engine.start()
        try:
            first = await one(engine, prompts[0])
            return [first, *await asyncio.gather(*[one(engine, p) for p in prompts[1:]])]
        finally:
            await engine.drain(10)

    found = []
    for decode in (0, 1):
        config = DeploymentConfig(prefill=1, decode=decode, cache_form="fp8", **settings)
        engine: Any = build_engine(model, config)
        found.append(asyncio.run(all_of(engine)))
        assert engine.entries[0].executor._cache[0].keys.dtype == float8.E4M3
    assert all(len(tokens) == 12 for tokens in found[1])
    alike = [a == b for pair in zip(*found, strict=True) for a, b in zip(*pair, strict=True)]
    assert sum(alike) > 0.8 * len(alike)
