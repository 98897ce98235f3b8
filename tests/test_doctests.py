"""The examples in docstrings are true."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["cli.render", "indexes.exact", "retrieval.preprocess"])
def test_examples(name):
    result = doctest.testmod(import_module(f"blip2_search.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
