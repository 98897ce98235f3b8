"""Keys and values that are kept: the same logits, no second projection, no more memory than allowed."""

import numpy as np
import pytest
import torch

from blip2_search.retrieval.engine import SearchEngine
from blip2_search.retrieval.errors import BackendError
from blip2_search.retrieval.keys_values import KeptKeysValues
from blip2_search.retrieval.model import RetrievalModel
from tiny import COLOURS, SHAPES, draw

NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def tokens(tiny_model):
    images = [draw(*name.split()) for name in NAMES]
    return tiny_model.image_tokens(images).numpy()


def asked(tokens, log):
    """Give tokens, and write down for which images."""

    def tokens_of(rows):
        log.append(rows)
        return {row: tokens[row] for row in rows}

    return tokens_of


def image_bytes(model, tokens):
    kept = KeptKeysValues(model, 10**9)
    kept.match("a", ["one"], lambda rows: {0: tokens[0]})
    return kept.nbytes


def test_logits_are_those_of_the_plain_path(tiny_model, tokens, monkeypatch):
    monkeypatch.setattr(RetrievalModel, "pairs_at_once", 5)
    kept, log = KeptKeysValues(tiny_model, 10**9), []
    for text in ("a red circle", "a picture of a clock tower", "a red circle"):
        expected = tiny_model.match(tokens, [text] * len(tokens))
        found = kept.match(text, NAMES, asked(tokens, log))
        np.testing.assert_allclose([found[row] for row in range(len(NAMES))], expected, atol=1e-5)
    assert log == [list(range(len(NAMES))), [], []]  # encoded and projected once


def test_those_not_asked_for_longest_make_room(tiny_model, tokens):
    one, log = image_bytes(tiny_model, tokens), []
    assert one > 0
    kept = KeptKeysValues(tiny_model, 3 * one)
    for rows in ([0, 1, 2], [0], [3], [0, 1]):
        names = [NAMES[row] for row in rows]
        kept.match("a bar", names, asked(tokens[rows], log))
        assert kept.nbytes <= 3 * one
    assert log == [[0, 1, 2], [], [0], [1]]  # 3 made room by 1, not by 0
    assert [name for name in NAMES if name in kept] == [NAMES[0], NAMES[1], NAMES[3]]


def test_more_candidates_than_fit(tiny_model, tokens, monkeypatch):
    monkeypatch.setattr(RetrievalModel, "pairs_at_once", 4)
    kept = KeptKeysValues(tiny_model, 2 * image_bytes(tiny_model, tokens))
    expected = tiny_model.match(tokens, ["a bar"] * len(tokens))
    for _ in range(2):
        found = kept.match("a bar", NAMES, asked(tokens, []))
        np.testing.assert_allclose([found[row] for row in range(len(NAMES))], expected, atol=1e-5)


def test_an_image_twice_is_counted_once(tiny_model, tokens):
    kept = KeptKeysValues(tiny_model, 10**9)
    found = kept.match("a", ["one", "one"], lambda rows: dict.fromkeys(rows, tokens[0]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert kept.nbytes == image_bytes(tiny_model, tokens)


def test_an_image_without_tokens_is_left_out(tiny_model, tokens):
    kept = KeptKeysValues(tiny_model, 10**9)
    found = kept.match("a bar", NAMES[:3], lambda rows: {row: tokens[row] for row in (0, 2)})
    assert list(found) == [0, 2]
    assert KeptKeysValues(tiny_model, 9).match("a", ["gone"], lambda rows: {}) == {}


@pytest.mark.parametrize("features", ["int8", "none"])
def test_an_engine_finds_the_same(tiny_model, photos, tmp_path, features, monkeypatch):
    plain = SearchEngine(tmp_path / "index", tiny_model)
    plain.add([photos], rerank_features=features)
    keeping = SearchEngine(tmp_path / "index", tiny_model, keys_values_memory=10**9)
    expected = [plain.search(text, rerank=12) for text in ("a red bar", "a blue circle")]
    projected = []
    project = RetrievalModel.image_keys_values
    monkeypatch.setattr(
        RetrievalModel,
        "image_keys_values",
        lambda self, tokens: (projected.append(len(tokens)), project(self, tokens))[1],
    )
    for _ in range(2):
        for text, hits in zip(("a red bar", "a blue circle"), expected, strict=True):
            found = keeping.search(text, rerank=12)
            assert [hit.path for hit in found] == [hit.path for hit in hits]
            np.testing.assert_allclose([h.itm for h in found], [h.itm for h in hits], atol=1e-5)
    assert 0 < sum(projected) <= len(NAMES)


def test_only_pytorch_keeps_them(photos, tmp_path):
    engine = SearchEngine(tmp_path / "index", backend="onnx", keys_values_memory=1)
    engine.add(sorted(photos.iterdir())[:2])
    with pytest.raises(BackendError, match="backend='torch'"):
        engine.search("a red bar")
    torch_engine = SearchEngine(tmp_path / "index", backend="torch", device="cpu")
    torch_engine.search("a red bar")
    assert torch_engine._keys_values is None  # on a processor only when asked for


def test_a_batch_is_not_kept_whole_by_one_image(tiny_model, tokens):
    kept = KeptKeysValues(tiny_model, image_bytes(tiny_model, tokens))
    kept.match("a", NAMES, asked(tokens, []))
    (left,) = kept._kept.values()
    assert left.untyped_storage().nbytes() == left.nbytes == kept.nbytes
    assert left.dtype == torch.float32
