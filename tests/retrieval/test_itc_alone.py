"""A model that was trained by ITC alone has no ITM head: it searches without rerank, and may get one."""

import numpy as np
import pytest
from safetensors import safe_open

from blip2_search.retrieval import onnx_exports, onnx_model
from blip2_search.retrieval.calibration import calibrate_itm
from blip2_search.retrieval.checkpoints import save_model
from blip2_search.retrieval.data import CaptionedImage
from blip2_search.retrieval.engine import SearchEngine
from blip2_search.retrieval.errors import CheckpointError, RecipeError
from blip2_search.retrieval.evaluation import evaluate
from blip2_search.retrieval.loading import load_model
from blip2_search.retrieval.onnx_export import export
from blip2_search.retrieval.onnx_exports import find_export
from blip2_search.retrieval.recipe import read_recipe
from blip2_search.retrieval.start import starting_model
from blip2_search.retrieval.trainer import Trainer
from tiny import WORDS, build_tiny_model, draw


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return what `mini-queries` starts from, saved, at tiny size."""
    folder = tmp_path_factory.mktemp("itc") / "model"
    save_model(starting_model(recipe("mini-queries", folder.parent / "old")), folder)
    return folder


def recipe(name, checkpoint, *changes):
    if not checkpoint.exists():
        save_model(build_tiny_model(), checkpoint)
    changes = [f"start.checkpoint={checkpoint}", "data.image_size=64", *changes]
    if name == "mini-queries":
        model = load_model(checkpoint, device="cpu")
        changes.append(f"start.query_words={WORDS[: model.num_vectors - 2]}")
    return read_recipe(name, changes)


def test_a_new_head_that_is_not_trained_is_left_out(started):
    model = load_model(started, device="cpu")
    assert not model.reranks
    with safe_open(started / "model.safetensors", "pt") as tensors:
        assert not [name for name in tensors.keys() if "itm_head" in name]  # noqa: SIM118
    with pytest.raises(CheckpointError, match="without an ITM head: rerank 0"):
        model.match(model.image_tokens([draw("red", "bar")]), ["a"])


def test_a_trained_head_stays_when_itc_alone_goes_on(tmp_path):
    model = starting_model(recipe("mini-finetune", tmp_path / "old", "train.itm_weight=0"))
    assert model.reranks
    assert model.config.itm_head


def test_a_head_is_added_where_one_is_trained(started):
    chosen = recipe("mini-finetune", started)
    model = starting_model(chosen)
    assert model.reranks
    assert model.config.itm_head
    assert model.fingerprint != load_model(started, device="cpu").fingerprint


def test_a_head_that_is_not_there_is_neither_trained_nor_scaled(started, photos):
    model = load_model(started, device="cpu")
    chosen = read_recipe("mini-finetune", ["train.itm_weight=1"])
    with pytest.raises(RecipeError, match=r"no ITM head to train: --set train\.itm_weight=0"):
        Trainer(model, None, chosen.train)
    changes = ["train.itm_weight=0", "train.calibration_images=9"]
    with pytest.raises(RecipeError, match=r"there is none: --set train\.calibration_images=0"):
        starting_model(recipe("mini-finetune", started, *changes))
    images = captioned(photos)
    with pytest.raises(CheckpointError, match="without an ITM head"):
        calibrate_itm(model, images, rerank=2)


def captioned(photos):
    paths = sorted(photos.iterdir())
    return [CaptionedImage(path=path, captions=("a bar",), group=path.name) for path in paths]


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_it_searches_without_rerank(started, photos, tmp_path, backend, monkeypatch):
    for module in (onnx_model, onnx_exports):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    if backend == "onnx":
        exported = export(str(started))
        assert find_export(str(started)) == exported
        assert not (exported / "match.onnx").exists()
        with pytest.raises(CheckpointError, match="without an ITM head"):
            onnx_model.OnnxModel(exported).match(np.zeros((1, 4, 256), np.float32), ["a"])
    engine = SearchEngine(tmp_path / "index", model=str(started), backend=backend)
    added = engine.add([photos])
    hits = engine.search("a red circle", k=3)
    assert len(hits) == min(3, added.added)
    assert {hit.itm for hit in hits} == {None}
    assert engine.info().rerank_features == "none"
    with pytest.raises(CheckpointError, match="without an ITM head: rerank 0"):
        engine.search("a red circle", rerank=2)


def test_it_is_evaluated_by_itc_alone(started, photos):
    dataset = captioned(photos)
    report = evaluate(load_model(started, device="cpu"), dataset)
    assert (report.rerank, set(report.tables)) == (0, {"itc"})
    with pytest.raises(CheckpointError, match="without an ITM head"):
        evaluate(load_model(started, device="cpu"), dataset, rerank=4)
