"""Names, keys, HEAD, other origins, and what clients ask a server about itself."""

import pytest

from jaxsys.model import ByteTokenizer
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.http.dashboard import Dashboard

BODY = {"prompt": "x", "max_tokens": 1, "temperature": 0}


@pytest.fixture(scope="module")
def guarded(scripted):
    """A server that asks for a key everywhere, and lets pages of one origin ask."""
    api = {
        "api_keys": frozenset(["sesame"]),
        "key_for_all": True,
        "cors_origins": ("https://here.example",),
    }
    server = scripted(ByteTokenizer(), lambda _: {97: 9.0}, api=api)
    Dashboard(server.engine, SharedSlo(Slo())).add_to(server.app)
    return server


KEY = {"Authorization": "Bearer sesame"}
PASSWORD = {"Authorization": "Basic YW55Ym9keTpzZXNhbWU="}  # anybody:sesame
PAGES = ["/metrics", "/dashboard", "/dashboard/data", "/docs", "/openapi.json", "/version"]


@pytest.mark.parametrize("path", PAGES)
def test_pages_ask_for_a_key_where_that_is_wanted(guarded, path):
    refused = guarded.ask("GET", path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Basic")  # so that browsers ask for it
    for given in (KEY, PASSWORD):
        assert guarded.ask("GET", path, headers=given).status_code == 200
    for wrong in ("Basic !", "Basic YW55Ym9keTp3cm9uZw==", "Bearer"):
        assert guarded.ask("GET", path, headers={"Authorization": wrong}).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_whoever_watches_needs_no_key(guarded, path):
    assert guarded.ask("GET", path).status_code == 200
    head = guarded.ask("HEAD", path)
    assert head.status_code == 200 and head.content == b""
    assert int(head.headers["content-length"]) > 0


def test_pages_need_nothing_from_elsewhere(guarded):
    for path in ("/docs", "/dashboard"):
        text = guarded.ask("GET", path, headers=KEY).text
        assert "http" not in text.replace("http://127.0.0.1:8000", "").replace("https?", "")
        assert "src=" not in text and "@import" not in text
    docs = guarded.ask("GET", "/docs", headers=KEY).text
    for words in ("/v1/chat/completions", "stop_token_ids", "a number from 0 to 2"):
        assert words in docs


def test_every_answer_has_a_name(guarded):
    given = guarded.ask("GET", "/health", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    for path, headers in (("/v1/completions", {}), ("/v1/nothing", KEY), ("/v1/completions", KEY)):
        answer = guarded.ask("POST", path, json=BODY, headers=headers)
        assert len(answer.headers["x-request-id"]) == 32
    odd = guarded.ask("GET", "/health", headers={"x-request-id": "a b" * 100})
    assert len(odd.headers["x-request-id"]) == 32


def test_pages_of_named_origins_may_ask(guarded):
    asks = {"Origin": "https://here.example", "Access-Control-Request-Method": "POST"}
    answer = guarded.ask("OPTIONS", "/v1/completions", headers=asks)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://here.example"
    other = guarded.ask(
        "OPTIONS", "/v1/completions", headers=asks | {"Origin": "https://x.example"}
    )
    assert "access-control-allow-origin" not in other.headers
    answer = guarded.post("/v1/completions", BODY, headers=KEY | {"Origin": asks["Origin"]})
    assert answer.headers["access-control-allow-origin"] == "https://here.example"


def test_models_have_names(guarded):
    assert guarded.ask("GET", "/v1/models/tiny", headers=KEY).json()["id"] == "tiny"
    for answer in (
        guarded.ask("GET", "/v1/models/some/other", headers=KEY),
        guarded.post("/v1/completions", BODY | {"model": "some/other"}, headers=KEY),
    ):
        error = answer.json()["error"]
        assert answer.status_code == 404 and error["code"] == "model_not_found"
        assert "'some/other' is not served; use 'tiny'" in error["message"]


def test_a_prompt_that_is_too_long_says_so_as_clients_look_for_it(guarded):
    for prompt in ("a" * 200, [97] * 128, "a" * 100_000):
        answer = guarded.post("/v1/completions", BODY | {"prompt": prompt}, headers=KEY)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
        assert "prompt is too long" in error["message"] and error["param"] == "prompt"


def test_texts_become_tokens_and_tokens_texts(guarded):
    def asked(path, body):
        return guarded.post(path, body, headers=KEY).json()

    found = asked("/tokenize", {"prompt": "aé", "return_token_strs": True})
    assert found["tokens"] == [97, 0xC3, 0xA9] and found["count"] == 3
    assert len(found["token_strs"]) == 3 and found["max_model_len"] == 128
    assert asked("/detokenize", {"tokens": found["tokens"]}) == {"prompt": "aé"}
    chat = asked("/tokenize", {"messages": [{"role": "user", "content": "a"}]})
    usage = asked("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    assert "one of them" in asked("/tokenize", {})["error"]["message"]
    info = guarded.ask("GET", "/tokenizer_info", headers=KEY).json()
    assert info["eos_token"] == "<|endoftext|>"
