"""Reading transformers' `Blip2ForImageTextRetrieval`, from a folder or from the hub.

The transformers model is never built: its `config.json`, tensors, tokenizer and image-processor numbers
are read directly. The tables below say, name by name, where every tensor goes.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .checkpoints import load_tensors
from .config import EncoderConfig, ModelConfig, PreprocessConfig, QFormerConfig
from .errors import CheckpointError, first_line
from .model import RetrievalModel
from .own_format import read_json
from .preprocess import TextTransform

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ARCHITECTURE = "Blip2ForImageTextRetrieval"

# Theirs -> ours. An entry without a final ".weight" stands for the module's weight and bias.
_HEADS = {
    "vision_model.post_layernorm": "ln_vision",
    "query_tokens": "qformer.query_tokens",
    "embeddings.word_embeddings.weight": "qformer.word_embeddings.weight",
    "embeddings.position_embeddings.weight": "qformer.position_embeddings.weight",
    "qformer.layernorm": "qformer.embedding_norm",
    "vision_projection": "vision_proj",
    "text_projection": "text_proj",
    "itm_head": "itm_head",
}
# Inside `encoder.layer.N`, with {inner} the name of BERT's attention projections: "attention" in
# transformers' Q-Former, "self" in LAVIS's.
_LAYER = {
    "attention.{inner}.query": "self_attention.query",
    "attention.{inner}.key": "self_attention.key",
    "attention.{inner}.value": "self_attention.value",
    "attention.output.dense": "self_attention.output",
    "attention.output.LayerNorm": "self_attention.norm",
    "intermediate.dense": "text_ffn.up",
    "output.dense": "text_ffn.down",
    "output.LayerNorm": "text_ffn.norm",
    "intermediate_query.dense": "query_ffn.up",
    "output_query.dense": "query_ffn.down",
    "output_query.LayerNorm": "query_ffn.norm",
    # Not in every layer: what the model has decides which of these are expected.
    "crossattention.{inner}.query": "cross_attention.query",
    "crossattention.{inner}.key": "cross_attention.key",
    "crossattention.{inner}.value": "cross_attention.value",
    "crossattention.output.dense": "cross_attention.output",
    "crossattention.output.LayerNorm": "cross_attention.norm",
}
# Position numbers 0, 1, 2, ... that old versions of transformers stored as if they were weights.
_HARMLESS = ("embeddings.position_ids", "vision_model.embeddings.position_ids")

_VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "qkv_bias",
)
_QFORMER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "max_position_embeddings",
    "layer_norm_eps",
    "cross_attention_frequency",
    "encoder_hidden_size",
    "use_qformer_text_input",
)
_SMALL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "vocab.txt",
    "added_tokens.json",
)


def load_hub(name_or_folder: str) -> RetrievalModel:
    """Load a `Blip2ForImageTextRetrieval` as float32 on the CPU.

    Args:
        name_or_folder: a folder, or the name of a repository on the Hugging Face hub, which is
            downloaded into the hub's cache. It becomes the model's name.

    Raises:
        CheckpointError: it cannot be fetched, is another architecture, or does not fit.
    """
    folder = _fetch(name_or_folder, _SMALL_FILES)  # the gigabytes only when these make sense
    try:
        config = read_config(folder, name_or_folder)
        model = RetrievalModel(config, _text_transform(folder, config))
    except ValueError as error:
        raise CheckpointError(f"{name_or_folder}: {error}") from error
    tensors = {k: v for k, v in _read_weights(name_or_folder).items() if k not in _HARMLESS}
    queries = tensors.get("query_tokens")
    if queries is not None and queries.ndim == 3 and len(queries) == 1:
        tensors["query_tokens"] = queries[0]  # (1, Q, H) -> (Q, H)
    # The conversion to the hub's format dropped the temperature: search does not need it.
    load_tensors(
        model, tensors, name_or_folder, optional=("temperature",), names=_tensor_names(model)
    )
    return model.eval()


# ---- names -----------------------------------------------------------------------------------


def qformer_names(num_layers: int, prefix: str, inner: str) -> dict[str, str]:
    """Return theirs -> ours for the layers of a BERT-like Q-Former.

    Args:
        num_layers: how many there are.
        prefix: what stands before `encoder.layer.N`.
        inner: what the attention projections are called, "attention" or "self".
    """
    names = {}
    for i in range(num_layers):
        for theirs, ours in _LAYER.items():
            theirs = f"{prefix}encoder.layer.{i}.{theirs.format(inner=inner)}"
            names[theirs] = f"qformer.layers.{i}.{ours}"
    return weights_and_biases(names)


def weights_and_biases(modules: Mapping[str, str]) -> dict[str, str]:
    """Turn names of modules, theirs -> ours, into names of their weights and biases."""
    return {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in modules.items()
        for kind in ("weight", "bias")
    }


def _tensor_names(model: RetrievalModel) -> dict[str, str]:
    tensors = {"query_tokens", *(name for name in _HEADS if name.endswith(".weight"))}
    names = {theirs: ours for theirs, ours in _HEADS.items() if theirs in tensors}
    names |= weights_and_biases({k: v for k, v in _HEADS.items() if k not in tensors})
    names |= qformer_names(model.config.qformer.num_layers, "qformer.", "attention")
    # The encoder is transformers' own module, so its names are theirs behind one prefix.
    for ours in model.image_encoder.state_dict():
        names[ours] = f"image_encoder.{ours}"
    return names


# ---- configuration -----------------------------------------------------------------------------


def read_config(folder: Path, name: str) -> ModelConfig:
    """Translate a folder's `config.json` and image-processor file.

    Raises:
        CheckpointError: it is another architecture, or its parts contradict each other.
        ValueError: sizes that no model can have.
    """
    data = read_json(folder / "config.json")
    _check_architecture(data, name)
    vision = _section(data, "vision_config", "Blip2VisionConfig", _VISION_FIELDS, name)
    qformer = _section(data, "qformer_config", "Blip2QFormerConfig", _QFORMER_FIELDS, name)
    given = cast("dict[str, Any]", data.get("qformer_config") or {}).get("encoder_hidden_size")
    if given is not None and given != vision["hidden_size"]:
        raise CheckpointError(
            f"{name} contradicts itself: the Q-Former expects image tokens of size {given} "
            f"(encoder_hidden_size), the vision model gives {vision['hidden_size']} (hidden_size)"
        )
    if not qformer["use_qformer_text_input"]:
        raise CheckpointError(f"{name}: this Q-Former has no text half (use_qformer_text_input)")
    if qformer["hidden_act"] != "gelu":
        raise CheckpointError(f"{name}: unknown Q-Former activation {qformer['hidden_act']!r}")
    vision["image_size"] = _side(vision["image_size"], name)
    vision["patch_size"] = _side(vision["patch_size"], name)
    return ModelConfig(
        name=name,
        encoder=EncoderConfig(kind="blip2_vision", vision_config=vision),
        qformer=QFormerConfig(
            num_layers=qformer["num_hidden_layers"],
            hidden_size=qformer["hidden_size"],
            num_heads=qformer["num_attention_heads"],
            ffn_size=qformer["intermediate_size"],
            num_queries=_number(data, "num_query_tokens", 32, name),
            image_token_size=vision["hidden_size"],
            cross_attention_every=qformer["cross_attention_frequency"],
            vocab_size=qformer["vocab_size"],
            max_positions=qformer["max_position_embeddings"],
            dropout=qformer["hidden_dropout_prob"],
            norm_eps=qformer["layer_norm_eps"],
        ),
        preprocess=_preprocess(folder, vision["image_size"], name),
        embedding_size=_number(data, "image_text_hidden_size", 256, name),
        ln_vision_eps=vision["layer_norm_eps"],
        lm_head=False,
    )


def _check_architecture(data: Mapping[str, object], name: str) -> None:
    architectures = data.get("architectures")
    found = architectures if isinstance(architectures, list) else []
    if ARCHITECTURE not in found:
        is_what = " and ".join(map(str, found)) or f"of model type {data.get('model_type')!r}"
        raise CheckpointError(f"{name} is {is_what}, not {ARCHITECTURE}")


def _section(
    data: Mapping[str, object], key: str, class_name: str, wanted: tuple[str, ...], name: str
) -> dict[str, Any]:
    """Return the wanted fields of a part of `config.json`.

    Different versions of transformers leave out different defaults and add fields of their own:
    fill in with their class, drop what is not wanted.
    """
    import transformers

    given = data.get(key) or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{name}: {key} is no JSON object")
    try:
        config = getattr(transformers, class_name)(**{k: given[k] for k in wanted if k in given})
    except Exception as error:  # a class of its own in each version of transformers
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{name}: {key} is not valid: {reason}") from error
    return {field: getattr(config, field) for field in wanted}


def _number(data: Mapping[str, object], key: str, default: int, name: str) -> int:
    value = data.get(key, default)
    if not isinstance(value, int):
        raise CheckpointError(f"{name}: {key} is {value!r}, not a whole number")
    return value


def _side(size: object, name: str) -> int:
    """Return the side of a square given as a number, a pair, or height and width."""
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int):
        raise CheckpointError(f"{name}: {size!r} is not the size of a square")
    return size


def _preprocess(folder: Path, image_size: int, name: str) -> PreprocessConfig:
    processor = _image_processor(folder, name)
    given = _side(processor.get("size", image_size), name)
    if given != image_size:
        raise CheckpointError(
            f"{name} contradicts itself: the image processor makes {given} pixels, the vision model "
            f"takes {image_size}"
        )
    if processor.get("resample", 3) != 3:
        raise CheckpointError(f"{name}: only bicubic resampling (3), not {processor['resample']}")
    config = PreprocessConfig(image_size=image_size)
    mean, std = processor.get("image_mean", config.mean), processor.get("image_std", config.std)
    for values in (mean, std):
        if not (isinstance(values, (list, tuple)) and len(values) == 3):
            raise CheckpointError(f"{name}: image_mean and image_std need three numbers each")
    return replace(config, mean=mean, std=std)


def _image_processor(folder: Path, name: str) -> dict[str, Any]:
    if (folder / "preprocessor_config.json").exists():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").exists():  # where newer versions keep it
        section = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(section, dict):
            return section
    raise CheckpointError(f"{name} has no preprocessor_config.json")


# ---- tokenizer ---------------------------------------------------------------------------------


def _text_transform(folder: Path, config: ModelConfig) -> TextTransform:
    rows = config.qformer.vocab_size
    try:
        tokenizer = _tokenizer(folder, rows)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{config.name}: the tokenizer cannot be read: {error}") from error
    size = tokenizer.get_vocab_size()
    if size > rows:
        raise CheckpointError(
            f"{config.name} contradicts itself: a tokenizer of {size} tokens, a Q-Former of {rows}"
        )
    return TextTransform(tokenizer, config.preprocess)


def _tokenizer(folder: Path, rows: int) -> Tokenizer:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").exists():
        data = read_json(folder / "tokenizer.json")
        # Newer processors add "<image>", which stands for the query tokens in transformers' inputs.
        # It has no embedding here; left in, a caption that says "<image>" would run out of range.
        added = cast("list[dict[str, Any]]", data.get("added_tokens") or [])
        data["added_tokens"] = [
            token for token in added if token["id"] < rows or token["content"] != "<image>"
        ]
        return Tokenizer.from_str(json.dumps(data))
    if (folder / "vocab.txt").exists():
        return _bert_tokenizer(folder)
    raise CheckpointError(f"{folder} has neither tokenizer.json nor vocab.txt")


def _bert_tokenizer(folder: Path) -> Tokenizer:
    """Build bert-base-uncased's tokenizer from its vocabulary, and added tokens where there are."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    start, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    if start is None or end is None:
        raise CheckpointError(f"{folder / 'vocab.txt'} lacks [CLS] or [SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", end), ("[CLS]", start))
    added = folder / "added_tokens.json"
    if added.exists():
        numbers = cast("dict[str, int]", read_json(added))
        numbers.pop("<image>", None)
        tokenizer.add_special_tokens(sorted(numbers, key=numbers.__getitem__))
    return tokenizer


