"""Models on ONNX Runtime: the same numbers, no PyTorch, and nothing that is out of date."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from blip2_search.retrieval import backends, onnx_model
from blip2_search.retrieval.backends import open_embedder
from blip2_search.retrieval.checkpoints import save_model
from blip2_search.retrieval.engine import SearchEngine
from blip2_search.retrieval.errors import CheckpointError
from blip2_search.retrieval.loading import load_model
from blip2_search.retrieval.onnx_export import export
from blip2_search.retrieval.onnx_model import OnnxModel, cache_folder, exports, find_export
from blip2_search.retrieval.onnx_sessions import open_session
from blip2_search.retrieval.own_format import EMBEDDED
from tiny import COLOURS, SHAPES, build_tiny_model, draw

TEXTS = ["a red circle", "a blue bar on black", "", "a picture of a clock tower on the left"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Keep what is exported out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(onnx_model, "cache_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(build_tiny_model(), folder)
    return folder


@pytest.fixture(scope="module")
def exported(cache, checkpoint):
    """Return the exported model's folder."""
    return export(load_model(checkpoint, device="cpu"))


def pictures(size=64):
    return [draw(colour, shape, size) for colour in COLOURS[:2] for shape in SHAPES[:2]]


def assert_equal_models(ours, theirs, images):
    pixels = np.stack([theirs.image_transform(image) for image in images])
    encoded, expected = ours.encode(pixels), theirs.encode(pixels)
    scale = np.abs(expected.tokens).max()
    np.testing.assert_allclose(encoded.tokens / scale, expected.tokens / scale, atol=1e-5)
    np.testing.assert_allclose(encoded.features, expected.features, atol=1e-4)
    np.testing.assert_allclose(ours.encode_images(images, 3), expected.features, atol=1e-4)
    np.testing.assert_allclose(ours.encode_texts(TEXTS, 3), theirs.encode_texts(TEXTS), atol=1e-4)
    one = expected.tokens[:1]
    for tokens, texts in (
        (expected.tokens, TEXTS),
        (expected.tokens, TEXTS[:1] * 4),
        (one, TEXTS),
        (one, TEXTS[:1]),
    ):
        found = ours.match(tokens, texts, batch_size=3)
        np.testing.assert_allclose(found, theirs.match(tokens, texts), atol=1e-4)
        assert found.dtype == np.float32
    assert ours.fingerprint == theirs.fingerprint
    assert ours.preprocessing == theirs.preprocessing
    assert ours.name == theirs.name


def test_an_exported_model_computes_the_same(exported, checkpoint):
    assert_equal_models(OnnxModel(exported), load_model(checkpoint, device="cpu"), pictures())


def test_the_embedded_export_is_of_the_embedded_weights(cache):
    model = open_embedder("mini", backend="onnx")
    assert isinstance(model, OnnxModel)
    assert_equal_models(model, load_model("mini", device="cpu"), pictures(300))


def test_nothing_is_as_empty_as_with_torch(exported, tiny_model):
    model = OnnxModel(exported)
    assert model.encode_images([]).shape == tiny_model.encode_images([]).shape
    assert model.encode_texts([]).shape == tiny_model.encode_texts([]).shape
    with pytest.raises(ValueError, match="cannot pair"):
        model.match(np.zeros((3, 4, 256), np.float32), TEXTS)


def test_what_is_optimised_is_kept_and_made_again_where_it_is_damaged(exported, cache):
    first = OnnxModel(exported).encode_texts(TEXTS)
    (graph,) = (cache / "onnx-optimised").glob(f"{exported.name}-*/texts/graph.onnx")
    np.testing.assert_allclose(OnnxModel(exported).encode_texts(TEXTS), first, atol=1e-6)
    graph.write_bytes(b"half of a fi")
    np.testing.assert_allclose(OnnxModel(exported).encode_texts(TEXTS), first, atol=1e-6)
    assert graph.stat().st_size > 1000
    assert {file.name for file in graph.parent.parent.iterdir()} <= {"texts", "match"}


def test_where_nothing_can_be_kept_it_works_all_the_same(exported, tmp_path):
    (tmp_path / "a file").touch()
    inputs = {"token_ids": np.array([[2, 3]]), "mask": np.array([[True, True]])}
    kept, anew = (
        open_session(exported / "texts.onnx", folder).run(None, inputs)[0]
        for folder in (tmp_path / "a file" / "texts", None)
    )
    np.testing.assert_allclose(kept, anew, atol=1e-6)


