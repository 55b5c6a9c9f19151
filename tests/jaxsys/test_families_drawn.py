"""Configurations drawn at random are computed as transformers computes them, or refused by name.

Needs the extra `parity`. `tests/jaxsys/family_draws.py` draws more, `family_keys.py` sets
every key of every family, one at a time.
"""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity

spec = importlib.util.spec_from_file_location(
    "family_keys", Path(__file__).parent / "family_keys.py"
)
assert spec is not None and spec.loader is not None
keys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(keys)
draws = keys.draws

SEEDS = range(4)


@pytest.mark.parametrize("family", draws.FAMILIES)
def test_as_drawn(family, tmp_path):
    pytest.importorskip("torch", reason="needs the extra `parity`")
    pytest.importorskip("transformers", reason="needs the extra `parity`")
    found = [draws.compare(family, seed, tmp_path / str(seed)) for seed in SEEDS]
    assert not [one for one in found if one.what == "different"]


@pytest.mark.parametrize("family", draws.FAMILIES)
def test_every_key_of_a_configuration_class_is_known(family):
    """A release of transformers that brings another one is seen here."""
    pytest.importorskip("transformers", reason="needs the extra `parity`")
    assert not keys.unlisted(family)
