"""Servers in this process, asked as clients ask; and a model whose outputs can be written down."""

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest

from jaxsys.model import DecoderConfig, LoadedModel
from jaxsys.serve.deployment import DeploymentConfig, build_engine
from jaxsys.serve.http.api import ApiConfig, create_app
from jaxsys.serve.http.metrics import Metrics


class Server:
    """An application on an event loop of its own, asked synchronously."""

    def __init__(self, model, config, **api):
        self.loop = asyncio.new_event_loop()
        self.engine: Any = build_engine(model, config)
        metrics = Metrics(self.engine)
        self.engine.on_token = lambda request, event, _: metrics.on_token(request, event)
        metrics.watch()
        settings = ApiConfig(model_name="tiny", max_length=config.max_length, **api)
        self.app = create_app(self.engine, model.tokenizer, settings, metrics)
        self.run(self.engine.start())

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def client(self):
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app), base_url="http://server", timeout=60
        )

    def ask(self, method, path, **arguments):
        async def run():
            async with self.client() as client:
                return await client.request(method, path, **arguments)

        return self.run(run())

    def post(self, path, body, **arguments):
        return self.ask("POST", path, json=body, **arguments)

    def idle(self):
        """Waits until nothing is in the engine, and checks every page and slot."""

        async def wait():
            for _ in range(500):
                busy = self.engine.unfinished or any(
                    instance.scheduler.requests or instance.requests
                    for instance in self.engine.instances
                )
                if not busy:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("requests were left behind")

        self.run(wait())
        for instance in self.engine.instances:
            instance.scheduler.check()
            assert instance.scheduler.allocator.held == 0
            assert instance.in_flight == 0

    def stream(self, path, body):
        """The data of a stream of server-sent events."""
        text = self.post(path, body | {"stream": True}).text
        lines = [line[6:] for line in text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def close(self):
        self.app.state.close()
        self.run(self.engine.drain(5))
        self.loop.close()


@pytest.fixture(scope="module")
def start():
    """Starts servers, which end with the module."""
    started = []

    def make(model, config, **api):
        started.append(Server(model, config, **api))
        return started[-1]

    yield make
    for server in started:
        if not server.loop.is_closed():
            server.close()


@pytest.fixture(scope="module")
def scripted(start, quickly_compiled):
    """Starts a server whose next token follows from the last one alone.

    `logits_of(token)` is {next token: logit}; embeddings are one-hot and the blocks add nothing.
    """

    def make(tokenizer, logits_of, *, api=None, **settings):
        count = tokenizer.vocab_size
        width = -(-count // 8) * 8
        config = DecoderConfig(
            vocab_size=count,
            hidden_size=width,
            intermediate_size=8,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            max_positions=256,
            rms_norm_eps=1e-12,
        )
        table = np.eye(count, width, dtype=np.float32)
        kernel = np.zeros((width, count), np.float32)
        for token in range(count):
            for following, logit in logits_of(token).items():
                kernel[token, following] = logit / np.sqrt(width)  # the norm raises a one to this

        def zeros(*shape):
            return np.zeros((1, *shape), np.float32)

        ones = np.ones((1, width), np.float32)
        parameters: Any = {
            "edge": {
                "embed": {"table": table},
                "head": {"kernel": kernel},
                "norm": {"scale": ones[0]},
            },
            "blocks": {
                "attention": {
                    "query": zeros(width, 16),
                    "key": zeros(width, 8),
                    "value": zeros(width, 8),
                    "out": zeros(16, width),
                },
                "mlp": {"gate": zeros(width, 8), "up": zeros(width, 8), "down": zeros(8, width)},
                "attention_norm": {"scale": ones},
                "mlp_norm": {"scale": ones},
            },
        }
        model = LoadedModel(
            config=config,
            parameters=parameters,
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
            source="scripted",
        )
        shape: dict[str, Any] = {
            "prefill": 1,
            "decode": 0,
            "max_batch": 2,
            "max_length": 128,
            "max_prefill_tokens": 32,
            "page_size": 8,
            "page_count": 64,
        }
        return start(model, DeploymentConfig(**(shape | settings)), **(api or {}))

    return make
