"""Texts such as people ask for, where there are no captions at hand."""

from __future__ import annotations

_SUBJECTS = (
    "a dog", "two children", "a man", "a red car", "people", "a clock tower", "a cat", "food",
)  # fmt: skip
_PLACES = (
    "on the beach", "in the snow", "in a street", "on grass", "indoors", "at night", "in water",
)  # fmt: skip

PROMPTS = tuple(f"{subject} {place}" for subject in _SUBJECTS for place in _PLACES)
