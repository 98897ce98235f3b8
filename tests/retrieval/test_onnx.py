"""Models on ONNX Runtime: the same numbers, no PyTorch, and nothing that is out of date."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from blip2_search.retrieval import backends, loading, onnx_exports, onnx_model
from blip2_search.retrieval.backends import open_embedder
from blip2_search.retrieval.checkpoints import save_model
from blip2_search.retrieval.data import CaptionedImage
from blip2_search.retrieval.engine import SearchEngine
from blip2_search.retrieval.errors import BackendError, CheckpointError
from blip2_search.retrieval.evaluation import evaluate
from blip2_search.retrieval.loading import load_model
from blip2_search.retrieval.onnx_export import export
from blip2_search.retrieval.onnx_exports import find_export
from blip2_search.retrieval.onnx_model import OnnxModel
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
        patch.setattr(onnx_exports, "cache_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(build_tiny_model(), folder)
    return folder


@pytest.fixture(scope="module")
def exported(cache, checkpoint):
    """Return the exported model's folder."""
    return export(str(checkpoint))


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


def kept(cache, graph="texts"):
    (folder,) = (cache / "onnx-optimised" / OnnxModel(export_of(cache)).fingerprint).glob(
        f"{graph}-*"
    )
    return folder


def export_of(cache):
    (folder,) = (path for path in (cache / "onnx").iterdir() if path.is_dir())
    return folder


@pytest.mark.parametrize("file", ["graph.onnx", "weights"])
def test_what_is_optimised_is_kept_and_made_again_where_it_is_damaged(
    exported, cache, file, caplog
):
    first = OnnxModel(exported).encode_texts(TEXTS)
    folder = kept(cache)
    assert {path.name for path in folder.iterdir()} == {"graph.onnx", "weights"}
    np.testing.assert_allclose(OnnxModel(exported).encode_texts(TEXTS), first, atol=1e-6)
    assert not caplog.messages
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    np.testing.assert_allclose(OnnxModel(exported).encode_texts(TEXTS), first, atol=1e-6)
    assert "made again" in caplog.text
    assert (folder / file).stat().st_size == len(whole)
    assert not list(folder.parent.glob("*.tmp"))


def test_another_graph_is_not_mistaken_for_what_was_made_of_the_first(exported, cache, tmp_path):
    shutil.copytree(exported, tmp_path / "model")
    graph = tmp_path / "model" / "texts.onnx"
    inputs = {"token_ids": np.array([[2, 3]]), "mask": np.array([[True, True]])}
    (first,) = open_session(graph, tmp_path / "kept").run(None, inputs)
    graph.write_bytes((exported / "match.onnx").read_bytes())
    wanted = open_session(graph, tmp_path / "kept").get_inputs()
    assert len(wanted) == 5
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert first.shape == (1, 16)


@pytest.mark.parametrize("trouble", ["no folder", "no room"])
def test_where_nothing_can_be_kept_it_works_all_the_same(
    exported, tmp_path, trouble, caplog, monkeypatch
):
    (tmp_path / "a file").touch()
    folder = tmp_path / ("a file" if trouble == "no folder" else "folder")
    if trouble == "no room":

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    inputs = {"token_ids": np.array([[2, 3]]), "mask": np.array([[True, True]])}
    (found,) = open_session(exported / "texts.onnx", folder).run(None, inputs)
    (anew,) = open_session(exported / "texts.onnx", None).run(None, inputs)
    np.testing.assert_allclose(found, anew, atol=1e-6)
    assert "start more slowly" in caplog.text
    assert trouble == "no folder" or not list(folder.iterdir())


def test_a_broken_graph_is_named(tmp_path):
    (tmp_path / "texts.onnx").write_bytes(b"no graph")
    for folder in (None, tmp_path / "kept"):
        with pytest.raises(CheckpointError, match=r"texts\.onnx"):
            open_session(tmp_path / "texts.onnx", folder)


def test_a_missing_runtime_is_one_sentence(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="--backend torch"):
        OnnxModel(exported).encode_texts(TEXTS)


