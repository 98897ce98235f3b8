"""A random model that fits any test, and photographs drawn by hand."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "white", "purple")
SHAPES = ("circle", "square", "bar")
WORDS = [*COLOURS, *SHAPES, "a", "on", "black", "picture", "of", "clock", "tower", "left"]


def draw(colour: str, shape: str, size: int = 64) -> Image.Image:
    """Draw one shape on black."""
    image = Image.new("RGB", (size, size), "black")
    pen = ImageDraw.Draw(image)
    box = [size // 4, size // 4, 3 * size // 4, 3 * size // 4]
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.rectangle([0, size // 2 - 4, size, size // 2 + 4], fill=colour)
    return image


def draw_scene(left: tuple[str, str], right: tuple[str, str]) -> Image.Image:
    """Draw two shapes side by side on black, each a colour and "circle" or "bar"."""
    image = Image.new("RGB", (64, 64), "black")
    pen = ImageDraw.Draw(image)
    for (colour, shape), x in ((left, 4), (right, 36)):
        if shape == "circle":
            pen.ellipse([x, 20, x + 24, 44], fill=colour)
        else:
            pen.rectangle([x + 9, 4, x + 15, 60], fill=colour)
    return image


def build_tiny_model(name: str = "tiny", seed: int = 0):
    """Return a random model with a convolutional encoder, small enough for any test."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    from blip2_search.retrieval.config import (
        EncoderConfig,
        ModelConfig,
        PreprocessConfig,
        QFormerConfig,
    )
    from blip2_search.retrieval.model import RetrievalModel
    from blip2_search.retrieval.preprocess import TextTransform

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "[DEC]"]
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = ModelConfig(
        name=name,
        encoder=EncoderConfig(kind="timm", name="test_efficientnet", pool=2),
        qformer=QFormerConfig(
            num_layers=2, hidden_size=32, num_heads=4, ffn_size=64, num_queries=4,
            image_token_size=256, vocab_size=len(vocabulary), max_positions=40, dropout=0.0,
        ),
        preprocess=PreprocessConfig(image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3),
        embedding_size=16,
        image_positions=4,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = RetrievalModel(config, TextTransform(tokenizer, config.preprocess))
    # Batch statistics of noise: with those of a fresh network hardly any of the image comes through.
    norms = [m for m in model.image_encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum, norm.training = 1.0, True
    with torch.no_grad():
        model.image_encoder(torch.randn(16, 3, 64, 64))
    # Strong cross-attention, so that different images have clearly different features.
    for name, parameter in model.qformer.named_parameters():
        if "cross_attention" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.refresh_fingerprint()
    return model.eval()
