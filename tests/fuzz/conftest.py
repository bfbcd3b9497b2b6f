"""``--fuzz 1`` runs the whole numbers of cases (minutes); the default is the share that the suite has time for."""

from __future__ import annotations

import pytest


@pytest.fixture
def share(request: pytest.FixtureRequest) -> float:
    """The share of the whole number of cases to run; a seed decides which."""
    return request.config.getoption("--fuzz")
