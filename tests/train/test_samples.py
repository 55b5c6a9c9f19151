"""Cutting a corpus into samples loses no prediction and makes none over a document's end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.errors import UsageError
from jaxsys.train import samples
from jaxsys.train.corpus import Corpus


def corpus_of(lengths: list[int]) -> Corpus:
    """Documents of these lengths, every token unique."""
    total = sum(lengths)
    return Corpus(
        tokens=np.arange(total, dtype=np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        source="test",
    )


def test_windows_cover_every_token_once():
    cut = samples.windows(corpus_of([10, 11]), 5)
    assert len(cut) == 4
    assert np.concatenate([cut[i]["inputs"] for i in range(4)]).tolist() == list(range(20))
    assert cut[3]["targets"].tolist() == [16, 17, 18, 19, 20]


def test_too_short_a_corpus_says_what_it_needs():
    with pytest.raises(UsageError, match="needs 9"):
        samples.windows(corpus_of([8]), 8)
    with pytest.raises(UsageError, match="no document has two tokens"):
        samples.whole_documents(corpus_of([1, 1]), 4)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30).filter(lambda n: max(n) > 1),
    room=st.integers(2, 12),
)
def test_whole_documents_predict_each_next_token_of_each_document_once(lengths, room):
    text = corpus_of(lengths)
    cut = samples.whole_documents(text, room)
    predicted = []
    for index in range(len(cut)):
        sample = cut[index]
        assert sample["inputs"].shape == sample["targets"].shape == (room,)
        counted = sample["targets"] >= 0
        # Tokens are unique and consecutive within a document, so this sees every wrong pairing.
        assert (sample["targets"][counted] == sample["inputs"][counted] + 1).all()
        predicted += sample["targets"][counted].tolist()
    firsts = set(text.starts[:-1].tolist())
    assert sorted(predicted) == [t for t in range(sum(lengths)) if t not in firsts]


def test_ids_past_the_vocabulary_are_refused():
    with pytest.raises(UsageError, match="token 9, but the model's vocabulary ends at 7"):
        samples.check_vocabulary(corpus_of([10]), 8)