def test_an_export_is_found_until_its_model_changes(exported, checkpoint):
    assert find_export(str(checkpoint)) == exported
    assert find_export(os.path.relpath(checkpoint)) == exported
    assert find_export("elsewhere") is None
    (checkpoint / "notes.md").touch()
    assert find_export(str(checkpoint)) == exported
    os.utime(checkpoint / "config.json")
    assert find_export(str(checkpoint)) is None
    (exported.parent / f"{exported.name}.0123.tmp").mkdir()  # of a killed run
    assert export(str(checkpoint)) == find_export(str(checkpoint)) == exported
    assert [path for path in exported.parent.iterdir() if path.is_dir()] == [exported]


@pytest.mark.parametrize("file", ["match.onnx", "model.safetensors", "onnx.json"])
def test_an_incomplete_export_is_none(exported, checkpoint, file):
    (exported / file).rename(exported / "elsewhere")
    assert find_export(str(checkpoint)) is None
    (exported / "elsewhere").rename(exported / file)
    assert find_export(str(checkpoint)) == exported


def test_auto_takes_what_is_exported(exported, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_wants_gpu", lambda device: False)
    assert isinstance(open_embedder(checkpoint), OnnxModel)
    assert not isinstance(open_embedder(checkpoint, backend="torch"), OnnxModel)
    save_model(build_tiny_model(seed=1), tmp_path / "other")
    assert not isinstance(open_embedder(tmp_path / "other"), OnnxModel)
    monkeypatch.setattr(backends, "_wants_gpu", lambda device: True)
    assert not isinstance(open_embedder(checkpoint, device="cpu"), OnnxModel)


def test_a_gpu_is_looked_for_without_torch(monkeypatch):
    monkeypatch.setattr(backends, "_GPU_FILES", ())
    monkeypatch.setattr(backends.ctypes.util, "find_library", lambda name: None)
    monkeypatch.delattr(loading, "pick_device")
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
    with pytest.raises(BackendError, match=complaint):
        open_embedder(name, **how)


def test_the_wrong_backend_says_nothing_against_the_index(photos, tmp_path, exported, checkpoint):
    SearchEngine(tmp_path / "index", str(checkpoint), backend="onnx").add([photos])
    with pytest.raises(BackendError, match="runs on the CPU"):
        SearchEngine(tmp_path / "index", backend="onnx", device="cuda").search("a bar")


def test_exporting_says_what_it_needs(monkeypatch, checkpoint):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"pip install 'blip2-search\[onnx\]'"):
        export(str(checkpoint))


def test_a_cache_that_cannot_be_written_is_one_sentence(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setattr(onnx_exports, "cache_folder", lambda: tmp_path / "a file")
    with pytest.raises(BackendError, match="cannot be written"):
        export(str(checkpoint))


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


def test_the_export_of_a_model_from_the_hub_knows_its_revision(monkeypatch, tmp_path):
    config = tmp_path / "snapshots" / "0123" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(config))
    assert list(onnx_exports.sources("blip2-itm-vit-g")) == [str(config)]
    monkeypatch.undo()
    assert onnx_exports.sources("no such/model of/the hub") == {}


def test_it_is_evaluated_as_the_model_in_pytorch_is(exported, checkpoint, photos, tmp_path):
    paths = sorted(photos.iterdir())
    dataset = [
        CaptionedImage(path=path, captions=(path.stem, f"a {path.stem}"), group=str(path))
        for path in paths
    ]
    ours, theirs = OnnxModel(exported), load_model(checkpoint, device="cpu")
    settings = {"rerank": 4, "cache": tmp_path}
    found, expected = (evaluate(model, dataset, **settings) for model in (ours, theirs))
    assert found.tables.keys() == {"itc", "itc+itm"}
    for name, table in expected.tables.items():
        assert found.tables[name] == pytest.approx(table, abs=100 / len(paths)), name
    assert found.mean_query_cosine == pytest.approx(expected.mean_query_cosine, abs=1e-3)
    assert found.rates["images"]  # the tokens of the one are not taken for those of the other
    with pytest.raises(BackendError, match="fp32, not in bf16"):
        evaluate(ours, dataset, precision="bf16")