def test_a_broken_graph_is_named(tmp_path):
    (tmp_path / "texts.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"texts\.onnx"):
        open_session(tmp_path / "texts.onnx", None)


def test_an_export_is_found_until_its_model_changes(exported, checkpoint):
    assert find_export(str(checkpoint)) == exported
    assert find_export(os.path.relpath(checkpoint)) == exported
    assert find_export("elsewhere") is None
    os.utime(checkpoint / "config.json")
    assert find_export(str(checkpoint)) is None
    again = export(load_model(checkpoint, device="cpu"))
    assert again == find_export(str(checkpoint)) == exported
    assert list(exports().iterdir()) == [again]


def test_auto_takes_what_is_exported(exported, checkpoint, tmp_path, monkeypatch):
    assert isinstance(open_embedder(checkpoint), OnnxModel)
    assert not isinstance(open_embedder(checkpoint, backend="torch"), OnnxModel)
    save_model(build_tiny_model(seed=1), tmp_path / "other")
    assert not isinstance(open_embedder(tmp_path / "other"), OnnxModel)
    monkeypatch.setattr(backends, "_wants_gpu", lambda device: True)
    assert not isinstance(open_embedder(checkpoint, device="cpu"), OnnxModel)


def test_a_gpu_is_looked_for_without_torch(monkeypatch):
    monkeypatch.setattr(backends, "_GPU_FILES", ())
    monkeypatch.setattr(backends.ctypes.util, "find_library", lambda name: None)
    assert not backends._wants_gpu("auto")
    assert not backends._wants_gpu("cpu")
    assert backends._wants_gpu("cuda:1")


@pytest.mark.parametrize(
    ("name", "how", "complaint"),
    [
        ("mini", {"backend": "onnx", "device": "cuda"}, "runs on the CPU"),
        ("open_clip:ViT-B-32/openai", {"backend": "onnx"}, "PyTorch only"),
        ("mini", {"backend": "jax"}, "auto, torch, onnx"),
    ],
)
def test_what_onnx_cannot_do_is_said(name, how, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        open_embedder(name, **how)


def test_exporting_says_what_it_needs(monkeypatch, tmp_path, tiny_model, cache):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    before = sorted(exports().iterdir()) if exports().exists() else []
    with pytest.raises(CheckpointError, match="onnx"):
        export(tiny_model)
    assert sorted(exports().iterdir()) == before


def test_an_index_is_the_same_for_both(exported, checkpoint, photos, tmp_path):
    by_torch = SearchEngine(tmp_path / "torch", str(checkpoint), backend="torch")
    by_onnx = SearchEngine(tmp_path / "onnx", str(checkpoint), backend="onnx")
    assert by_torch.add([photos]).added == by_onnx.add([photos]).added == 18
    np.testing.assert_allclose(by_onnx.features(), by_torch.features(), atol=1e-3)
    across = SearchEngine(tmp_path / "torch", backend="onnx")
    for text in TEXTS[:2]:
        for rerank in (0, 8):
            hits = by_torch.search(text, k=5, rerank=rerank)
            found = across.search(text, k=5, rerank=rerank)
            assert [hit.path for hit in found] == [hit.path for hit in hits]
            assert [hit.score for hit in found] == pytest.approx(
                [hit.score for hit in hits], abs=1e-4
            )
    for hit in across.rank_texts(photos / "red bar.png", TEXTS[:2]):
        assert hit.itm is not None
    assert across.search(photos / "red bar.png", k=1)[0].path.endswith("red bar.png")


def test_indexing_and_asking_load_no_torch(photos, tmp_path):
    code = (
        "import sys\n"
        "from blip2_search import SearchEngine\n"
        f"engine = SearchEngine({str(tmp_path / 'index')!r}, device='cpu')\n"
        f"assert engine.add([{str(photos)!r}]).added == 18\n"
        "assert len(engine.search('a red circle', k=3)) == 3\n"
        "heavy = ('torch', 'torchvision', 'transformers', 'timm', 'open_clip', 'pyarrow.dataset')\n"
        "print(sorted(set(heavy) & set(sys.modules)))\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_graphs_hold_no_weights():
    folder = EMBEDDED / "mini"
    assert sum(file.stat().st_size for file in folder.glob("*.onnx")) < 1e6
    assert json.loads((folder / "onnx.json").read_text())["sources"] == {}
    assert importlib.util.find_spec("onnxruntime")
    assert cache_folder().name == "blip2-search"
