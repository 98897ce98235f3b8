"""Reading a LAVIS stage-1 checkpoint, a `.pth` that holds nothing but tensors.

It carries no configuration: every size follows from the shape of a tensor. Where the image encoder was
frozen in training, LAVIS left it out; it then comes from open_clip, which downloads it once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import load_tensors
from .config import EncoderConfig, ModelConfig, PreprocessConfig, QFormerConfig
from .errors import CheckpointError, first_line
from .hub import only_tensors, qformer_names, read_pickle, weights_and_biases
from .model import RetrievalModel
from .own_format import EMBEDDED, load_tokenizer
from .preprocess import TextTransform

# The encoders that LAVIS freezes, by the size of their image tokens. OpenAI's CLIP was trained with
# the QuickGELU activation, which open_clip's plain "ViT-L-14" does not have.
FROZEN_ENCODERS = {
    1408: EncoderConfig(kind="open_clip", name="EVA01-g-14", pretrained="laion400m_s11b_b41k"),
    1024: EncoderConfig(kind="open_clip", name="ViT-L-14-quickgelu", pretrained="openai"),
}
_EVA_HEAD_SIZES = {1408: 88}  # ViT-g; others have CLIP's usual 64
_BERT_HEAD_SIZE = 64

_BERT = "Qformer.bert."
_LM = "Qformer.cls.predictions."
_VISUAL = "visual_encoder."

# Theirs -> ours, as in hub.py.
_TENSORS = {
    "query_tokens": "qformer.query_tokens",
    f"{_BERT}embeddings.word_embeddings.weight": "qformer.word_embeddings.weight",
    f"{_BERT}embeddings.position_embeddings.weight": "qformer.position_embeddings.weight",
    "temp": "temperature",
}
_MODULES = {
    f"{_BERT}embeddings.LayerNorm": "qformer.embedding_norm",
    "ln_vision": "ln_vision",
    "vision_proj": "vision_proj",
    "text_proj": "text_proj",
    "itm_head": "itm_head",
}
_LM_MODULES = {
    f"{_LM}transform.dense": "lm_head.transform",
    f"{_LM}transform.LayerNorm": "lm_head.norm",
}
_EVA_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HARMLESS = (f"{_BERT}embeddings.position_ids",)  # 0, 1, 2, ...
# The word that a tensor of stage 2, which has no text half, starts with.
_STAGE_2 = re.compile(r"(opt|t5|llm)_(proj|model)\.")


def load_lavis(path: Path) -> RetrievalModel:
    """Load a LAVIS stage-1 checkpoint, pre-trained or fine-tuned, as float32 on the CPU.

    Args:
        path: the `.pth`. A `tokenizer.json` beside it is used; by default bert-base-uncased's, which
            the embedded model carries too.

    Raises:
        CheckpointError: it is not one, does not fit, or its frozen encoder cannot be downloaded.
    """
    state = _read_state(path)
    _untie(state, path)
    _join_qkv_biases(state)
    try:
        config = _config(state, path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model = _build(config, _text_transform(path, config))
    frozen = config.encoder.pretrained is not None
    if frozen:  # the encoder's tensors are the model's own from now on, and saved with it
        model.config = replace(config, encoder=replace(config.encoder, pretrained=None))
    if state["query_tokens"].ndim == 3 and len(state["query_tokens"]) == 1:
        state["query_tokens"] = state["query_tokens"][0]  # (1, Q, H) -> (Q, H)
    load_tensors(
        model,
        state,
        str(path),
        optional=("temp", "image_encoder.") if frozen else ("temp",),
        names=_names(config) | ({} if frozen else _encoder_names(model)),
    )
    return model.eval()


def _read_state(path: Path) -> dict[str, Tensor]:
    data = read_pickle(path)
    if isinstance(data.get("model"), Mapping):
        data = data["model"]
    state = only_tensors(data, path)
    if any(_STAGE_2.match(key) for key in state):
        raise CheckpointError(f"{path} is of BLIP-2's stage 2, which has no retrieval heads")
    return {key: tensor for key, tensor in state.items() if key not in _HARMLESS}


def _untie(state: dict[str, Tensor], path: Path) -> None:
    """Drop the second copies of tied tensors of the language-model head."""
    ties = {
        f"{_LM}decoder.weight": f"{_BERT}embeddings.word_embeddings.weight",
        f"{_LM}decoder.bias": f"{_LM}bias",
    }
    for copy, original in ties.items():
        tensor = state.pop(copy, None)
        if tensor is not None and not torch.equal(tensor, _get(state, original, path)):
            raise CheckpointError(f"{path} does not fit: {copy} and {original} are not the same")


def _join_qkv_biases(state: dict[str, Tensor]) -> None:
    """Make one bias of the two that EVA has: for queries and values, none for keys."""
    for key in [key for key in state if key.endswith(".attn.q_bias")]:
        block = key.removesuffix("q_bias")
        if f"{block}v_bias" in state:
            query, value = state.pop(key), state.pop(f"{block}v_bias")
            state[f"{block}qkv.bias"] = torch.cat((query, torch.zeros_like(query), value))


def _get(state: Mapping[str, Tensor], key: str, path: Path, ndim: int = 1) -> Tensor:
    """Return a tensor of which a size is read."""
    if key not in state:
        raise CheckpointError(f"{path} is no LAVIS stage-1 checkpoint: it lacks {key}")
    if state[key].ndim < ndim:
        raise CheckpointError(f"{path} does not fit: {key} is {tuple(state[key].shape)}")
    return state[key]


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many numbered modules there are behind a prefix."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


# ---- configuration -----------------------------------------------------------------------------


def _config(state: Mapping[str, Tensor], path: Path) -> ModelConfig:
    encoder, image_size = _encoder(state, path)
    words = _get(state, f"{_BERT}embeddings.word_embeddings.weight", path, 2)
    vocab_size, hidden_size = words.shape
    if hidden_size % _BERT_HEAD_SIZE:
        raise CheckpointError(f"{path}: hidden size {hidden_size} does not split into heads of 64")
    return ModelConfig(
        name=path.stem,
        encoder=encoder,
        qformer=QFormerConfig(
            num_layers=_count(state, f"{_BERT}encoder.layer."),
            hidden_size=hidden_size,
            num_heads=hidden_size // _BERT_HEAD_SIZE,
            ffn_size=len(_get(state, f"{_BERT}encoder.layer.0.intermediate.dense.bias", path)),
            num_queries=_get(state, "query_tokens", path, 2).shape[-2],
            image_token_size=len(_get(state, "ln_vision.weight", path)),
            cross_attention_every=_cross_attention_every(state, path),
            vocab_size=vocab_size,
            max_positions=len(_get(state, f"{_BERT}embeddings.position_embeddings.weight", path)),
        ),
        preprocess=PreprocessConfig(image_size=image_size),
        embedding_size=len(_get(state, "vision_proj.bias", path)),
        lm_head=any(key.startswith("Qformer.cls.") for key in state),
    )


def _cross_attention_every(state: Mapping[str, Tensor], path: Path) -> int:
    prefix = f"{_BERT}encoder.layer."
    count = _count(state, prefix)
    layers = [
        i for i in range(count) if any(k.startswith(f"{prefix}{i}.crossattention.") for k in state)
    ]
    every = layers[1] if len(layers) > 1 else max(count, 1)
    if layers != list(range(0, count, every)):
        raise CheckpointError(f"{path}: cross-attention in layers {layers} is not in every n-th")
    return every


def _names(config: ModelConfig) -> dict[str, str]:
    names = _TENSORS | weights_and_biases(_MODULES)
    names |= qformer_names(config.qformer.num_layers, _BERT, "self")
    if config.lm_head:
        names |= weights_and_biases(_LM_MODULES) | {f"{_LM}bias": "lm_head.bias"}
    return names


# ---- the image encoder -------------------------------------------------------------------------


def _encoder(state: Mapping[str, Tensor], path: Path) -> tuple[EncoderConfig, int]:
    """Return the encoder's configuration and image size."""
    if f"{_VISUAL}patch_embed.proj.weight" in state:
        return _eva(state, path)
    size = len(_get(state, "ln_vision.weight", path))
    if size not in FROZEN_ENCODERS:
        raise CheckpointError(f"{path}: no image encoder is known with tokens of size {size}")
    config = FROZEN_ENCODERS[size]
    if any(key.startswith(_VISUAL) for key in state):  # a CLIP tower under its own names
        config = replace(config, pretrained=None)
    return config, _open_clip_image_size(config.name)


