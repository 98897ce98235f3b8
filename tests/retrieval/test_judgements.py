"""Agreement with people: the formulas by hand, and the files that ratings come in."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from foreign import save_clip

from blip2_search.retrieval.errors import DatasetError
from blip2_search.retrieval.judgements import Judgement, _taus, judge, read_judgements
from blip2_search.retrieval.loading import load_embedder


def taus_by_hand(x, y):
    """Count concordant and discordant pairs one by one (Kendall 1945; Stuart 1953 for tau-c)."""
    signs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in combinations(range(len(x)), 2)]
    surplus, pairs = sum(signs), len(signs)
    tied_x = sum(a == b for a, b in combinations(x, 2))
    tied_y = sum(a == b for a, b in combinations(y, 2))
    m = min(len(set(x)), len(set(y)))
    return {
        "tau_b": surplus / math.sqrt((pairs - tied_x) * (pairs - tied_y)),
        "tau_c": 2 * surplus / (len(x) ** 2 * (m - 1) / m),
    }


def test_taus_equal_the_count_by_hand(rng):
    ratings = rng.integers(1, 5, size=40).astype(float)
    scores = (ratings + rng.normal(size=40)).astype(np.float32)
    scores[:8] = scores[0]
    assert _taus(scores, ratings) == pytest.approx(taus_by_hand(scores.tolist(), ratings.tolist()))


def test_every_rating_is_an_observation(tiny_model, photos):
    paths = sorted(photos.iterdir())[:4]
    captions = ["a red bar", "blue circle on black", "clock tower"]
    judgements = [
        Judgement(image=path, caption=caption, ratings=((i + j) % 4 + 1.0, (i * j) % 4 + 1.0))
        for i, path in enumerate(paths)
        for j, caption in enumerate(captions)
    ]
    report = judge(tiny_model, judgements)
    assert (report.pairs, report.ratings) == (12, 24)
    itc, itm, ratings = [], [], []
    for one in judgements:
        features = tiny_model.encode_images([one.image])[0]
        for rating in one.ratings:
            itc.append((features @ tiny_model.encode_texts([one.caption])[0]).max())
            itm.append(tiny_model.match(tiny_model.image_tokens([one.image]), [one.caption])[0])
            ratings.append(rating)
    assert report.tau["itc"] == pytest.approx(taus_by_hand(itc, ratings))
    assert report.tau["itm"] == pytest.approx(taus_by_hand(itm, ratings), abs=0.02)
    total = np.add(itc, itm).tolist()
    assert report.tau["itc+itm"] == pytest.approx(taus_by_hand(total, ratings), abs=0.02)


def test_images_that_cannot_be_read_are_left_out(tiny_model, photos):
    good, bad = sorted(photos.iterdir())[:2]
    bad.write_bytes(b"")
    judged = [Judgement(image=bad, caption="a bar", ratings=(1.0,))]
    judged += [
        Judgement(image=good, caption=c, ratings=(r,)) for c, r in (("bar", 1.0), ("a", 2.0))
    ]
    report = judge(tiny_model, judged)
    assert (report.pairs, len(report.skipped)) == (2, 1)
    with pytest.raises(DatasetError, match="no image can be read"):
        judge(tiny_model, judged[:1])


def test_a_dual_encoder_has_itc_alone(photos, tmp_path):
    clip = load_embedder(f"open_clip:local-dir:{save_clip(tmp_path / 'clip')}")
    judged = [
        Judgement(image=path, caption="a bar", ratings=(float(i),))
        for i, path in enumerate(sorted(photos.iterdir())[:5])
    ]
    assert set(judge(clip, judged).tau) == {"itc"}


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture
def flickr8k(tmp_path):
    (tmp_path / "Flickr8k.token.txt").write_text(
        "a.jpg#0\tA dog runs .\na.jpg#1\tA brown dog .\nb.jpg#0\tTwo cats .\n"
    )
    return tmp_path


def test_flickr8k_expert(flickr8k):
    file = flickr8k / "ExpertAnnotations.txt"
    file.write_text("a.jpg\tb.jpg#0\t1\t1\t2\na.jpg\ta.jpg#1\t4\t4\t4\nb.jpg\ta.jpg#0\t2\t1\t1\n")
    judged = read_judgements(file, flickr8k / "images")
    # The caption that was written for the very image is left out.
    assert [one.caption for one in judged] == ["Two cats .", "A dog runs ."]
    assert judged[0].ratings == (1, 1, 2)
    assert judged[1].image == flickr8k / "images" / "b.jpg"


def test_flickr8k_cf_counts_the_share_of_yes(flickr8k):
    file = flickr8k / "CrowdFlowerAnnotations.txt"
    file.write_text("a.jpg\tb.jpg#0\t0\t0\t3\nb.jpg\ta.jpg#0\t0.25\t1\t3\n")
    assert [one.ratings for one in read_judgements(file, flickr8k)] == [(0,), (0.25,)]


def test_clipscore(tmp_path):
    judged = [
        {"image_path": "a.jpg", "caption": "a dog", "rating": 3},
        {"image_path": "a.jpg", "caption": "a cat", "rating": float("nan")},
    ]
    file = tmp_path / "flickr8k.json"
    file.write_text(json.dumps({"1": {"ground_truth": [], "human_judgement": judged}}))
    (one,) = read_judgements(file, tmp_path)
    assert (one.image, one.caption, one.ratings) == (tmp_path / "a.jpg", "a dog", (3,))


def test_a_table_with_columns_of_ratings(tmp_path):
    file = tmp_path / "ratings.csv"
    file.write_text(
        "image,caption,rating_1,rating_2,who\na.jpg,a dog,1,2,ada\nb.jpg,a cat,3,,ada\n"
    )
    assert [one.ratings for one in read_judgements(file, tmp_path)] == [(1, 2), (3,)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "image,caption\na.jpg,a dog\n", "needs columns called path, caption and rating"),
        ("a.csv", "image,caption,rating\na.jpg,a dog,good\n", "a rating is no number"),
        ("a.json", "[]", "not in CLIPScore's format"),
        ("a.json", "{}", "has no judgement"),
        ("a.txt", "a.jpg\tb.jpg#0\t1\n", "not in Flickr8k's format"),
        ("a.txt", "a.jpg\tc.jpg#9\t1\t2\t3\n", "has no caption c.jpg#9"),
        ("a.pdf", "", "judgements come as"),
    ],
)
def test_files_that_cannot_be_used(flickr8k, name, content, message):
    (flickr8k / name).write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_judgements(flickr8k / name, flickr8k)


def test_a_missing_file_of_captions_is_named(tmp_path):
    (tmp_path / "ExpertAnnotations.txt").write_text("a.jpg\tb.jpg#0\t1\t2\t3\n")
    with pytest.raises(DatasetError, match=r"Flickr8k\.token\.txt"):
        read_judgements(tmp_path / "ExpertAnnotations.txt", tmp_path)
