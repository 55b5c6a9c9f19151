"""What tests of whole engines share: a tiny random model, and callers that leave."""

import asyncio
import dataclasses
import os

import jax
import numpy as np
import pytest

from jaxsys.layered import Parameters
from jaxsys.model import ByteTokenizer, LoadedModel, initial_parameters, layered, preset
from jaxsys.model.peft import write_adapters


@pytest.fixture(scope="module", autouse=True)
def _quickly(quickly_compiled, compiled_once):
    """For every module here, and the processes that it starts."""
    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    yield
    if before is None:
        del os.environ[name]
    else:
        os.environ[name] = before


@pytest.fixture(scope="session")
def model():
    """Two layers over bytes; weights large enough that tokens differ."""
    config, tokenizer = dataclasses.replace(preset("tiny"), num_layers=2), ByteTokenizer()
    return LoadedModel(
        config=config,
        parameters=jax.tree.map(lambda leaf: leaf * 4, initial_parameters(config, seed=1)),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        source="tiny",
    )


@pytest.fixture(scope="session")
def perhaps_left():
    """Waits for a request, but with some chance leaves it; says how it ended."""

    async def run(request, rng, *, chance, rate_per_s):
        task = asyncio.ensure_future(request)
        if rng.random() < chance:
            await asyncio.sleep(rng.expovariate(rate_per_s))
            task.cancel()
        try:
            return (await task)[1]
        except asyncio.CancelledError:
            return "left"

    return run


@pytest.fixture(scope="session")
def write_adapter():
    """Writes an adapter that matters, as PEFT has it; gives the parameters it is merged into."""

    def write(folder, config, parameters, *, rank, targets, seed):
        rng = np.random.default_rng(seed)
        model = layered(config)
        adapters, merged = {}, {}
        for kind, stack in model.stacks(parameters["blocks"]).items():
            own = adapters[kind] = {}

            def leaf(path, value, own=own):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                if value.ndim != 3 or not any(f"/{name}".endswith(f"/{one}") for one in targets):
                    return value
                layers, inputs, outputs = value.shape
                a = rng.normal(0, 0.15, (layers, inputs, rank)).astype(np.float32)
                b = rng.normal(0, 0.15, (layers, rank, outputs)).astype(np.float32)
                own[name] = {"a": a, "b": b}
                return np.asarray(value) + 3.0 * (a @ b)

            merged[kind] = jax.tree_util.tree_map_with_path(leaf, stack)
        write_adapters(folder, config, adapters, scale=3.0 * rank)
        return Parameters(edge=parameters["edge"], blocks=model.blocks(merged))

    return write
