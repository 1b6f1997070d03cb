"""Fixtures of the models' tests."""

import pytest

from tests.unclip_models.small_stack import small_stack
from unclip_models.generate import UnCLIP


@pytest.fixture(scope="session")
def stack() -> UnCLIP:
    """A small stack; nobody may change its weights."""
    return small_stack()
