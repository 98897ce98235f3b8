"""Image tokens on disk: what comes back, how exact it is, and what damage does."""

from __future__ import annotations

import numpy as np
import pytest

from blip2_search.indexes.token_files import TokenFiles

HASH = "ab" + "0" * 30


@pytest.fixture
def files(tmp_path):
    return TokenFiles(tmp_path, "f00d")


@pytest.fixture
def tokens(rng):
    return (rng.normal(size=(5, 12)) * rng.uniform(0.01, 100, size=(5, 1))).astype(np.float32)


def test_int8_is_off_by_half_a_step_of_each_token(files, tokens):
    tokens[3] = 0
    files.write(HASH, tokens, "int8")
    found = files.read(HASH)
    assert (found.dtype, found.shape) == (np.float32, (5, 12))
    step = np.abs(tokens).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - tokens) <= 0.5001 * step).all()
    assert (found[3] == 0).all()


def test_fp16_is_what_float16_can_hold(files, tokens):
    files.write(HASH, tokens, "fp16")
    assert (files.read(HASH) == tokens.astype(np.float16).astype(np.float32)).all()


def test_the_last_one_written_counts(files, tokens):
    files.write(HASH, tokens, "int8")
    files.write(HASH, -tokens, "fp16")
    assert (files.read(HASH) == -tokens.astype(np.float16).astype(np.float32)).all()
    assert [file.name for file in files._folder.glob("*/*")] == [HASH]


def test_another_model_sees_none(files, tokens, tmp_path):
    files.write(HASH, tokens, "int8")
    assert HASH in files
    assert HASH not in TokenFiles(tmp_path, "beef")
    assert TokenFiles(tmp_path, "beef").read(HASH) is None


@pytest.mark.parametrize(
    "spoil", [lambda x: x[:-1], lambda x: x[:3], lambda x: b"", lambda x: x[:-1] + b"!"]
)
def test_damage_is_as_if_it_were_missing(files, tokens, spoil):
    files.write(HASH, tokens, "int8")
    path = files._path(HASH)
    path.write_bytes(spoil(path.read_bytes()))
    assert files.read(HASH) is None


def test_sweep_keeps_what_is_live(files, tokens, tmp_path):
    other = "cd" + "1" * 30
    for name in (HASH, other):
        files.write(name, tokens, "int8")
    TokenFiles(tmp_path, "beef").write(HASH, tokens, "int8")
    files.sweep({other})
    assert HASH not in files
    assert other in files
    assert [folder.name for folder in (tmp_path / "tokens").iterdir()] == ["f00d"]


def test_sweeping_nothing(files):
    files.sweep(set())
