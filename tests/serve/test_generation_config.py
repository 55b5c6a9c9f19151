"""Requests that do not say are sampled as the model's makers do, and the user is told."""

import json

import pytest

from jaxsys.errors import UsageError
from jaxsys.model import ByteTokenizer
from jaxsys.serve.cli import _sampling_of
from jaxsys.serve.http.protocol import ChatRequest, CompletionRequest
from jaxsys.serve.options import parser

DEFAULTS = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}


def sampling(body, **more):
    return body.sampling(ByteTokenizer(), max_tokens=4, logprobs=None, **more)


def test_fields_that_are_not_given_are_the_models_own():
    chat = {"messages": [{"role": "user", "content": "a"}]}
    found = sampling(ChatRequest.model_validate(chat), defaults=DEFAULTS)
    assert (found.temperature, found.top_p, found.top_k) == (0.6, 0.9, 20)
    assert found.repetition_penalty == 1.05 and found.min_p == 0.0
    # A value is a value, though it be the API's own default; null is none.
    body = {"prompt": "a", "temperature": 1.0, "top_p": None, "top_k": 0}
    found = sampling(CompletionRequest.model_validate(body), defaults=DEFAULTS)
    assert (found.temperature, found.top_p, found.top_k) == (1.0, 0.9, 0)
    found = sampling(CompletionRequest.model_validate(body))
    assert (found.temperature, found.top_p, found.repetition_penalty) == (1.0, 1.0, 1.0)


def test_the_server_says_at_its_start_what_it_samples_with(tmp_path, capsys):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(DEFAULTS | {"do_sample": True, "eos_token_id": 2}))
    assert _sampling_of(tmp_path, False) == DEFAULTS
    said = capsys.readouterr().err
    assert "temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05" in said
    assert "--no-generation-config turns this off" in said
    assert _sampling_of(tmp_path, True) == {} and not capsys.readouterr().err
    assert parser("serve").parse_args(["--no-generation-config"]).no_generation_config
    rest = {"num_beams": 1, "typical_p": 0.9, "bad_words_ids": [[5]], "suppress_tokens": []}
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9, **rest}))
    assert _sampling_of(tmp_path, False) == {"temperature": 0.0}
    said = capsys.readouterr().err
    assert "sampled with temperature=0 (" in said
    assert "asks for typical_p=0.9, bad_words_ids=[[5]], which is not applied" in said
    path.write_text(json.dumps({"top_p": 1.5}))
    with pytest.raises(UsageError, match=r"generation_config.json: top_p=1.5 must be .*--no-gen"):
        _sampling_of(tmp_path, False)
