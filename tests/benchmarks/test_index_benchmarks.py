"""The benchmarks of the index, on the features of a few drawn images."""

import json
import sys

import pytest

from blip2_search.benchmarks import index_growth, index_tradeoff
from blip2_search.retrieval.checkpoints import save_model
from blip2_search.retrieval.engine import SearchEngine
from tiny import build_tiny_model


@pytest.fixture
def index(photos, tmp_path):
    save_model(build_tiny_model("tiny"), tmp_path / "model")
    SearchEngine(tmp_path / "index", str(tmp_path / "model")).add([photos])
    return tmp_path / "index"


def run(main, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    main()


def test_tradeoff(index, tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "picture.png"
    run(
        index_tradeoff.main, monkeypatch, "--index", index, "--images", 300,
        "--only", "ours", "numpy", "--out", out, "--plot", picture,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert (found["images"], found["real_images"], found["queries"]) == (300, 18, 64)
    assert list(found["results"]) == ["ours, exact", "ours, compact", "numpy, all vectors"]
    for row in found["results"].values():
        assert row["recall@128"] == pytest.approx(1, abs=2e-4)
    assert "300 images" in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_growth(index, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    (tmp_path / "work").mkdir()
    run(
        index_growth.main, monkeypatch, "--index", index, "--work", tmp_path / "work",
        "--images", 1100, 2500, "--out", out,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert [row["images"] for row in found["rows"]] == [1100, 2500]
    assert found["exponents"].keys() >= {"exact_open_s", "compact_p50_ms", "add_1000_s"}
    assert list((tmp_path / "work").iterdir()) == []
