"""Fixtures for tests that read the checkpoints of others."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
from foreign import hub_model, save_hub
from PIL import Image


@pytest.fixture(scope="session")
def theirs():
    """Return transformers' model; nobody may change it."""
    return hub_model()


@pytest.fixture
def hub_folder(theirs, tmp_path):
    """Return the model saved in the hub's layout, for tests to spoil."""
    return save_hub(theirs, tmp_path / "hub")


@pytest.fixture(scope="session")
def pictures():
    """Return four drawn pictures of different shapes: soft shades under coarse noise."""
    rng = np.random.default_rng(0)
    pictures = []
    for width, height in [(60, 40), (33, 71), (28, 28), (100, 90)]:
        rows, columns = np.mgrid[0:height, 0:width]
        shades = np.stack([rows * 255 / height, columns * 255 / width, 0 * rows + 90], axis=-1)
        noise = rng.integers(-60, 60, size=(height // 4 + 1, width // 4 + 1, 3))
        noise = noise.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
        pictures.append(Image.fromarray(np.clip(shades + noise, 0, 255).astype(np.uint8)))
    return pictures


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """Register tiny open_clip models: a CLIP tower, and an EVA tower through timm."""
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny-clip.json").write_text(
        json.dumps(
            {
                "embed_dim": 16,
                "quick_gelu": True,
                "vision_cfg": {"image_size": 28, "layers": 3, "width": 64, "patch_size": 14},
                "text_cfg": text,
            }
        )
    )
    (folder / "tiny-eva.json").write_text(
        json.dumps(
            {
                "embed_dim": 16,
                "vision_cfg": {
                    "image_size": 224,
                    "timm_model_name": "eva02_tiny_patch14_224",
                    "timm_model_pretrained": False,
                    "timm_pool": "token",
                    "timm_proj": None,
                },
                "text_cfg": text,
                "custom_text": True,
            }
        )
    )
    open_clip.add_model_config(folder)
