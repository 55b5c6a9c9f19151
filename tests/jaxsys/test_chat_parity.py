"""Chat templates in the manner of eight published models, rendered as transformers renders them.

Against texts stored with their origin; with the extra `parity`, against transformers itself.
"""

import importlib.util
import json
from pathlib import Path

import pytest

from jaxsys.errors import UsageError
from jaxsys.model.folder import read_tokenizer

spec = importlib.util.spec_from_file_location("chat_cases", Path(__file__).parent / "chat_cases.py")
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


def our_texts(folder):
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    found = {}
    for name, asked in cases.CONVERSATIONS.items():
        options = {"add_generation_prompt": True} | asked
        try:
            found[name] = tokenizer.apply_chat_template(options.pop("messages"), **options)
        except UsageError:
            found[name] = None
    return found


@pytest.mark.parametrize("template", cases.NAMES)
def test_texts_are_those_of_transformers(template, tmp_path):
    cases.write_folder(template, tmp_path)
    wanted = json.loads(cases.STORED.read_text())["texts"][template]
    assert our_texts(tmp_path) == wanted
    assert sum(text is not None for text in wanted.values()) > 5


@pytest.mark.parity
@pytest.mark.parametrize("template", cases.NAMES)
def test_texts_are_those_of_the_transformers_here(template, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra `parity`")
    cases.write_folder(template, tmp_path)
    assert our_texts(tmp_path) == cases.their_texts(tmp_path)
