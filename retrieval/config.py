"""The sizes of a model, as frozen dataclasses. Defaults are BLIP-2's own (arXiv 2301.12597, section 3).

Legend used by every shape comment of this package:
B batch, N images, Q query tokens, T text tokens, P image tokens, D image-token size, H hidden, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
EncoderKind = Literal["timm", "open_clip", "blip2_vision"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """The Q-Former: a BERT with query tokens and cross-attention (BERT-base unless told otherwise)."""

    num_layers: int = 12
    hidden_size: int = 768  # H
    num_heads: int = 12
    ffn_size: int = 3072
    num_queries: int = 32  # Q
    image_token_size: int = 1408  # D, what the image encoder gives
    cross_attention_every: int = 2  # cross-attention stands in layers 0, 2, 4, ...
    vocab_size: int = 30523  # bert-base-uncased and one more token, [DEC]
    max_positions: int = 512
    dropout: float = 0.1
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that contradict each other."""
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        for name in ("num_layers", "num_queries", "image_token_size", "cross_attention_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which image encoder gives the image tokens.

    `name` is a timm or open_clip model name; `pretrained` an open_clip weight tag (only where the
    checkpoint lacks the encoder's tensors). `pool` averages a timm grid down to `pool` x `pool`
    tokens. `vision_config` holds the fields of transformers' `Blip2VisionConfig`.
    """

    kind: EncoderKind
    name: str = ""
    pretrained: str | None = None
    pool: int | None = None
    vision_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown kind or a contradiction."""
        if self.kind not in ("timm", "open_clip", "blip2_vision"):
            raise ValueError(f"unknown image encoder kind {self.kind!r}")
        if self.kind != "blip2_vision" and not self.name:
            raise ValueError(f"an image encoder of kind {self.kind!r} needs a name")
        if self.pool is not None and (self.kind != "timm" or self.pool < 1):
            raise ValueError("pool is a positive number and for timm encoders only")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How an image becomes pixels and a caption becomes tokens."""

    image_size: int = 224  # pixels; images are squashed to image_size x image_size, never cropped
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    max_text_tokens: int = 35  # T at evaluation; training uses 32
    max_words: int = 50

    def __post_init__(self) -> None:
        """Make tuples of what JSON gives as lists; raise ValueError for impossible sizes."""
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.image_size < 1 or self.max_text_tokens < 2:
            raise ValueError("image_size must be positive and max_text_tokens at least 2")

    @property
    def in_words(self) -> dict[str, Any]:
        """How images become pixels, in words and numbers that JSON can hold."""
        return {
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": "squash, bicubic",
        }


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that `config.json` of a checkpoint says."""

    name: str
    encoder: EncoderConfig
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    embedding_size: int = 256  # E
    ln_vision_eps: float = 1e-5
    # Learned positions for the image tokens: 0 for a ViT, which has its own; P for a grid of
    # convolutional features, which has none.
    image_positions: int = 0
    lm_head: bool = True  # the hub's checkpoints were published without one
    # False for a model that was trained by ITC alone. The fingerprint need not say it: it counts the weights.
    itm_head: bool = field(default=True, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able data; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read `to_dict`'s data back.

        Raises:
            ValueError: an unknown or missing field, named, or a value that `__post_init__` refuses.
        """
        parts = {"encoder": EncoderConfig, "qformer": QFormerConfig, "preprocess": PreprocessConfig}
        values = dict(data)
        for key, part in parts.items():
            if key in values:
                values[key] = build_dataclass(part, values[key], key)
        return build_dataclass(cls, values, "model")


def build_dataclass(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from what JSON or TOML gives.

    Raises:
        ValueError: an unknown or missing field, named; a value of another type than the field's, or
            one that `__post_init__` refuses.
    """
    unknown = sorted(set(data) - {f.name for f in fields(cls)})  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"unknown field(s) in the {where} configuration: {', '.join(unknown)}")
    types = get_type_hints(cls)
    for name, value in data.items():
        if not _fits(value, types[name]):
            wanted = getattr(types[name], "__name__", str(types[name])).removeprefix("typing.")
            raise ValueError(f"{where}.{name} cannot be {value!r}: it is {wanted}")
    try:
        return cls(**data)
    except TypeError as error:
        raise ValueError(f"incomplete {where} configuration: {error}") from error


def _fits(value: Any, wanted: Any) -> bool:
    """Tell whether a value is of a field's type; lists pass for tuples, integers for floats."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        kinds = arguments[:1] * len(value) if arguments[1:] == (Ellipsis,) else arguments
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if wanted is Any:
        return True
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or wanted)
