"""The benchmark's results, and the tables that are made of them."""

import json
import sys

from foreign import hub_model, save_clip, save_hub

from blip2_search.benchmarks import recall, tables
from blip2_search.retrieval import report


def test_models_side_by_side(photos, tmp_path, monkeypatch, capsys):
    """COCO's layout, a model as the hub has it, and a dual encoder."""
    folder = tmp_path / "data" / "coco"
    folder.mkdir(parents=True)
    photos.rename(folder / "val2014")
    images = [
        {
            "filepath": "val2014", "filename": path.name, "split": "test",
            "sentences": [{"raw": f"a {path.stem}"}] * (1 + i % 7),
        }
        for i, path in enumerate(sorted((folder / "val2014").iterdir()))
    ]  # fmt: skip
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    blip2 = str(save_hub(hub_model(), tmp_path / "hub"))
    clip = f"open_clip:local-dir:{save_clip(tmp_path / 'clip')}"
    arguments = ["--dataset", "coco", "--root", tmp_path / "data", "--rerank", 4]
    arguments += ["--model", blip2, "--model", clip, "--results", tmp_path / "results"]
    monkeypatch.setattr(sys, "argv", ["recall", *map(str, arguments)])
    monkeypatch.setattr(recall, "default_cache", lambda: tmp_path / "cache")
    monkeypatch.setitem(report.PUBLISHED_SIZE, "coco", (18, sum(1 + i % 7 for i in range(18))))
    recall.main()
    printed = capsys.readouterr().out
    assert printed.count("ITC + ITM, 4 reranked") == 1
    assert printed.count(", ITC  ") == 2
    assert "BLIP-2 ViT-g (published)" in printed
    file = tmp_path / "results" / recall.result_name(blip2, "coco", "test")
    assert (tmp_path / "results" / recall.result_name(clip, "coco", "test")).exists()
    result = json.loads(file.read_text())
    assert (result["images"], result["rerank"], result["split"]) == (18, 4, "test")
    assert result["command"].startswith("python -m blip2_search.benchmarks.recall --dataset")

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
