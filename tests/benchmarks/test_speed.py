"""The benchmarks of speed, on a few drawn images."""

import json
import sys

import pytest

from blip2_search.benchmarks import crops, indexing, int8, peak, queries, tables
from blip2_search.retrieval.checkpoints import save_model
from blip2_search.retrieval.engine import SearchEngine
from tiny import draw


def run(main, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    main()


def test_queries(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(queries, "DEPTHS", (0, 4))
    SearchEngine(tmp_path / "index", device="cpu").add([photos])
    out = tmp_path / "out.json"
    run(
        queries.main, monkeypatch, "--index", tmp_path / "index", "--rounds", 1,
        "--out", out,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["images"] == found["warm"][0]["images"] == 18
    assert all(len(times) == 1 for times in found["cold_s"].values())
    assert found["stages_s"].keys() >= {"command line", "search"}
    assert found["warm"][0]["4"]["p50_ms"] > 0
    assert "| 18 images | " in tables.queries_table(found)


def test_indexing(photos, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    run(indexing.main, monkeypatch, "--images", photos, "--count", 8, "--rounds", 1, "--out", out)
    found = json.loads(out.read_text())
    assert found["images"] == 8
    assert list(found["seconds"]) == [
        "a plain loop, PyTorch",
        "ours, PyTorch",
        "ours, ONNX Runtime",
    ]
    assert all(0 < share <= 1 for (share,) in found["busy"].values())
    assert tables.indexing_table(found).count("\n") == 4


def test_int8(photos, tmp_path, monkeypatch):
    entries = [
        {
            "filename": path.name,
            "split": "val" if row % 2 else "train",
            "sentences": [{"raw": f"a {path.stem}"}],
        }
        for row, path in enumerate(sorted(photos.iterdir()))
    ]
    data, out = tmp_path / "captions.json", tmp_path / "out.json"
    data.write_text(json.dumps({"images": entries}))
    run(
        int8.main, monkeypatch, "--data", data, "--images", photos, "--calibrate", 4,
        "--out", out,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["images"] == 9
    assert {len(one["seconds"]) for one in found["precisions"].values()} == {1}
    assert found["precisions"]["fp32"] != found["precisions"]["int8"]
    assert tables.int8_table(found).count("\n") == 3


def test_crops_are_the_same_each_time(photos, tmp_path, monkeypatch):
    for name in ("one", "two"):
        run(crops.main, monkeypatch, "--images", photos, "--count", 20, "--out", tmp_path / name)
    one, two = (sorted((tmp_path / name).rglob("*.jpg")) for name in ("one", "two"))
    assert len(one) == 20
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
    assert len({file.read_bytes() for file in one}) == 20


def test_peak(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(peak, "LASTING", 0.01)
    save_model(tiny_model, tmp_path / "model")
    out = tmp_path / "out.json"
    run(
        peak.main, monkeypatch, "--model", tmp_path / "model", "--device", "cpu", "--pairs", 5,
        "--out", out,
    )  # fmt: skip
    found = json.loads(out.read_text())
    flops = {name: work["flops"] for name, work in found["works"].items()}
    assert flops[tables.PEAK] == 2 * peak.SIDE**3
    # What keeping saves: keys and values of the image tokens, in each layer that looks at them.
    config, positions = tiny_model.config, tiny_model.image_tokens([draw("red", "bar")]).shape[1]
    looking = sum(layer.cross_attention is not None for layer in tiny_model.qformer.layers)
    saved = flops["a text, candidates"] - flops["a text, candidates, keys and values kept"]
    width, depth = config.qformer.hidden_size, config.qformer.image_token_size
    assert saved == looking * 2 * 2 * positions * depth * width
    assert 0 < tables.share_of_peak(found["works"], "an image, texts") < 1
    assert tables.share_of_peak(found["works"], tables.PEAK) == pytest.approx(1)
    assert tables.peak_table(found).count("\n") == 6
