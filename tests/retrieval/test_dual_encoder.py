"""open_clip models behind the same interface, against open_clip itself."""

import json
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from foreign import save_clip
from PIL import Image

from blip2_search import SearchEngine
from blip2_search.retrieval import dual_encoder
from blip2_search.retrieval.dual_encoder import DualEncoder
from blip2_search.retrieval.errors import CheckpointError
from blip2_search.retrieval.loading import load_embedder

CAPTIONS = ["a red bar", "A photograph of two cats.", "clock tower"]


@pytest.fixture
def clip(tmp_path):
    return f"open_clip:local-dir:{save_clip(tmp_path / 'clip')}"


@torch.no_grad()
def test_vectors_equal_open_clips(clip, photos):
    ours = load_embedder(clip, device="cpu")
    place = clip.removeprefix("open_clip:")
    model, _, preprocess = open_clip.create_model_and_transforms(place)
    paths = sorted(photos.iterdir())[:5]
    wide = Image.new("RGB", (90, 40), "navy")
    pixels = torch.stack([preprocess(image) for image in (*map(Image.open, paths), wide)])
    expected = model.eval().encode_image(pixels, normalize=True)
    found = ours.encode_images([*paths, wide], batch_size=4)
    assert found.shape == (6, 1, 24)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    expected = model.encode_text(open_clip.get_tokenizer(place)(CAPTIONS), normalize=True)
    np.testing.assert_allclose(ours.encode_texts(CAPTIONS, batch_size=2), expected, atol=1e-5)
    assert ours.encode_images([]).shape == (0, 1, 24)
    assert ours.encode_texts([]).shape == (0, 24)


def test_an_index_of_one_vector_an_image(clip, photos, tmp_path):
    engine = SearchEngine(tmp_path / "index", clip)
    assert engine.add([photos]).added == 18
    info = engine.info()
    assert (info.vectors_per_image, info.embedding_size) == (1, 24)
    assert info.preprocessing["mean"] == [0.5, 0.4, 0.3]
    again = SearchEngine(tmp_path / "index")  # the index remembers its model
    hits = again.search("a red bar", k=4)
    assert len(hits) == 4
    assert all(hit.itm is None for hit in hits)
    assert again.search(photos / "red bar.png", k=1)[0].path.endswith("red bar.png")
    with pytest.raises(CheckpointError, match="without an ITM head"):
        again.search("a red bar", rerank=8)


def test_other_weights_have_another_fingerprint(clip, tmp_path):
    other = f"open_clip:local-dir:{save_clip(tmp_path / 'other', seed=1)}"
    same = f"open_clip:local-dir:{save_clip(tmp_path / 'same')}"
    assert DualEncoder(clip).fingerprint == DualEncoder(same).fingerprint
    assert DualEncoder(clip).fingerprint != DualEncoder(other).fingerprint


def test_a_name_and_a_file_of_weights(clip, tmp_path, monkeypatch):
    folder = tmp_path / "clip"
    config = (folder / "open_clip_config.json").read_text()
    model = json.loads(config)["model_cfg"]
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda _: deepcopy(model))
    monkeypatch.chdir(folder)
    ours = DualEncoder("open_clip:tiny/open_clip_pytorch_model.bin")
    # Its weights are found again from any working directory, its mean and std are CLIP's.
    assert ours.name == f"open_clip:tiny/{folder / 'open_clip_pytorch_model.bin'}"
    assert ours.preprocessing["mean"] != [0.5, 0.4, 0.3]
    assert (ours.encode_texts(CAPTIONS) == DualEncoder(clip).encode_texts(CAPTIONS)).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32", "name its weights, as open_clip:ViT-B-32/WEIGHTS: one of openai"),
        ("ViT-B-32/nonsense", "nonsense"),
        ("ViT-Q-99/openai", "ViT-Q-99"),
        ("local-dir:nowhere", "nowhere"),
    ],
)
def test_what_is_missing_is_named(name, message):
    with pytest.raises(CheckpointError, match=message):
        load_embedder(f"open_clip:{name}")


def test_a_folder_without_weights_is_refused(clip, tmp_path):
    (tmp_path / "clip" / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_embedder(clip)


@pytest.mark.parametrize("weights", ["openai", "laion2b_s32b_b82k"])
def test_weights_get_the_activation_they_were_trained_with(weights):
    asked = {}
    fake = SimpleNamespace(
        get_pretrained_cfg=open_clip.get_pretrained_cfg,
        create_model=lambda name, **settings: asked.update(name=name, **settings),
    )
    dual_encoder._create(fake, "ViT-L-14", weights)
    assert asked["force_quick_gelu"] == (weights == "openai")
    assert asked["require_pretrained"]
