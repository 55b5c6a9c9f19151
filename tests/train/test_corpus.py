"""Text, JSONL and token arrays become one flat array; faults are named."""

import json
import re

import numpy as np
import pytest

from jaxsys.errors import RunError, UsageError
from jaxsys.model import ByteTokenizer
from jaxsys.train import Batches, corpus, samples

END = 256


@pytest.fixture(scope="module")
def encode():
    return ByteTokenizer().encode_array


def test_standard_library_is_the_same_twice_and_splits_by_document(encode):
    text = corpus.standard_library(encode, separator=END)
    assert text.documents > 300
    assert int((text.tokens[:] == END).sum()) == text.documents
    again = corpus.standard_library(encode, separator=END)
    assert text.fingerprint() == again.fingerprint()
    train, held_out = corpus.split(text)
    assert len(train.tokens) + len(held_out.tokens) == len(text.tokens)
    assert held_out.documents == text.documents // corpus.HELD_OUT_EVERY
    assert (held_out.tokens[:][held_out.starts[1:] - 1] == END).all()


def test_one_long_text_is_split_within(tmp_path, encode):
    (tmp_path / "a.txt").write_text("x" * 999)
    text = corpus.read(tmp_path / "a.txt", encode, separator=END)
    train, held_out = corpus.split(text)
    assert (len(train.tokens), len(held_out.tokens)) == (950, 50)
    assert np.concatenate([train.tokens[:], held_out.tokens[:]]).tolist() == text.tokens[:].tolist()


def test_jsonl_documents(tmp_path, encode):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in ("ab", "", "c")) + "\n\n")
    text = corpus.read(file, encode, separator=END)
    assert text.tokens[:].tolist() == [97, 98, END, 99, END]
    assert text.starts.tolist() == [0, 3, 5]


def test_token_array_stays_on_disk_and_is_cut_at_the_separator(tmp_path, encode):
    ids = np.random.default_rng(0).integers(0, 50_000, 120_000).astype(np.int32)
    ids[3000::3000] = END
    for name, values in (("a.npy", ids[:2000]), ("b.npy", ids)):
        np.save(tmp_path / name, values)
        text = corpus.read(tmp_path / name, encode, separator=END)
        held = corpus.Corpus(tokens=values, starts=text.starts, source="in memory")
        assert not isinstance(text.tokens, np.ndarray)
        assert text.fingerprint() == held.fingerprint()
        for found, wanted in zip(corpus.split(text), corpus.split(held), strict=True):
            assert found.fingerprint() == wanted.fingerprint()
            for start, stop in ((0, 5), (97, 4001), (0, len(wanted.tokens))):
                assert (found.tokens[start:stop] == wanted.tokens[start:stop]).all()


@pytest.mark.parametrize("change", ["overwritten", "cut short"])
def test_data_that_changes_under_a_run_is_named(tmp_path, encode, change):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100_000, dtype=np.int32) % 200)
    text = corpus.read(path, encode, separator=END)
    text.tokens[0:100_000]
    with path.open("r+b") as file:
        if change == "cut short":
            file.truncate(200_000)
        else:
            file.seek(300_000)
            file.write(bytes(64))
    text.tokens[0:1000]  # what is still as it was can be read
    batches = Batches(
        samples.windows(text, 1000), rows=2, microbatch_size=50, shuffle=False, prefetch=2
    )
    said = "was cut short" if change == "cut short" else "was written to"
    with pytest.raises(RunError, match=f"{re.escape(str(path))} {said} while the run"):
        next(batches.read(0))


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
