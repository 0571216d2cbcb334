"""An encoder that is instant, and what else several tests take."""

import pytest

from jaxml.testing import TinyEncoder as Words


@pytest.fixture
def words():
    return Words()
