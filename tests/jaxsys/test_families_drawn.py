"""Configurations drawn at random are computed as transformers computes them, or refused by name.

Needs the extra `parity`. `tests/jaxsys/family_draws.py` draws more.
"""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity

spec = importlib.util.spec_from_file_location(
    "family_draws", Path(__file__).parent / "family_draws.py"
)
assert spec is not None and spec.loader is not None
draws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draws)

SEEDS = range(4)


@pytest.mark.parametrize("family", draws.FAMILIES)
def test_as_drawn(family, tmp_path):
    pytest.importorskip("torch", reason="needs the extra `parity`")
    pytest.importorskip("transformers", reason="needs the extra `parity`")
    found = [draws.compare(family, seed, tmp_path / str(seed)) for seed in SEEDS]
    assert not [one for one in found if one.what == "different"]
