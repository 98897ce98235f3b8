"""BLIP-2's retrieval protocol: recall by ITC alone, and with the best candidates reranked by ITM.

ITC similarity is the max over queries, without temperature. The best k candidates of each query, in
each direction, are scored by ITM logit + ITC (BLIP-2, section 4.4).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .feature_cache import OnProgress
from .metrics import recall_table
from .model import Precision, RetrievalModel, autocast, image_features, itc_similarities
from .validation import mean_query_cosine

Scores = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
CHUNK = 512  # pairs whose image tokens are gathered at once


def candidates(itc: Scores, k: int) -> tuple[Int64, Int64]:
    """Return (image, text) numbers of every pair to rerank: each text's best k images and back.

    Args:
        itc: (N images, B texts).
        k: candidates a query; more than there are means all.
    """
    best_images = np.argsort(-itc, axis=0, kind="stable")[:k]  # (k, B)
    best_texts = np.argsort(-itc, axis=1, kind="stable")[:, :k]  # (N, k)
    wanted = np.zeros(itc.shape, bool)
    np.put_along_axis(wanted, best_images, True, axis=0)
    np.put_along_axis(wanted, best_texts, True, axis=1)
    images, texts = np.nonzero(wanted)
    return images, texts


def match_all(
    model: RetrievalModel,
    image_tokens: torch.Tensor,
    captions: Sequence[str],
    pairs: tuple[Int64, Int64],
    on_progress: OnProgress | None = None,
) -> Scores:
    """Return the ITM logit of every pair; pairs of like length go together, to waste no padding."""
    images, texts = pairs
    lengths = model.tokenize(captions).mask.sum(dim=1).cpu().numpy()
    order = np.argsort(lengths[texts], kind="stable")
    scores = np.empty(len(order), np.float32)
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        tokens = image_tokens[torch.from_numpy(images[rows])]
        scores[rows] = model.match(tokens, [captions[text] for text in texts[rows]])
        if on_progress is not None:
            on_progress(min(start + CHUNK, len(order)), len(order))
    return scores


def reranked(itc: Scores, itm: Scores, pairs: tuple[Int64, Int64], k: int, axis: int) -> Scores:
    """Return ITM + ITC for the best k along an axis (0: images of a text), -inf for the rest."""
    full = np.full(itc.shape, -np.inf, np.float32)
    full[pairs] = itm + itc[pairs]
    best = np.take(
        np.argsort(-itc, axis=axis, kind="stable"), np.arange(min(k, itc.shape[axis])), axis
    )
    kept = np.full(itc.shape, -np.inf, np.float32)
    np.put_along_axis(kept, best, np.take_along_axis(full, best, axis), axis)
    return kept


def rerank_table(
    itc: Scores, itm: Scores, pairs: tuple[Int64, Int64], k: int, owner: Int64
) -> dict[str, float]:
    """Return the recall of ITM + ITC over the best k of each query, in each direction."""
    by_text = recall_table(reranked(itc, itm, pairs, k, axis=0), owner)
    by_image = recall_table(reranked(itc, itm, pairs, k, axis=1), owner)
    return {name: (by_image if name.startswith("tr") else by_text)[name] for name in by_text}


def evaluate(
    model: RetrievalModel,
    paths: Sequence[Path],
    captions: Sequence[str],
    owner: Int64,
    k: int,
    precision: Precision = "fp32",
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Return {"itc": {"tr@1": ...}, "itc+itm": {...}, "seconds": {...}}.

    Args:
        model: the model.
        paths: N images.
        captions: B captions.
        owner: (B,), the image of each caption.
        k: candidates to rerank; 0 is ITC alone.
        precision: of the rerank; ITC is computed in full.
        on_progress: called with the pairs that are reranked, and how many there are.
    """
    start = time.perf_counter()
    tokens = model.image_tokens(paths)
    features = image_features(model, tokens)
    itc = itc_similarities(features, model.encode_texts(captions))
    report: dict[str, Any] = {
        "itc": recall_table(itc, owner),
        "mean_query_cosine": mean_query_cosine(features.cpu().numpy()),
    }
    report["seconds"] = {"itc": time.perf_counter() - start}
    if k:
        start = time.perf_counter()
        pairs = candidates(itc, k)
        with autocast(model.device, precision):
            itm = match_all(model, tokens, captions, pairs, on_progress)
        report["itc+itm"] = rerank_table(itc, itm, pairs, k, owner)
        report["seconds"]["rerank"] = time.perf_counter() - start
    return report
