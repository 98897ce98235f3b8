"""The parts of mini's recipe that need neither its data nor its ancestors."""

import json

import pytest
import torch

from blip2_search.benchmarks import train_mini
from blip2_search.retrieval.data import CaptionedImage
from blip2_search.retrieval.errors import DatasetError
from tiny import build_tiny_model


def test_labels_become_captions_in_groups(tmp_path):
    entries = [
        {"filename": f"{i}.jpg", "wnid": "n0", "label": label, "source": "x"}
        for i, label in enumerate(["orange", "dog", "dog"])
    ]
    (tmp_path / "labels.json").write_text(json.dumps(entries))
    orange, one, other = train_mini.read_labelled(tmp_path)
    assert "a photo of an orange" in orange.captions
    assert "a photo of a dog" in one.captions
    assert one.group == other.group != orange.group
    assert one.path == tmp_path / "images" / "1.jpg"
    with pytest.raises(DatasetError, match="cannot read"):
        train_mini.read_labelled(tmp_path / "nowhere")


def test_the_queries_start_as_one_sentence():
    assert len(train_mini.QUERY_WORDS) + 2 == train_mini.MINI.qformer.num_queries
    assert len(set(train_mini.QUERY_WORDS)) == len(train_mini.QUERY_WORDS)


def test_calibration_scales_the_itm_head_and_nothing_else(photos):
    model = build_tiny_model()
    images = [
        CaptionedImage(path=path, captions=(f"a {path.stem}",), group=path.stem)
        for path in sorted(photos.iterdir())
    ]
    tokens = model.image_tokens([images[0].path])
    itm, features = model.match(tokens, ["a bar"]), model.encode_images([images[0].path])
    fingerprint = model.fingerprint
    scale, scores = train_mini.calibrate_itm(model, images, "fp32")
    assert scores[scale] == max(scores.values())
    assert set(scores) == set(train_mini.CALIBRATION_SCALES)
    assert model.match(tokens, ["a bar"]) == pytest.approx(scale * itm, abs=1e-5)
    assert (model.encode_images([images[0].path]) == features).all()
    assert scale == 1 or model.fingerprint != fingerprint
    assert torch.isfinite(model.itm_head.weight).all()
