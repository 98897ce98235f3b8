"""The evaluation whole: against transformers pair by pair, through an index, killed and resumed."""

import json

import numpy as np
import pytest
import torch
from foreign import PILLOW_PROCESSOR, VOCABULARY, hub_model, save_clip, save_hub
from PIL import Image
from transformers import PreTrainedTokenizerFast

from blip2_search.retrieval import feature_cache
from blip2_search.retrieval.data import CaptionedImage
from blip2_search.retrieval.errors import CheckpointError, DatasetError
from blip2_search.retrieval.evaluation import evaluate
from blip2_search.retrieval.hub import load_hub
from blip2_search.retrieval.loading import load_embedder
from tiny import COLOURS, SHAPES


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

    report = evaluate(load_hub(str(folder)), dataset, rerank=5)
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
    assert data["seconds"].keys() == {"images", "texts", "itc", "rerank"}
    assert data["rates"].keys() == {"images", "texts", "pairs"}
    assert (data["images"], data["captions"], data["rerank"]) == (18, 54, 4)
    assert report.sweep[0].table == report.tables["itc"]
    assert report.sweep[4].table == report.tables["itc+itm"]
    assert report.sweep[0].seconds_per_query == 0 < report.sweep[2].seconds_per_query
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
        assert through.tables[name] == pytest.approx(table)
    again = evaluate(tiny_model, dataset, rerank=rerank, index=tmp_path / "index")
    assert again.tables == through.tables


def test_what_an_index_does_not_find_is_missed(tiny_model, dataset, tmp_path, monkeypatch):
    from blip2_search.retrieval.engine import SearchEngine

    whole = SearchEngine.search_many
    dense = evaluate(tiny_model, dataset, rerank=0, directions=["ir"])

    def lossy(self, texts, k):
        return [hits[1:] for hits in whole(self, texts, k)]

    monkeypatch.setattr(SearchEngine, "search_many", lossy)
    lost = evaluate(tiny_model, dataset, rerank=0, directions=["ir"], index=tmp_path / "index")
    first = dense.tables["itc"]["ir@1"]
    assert lost.tables["itc"]["ir@1"] <= 100 - first
    assert lost.tables["itc"]["ir_mrr"] < dense.tables["itc"]["ir_mrr"]


def test_an_index_of_other_images_is_refused(tiny_model, dataset, tmp_path):
    evaluate(tiny_model, dataset, rerank=0, index=tmp_path / "index")
    with pytest.raises(DatasetError, match="holds other images than this dataset"):
        evaluate(tiny_model, dataset[:9], rerank=0, index=tmp_path / "index")


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
    with pytest.raises(DatasetError, match="no image can be evaluated"):
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
