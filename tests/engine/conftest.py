"""The model of tests about the engine around it; those about how it computes build their own."""

import pytest

from tests.engine.test_golden_rule import build


@pytest.fixture(scope="session")
def reference_model():
    """The golden rule's model, computed by the oracle of attention; nobody changes it."""
    built, _ = build("torch_ref")
    return built
