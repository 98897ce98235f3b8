"""BLIP-2's two steps of retrieval: the best candidates by ITC, put in order by ITM + ITC.

Both directions, image -> text ("tr") and text -> image ("ir"), go the same way: `rank_by_itc` takes
the candidates, `pairs_to_match` collects what ITM has to score, `match_pairs` scores it, and
`Ranking.reranked` tells where the right answers stand then. (Section 4.4; LAVIS's compute_sim_matrix.)

N images, B texts, R queries of a direction, K candidates of each, P image tokens, D their size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..indexes.base import Float16, Float32, Int64
from .embedder import Reranker
from .errors import ScoreError
from .itm_cache import ItmCache
from .metrics import image_ranks, text_ranks
from .progress import OnProgress

Direction = Literal["tr", "ir"]

DIRECTIONS: tuple[Direction, ...] = ("tr", "ir")
MEMORY = 2 << 30  # bytes of image tokens that are held at once
_ROWS = 512  # queries sorted at once
_GROUP = 16  # passes over which pairs are sorted by the length of their captions


@dataclass(frozen=True, eq=False)
class Ranking:
    """The candidates of every query of one direction, and where the right answers stand by ITC."""

    candidates: Int64  # (R, K), texts of an image or images of a text, best first
    itc: Float32  # (R, K), descending
    correct: npt.NDArray[np.bool_]  # (R, K)
    itc_ranks: Int64  # (R,), 0-based rank of the best right answer among all

    def reranked(self, itm: Float32, k: int) -> Int64:
        """Return the ranks (R,) when the first k candidates are ordered by ITM + ITC.

        What is not among the first k stays behind them, in the order of ITC. Ties count against us.

        Args:
            itm: (R, K), ITM logits of the candidates; raw, no softmax.
            k: 0 is ITC alone, and more than K is K.
        """
        if k == 0:
            return self.itc_ranks
        scores, correct = (self.itc + itm)[:, :k], self.correct[:, :k]
        best = np.where(correct, scores, -np.inf).max(axis=1)
        ranks = ((scores >= best[:, None]) & ~correct).sum(axis=1)
        return np.where(correct.any(axis=1), ranks, self.itc_ranks)


def rank_by_itc(
    itc: Float32, owner: Int64, k: int, directions: Sequence[Direction] = DIRECTIONS
) -> dict[Direction, Ranking]:
    """Return the best k of every query by ITC; of equals, the lower number first.

    Args:
        itc: (N, B), similarities, not divided by the temperature.
        owner: (B,), the image of each text; every image has at least one.
        k: candidates a query; more than there are gives all.
        directions: those wanted.

    Raises:
        ScoreError: a similarity is no number.
    """
    check_finite(itc, "ITC similarities")
    found = {}
    for direction in directions:
        scores = itc if direction == "tr" else itc.T
        candidates = _best(scores, k)
        if direction == "tr":
            correct = owner[candidates] == np.arange(len(itc))[:, None]
            ranks = text_ranks(itc, owner)
        else:
            correct, ranks = candidates == owner[:, None], image_ranks(itc, owner)
        found[direction] = Ranking(
            candidates, np.take_along_axis(scores, candidates, axis=1), correct, ranks
        )
    return found


def _best(scores: Float32, k: int) -> Int64:
    """Return the numbers (R, K) of the k greatest of each row (R, C), descending."""
    parts = [
        # A copy: the slice alone would keep all of the order in memory.
        np.argsort(-scores[start : start + _ROWS], axis=1, kind="stable")[:, :k].copy()
        for start in range(0, len(scores), _ROWS)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Image and text of every pair that ITM has to score, each pair once, sorted by image."""

    images: Int64  # (M,)
    texts: Int64  # (M,)
    positions: dict[Direction, Int64]  # (R, K): the pair of each query and candidate

    def __len__(self) -> int:
        """M."""
        return len(self.images)


