"""Makes token_mdp importable under every import mode of pytest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from token_mdp import TokenMDP


@pytest.fixture(scope="session")
def mdp() -> TokenMDP:
    return TokenMDP.build()
