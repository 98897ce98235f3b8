"""Fixtures for every test that wants a small model or drawn photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tiny import COLOURS, SHAPES, build_tiny_model, draw


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of 18 drawn photographs, named after what they show."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for colour in COLOURS:
        for shape in SHAPES:
            draw(colour, shape).save(folder / f"{colour} {shape}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_model():
    """Return a random model; tests that change it must build their own."""
    return build_tiny_model()


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a seeded generator."""
    return np.random.default_rng(0)
