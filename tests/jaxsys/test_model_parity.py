"""Logits against transformers' in float32, over folders written by either side.

Needs the extra `parity`. The weights are random and large, so that every term shows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.model import (
    ByteTokenizer,
    Llama3RopeScaling,
    default_model_path,
    forward,
    initial_parameters,
    load,
    preset,
    save_safetensors,
)

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
SCALING = Llama3RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
)
CONFIGS = {
    "grouped": preset("tiny"),
    "tied": dataclasses.replace(preset("tiny"), tie_embeddings=True, rms_norm_eps=1e-6),
    "llama 3 rope": dataclasses.replace(
        preset("tiny"), rope_theta=500000.0, rope_scaling=SCALING, head_dim=16, num_kv_heads=1
    ),
}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs the extra `parity`")
    return pytest.importorskip("transformers", reason="needs the extra `parity`")


def tokens_of(config):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, 100))


def their_logits(model, tokens):
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


def report(record_property, ours, theirs):
    difference = float(np.abs(np.asarray(ours) - theirs).max())
    print(f"largest difference {difference:.2e}, logits up to {np.abs(theirs).max():.1f}")
    record_property("largest_difference", difference)
    assert np.std(theirs) > 0.1
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_we_write(transformers, tmp_path, record_property, name):
    config = CONFIGS[name]
    generator = np.random.default_rng(1)
    weights = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(generator.normal(0, 0.1, leaf.shape), jnp.float32),
        initial_parameters(config, seed=1),
    )
    save_safetensors(tmp_path / "model", config, weights, ByteTokenizer(), max_shard_bytes=50_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == "LlamaForCausalLM"
    tokens = tokens_of(config)
    ours = forward(config, weights, jnp.asarray(tokens, jnp.int32))
    report(record_property, ours, their_logits(model, tokens))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_we_read_what_transformers_writes(transformers, tmp_path, record_property, name, family):
    import torch  # pyright: ignore[reportMissingImports]

    config = CONFIGS[name]
    settings = {
        key: value
        for key, value in config.to_hf().items()
        if key not in ("model_type", "architectures", "rope_theta", "rope_scaling")
    }
    if family == "Mistral":
        settings["sliding_window"] = None
        settings.pop("attention_bias")
        settings.pop("mlp_bias")
    theirs = getattr(transformers, f"{family}Config")(**settings, initializer_range=0.1)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(theirs)
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    loaded = load(tmp_path / "model")
    assert loaded.config == config
    tokens = tokens_of(config)
    ours = forward(config, loaded.parameters, jnp.asarray(tokens, jnp.int32))
    report(record_property, ours, their_logits(model, tokens))


def test_tokenizer_and_chat_agree(transformers, tmp_path):
    config, ours = preset("tiny"), ByteTokenizer()
    save_safetensors(tmp_path / "model", config, initial_parameters(config), ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "Grüße <|pad|> 123"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ours.apply_chat_template(messages)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode_chat(messages)
    assert theirs.eos_token_id == ours.eos_ids[0]


def test_smollm_text_agrees_with_transformers_reading_of_gguf(transformers, tmp_path):
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF")
    try:
        path = default_model_path()
    except UsageError as error:
        pytest.skip(str(error))
    loaded = load(path)
    assert loaded.tokenizer is not None
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = ["The capital of France is", "x = 12345\n\n  if x:", "Grüße, 日本語 😀 it's"]
    for text in texts:
        assert theirs(text, add_special_tokens=False)["input_ids"] == loaded.tokenizer.encode(text)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    tokens = np.array([loaded.tokenizer.encode(texts[0])])
    ours = forward(loaded.config, loaded.parameters, jnp.asarray(tokens, jnp.int32))
    difference = np.abs(np.asarray(ours) - their_logits(model, tokens)).max()
    print(f"SmolLM2: largest difference {difference:.2e}")
    # 30 layers, logits up to 30: a thousandth is float32 noise.
    assert difference < 1e-3