def _open_clip_image_size(name: str) -> int:
    import open_clip

    return int(open_clip.get_model_config(name)["vision_cfg"]["image_size"])


def _eva(state: Mapping[str, Tensor], path: Path) -> tuple[EncoderConfig, int]:
    size, _, patch, _ = _get(state, f"{_VISUAL}patch_embed.proj.weight", path, 4).shape
    patches = _get(state, f"{_VISUAL}pos_embed", path, 2).shape[-2] - 1
    side, head_size = math.isqrt(max(patches, 0)), _EVA_HEAD_SIZES.get(size, 64)
    if side * side != patches or size % head_size:
        raise CheckpointError(
            f"{path}: {patches} patches make no square, or {size} does not split into heads"
        )
    config = {
        "hidden_size": size,
        "intermediate_size": len(_get(state, f"{_VISUAL}blocks.0.mlp.fc1.bias", path)),
        "num_hidden_layers": _count(state, f"{_VISUAL}blocks."),
        "num_attention_heads": size // head_size,
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    }
    return EncoderConfig(kind="blip2_vision", vision_config=config), side * patch


def _encoder_names(model: RetrievalModel) -> dict[str, str]:
    """Return theirs -> ours of an encoder that the checkpoint holds."""
    if model.config.encoder.kind == "open_clip":  # named as in open_clip; LAVIS cut the last block
        tensors = (f"image_encoder.{name}" for name in model.image_encoder.state_dict())
        return {ours.replace("image_encoder.tower.", _VISUAL): ours for ours in tensors}
    ours = "image_encoder.vision_model."
    modules = {f"{_VISUAL}patch_embed.proj": f"{ours}embeddings.patch_embedding"}
    for i in range(model.config.encoder.vision_config["num_hidden_layers"]):
        for block, layer in _EVA_BLOCK.items():
            modules[f"{_VISUAL}blocks.{i}.{block}"] = f"{ours}encoder.layers.{i}.{layer}"
    return weights_and_biases(modules) | {
        f"{_VISUAL}cls_token": f"{ours}embeddings.class_embedding",
        f"{_VISUAL}pos_embed": f"{ours}embeddings.position_embedding",
    }


def _build(config: ModelConfig, text_transform: TextTransform) -> RetrievalModel:
    try:
        return RetrievalModel(config, text_transform)
    except Exception as error:  # whatever the download raises
        if config.encoder.pretrained is None:
            raise
        raise CheckpointError(
            f"{config.name} was saved without its frozen image encoder, and open_clip's "
            f"{config.encoder.name} ({config.encoder.pretrained}) cannot be had: {first_line(error)}"
        ) from error


def _text_transform(path: Path, config: ModelConfig) -> TextTransform:
    homes = (path.parent, EMBEDDED / "mini")
    home = next((home for home in homes if (home / "tokenizer.json").exists()), None)
    if home is None:
        raise CheckpointError(
            f"{path} needs the tokenizer of bert-base-uncased with [DEC]: put its tokenizer.json beside it"
        )
    transform = load_tokenizer(home, config)
    size = transform.tokenizer.get_vocab_size()
    if size != config.qformer.vocab_size:
        raise CheckpointError(
            f"{path} has {config.qformer.vocab_size} word embeddings, but {home / 'tokenizer.json'} "
            f"has {size} tokens"
        )
    return transform
