"""The evaluation whole: against transformers pair by pair, through an index, killed and resumed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign import PILLOW_PROCESSOR, VOCABULARY, hub_model, save_clip, save_hub
from PIL import Image
from transformers import PreTrainedTokenizerFast

from blip2_search.indexes.base import SearchResult
from blip2_search.retrieval import evaluation, feature_cache
from blip2_search.retrieval.data import CaptionedImage
from blip2_search.retrieval.engine import SearchEngine
from blip2_search.retrieval.errors import CheckpointError, DatasetError, ScoreError
from blip2_search.retrieval.evaluation import evaluate
from blip2_search.retrieval.feature_cache import cached_features, plain_tokens
from blip2_search.retrieval.hub import load_hub
from blip2_search.retrieval.loading import load_embedder
from blip2_search.retrieval.model import itc_similarities
from blip2_search.retrieval.reranking import match_pairs, pairs_to_match, rank_by_itc
from tiny import COLOURS, SHAPES, build_tiny_model


@pytest.fixture
def dataset(photos):
    """Return 18 photographs; some have one caption, some seven."""
    found = []
    for i, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
        more = [
            f"{word} {colour} {shape}" for word in ("black", "on", "of", "clock", "a", "picture")
        ]
        captions = (f"a {colour} {shape}", *(more if i % 3 == 0 else ()))
        path = photos / f"{colour} {shape}.png"
        found.append(CaptionedImage(path=path, captions=captions, group=str(path)))
    return found


def naive(scores, candidates_by, right, k):
    """Return recall at 1, 5 and 10 of rows of scores, k of each row reranked, by sorting lists."""
    ranks = []
    for row, itc, ok in zip(scores, candidates_by, right, strict=True):
        by_itc = sorted(range(len(itc)), key=lambda i: -itc[i])
        order = sorted(by_itc[:k], key=lambda i: -row[i]) + by_itc[k:]
        ranks.append(next(rank for rank, i in enumerate(order) if ok[i]))
    return [100 * np.mean([rank < at for rank in ranks]) for at in (1, 5, 10)]


@torch.no_grad()
def test_equals_transformers_pair_by_pair(tmp_path, rng):
    """The same protocol with `Blip2ForImageTextRetrieval`, each pair in a pass of its own."""
    theirs = hub_model()
    folder = save_hub(theirs, tmp_path / "hub")
    words = [word for word in VOCABULARY if word.isalpha()]
    dataset, captions, owner = [], [], []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
        own = tuple(" ".join(rng.choice(words, rng.integers(1, 8))) for _ in range(1 + i % 3))
        dataset.append(CaptionedImage(path=path, captions=own, group=str(i)))
        captions += own
        owner += [i] * len(own)
    processor = PILLOW_PROCESSOR.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]"
    )
    itc, itm = np.zeros((12, len(captions))), np.zeros((12, len(captions)))
    for i, image in enumerate(dataset):
        pixels = processor(Image.open(image.path), return_tensors="pt")["pixel_values"]
        for j, caption in enumerate(captions):
            text = tokenizer([caption], return_tensors="pt")
            inputs = {
                "pixel_values": pixels, "input_ids": text["input_ids"],
                "attention_mask": text["attention_mask"],
            }  # fmt: skip
            itc[i, j] = theirs(**inputs).logits_per_image
            match = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
            itm[i, j] = match[0, 1]
    right = np.array(owner) == np.arange(12)[:, None]

    ours = load_hub(str(folder))
    with plain_tokens(ours, [image.path for image in dataset], None) as tokens:
        features = torch.from_numpy(cached_features(ours, tokens.images))
        rankings = rank_by_itc(
            itc_similarities(features, ours.encode_texts(captions)), np.array(owner), 5
        )
        pairs = pairs_to_match(rankings, len(captions))
        logits = match_pairs(ours, tokens.images, captions, pairs)
    for direction, theirs_itc, theirs_itm in (("tr", itc, itm), ("ir", itc.T, itm.T)):
        ranking = rankings[direction]
        total = ranking.itc + logits[pairs.positions[direction]]
        for row, candidates in enumerate(ranking.candidates):
            by_itc = sorted(range(theirs_itc.shape[1]), key=lambda i: -theirs_itc[row, i])[:5]
            assert candidates.tolist() == by_itc
            final = sorted(by_itc, key=lambda i: -theirs_itc[row, i] - theirs_itm[row, i])
            assert candidates[np.argsort(-total[row])].tolist() == final

    report = evaluate(ours, dataset, rerank=5)
    for name, scores, k in (("itc", itc, 0), ("itc+itm", itc + itm, 5)):
        table = report.tables[name]
        assert [table[f"tr@{at}"] for at in (1, 5, 10)] == pytest.approx(
            naive(scores, itc, right, k)
        )
        assert [table[f"ir@{at}"] for at in (1, 5, 10)] == pytest.approx(
            naive(scores.T, itc.T, right.T, k)
        )
    # The weights are wild enough for the two steps to differ.
    assert report.tables["itc"] != report.tables["itc+itm"]


def test_a_report_says_everything(tiny_model, dataset):
    seen = []

    def prepare(what):
        return lambda done, total: seen.append((what, done, total))

    report = evaluate(tiny_model, dataset, rerank=4, sweep=(0, 2, 4, 99), prepare=prepare)
    data = json.loads(json.dumps(report.to_dict()))
    assert list(data)[:2] == ["itc", "itc+itm"]
    assert {"tr@1", "ir@10", "tr_mean", "ir_mrr", "tr_median_rank", "mean"} <= data["itc"].keys()
    low, high = data["intervals"]["itc+itm"]["ir@5"]
    assert low <= data["itc+itm"]["ir@5"] <= high
    assert data["seconds"].keys() == {"images", "features", "texts", "itc", "rerank"}
    assert data["rates"].keys() == {"images", "texts", "pairs"}
    assert (data["images"], data["captions"], data["rerank"]) == (18, 54, 4)
    assert report.sweep[0].table == report.tables["itc"]
    assert report.sweep[4].table == report.tables["itc+itm"]
    assert report.sweep[0].seconds == 0 < report.sweep[2].itm_seconds < report.sweep[2].seconds
    assert report.precision == "fp32"
    assert {what for what, _, _ in seen} == {"Encoding images", "Encoding texts", "Reranking pairs"}


def test_one_direction_alone(tiny_model, dataset):
    both = evaluate(tiny_model, dataset, rerank=4)
    one = evaluate(tiny_model, dataset, rerank=4, directions=["ir"])
    assert one.tables["itc+itm"]["ir@1"] == both.tables["itc+itm"]["ir@1"]
    assert not any(name.startswith("tr") or name == "mean" for name in one.tables["itc"])


@pytest.mark.parametrize("rerank", [0, 4, 100])
def test_an_exact_index_loses_nothing(tiny_model, dataset, tmp_path, rerank):
    dense = evaluate(tiny_model, dataset, rerank=rerank)
    through = evaluate(tiny_model, dataset, rerank=rerank, index=tmp_path / "index")
    assert through.candidates == "index"
    assert through.tables.keys() == dense.tables.keys()
    for name, table in dense.tables.items():
        assert through.tables[name] == pytest.approx(table, rel=0.02)  # it stores fp16, and int8
    again = evaluate(tiny_model, dataset, rerank=rerank, index=tmp_path / "index")
    assert again.tables == through.tables


def test_what_an_index_does_not_find_is_missed(tiny_model, dataset, tmp_path, monkeypatch):
    whole = SearchEngine.search_vectors
    dense = evaluate(tiny_model, dataset, rerank=0, directions=["ir"])

    def lossy(self, vectors, k):
        found = whole(self, vectors, k)
        return SearchResult(scores=found.scores[:, :2], images=found.images[:, :2])

    monkeypatch.setattr(SearchEngine, "search_vectors", lossy)
    lost = evaluate(tiny_model, dataset, rerank=0, directions=["ir"], index=tmp_path / "index")
    assert lost.tables["itc"]["ir@1"] == dense.tables["itc"]["ir@1"]
    assert lost.tables["itc"]["ir@5"] == lost.tables["itc"]["ir@10"] < dense.tables["itc"]["ir@5"]
    assert lost.tables["itc"]["ir_mrr"] < dense.tables["itc"]["ir_mrr"]


def test_an_index_of_other_images_is_refused(tiny_model, dataset, tmp_path):
    evaluate(tiny_model, dataset, rerank=0, index=tmp_path / "index")
    before = SearchEngine(tmp_path / "index").paths()
    dataset[0].path.rename(dataset[0].path.with_name("new.png"))
    new = replace(dataset[0], path=dataset[0].path.with_name("new.png"))
    with pytest.raises(DatasetError, match="holds other images than this dataset"):
        evaluate(tiny_model, [new, *dataset[1:9]], rerank=0, index=tmp_path / "index")
    assert SearchEngine(tmp_path / "index").paths() == before  # and nothing was put into it


def test_ctrl_c_while_the_index_is_made(tiny_model, dataset, tmp_path):
    def interrupt(what):
        def update(done, total):
            if what == "Indexing images":
                raise KeyboardInterrupt

        return update

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model, dataset, rerank=0, index=tmp_path / "index", prepare=interrupt)


@pytest.mark.parametrize("depth", [1, 4])
def test_ranks_behind_the_first_are_exact_through_an_index(
    tiny_model, dataset, tmp_path, monkeypatch, depth
):
    monkeypatch.setattr(evaluation, "DEFAULT_RERANK", depth)
    dense = evaluate(tiny_model, dataset, rerank=0)
    through = evaluate(tiny_model, dataset, rerank=0, index=tmp_path / "index")
    assert dense.tables["itc"]["ir_median_rank"] > depth
    assert through.tables["itc"] == pytest.approx(dense.tables["itc"])


def test_one_file_with_two_entries(tiny_model, dataset, tmp_path):
    twice = [*dataset, replace(dataset[0], captions=("black circle",))]
    report = evaluate(tiny_model, twice, rerank=3, index=tmp_path / "index")
    assert (report.images, report.captions) == (19, 55)


def test_scores_that_are_no_numbers_are_refused(dataset):
    model = build_tiny_model()
    with torch.no_grad():
        model.itm_head.bias.fill_(torch.nan)
    assert evaluate(model, dataset, rerank=0).tables
    with pytest.raises(ScoreError, match="ITM logits are no numbers"):
        evaluate(model, dataset, rerank=2)
    with torch.no_grad():
        model.vision_proj.weight.fill_(torch.nan)
    with pytest.raises(ScoreError, match="ITC similarities are no numbers"):
        evaluate(model, dataset, rerank=0)


def test_precisions_share_no_tokens(tiny_model, dataset, tmp_path):
    """What one run caches in bf16 is not what another wants in fp32."""
    rough = evaluate(tiny_model, dataset, rerank=4, precision="bf16", cache=tmp_path)
    exact = evaluate(tiny_model, dataset, rerank=4, cache=tmp_path)
    assert (rough.precision, exact.precision) == ("bf16", "fp32")
    assert "images" in exact.rates
    assert rough.tables["itc"]["mean"] == pytest.approx(exact.tables["itc"]["mean"], abs=15)


def test_a_killed_evaluation_goes_on_from_its_cache(tiny_model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "IMAGES_A_FILE", 4)
    monkeypatch.setattr(feature_cache, "IMAGES_A_BATCH", 2)

    def interrupt(what):
        def update(done, total):
            if done > 10:
                raise KeyboardInterrupt

        return update

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model, dataset, rerank=2, cache=tmp_path, prepare=interrupt)
    encoded = []

    def count(what):
        return lambda done, total: encoded.append(done) if what == "Encoding images" else None

    resumed = evaluate(tiny_model, dataset, rerank=2, cache=tmp_path, prepare=count)
    assert min(encoded) > 8
    assert resumed.tables == evaluate(tiny_model, dataset, rerank=2).tables
    cached = evaluate(tiny_model, dataset, rerank=2, cache=tmp_path)
    assert "images" not in cached.rates  # nothing was encoded: there is no rate to tell


def test_unreadable_images_are_left_out_and_told(tiny_model, dataset):
    dataset[3].path.write_bytes(b"no image")
    report = evaluate(tiny_model, dataset, rerank=0)
    assert (report.images, len(report.skipped)) == (17, 1)
    assert str(dataset[3].path) in report.skipped[0]
    assert report.tables == evaluate(tiny_model, dataset[:3] + dataset[4:], rerank=0).tables
    with pytest.raises(DatasetError, match="no image can be read"):
        evaluate(tiny_model, dataset[3:4])


def test_a_dual_encoder_stands_beside(dataset, tmp_path):
    clip = load_embedder(f"open_clip:local-dir:{save_clip(tmp_path / 'clip')}")
    report = evaluate(clip, dataset, cache=tmp_path / "cache")
    assert (report.rerank, set(report.tables), report.mean_query_cosine) == (0, {"itc"}, 1)
    paths = [image.path for image in dataset]
    captions = [caption for image in dataset for caption in image.captions]
    scores = clip.encode_images(paths)[:, 0] @ clip.encode_texts(captions).T
    owner = np.repeat(np.arange(18), [len(image.captions) for image in dataset])
    right = owner == np.arange(18)[:, None]
    expected = naive(scores, scores, right, 0)
    assert [report.tables["itc"][f"tr@{k}"] for k in (1, 5, 10)] == pytest.approx(expected)
    through = evaluate(clip, dataset, index=tmp_path / "index")
    assert through.tables["itc"]["ir@10"] == pytest.approx(report.tables["itc"]["ir@10"], abs=2)
    with pytest.raises(CheckpointError, match="without an ITM head"):
        evaluate(clip, dataset, rerank=8)
