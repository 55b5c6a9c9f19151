"""Adapters as clients see them: models beside the model, loaded and unloaded by vLLM's calls."""

import dataclasses

import pytest

from jaxsys.serve.deployment import DeploymentConfig

CONFIG = DeploymentConfig(
    decode=0,
    max_batch=1,
    max_length=64,
    max_prefill_tokens=16,
    page_size=8,
    page_count=32,
    max_loras=2,
    max_lora_rank=2,
)
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def folders(model, write_adapter, tmp_path_factory):
    found = []
    for seed in range(2):
        path = tmp_path_factory.mktemp("adapters") / str(seed)
        targets = ("query", "value", "mlp/down")
        write_adapter(path, model.config, model.parameters, rank=2, targets=targets, seed=seed)
        found.append(str(path))
    return found


@pytest.fixture(scope="module")
def server(model, start):
    return start(model, CONFIG, lora_updates=True)


def text(server, model, prompt="hello you there"):
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = server.post("/v1/completions", body | {"logprobs": 0})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["choices"][0]["logprobs"]["tokens"]


def error(answer, status):
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_adapters_are_models_beside_the_model(server, folders):
    base = text(server, "tiny")
    said = [
        server.post(LOAD, {"lora_name": name, "lora_path": folder})
        for name, folder in zip("ab", folders, strict=True)
    ]
    assert said[0].text == "Success: LoRA adapter 'a' added successfully."
    assert [one.status_code for one in said] == [200, 200]
    listed = server.ask("GET", "/v1/models").json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [
        ("tiny", None),
        ("a", "tiny"),
        ("b", "tiny"),
    ]
    assert listed[1]["root"] == folders[0] and listed[1]["max_model_len"] == 64
    assert server.ask("GET", "/v1/models/b").json()["parent"] == "tiny"
    texts = [text(server, name) for name in ("tiny", "a", "b", "a", "tiny")]
    assert texts[0] == texts[4] == base and texts[1] == texts[3]
    assert len({tuple(one) for one in texts}) == 3
    found = error(server.post("/v1/completions", {"model": "c", "prompt": "x"}), 404)
    assert found["code"] == "model_not_found" and found["param"] == "model"
    assert found["message"] == "model 'c' is not served; use 'tiny', 'a', 'b'"
    chat = {"model": "b", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    chat |= {"temperature": 0}
    assert server.stream("/v1/chat/completions", chat)[0]["model"] == "b"
    asked = {"model": "a", "input": "x", "max_output_tokens": 2, "temperature": 0}
    assert server.post("/v1/responses", asked).json()["model"] == "a"
    metrics = server.ask("GET", "/metrics").text
    assert 'jaxsys_adapter_requests{adapter="a"} 0.0' in metrics
    assert 'vllm:lora_requests_info{max_lora="2",running_lora_adapters=""' in metrics

    known = error(server.post(LOAD, {"lora_name": "a", "lora_path": folders[1]}), 400)
    assert "'a' is loaded already" in known["message"]
    full = error(server.post(LOAD, {"lora_name": "c", "lora_path": folders[1]}), 400)
    assert "2 adapter(s) are loaded, as many as --max-loras allows" in full["message"]
    gone = server.post(UNLOAD, {"lora_name": "a"})
    assert gone.text == "Success: LoRA adapter 'a' removed successfully."
    assert error(server.post("/v1/completions", {"model": "a", "prompt": "x"}), 404)
    unknown = error(server.post(UNLOAD, {"lora_name": "a"}), 404)
    assert unknown["message"] == "adapter 'a' is not loaded"
    assert server.post(LOAD, {"lora_name": "a", "lora_path": folders[1]}).status_code == 200
    assert text(server, "a") == texts[2]  # nothing of the prefixes of the first `a` is found
    server.idle()


@pytest.mark.slow
def test_embeddings_and_echo_are_the_adapters_own(server, folders):
    for name, folder in zip("ab", folders, strict=True):
        server.post(LOAD, {"lora_name": name, "lora_path": folder, "load_inplace": True})
    vectors = [
        server.post("/v1/embeddings", {"model": name, "input": "xy"}).json()["data"][0]["embedding"]
        for name in ("tiny", "a", "b")
    ]
    assert vectors[0] != vectors[1] != vectors[2] != vectors[0]
    echo = {"prompt": "hello", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    scored = [
        server.post("/v1/completions", echo | {"model": name}).json()["choices"][0]["logprobs"]
        for name in ("tiny", "a")
    ]
    assert scored[0]["token_logprobs"][1:] != scored[1]["token_logprobs"][1:]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"lora_name": "tiny", "lora_path": "/x"}, "is the model's own; give another"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": "/x"}, "printable"),
    ],
)
def test_what_cannot_be_loaded_is_said(server, body, said):
    assert said in error(server.post(LOAD, body), 400)["message"]


def test_without_the_option_nothing_is_loaded(model, start, folders):
    server = start(model, dataclasses.replace(CONFIG, max_loras=0))
    for path, body in ((LOAD, {"lora_name": "a", "lora_path": folders[0]}), (UNLOAD, {})):
        assert "--allow-lora-updates" in error(server.post(path, body), 404)["message"]
    assert "adapter" not in server.ask("GET", "/metrics").text
