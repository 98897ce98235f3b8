"""Validation in training: ITC recall on held-out images, and whether the queries earn their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .data import CaptionedImage, captions_and_owners
from .feature_cache import TokenCache
from .metrics import recall_table
from .model import Precision, RetrievalModel, autocast, itc_similarities

IMAGES_A_BATCH = 64


class Validator:
    """Computes the recall of a model on the same held-out images each time."""

    def __init__(
        self,
        data: Sequence[CaptionedImage],
        cache: TokenCache | None = None,
        precision: Precision = "fp32",
    ) -> None:
        """Take the images, and where the encoder is frozen the tokens of their one view, row by row."""
        self._data = data
        self._captions, self._owner = captions_and_owners(self._data)
        self._cache = cache
        self._precision = precision

    def __call__(self, model: RetrievalModel) -> dict[str, float]:
        """Return {"tr@1": ..., "ir@10": ..., "mean_recall", "query_cosine", "queries_used"}.

        `mean_recall` is the mean of the six recalls, percent; for the rest see the functions below.
        """
        with torch.inference_mode(), autocast(model.device, self._precision):
            parts = [
                model.query_pass(model.normalise_tokens(self._encoder_tokens(model, start)))
                for start in range(0, len(self._data), IMAGES_A_BATCH)
            ]
            texts = model.encode_texts(self._captions)
        features = torch.cat([part.image_features for part in parts])
        scores = itc_similarities(features, texts)
        table = recall_table(scores, self._owner)
        queries = features.cpu().numpy()
        return {
            **table,
            "mean_recall": float(np.mean(list(table.values()))),
            "query_cosine": mean_query_cosine(queries),
            "queries_used": queries_used(queries[self._owner], texts),
        }

    def _encoder_tokens(self, model: RetrievalModel, start: int) -> Tensor:
        stop = start + IMAGES_A_BATCH
        if self._cache is not None:
            views = np.stack([views[0] for views in self._cache.tokens[start:stop]])
            return torch.from_numpy(views).to(model.device, model.dtype)
        pixels = np.stack([model.image_transform(image.path) for image in self._data[start:stop]])
        tokens: Tensor = model.image_encoder(torch.from_numpy(pixels).to(model.device, model.dtype))
        return tokens


def mean_query_cosine(image_features: npt.NDArray[np.float32]) -> float:
    """Return how alike an image's query vectors (N, Q, E) are: mean cosine of two different ones.

    1 says that the Q queries of an image are one vector and do the work of one.
    """
    queries = image_features.shape[1]
    if queries == 1:
        return 1.0
    total = float(np.mean(np.square(image_features.sum(axis=1)).sum(axis=-1)))
    return float((total / queries - 1) / (queries - 1))


def queries_used(
    image_features: npt.NDArray[np.float32], text_features: npt.NDArray[np.float32]
) -> float:
    """Return how many queries win the max over queries, effectively: exp of the entropy of winners.

    Args:
        image_features: (B, Q, E), of the image of each text.
        text_features: (B, E).
    """
    winners = np.einsum("bqe,be->bq", image_features, text_features).argmax(axis=1)
    counts = np.bincount(winners)
    shares = counts[counts > 0] / len(winners)
    return float(np.exp(-np.sum(shares * np.log(shares))))
