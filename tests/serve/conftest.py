"""What tests of whole engines share: a tiny random model, and callers that leave."""

import asyncio
import dataclasses
import os

import jax
import pytest

from jaxsys.model import ByteTokenizer, LoadedModel, initial_parameters, preset


@pytest.fixture(scope="module", autouse=True)
def _quickly(quickly_compiled):
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
