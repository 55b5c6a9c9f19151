"""Text, JSONL and token arrays become one flat array; faults are named."""

import json

import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.model import ByteTokenizer
from jaxsys.train import corpus

END = 256


@pytest.fixture(scope="module")
def encode():
    return ByteTokenizer().encode_array


def test_standard_library_is_the_same_twice_and_splits_by_document(encode):
    text = corpus.standard_library(encode, separator=END)
    assert text.documents > 300
    assert int((text.tokens == END).sum()) == text.documents
    again = corpus.standard_library(encode, separator=END)
    assert text.fingerprint() == again.fingerprint()
    train, held_out = corpus.split(text)
    assert len(train.tokens) + len(held_out.tokens) == len(text.tokens)
    assert held_out.documents == text.documents // corpus.HELD_OUT_EVERY
    assert (held_out.tokens[held_out.starts[1:] - 1] == END).all()


def test_one_long_text_is_split_within(tmp_path, encode):
    (tmp_path / "a.txt").write_text("x" * 999)
    text = corpus.read(tmp_path / "a.txt", encode, separator=END)
    train, held_out = corpus.split(text)
    assert (len(train.tokens), len(held_out.tokens)) == (950, 50)
    assert np.concatenate([train.tokens, held_out.tokens]).tolist() == text.tokens.tolist()


def test_jsonl_documents(tmp_path, encode):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in ("ab", "", "c")) + "\n\n")
    text = corpus.read(file, encode, separator=END)
    assert text.tokens.tolist() == [97, 98, END, 99, END]
    assert text.starts.tolist() == [0, 3, 5]


def test_token_array_is_mapped_and_cut_at_the_separator(tmp_path, encode):
    np.save(tmp_path / "a.npy", np.array([5, 6, END, 7], np.uint16))
    text = corpus.read(tmp_path / "a.npy", encode, separator=END)
    assert isinstance(text.tokens, np.memmap)
    assert text.starts.tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"ok \xff\xfe", "not UTF-8 text (byte 3)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2 has no text under 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("a.npy", b"\x93NUMPY\x01\x00rubbish", "not a readable .npy"),
    ],
)
def test_bad_files(tmp_path, encode, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=says.replace("(", r"\(").replace(")", r"\)")):
        corpus.read(tmp_path / name, encode, separator=END)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 2), np.int32), "must be integers"),
        (np.zeros(3, np.float32), "must be integers"),
        (np.zeros(0, np.int32), "no tokens"),
        (np.array([1, -1], np.int32), "negative id -1"),
    ],
)
def test_bad_token_arrays(tmp_path, encode, array, says):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UsageError, match=says):
        corpus.read(tmp_path / "a.npy", encode, separator=END)


def test_missing_path_and_empty_folder(tmp_path, encode):
    with pytest.raises(UsageError, match="does not exist"):
        corpus.read(tmp_path / "none.txt", encode, separator=END)
    with pytest.raises(UsageError, match="holds no files"):
        corpus.read(tmp_path, encode, separator=END)
