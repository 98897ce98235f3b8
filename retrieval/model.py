"""BLIP-2's retrieval model: image encoder, Q-Former, and the ITC, ITM and language-model heads.

The upper half of `RetrievalModel` is what programs use: images and captions in, numpy out. The lower
half is what the losses use: tensors in, tensors out, with gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..indexes.base import Float32, Int64
from .config import ModelConfig
from .embedder import (
    NO_TOKENS,
    EncodedImages,
    EncodesImages,
    MatchesPairs,
    as_reranker,
)
from .encoders import build_encoder
from .errors import DeviceMemoryError
from .fingerprint import fingerprint
from .masks import bi_directional_mask, multimodal_causal_mask, uni_modal_mask
from .preprocess import ImageLike, ImageTransform, TextTransform, TokenisedTexts
from .qformer import KeyValue, LanguageModelHead, QFormer
from .text_batch import TextBatch

Precision = Literal["fp32", "bf16", "fp16"]
INITIAL_TEMPERATURE = 0.07
MATCH = 1  # the column of the ITM head that says "this pair matches"


class QueryPass(NamedTuple):
    """The query half of the Q-Former over a batch of images."""

    image_features: Tensor  # (N, Q, E), normalised
    keys_values: tuple[KeyValue, ...]  # for the ITG pass


class RetrievalModel(nn.Module, EncodesImages, MatchesPairs):
    """BLIP-2 stage 1 (arXiv 2301.12597, section 3.1)."""

    fingerprint: str  # set by `refresh_fingerprint`
    origin = ""  # where it was loaded from, set by `loading.py`

    def __init__(self, config: ModelConfig, text_transform: TextTransform) -> None:
        """Build with random weights; `loading.load_model` fills them."""
        super().__init__()
        size, qformer = config.qformer.image_token_size, config.qformer
        self.image_encoder = build_encoder(config.encoder, config.preprocess.image_size)
        self.ln_vision = nn.LayerNorm(size, eps=config.ln_vision_eps)
        self.image_positions = (
            nn.Parameter(0.02 * torch.randn(config.image_positions, size))
            if config.image_positions
            else None
        )
        self.qformer = QFormer(qformer)
        self.vision_proj = nn.Linear(qformer.hidden_size, config.embedding_size)
        self.text_proj = nn.Linear(qformer.hidden_size, config.embedding_size)
        self.itm_head = nn.Linear(qformer.hidden_size, 2) if config.itm_head else None
        self.lm_head = LanguageModelHead(qformer) if config.lm_head else None
        self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        self.text_transform = text_transform
        self.reconfigure(config)

    def reconfigure(self, config: ModelConfig) -> None:
        """Take over a configuration that differs in what needs no other modules."""
        self.config = config
        self.image_transform = ImageTransform(config.preprocess)
        self.refresh_fingerprint()

    # ---- for programs: images and captions in, numpy out -------------------------------------

    @property
    def name(self) -> str:
        """What to load again, such as "mini" or a folder."""
        return self.origin or self.config.name

    @property
    def reranks(self) -> bool:
        """Whether there is an ITM head: `match` needs it."""
        return self.itm_head is not None

    @property
    def encoder_fingerprint(self) -> str:
        """16 hex digits of the image encoder and of how pixels come to it."""
        description = repr((self.config.encoder, self.config.preprocess))
        # In half precision, so that a checkpoint stored in it has the same.
        return fingerprint(description, self.image_encoder.state_dict(), torch.float16)

    @property
    def num_vectors(self) -> int:
        """Q, vectors an image: one of each query token."""
        return self.config.qformer.num_queries

    @property
    def embedding_size(self) -> int:
        """E, numbers a vector."""
        return self.config.embedding_size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images become pixels, in words and numbers that JSON can hold."""
        return self.config.preprocess.in_words

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.ln_vision.weight.device

    @property
    def pairs_at_once(self) -> int:
        """Pairs in a pass of the ITM head, where there are many."""
        return 32 if self.device.type == "cpu" else 512

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type of number."""
        return self.ln_vision.weight.dtype

    @torch.inference_mode()
    def encode(self, pixels: Float32, *, keep_tokens: bool = True) -> EncodedImages:
        """Return the ITC features of pixels (N, 3, S, S), and the encoder's tokens, for `match`.

        Raises:
            DeviceMemoryError: so many images do not fit into the GPU's memory.
        """
        try:
            tokens = self.encode_pixels(torch.from_numpy(pixels))
            features = self.features_from_encoder(tokens).float().cpu().numpy()
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceMemoryError.of(len(pixels), error) from None
        # Not in bfloat16, which numpy lacks.
        kept = tokens.float() if tokens.dtype == torch.bfloat16 else tokens
        return EncodedImages(kept.cpu().numpy() if keep_tokens else NO_TOKENS, features)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Float32:
        """Return the ITC features of captions: (B, E), float32, each vector of length 1."""
        batches = [
            self.text_features(self.tokenize(texts[i : i + batch_size])).float().cpu().numpy()
            for i in range(0, len(texts), batch_size)
        ]
        empty = np.empty((0, self.embedding_size), np.float32)
        return np.concatenate(batches) if batches else empty

    @torch.inference_mode()
    def image_tokens(self, images: Sequence[ImageLike], batch_size: int = 32) -> Tensor:
        """Return the encoder's tokens of images, for `match`: (N, P, D) on the model's device.

        Raises:
            ImageReadError: an image cannot be decoded.
            ValueError: no image was given.
        """
        if not images:
            raise ValueError("image_tokens needs at least one image")
        parts = []
        for start in range(0, len(images), batch_size):
            pixels = [self.image_transform(image) for image in images[start : start + batch_size]]
            parts.append(self.encode_pixels(torch.from_numpy(np.stack(pixels))))
        return torch.cat(parts)

    @torch.inference_mode()
    def match_pass(
        self,
        image_tokens: Tensor | npt.NDArray[Any],
        text: TokenisedTexts,
        image_of: Int64 | None = None,
        text_of: Int64 | None = None,
    ) -> Float32:
        """Return the ITM logit "these match" of pairs: (B,), float32; see `Reranker.match_pass`."""
        tokens = torch.as_tensor(image_tokens).to(self.device, self.dtype)
        places = (
            None if of is None else torch.from_numpy(of).to(self.device)
            for of in (image_of, text_of)
        )
        batch = TextBatch.of(text).to(self.device)
        logits = self.match_logits(self.normalise_tokens(tokens), batch, *places)
        matches: Float32 = logits[:, MATCH].float().cpu().numpy()
        return matches

    def refresh_fingerprint(self) -> None:
        """Recompute `fingerprint`, 16 hex digits that tell this model's features from another's.

        See `fingerprint.fingerprint`; the configuration without its name is part of it.
        """
        unnamed = replace(self.config, name="")  # the same model by another path is the same
        self.fingerprint = fingerprint(repr(unnamed), self.state_dict())

    def tokenize(self, texts: Sequence[str]) -> TextBatch:
        """Clean and tokenise captions onto the model's device."""
        return TextBatch.of(self.text_transform(texts)).to(self.device)

    # ---- for the losses: tensors in, tensors out ----------------------------------------------

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the encoder's tokens of pixels (N, 3, S, S): (N, P, D), before `ln_vision`."""
        tokens: Tensor = self.image_encoder(pixels.to(self.device, self.dtype))
        return tokens

    def features_from_encoder(self, tokens: Tensor) -> Tensor:
        """Return the ITC features (N, Q, E) of the encoder's tokens (N, P, D)."""
        tokens = self.normalise_tokens(tokens.to(self.device, self.dtype))
        return self.query_pass(tokens).image_features

    def normalise_tokens(self, encoder_tokens: Tensor) -> Tensor:
        """Apply `ln_vision`, and positions where the encoder has none, to (N, P, D)."""
        tokens: Tensor = self.ln_vision(encoder_tokens)
        return tokens if self.image_positions is None else tokens + self.image_positions

    def query_pass(self, image_tokens: Tensor) -> QueryPass:
        """Run the query half over (N, P, D): ITC image features (N, Q, E) and what ITG reuses."""
        out = self.qformer(image_tokens=image_tokens)
        return QueryPass(_normalise(self.vision_proj(out.queries)), out.query_keys_values)

    def text_features(self, text: TextBatch) -> Tensor:
        """Return ITC text features (B, E), from the text's [CLS], seeing nothing but the text."""
        return self.features_from_text(self.text_states(text))

    def text_states(self, text: TextBatch) -> Tensor:
        """Return the states of [CLS] (B, H) that ITC text features are made of."""
        out = self.qformer(token_ids=text.token_ids, mask=uni_modal_mask(0, text.mask))
        states: Tensor = out.text[:, 0]
        return states

    def features_from_text(self, states: Tensor) -> Tensor:
        """Return ITC text features (B, E) of what `text_states` gives."""
        return _normalise(self.text_proj(states))

    def image_keys_values(self, encoder_tokens: Tensor) -> tuple[KeyValue | None, ...]:
        """Return what ITM makes of an image alone: of (N, P, D), keys and values of each layer.

        Each is (N, heads, P, H / heads); None for a layer that does not look at the image.
        """
        tokens = self.normalise_tokens(encoder_tokens.to(self.device, self.dtype))
        return tuple(self.qformer.image_keys_values(tokens))

    def match_logits(
        self,
        image: Tensor | Iterable[KeyValue | None],
        text: TextBatch,
        image_of: Tensor | None = None,
        text_of: Tensor | None = None,
    ) -> Tensor:
        """Return ITM logits (B, 2), averaged over the queries, of pairs of images and text.

        An image is its tokens (B, P, D), behind `ln_vision`, or the `image_keys_values` of them. With
        `image_of` (B,), int64, they are those of N images, and it names each pair's; with `text_of`
        (B,), int64, the same of the texts. What is an image's or a text's alone is computed once.

        Raises:
            CheckpointError: the model was trained by ITC alone, and has no ITM head.
        """
        as_reranker(self)
        mask = bi_directional_mask(self.config.qformer.num_queries, text.mask)
        tokens = isinstance(image, Tensor)
        out = self.qformer(
            image_tokens=image if tokens else None, image_keys_values=None if tokens else image,
            token_ids=text.token_ids, mask=mask,
            image_of=image_of, text_of=text_of, queries_only=True,
        )  # fmt: skip
        head = self.itm_head
        assert head is not None
        with torch.autocast(self.device.type, enabled=False):  # rankings hang on small differences
            logits = F.linear(out.queries.float(), head.weight.float(), head.bias.float())
            return logits.mean(dim=1)

    def caption_hidden(self, text: TextBatch, keys_values: Sequence[KeyValue]) -> Tensor:
        """Return the ITG text states (B, T, H) that `lm_head` turns into next-token logits.

        Args:
            text: captions whose first token is [DEC].
            keys_values: of `query_pass` over the same images; the causal mask lets no text reach
                the queries, so that the pass made for ITC serves here too.
        """
        num_queries = self.config.qformer.num_queries
        mask = multimodal_causal_mask(num_queries, text.mask)[:, :, num_queries:]
        out = self.qformer(token_ids=text.token_ids, mask=mask, past=keys_values)
        hidden: Tensor = out.text
        return hidden


def max_over_queries(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return ITC similarities (N, B) of (N, Q, E) and (B, E): the best query of each image.

    Not divided by the temperature (BLIP-2, section 3.1); in full precision under autocast too,
    because rankings hang on small differences.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        return torch.einsum("nqe,be->nbq", image_features, text_features).amax(dim=-1)


@torch.inference_mode()
def itc_similarities(
    image_features: Tensor, text_features: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return ITC similarities (N, B), of image features (N, Q, E) and text features (B, E)."""
    texts = torch.from_numpy(text_features).to(image_features.device)
    parts = torch.split(image_features, 64)  # bounds the (64, B, Q) products
    return torch.cat([max_over_queries(part, texts) for part in parts]).cpu().numpy()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context in which a model on this device computes in this precision."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def _normalise(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)
