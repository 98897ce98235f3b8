"""Logits on disk: what was scored is not scored again, whatever ended the run."""

import numpy as np
import pytest

from blip2_search.retrieval.itm_cache import ItmCache, itm_cache_name
from blip2_search.retrieval.reranking import Pairs, match_pairs


def numbers(*values):
    return np.array(values, np.int64)


def test_gives_back_what_it_was_given(tmp_path):
    with ItmCache(tmp_path / "itm") as cache:
        cache.add(numbers(0, 0, 2), numbers(1, 4_000_000_000, 0), np.float32([1, 2, -3]), 0.5)
    with ItmCache(tmp_path / "itm") as cache:
        cache.add(numbers(1), numbers(1), np.float32([7]), 0.25)
    cache = ItmCache(tmp_path / "itm")
    found = cache.known(numbers(2, 1, 0, 0, 0, 9), numbers(0, 1, 0, 1, 4_000_000_000, 9))
    assert np.array_equal(found, np.float32([-3, 7, np.nan, 1, 2, np.nan]), equal_nan=True)
    assert (cache.pairs, cache.seconds) == (4, 0.75)


def test_an_empty_cache_knows_nothing(tmp_path):
    assert np.isnan(ItmCache(tmp_path).known(numbers(0, 3), numbers(0, 1))).all()


def test_an_interrupt_keeps_what_was_scored(tmp_path):
    def run():
        with ItmCache(tmp_path) as cache:
            cache.add(numbers(3), numbers(4), np.float32([5]), 1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert ItmCache(tmp_path).known(numbers(3), numbers(4)).tolist() == [5]


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path):
    with ItmCache(tmp_path) as one, ItmCache(tmp_path) as other:
        one.add(numbers(0, 1), numbers(0, 0), np.float32([1, 2]), 1.0)
        other.add(numbers(1, 2), numbers(0, 0), np.float32([2, 3]), 1.0)
    assert ItmCache(tmp_path).known(numbers(0, 1, 2), numbers(0, 0, 0)).tolist() == [1, 2, 3]


def test_other_captions_and_settings_have_another_name(tiny_model):
    name = itm_cache_name(tiny_model, ["a", "b"], "fp32")
    assert name == itm_cache_name(tiny_model, ["a", "b"], "fp32")
    others = [(["a"], "fp32"), (["ab"], "fp32"), (["b", "a"], "fp32"), (["a", "b"], "fp16")]
    assert name not in {itm_cache_name(tiny_model, *other) for other in others}


def test_a_killed_rerank_goes_on(tiny_model, tmp_path, rng):
    captions = ["a red circle", "a blue bar on black", "white"]
    size = tiny_model.config.qformer.image_token_size
    tokens = list(rng.normal(size=(40, 4, size)).astype(np.float16))
    images, texts = (x.ravel() for x in np.indices((40, 3)))
    pairs = Pairs(images, texts, {})
    whole = match_pairs(tiny_model, tokens, captions, pairs)

    def stop(done, total):
        if done >= 60:
            raise KeyboardInterrupt

    one_image = tokens[0].nbytes  # a group of pairs each
    with pytest.raises(KeyboardInterrupt), ItmCache(tmp_path) as cache:
        match_pairs(
            tiny_model, tokens, captions, pairs, memory=one_image, cache=cache, on_progress=stop
        )
    kept = ItmCache(tmp_path).pairs
    assert 0 < kept < 120
    calls = []
    with ItmCache(tmp_path) as cache:
        again = match_pairs(
            tiny_model, tokens, captions, pairs,
            cache=cache, on_progress=lambda done, total: calls.append((done, total)),
        )  # fmt: skip
    assert calls[0][0] > kept
    assert calls[-1] == (120, 120)
    np.testing.assert_allclose(again, whole, atol=1e-5)
    calls.clear()
    with ItmCache(tmp_path) as cache:  # and nothing is left to do
        assert (match_pairs(tiny_model, tokens, captions, pairs, cache=cache) == again).all()
        assert not calls