# ---- files -------------------------------------------------------------------------------------


def read_pickle(file: Path) -> dict[str, Any]:
    """Read a file written by `torch.save`, without running any code that it may carry.

    Raises:
        CheckpointError: it is missing, broken, or holds more than tensors and plain values.
    """
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is broken or holds more than tensors: it could run code, so it is not read"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, LookupError) as error:
        raise CheckpointError(f"{file} is broken: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds no named tensors")
    return data


def only_tensors(data: Mapping[Any, Any], file: Path) -> dict[str, Tensor]:
    """Return the mapping as it is.

    Raises:
        CheckpointError: something in it is no tensor, or has no name.
    """
    for name, value in data.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise CheckpointError(f"{file}: {name!r} is a {type(value).__name__}, not a tensor")
    return dict(data)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _read_bin(file: Path) -> dict[str, Tensor]:
    return only_tensors(read_pickle(file), file)


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "model.safetensors": _read_safetensors,
    "pytorch_model.bin": _read_bin,
}


def _read_weights(name: str) -> dict[str, Tensor]:
    for whole, read in _READERS.items():
        stem, suffix = whole.split(".")
        folder = _fetch(name, (whole, f"{whole}.index.json", f"{stem}-*.{suffix}"))
        index = folder / f"{whole}.index.json"
        if (folder / whole).exists():
            return read(folder / whole)
        if index.exists():
            tensors: dict[str, Tensor] = {}
            for shard in _shards(index):
                tensors |= read(folder / shard)
            return tensors
    raise CheckpointError(f"{name} has neither {' nor '.join(_READERS)}, whole or in shards")


def _shards(index: Path) -> list[str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index} has no weight_map")
    return sorted(set(places.values()))


def _fetch(name: str, patterns: tuple[str, ...]) -> Path:
    """Return the folder itself, or the cache folder of a hub repository with these files in it."""
    if Path(name).is_dir():
        return Path(name)
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"the hub has no model {name!r}, or not for everyone") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name!r} is not in the local cache and the Hugging Face hub cannot be reached"
        ) from error
    except Exception as error:  # requests', httpx's and the hub's own errors share no base
        raise CheckpointError(
            f"cannot fetch {name!r} from the Hugging Face hub: {first_line(error)}"
        ) from error
