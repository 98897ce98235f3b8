"""Frozen stages in ONNX Runtime: the same tokens, losses and gradients as without."""

import pytest
import torch

from blip2_search.retrieval import frozen_parts as module
from blip2_search.retrieval.frozen_parts import FrozenPart, frozen_encoder, frozen_stages
from blip2_search.retrieval.optimizer import freeze_unused
from blip2_search.retrieval.recipe import TrainConfig
from blip2_search.retrieval.trainer import Objectives
from tiny import build_tiny_model


def finetuned(encoder_layers):
    model = build_tiny_model()
    config = TrainConfig(steps=1, train_encoder=True, encoder_layers=encoder_layers, itg_weight=0)
    freeze_unused(model, config)
    return model, config


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_stages_are_those_below_the_trained_layers(layers):
    model, _ = finetuned(layers)
    encoder = model.image_encoder
    blocks = len(encoder.backbone.blocks)
    assert encoder.frozen_blocks == blocks - layers
    pixels = torch.randn(3, 3, 64, 64)
    whole = encoder(pixels)
    torch.testing.assert_close(encoder.upper(encoder.lower(pixels, 2), 2), whole)
    stages = frozen_stages(model, "fp32")
    torch.testing.assert_close(stages(pixels), whole, atol=1e-4, rtol=1e-4)


def test_losses_and_gradients_are_the_same():
    model, config = finetuned(2)
    model.eval()
    pixels = torch.randn(4, 3, 64, 64)
    text = model.tokenize(["a red circle", "a blue square", "a green circle", "red"])
    results = []
    for stages in (None, frozen_stages(model, "fp32")):
        model.zero_grad()
        objectives = Objectives(model, config, False, stages=stages)
        losses = objectives(pixels, text, torch.arange(4), 1.0, 0)
        sum(losses.values()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    assert any(name.startswith("image_encoder") for name in results[0][1])
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)


def test_they_are_left_to_pytorch_where_nothing_is_frozen_or_can_be_exported(monkeypatch, caplog):
    assert frozen_stages(finetuned(None)[0], "fp32") is None
    assert frozen_stages(finetuned(1)[0], "bf16") is None
    monkeypatch.setattr(module, "can_export", lambda: False)
    assert frozen_stages(finetuned(1)[0], "fp32") is None
    assert "pip install" in caplog.text


def test_a_frozen_encoder_gives_the_same_tokens(monkeypatch):
    model = build_tiny_model()
    pixels = torch.randn(40, 3, 64, 64)
    encode = frozen_encoder(model, "fp32")
    assert isinstance(encode, FrozenPart)
    with torch.inference_mode():
        torch.testing.assert_close(
            encode(pixels), model.encode_pixels(pixels), atol=1e-4, rtol=1e-4
        )
    assert frozen_encoder(model, "bf16") is None
    monkeypatch.setattr(module, "can_export", lambda: False)
    assert frozen_encoder(model, "fp32") is None


def test_what_cannot_be_exported_is_left_to_pytorch(monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(module, "onnx_graph", refuse)
    model, _ = finetuned(1)
    model.train()
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(frozen_stages(model, "fp32")(pixels), model.image_encoder(pixels))
    assert model.image_encoder.training
    assert "no such operator" in caplog.text