def pairs_to_match(rankings: Mapping[Direction, Ranking], num_texts: int) -> Pairs:
    """Return the pairs of all candidates; what both directions ask for is there once."""
    ids = []
    for direction, ranking in rankings.items():
        queries = np.arange(len(ranking.candidates))[:, None]
        image_to_text = direction == "tr"
        images, texts = (
            (queries, ranking.candidates) if image_to_text else (ranking.candidates, queries)
        )
        ids.append(images * num_texts + texts)
    unique, inverse = np.unique(np.concatenate([x.ravel() for x in ids]), return_inverse=True)
    parts = np.split(inverse.ravel(), np.cumsum([x.size for x in ids])[:-1])
    positions = {
        direction: part.reshape(x.shape)
        for direction, part, x in zip(rankings, parts, ids, strict=True)
    }
    return Pairs(unique // num_texts, unique % num_texts, positions)


def match_pairs(
    model: Reranker,
    encoder_tokens: Sequence[Float16],
    captions: Sequence[str],
    pairs: Pairs,
    *,
    memory: int = MEMORY,
    cache: ItmCache | None = None,
    on_progress: OnProgress | None = None,
) -> Float32:
    """Return the ITM logit "these match" of every pair (M,), raw, no softmax.

    A few images at a time: of their pairs, those with captions of like length make a pass together, to
    waste no padding, and what is an image's alone is computed once a pass.

    Args:
        model: the model.
        encoder_tokens: N of (P, D), before `ln_vision`; may lie on disk.
        captions: B.
        pairs: what to score.
        memory: bytes of image tokens that pairs are sorted over; one image's in any case.
        cache: logits of earlier runs over the same images and captions; the others are added.
        on_progress: called with (pairs scored, pairs to score).

    Raises:
        ScoreError: a logit is no number.
    """
    scores = np.full(len(pairs), np.nan, np.float32)
    if cache is not None:
        scores = cache.known(pairs.images, pairs.texts)
    missing = np.flatnonzero(np.isnan(scores))
    text = model.text_transform(captions)
    lengths, size = text.mask.sum(axis=1), model.pairs_at_once
    done = len(pairs) - len(missing)
    for group in _image_groups(pairs.images[missing], _GROUP * size, encoder_tokens, memory):
        start = time.perf_counter()
        rows = missing[group]
        rows = rows[np.argsort(lengths[pairs.texts[rows]], kind="stable")]
        for batch in np.split(rows, range(size, len(rows), size)):
            images, places = np.unique(pairs.images[batch], return_inverse=True)
            tokens = np.stack([encoder_tokens[image] for image in images])
            texts = text.select(pairs.texts[batch])
            scores[batch] = model.match_pass(tokens, texts, places.ravel())
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(pairs))
        check_finite(scores[rows], "ITM logits")
        if cache is not None:
            seconds = time.perf_counter() - start
            cache.add(pairs.images[rows], pairs.texts[rows], scores[rows], seconds)
    return scores


def check_finite(scores: Float32, what: str) -> None:
    """Make sure that scores can be ranked.

    Raises:
        ScoreError: one is no number, or infinite.
    """
    if not np.isfinite(scores).all():
        raise ScoreError(f"some {what} are no numbers: a higher precision, as fp32, may help")


def _image_groups(
    images: Int64, size: int, encoder_tokens: Sequence[Float16], memory: int
) -> Iterator[slice]:
    """Give slices of pairs (M,), sorted by image: whole images that fit into memory together.

    A slice ends with the image that fills `size` pairs.
    """
    if not len(images):
        return
    starts = np.flatnonzero(np.diff(images, prepend=-1))  # the first pair of each image
    most = max(1, memory // encoder_tokens[0].nbytes)  # images
    first = 0
    while first < len(starts):
        last = np.searchsorted(starts, starts[first] + size)
        last = min(max(last, first + 1), first + most, len(starts))
        yield slice(starts[first], starts[last] if last < len(starts) else len(images))
        first = last
