"""The evaluation of a tiny model, against the protocol written out pair by pair."""

import json
import sys

import numpy as np
import pytest

from blip2_search.benchmarks import recall
from blip2_search.retrieval.checkpoints import save_model
from tiny import COLOURS, SHAPES


@pytest.fixture
def dataset(photos):
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    paths = [photos / f"{name}.png" for name in names]
    captions = [caption for name in names for caption in (f"a {name}", f"{name} on black")]
    return paths, captions, np.repeat(np.arange(len(names)), 2)


def pair_by_pair(model, paths, captions, k):
    """Return the rank of every image's best caption and of every caption's image."""
    itc = np.zeros((len(paths), len(captions)))
    itm = np.zeros_like(itc)
    for i, path in enumerate(paths):
        features, tokens = model.encode_images([path])[0], model.image_tokens([path])
        for j, caption in enumerate(captions):
            itc[i, j] = (features @ model.encode_texts([caption])[0]).max()
            itm[i, j] = model.match(tokens, [caption])[0]
    text_ranks = [order(row, row + extra, k) for row, extra in zip(itc, itm, strict=True)]
    image_ranks = [order(col, col + extra, k) for col, extra in zip(itc.T, itm.T, strict=True)]
    return text_ranks, image_ranks


def order(itc, final, k):
    """Return the best k by ITC, in the order of the final score."""
    best = sorted(range(len(itc)), key=lambda i: -itc[i])[:k]
    return sorted(best, key=lambda i: -final[i])


@pytest.mark.parametrize("k", [4, 1000])
def test_equals_the_protocol_written_out(tiny_model, dataset, k):
    paths, captions, owner = dataset
    report = recall.evaluate(tiny_model, paths, captions, owner, k)
    texts, images = pair_by_pair(tiny_model, paths, captions, k)
    for at in (1, 5, 10):
        tr = np.mean([any(owner[t] == i for t in row[:at]) for i, row in enumerate(texts)])
        ir = np.mean([owner[t] in row[:at] for t, row in enumerate(images)])
        assert report["itc+itm"][f"tr@{at}"] == pytest.approx(100 * tr)
        assert report["itc+itm"][f"ir@{at}"] == pytest.approx(100 * ir)


def test_the_command(tiny_model, photos, tmp_path, monkeypatch, capsys):
    save_model(tiny_model, tmp_path / "model")
    images = [
        {"filename": path.name, "split": "val", "sentences": [{"raw": path.stem}]}
        for path in sorted(photos.iterdir())
    ]
    (tmp_path / "data.json").write_text(json.dumps({"images": images}))
    arguments = ["--data", tmp_path / "data.json", "--images", photos, "--split", "val"]
    arguments += ["--model", tmp_path / "model", "--out", tmp_path / "report.json", "--limit", 9]
    monkeypatch.setattr(sys, "argv", ["recall", *map(str, arguments)])
    recall.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["captions"], report["rerank"]) == (9, 9, 128)
    assert f"{report['itc+itm']['ir@5']:.1f}" in capsys.readouterr().out
