"""Programs that run a few times on small arrays: compiling them is most of what tests wait for."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quickly(quickly_compiled):
    """For every module here."""
