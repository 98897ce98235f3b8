"""Fixtures for tests of the indexes."""

import pytest

from blip2_search.indexes import flat


@pytest.fixture
def force(monkeypatch):
    """Return what forces one of FAISS's two ways; by fetching, from the most meagre first fetch."""

    def force(way):
        if way == "fetching":
            monkeypatch.setattr(flat, "_FIRST_FETCH", 1)
            monkeypatch.setattr(flat, "_GROWTH", 2)
            monkeypatch.setattr(flat, "_SCAN_SHARE", 1)
        if way == "scanning":
            monkeypatch.setattr(flat, "_SCAN_SHARE", float("inf"))

    return force
