"""`blip2-search info` and `blip2-search models`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip2_search.cli import models
from blip2_search.retrieval import loading, own_format


def test_info_is_a_table(run, engine):
    done = run("info", "--index", "here")
    assert engine.opened[0]["index"] == Path("here")
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    table = {name: value.strip() for name, value in lines.items()}
    assert table["images"] == "1,234"
    assert table["vectors"] == "39,488 (32 x 256 an image)"
    assert table["size on disk"] == "20.5 MB and image tokens"
    assert table["rerank"] == "from kept image tokens, int8"
    assert table["model"] == "mini (fingerprint 0123abcd)"
    assert table["search"] == "exact, through 12.0 MB a query"
    assert done.stderr == ""


def test_info_as_json(run, engine):
    found = json.loads(run("info", "--json").stdout)
    assert found["images"] == 1234
    assert found["preprocessing"]["image_size"] == 260


def test_models_lists_every_name(run):
    done = run("models")
    for name in (loading.DEFAULT_MODEL, *loading.SHORT_NAMES.items()):
        for part in [name] if isinstance(name, str) else name:
            assert part in done.stdout
    assert "224 px" in done.stdout
    assert "364 px" in done.stdout
    assert ".pth" in done.stderr
    assert ".pth" not in done.stdout


def test_the_embedded_model_shows_its_size(run, monkeypatch, tmp_path):
    folder = tmp_path / "mini"
    folder.mkdir()
    monkeypatch.setattr(own_format, "EMBEDDED", tmp_path)
    assert "missing" in run("models").stdout
    (folder / "model.safetensors").write_bytes(bytes(2_000_000))
    (folder / "config.json").write_text(json.dumps({"preprocess": {"image_size": 260}}))
    shown = run("models").stdout
    assert "2.0 MB" in shown
    assert "260 px" in shown


def test_every_published_model_is_described():
    assert set(models._PUBLISHED) == set(loading.SHORT_NAMES)


@pytest.mark.parametrize("command", ["info", "models"])
def test_they_take_no_argument(run, command):
    run(command, "photos", code=2)
