"""Tiny random checkpoints in the layouts of others."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    "a", "the", "red", "bus", "cat", "on", "clock", "tower", "two", "##s", "grass", "[DEC]",
]  # fmt: skip
CAPTIONS = ["a red bus", "two cats on the grass", "the clock tower", "a"]
# The class that resizes with Pillow, as BLIP-2 was evaluated; before version 5 it was the only one.
PILLOW_PROCESSOR = getattr(transformers, "BlipImageProcessorPil", transformers.BlipImageProcessor)


def wordpiece():
    """Return a WordPiece tokenizer over the made-up vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Make every weight random, norms and biases too, so that no two tensors can be mixed up."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def hub_model(**changes):
    """Return a tiny random `Blip2ForImageTextRetrieval`; sizes differ wherever they may."""
    vision = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 40, "image_size": 28, "patch_size": 14, "layer_norm_eps": 0.5,
    }  # fmt: skip
    qformer = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 56, "cross_attention_frequency": 2, "max_position_embeddings": 40,
        "vocab_size": len(VOCABULARY), "layer_norm_eps": 0.1, "use_qformer_text_input": True,
    }  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=vision | changes.pop("vision", {}),
        qformer_config=qformer | changes.pop("qformer", {}),
        text_config={"model_type": "opt", "num_hidden_layers": 1, "hidden_size": 8,
                     "num_attention_heads": 1, "ffn_dim": 8, "word_embed_proj_dim": 8},
        **{"num_query_tokens": 8, "image_text_hidden_size": 16, "image_token_index": None} | changes,
    )  # fmt: skip
    model = transformers.Blip2ForImageTextRetrieval(config).eval()
    randomise(model)
    return model


def save_hub(model, folder: Path) -> Path:
    """Save a model as it would lie on the hub, with its tokenizer and image processor."""
    model.save_pretrained(folder)
    wordpiece().save(str(folder / "tokenizer.json"))
    size = model.config.vision_config.image_size
    processor = PILLOW_PROCESSOR(
        size={"height": size, "width": size}, image_mean=[0.5, 0.4, 0.3], image_std=[0.3, 0.2, 0.25]
    )
    processor.save_pretrained(folder)
    return folder


def edit_json(file: Path, **changes) -> None:
    """Overwrite some fields of a JSON object."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}


def save_clip(folder: Path, seed: int = 0) -> Path:
    """Save a tiny random open_clip model as a folder that `open_clip:local-dir:` takes."""
    import open_clip

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = open_clip.CLIP(CLIP["embed_dim"], CLIP["vision_cfg"], CLIP["text_cfg"])
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    settings = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.25], "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CLIP, "preprocess_cfg": settings})
    )
    return folder
