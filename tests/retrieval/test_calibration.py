"""The scale of the ITM head."""

import pytest
import torch

from blip2_search.retrieval.calibration import SCALES, calibrate_itm
from blip2_search.retrieval.data import CaptionedImage
from tiny import build_tiny_model


def test_calibration_scales_the_itm_head_and_nothing_else(photos):
    model = build_tiny_model()
    images = [
        CaptionedImage(path=path, captions=(f"a {path.stem}",), group=path.stem)
        for path in sorted(photos.iterdir())
    ]
    tokens = model.image_tokens([images[0].path])
    itm, features = model.match(tokens, ["a bar"]), model.encode_images([images[0].path])
    fingerprint = model.fingerprint
    scale, gains = calibrate_itm(model, images)
    assert set(gains) == set(SCALES)
    assert gains[scale] == max(gains.values())
    assert model.match(tokens, ["a bar"]) == pytest.approx(scale * itm, abs=1e-5)
    assert (model.encode_images([images[0].path]) == features).all()
    assert scale == 1 or model.fingerprint != fingerprint
    assert torch.isfinite(model.itm_head.weight).all()
