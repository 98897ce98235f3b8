"""The embedded default model: it is there, it is small, and it can tell colours and things apart."""

import numpy as np

from blip2_search.retrieval.loading import load_model
from blip2_search.retrieval.own_format import EMBEDDED
from tiny import draw


def test_it_is_at_most_80_mb_and_has_a_card():
    folder = EMBEDDED / "mini"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 80e6
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in folder.iterdir()
    }


def test_it_sees_what_is_drawn():
    model = load_model("mini", device="cpu")
    red, blue = draw("red", "square", 340), draw("blue", "square", 340)
    features = model.encode_images([red, blue])
    texts = model.encode_texts(["a red square", "a blue square"])
    assert features.shape == (2, 32, 256)
    assert texts.shape == (2, 256)
    assert np.allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-5)
    itc = (features @ texts.T).max(axis=1)  # (2 images, 2 texts)
    assert itc[0, 0] + itc[1, 1] > itc[0, 1] + itc[1, 0]
