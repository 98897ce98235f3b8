"""Candidates, looked at a second time: the ITM head scores each with the query, and ITM + ITC orders them.

What the index finds by ITC are candidates (`engine`). Of an image's tokens, which ITM needs, the index
may keep a copy (`indexes.token_files`); else the photograph is decoded and encoded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..indexes.base import Float32, search_any
from ..indexes.bounded import index_in_memory
from ..indexes.segments import ImageRecord
from ..indexes.token_files import TokenFiles
from .embedder import Embedder, Reranker, as_reranker
from .errors import ImageReadError

if TYPE_CHECKING:
    from .keys_values import KeptKeysValues

log = logging.getLogger(__name__)

_BATCH = 32  # images encoded at once


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One found image."""

    rank: int  # from 1
    path: str
    score: float  # ITM logit + ITC similarity; the ITC similarity alone without rerank
    itc: float  # cosine, -1 to 1
    itm: float | None  # raw logit of "match"; None without rerank


@dataclass(frozen=True, kw_only=True)
class TextHit:
    """One text that fits an image; the scores are those of `Hit`."""

    rank: int
    text: str
    score: float
    itc: float
    itm: float | None


def hits_by_itc(images: Sequence[ImageRecord], itc: Float32) -> list[Hit]:
    """Return images as they were found, best first, with their ITC similarities (n,)."""
    return [
        Hit(rank=rank, path=image.path, score=float(score), itc=float(score), itm=None)
        for rank, (image, score) in enumerate(zip(images, itc, strict=True), start=1)
    ]


def reranked(
    model: Reranker,
    kept: TokenFiles,
    text: str,
    images: Sequence[ImageRecord],
    itc: Float32,
    keys_values: KeptKeysValues | None = None,
) -> list[Hit]:
    """Return images in the order of ITM + ITC, of equals the one that ITC had first.

    Args:
        model: the model.
        kept: the image tokens that the index keeps.
        text: the query.
        images: n candidates; one whose tokens are not kept and whose file cannot be read is left
            out, with a warning in the log.
        itc: (n,), their similarities.
        keys_values: what the model keeps of earlier candidates, if it does.
    """

    def tokens_of(rows: Sequence[int]) -> dict[int, npt.NDArray[Any]]:
        return _encoder_tokens(model, kept, images, rows)

    if keys_values is None:
        itm = _match_tokens(model, text, tokens_of(range(len(images))))
    else:
        itm = keys_values.match(text, [image.content_hash for image in images], tokens_of)
    rows = sorted(itm)
    if not rows:
        return []
    logits = np.array([itm[row] for row in rows], np.float32)
    scores = logits + itc[rows]
    order = np.argsort(-scores, kind="stable")
    return [
        Hit(
            rank=rank,
            path=images[rows[i]].path,
            score=float(scores[i]),
            itc=float(itc[rows[i]]),
            itm=float(logits[i]),
        )
        for rank, i in enumerate(order, start=1)
    ]


def _match_tokens(
    model: Reranker, text: str, tokens: Mapping[int, npt.NDArray[Any]]
) -> dict[int, float]:
    """Return the ITM logits of a text and images, of tokens (P, D) by the images' places."""
    rows = sorted(tokens)
    if not rows:
        return {}
    itm = model.match(np.stack([tokens[row] for row in rows]), [text] * len(rows))
    return dict(zip(rows, itm.tolist(), strict=True))


def rank_texts(
    model: Embedder, image: Path | Image.Image, texts: Sequence[str], k: int, depth: int
) -> list[TextHit]:
    """Return the k texts that fit an image best; of equals the earlier one.

    Args:
        model: the model.
        image: an image file or a PIL image.
        texts: at least one.
        k: how many.
        depth: how many of the best by ITC are reranked; 0 is none.

    Raises:
        ImageReadError: the image cannot be read.
        CheckpointError: a rerank was asked of a model without an ITM head.
    """
    index = index_in_memory(model.encode_texts(list(texts))[:, None])  # a vector a text
    tokens, features = model.encode(model.image_transform(image)[None], keep_tokens=depth > 0)
    itc, found = search_any(index, features[0], max(k, depth))
    itm, scores = None, itc
    if depth:
        itm = as_reranker(model).match(tokens, [texts[i] for i in found])
        scores = itc + itm
    order = np.argsort(-scores, kind="stable")[:k]
    return [
        TextHit(
            rank=rank,
            text=texts[found[i]],
            score=float(scores[i]),
            itc=float(itc[i]),
            itm=None if itm is None else float(itm[i]),
        )
        for rank, i in enumerate(order, start=1)
    ]


def decoding_threads() -> int:
    """Return how many threads decode: one a processor, but no memory full of large photographs."""
    return min(8, os.cpu_count() or 1)


def _encoder_tokens(
    model: Reranker,
    kept: TokenFiles,
    images: Sequence[ImageRecord],
    places: Sequence[int],
) -> dict[int, npt.NDArray[Any]]:
    """Return the encoder's tokens (P, D) of the images at some places, of those that have any."""

    def look_at(image: ImageRecord) -> tuple[Float32 | None, Float32 | None]:
        """Return its tokens where they are kept, else its pixels."""
        found = kept.read(image.content_hash)
        if found is not None:
            return found, None
        try:
            return None, model.image_transform(image.path)
        except ImageReadError as error:
            log.warning("%s; left out (`blip2-search index` updates the index)", error)
            return None, None

    with ThreadPoolExecutor(decoding_threads()) as pool:  # Pillow lets go of the interpreter's lock
        seen = list(pool.map(look_at, [images[row] for row in places]))
    tokens: dict[int, npt.NDArray[Any]]
    looked = list(zip(places, seen, strict=True))
    tokens = {row: found for row, (found, _) in looked if found is not None}
    rest = [(row, found) for row, (_, found) in looked if found is not None]
    for start in range(0, len(rest), _BATCH):
        rows, pixels = zip(*rest[start : start + _BATCH], strict=True)
        tokens |= zip(rows, model.encode(np.stack(pixels)).tokens, strict=True)
    return tokens
