"""Programs are traced to be planned for, and run but a few times."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quickly(quickly_compiled, compiled_once):
    """For every module here."""
