"""Prompts that are given back, with how likely the model finds each of their tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.model import forward
from jaxsys.serve.deployment import DeploymentConfig

COMPLETIONS = "/v1/completions"


@pytest.fixture(
    scope="module", params=[pytest.param(0, marks=pytest.mark.slow), 1], ids=["together", "apart"]
)
def server(model, start, quickly_compiled, request):
    """Prompts are read in pieces of 16 tokens, by one instance or for another."""
    return start(
        model,
        DeploymentConfig(
            prefill=1,
            decode=request.param,
            max_batch=2,
            max_length=96,
            max_prefill_tokens=16,
            page_size=4,
            page_count=64,
        ),
    )


def expected(model, tokens):
    """Log-probabilities [T - 1, V] of what follows each token, by the whole forward pass."""
    logits = forward(model.config, model.parameters, jnp.asarray([tokens]))[0]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))[:-1]


def test_a_prompt_comes_back_with_its_likelihood(server, model):
    """As lm-eval asks: token ids, one token more, the first entry null, greedy entries highest."""
    prompt = np.random.default_rng(3).integers(97, 123, 37).tolist()
    body = {"prompt": [prompt, prompt], "max_tokens": 1, "logprobs": 1, "echo": True}
    body |= {"temperature": 0, "seed": 1234}
    answer = server.post(COMPLETIONS, body).json()
    assert answer["usage"]["completion_tokens"] == 2
    for choice in answer["choices"]:
        beside = choice["logprobs"]
        assert len(beside["tokens"]) == 38 and beside["token_logprobs"][0] is None
        assert beside["top_logprobs"][0] is None
        assert "".join(beside["tokens"]) == choice["text"]
        assert choice["text"].startswith(bytes(prompt).decode())
        assert beside["text_offset"][:37] == list(range(37))
        wanted = expected(model, prompt)
        chosen = wanted[np.arange(36), prompt[1:]]
        assert np.allclose(beside["token_logprobs"][1:37], chosen, atol=2e-4)
        for row, top in enumerate(beside["top_logprobs"][1:37]):
            assert math.isclose(max(top.values()), wanted[row].max(), abs_tol=2e-4)
    parts = server.stream(COMPLETIONS, body | {"prompt": prompt})
    streamed = [part["choices"][0]["logprobs"]["token_logprobs"] for part in parts]
    joined = [value for part in streamed for value in part]
    assert joined == answer["choices"][0]["logprobs"]["token_logprobs"]
    server.idle()


def test_log_probabilities_of_prompts_are_by_token_and_rank(server, model):
    prompt = list(b"how likely is this")
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "prompt_logprobs": 3}
    choice = server.post(COMPLETIONS, body).json()["choices"][0]
    assert choice["logprobs"] is None
    first, *entries = choice["prompt_logprobs"]
    wanted = expected(model, prompt)
    assert first is None and len(entries) == len(prompt) - 1
    for row, (token, entry) in enumerate(zip(prompt[1:], entries, strict=True)):
        found = entry[str(token)]
        assert math.isclose(found["logprob"], wanted[row][token], abs_tol=2e-4)
        assert found["rank"] == 1 + int((wanted[row] > wanted[row][token] + 1e-6).sum())
        assert len(entry) == 3 + (found["rank"] > 3)
    # Found in the prefix cache or not, all of them are there; without being asked for, none.
    again = server.post(COMPLETIONS, body).json()["choices"][0]
    assert len(again["prompt_logprobs"]) == len(prompt)
    plain = server.post(COMPLETIONS, body | {"prompt_logprobs": None}).json()["choices"][0]
    assert "prompt_logprobs" not in plain and plain["text"] == choice["text"]
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "prompt_logprobs": 0}
    answer = server.post("/v1/chat/completions", chat).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    server.idle()


def test_a_prompt_that_is_not_finite_is_said(model, start, quickly_compiled):
    """One token's embedding is NaN: whoever has it gets an error, beside those who have not."""
    table = np.array(model.parameters["edge"]["embed"]["table"])
    table[ord("!")] = np.nan
    edge = model.parameters["edge"] | {"embed": {"table": table}}
    if "head" not in edge:
        edge |= {"head": {"kernel": np.asarray(model.parameters["edge"]["embed"]["table"]).T}}
    spoilt = dataclasses.replace(model, parameters=model.parameters | {"edge": edge})
    server = start(
        spoilt,
        DeploymentConfig(
            prefill=1,
            decode=1,
            max_batch=4,
            max_length=96,
            max_prefill_tokens=16,
            page_size=4,
            page_count=24,
        ),
    )
    good = {"prompt": "a quiet prompt", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    text = server.post(COMPLETIONS, good).json()["choices"][0]["text"]
    for _ in range(3):  # pages of bad requests are given to good ones
        for more in ({}, {"prompt_logprobs": 1}, {"logprobs": 2, "stream": True}):
            bad = good | {"prompt": "not a good one!" * 4} | more
            answer = server.post(COMPLETIONS, bad)
            assert answer.status_code == (200 if "stream" in more else 500)
            assert "the model's outputs are not finite" in answer.text
            server.idle()
            assert server.post(COMPLETIONS, good).json()["choices"][0]["text"] == text
    server.idle()
