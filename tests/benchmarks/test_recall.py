"""The benchmark's results, and the tables that are made of them."""

import json
import sys

from blip2_search.benchmarks import recall, tables
from blip2_search.retrieval.checkpoints import save_model


def test_models_side_by_side(tiny_model, photos, tmp_path, monkeypatch, capsys):
    save_model(tiny_model, tmp_path / "model")
    folder = tmp_path / "data" / "flickr8k"
    folder.mkdir(parents=True)
    photos.rename(folder / "images")
    images = [
        {"filename": path.name, "split": "val", "sentences": [{"raw": path.stem}]}
        for path in sorted((folder / "images").iterdir())
    ]
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    model = str(tmp_path / "model")
    arguments = ["--dataset", "flickr8k", "--root", tmp_path / "data", "--split", "val"]
    arguments += ["--model", model, "--model", model, "--rerank", 4]
    arguments += ["--results", tmp_path / "results"]
    monkeypatch.setattr(sys, "argv", ["recall", *map(str, arguments)])
    monkeypatch.setattr(recall, "default_cache", lambda: tmp_path / "cache")
    recall.main()
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == recall.result_name(model, "flickr8k", "val")
    result = json.loads(file.read_text())
    assert (result["images"], result["rerank"], result["split"]) == (18, 4, "val")
    assert result["command"].startswith("python -m blip2_search.benchmarks.recall --dataset")
    printed = capsys.readouterr().out
    assert printed.count("ITC + ITM, 4 reranked") == 2

    page = f"before\n<!-- {file.name} -->\nold\n<!-- end -->\nafter\n"
    filled = tables.with_tables(page, tmp_path / "results")
    assert f"{result['itc+itm']['ir@5']:.1f}" in filled
    assert "old" not in filled
    assert tables.with_tables(filled, tmp_path / "results") == filled


def test_the_tables_on_our_pages_equal_their_results():
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.with_tables(text) == text, (
            f"python -m blip2_search.benchmarks.tables ({page})"
        )
        assert "<!-- " in text, f"{page} has no table of results"
