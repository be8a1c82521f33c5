"""Stores for the tests of the tiers."""

import pytest

from tests.support.tier_stores import stores_on


@pytest.fixture
def open_store(tmp_path):
    with stores_on(tmp_path) as open_:
        yield open_
