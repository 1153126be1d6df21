"""One code verifier for all tests of a run: starting its sandboxes takes longer than most jobs."""

from __future__ import annotations

import pytest

from negtune.verifiers.code import CodeVerifier

collect_ignore_glob = ["attacks/*"]  # never imported here: they are hostile


@pytest.fixture(scope="session")
def verifier():
    with CodeVerifier(seconds=2, workers=2) as one:
        yield one
