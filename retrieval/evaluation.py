"""BLIP-2's retrieval protocol, whole: recall by ITC alone, and with the best candidates reranked.

ITC similarity is the max over queries, without temperature. The best k candidates of each query, in
each direction, are scored by ITM logit + ITC (BLIP-2, section 4.4); `reranking.py` has the steps.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .data import CaptionedImage, captions_and_owners
from .embedder import Embedder, Float32
from .engine import SearchEngine
from .errors import DatasetError
from .feature_cache import TokenCache, cached_features, encoder_tokens
from .metrics import bootstrap_intervals, rank_statistics
from .model import Precision, RetrievalModel, autocast, itc_similarities, with_itm_head
from .recipe import DataConfig
from .report import Depth, RetrievalReport
from .reranking import (
    DIRECTIONS,
    MEMORY,
    Direction,
    Int64,
    OnProgress,
    Ranking,
    match_pairs,
    pairs_to_match,
    rank_by_itc,
)
from .validation import mean_query_cosine

Prepare = Callable[[str], OnProgress]  # announces a piece of work, and gives its progress callback

DEFAULT_RERANK = 128  # candidates a query, as published
_TEXTS = 256  # captions a pass


@dataclass
class _Clock:
    """Wall time of the stages."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def evaluate(
    model: Embedder,
    dataset: Sequence[CaptionedImage],
    *,
    rerank: int | None = None,
    sweep: Sequence[int] = (),
    directions: Sequence[Direction] = DIRECTIONS,
    precision: Precision = "fp32",
    memory: int = MEMORY,
    cache: Path | None = None,
    index: str | os.PathLike[str] | None = None,
    prepare: Prepare | None = None,
) -> RetrievalReport:
    """Measure retrieval on captioned images.

    Args:
        model: of `load_embedder`.
        dataset: images with their captions, of one split; images that cannot be read are left out
            with their captions, and reported.
        rerank: candidates a query that ITM scores; None is 128, and 0 for a dual encoder.
        sweep: further depths of rerank to report.
        directions: "tr" (image -> text), "ir" (text -> image), or both.
        precision: of the rerank; ITC is computed in the model's own.
        memory: bytes of image tokens that are held at once. All of them are kept in fp16 on disk.
        cache: the folder of encoded images, with which a killed evaluation goes on and another depth
            costs no encoding; None is a temporary one.
        index: the folder of a `SearchEngine`'s index: text queries then go through it, and images
            are compared as it has stored them. Made, or brought up to date, if need be.
        prepare: called with the name of a long piece of work, gives its progress callback.

    Raises:
        CheckpointError: a rerank was asked of a dual encoder.
        DatasetError: no image can be read, or the index holds other images as well.
        ModelMismatchError: the index was made by another model.
        TokenOverflowError: image tokens do not fit into float16.
    """
    if rerank is None:
        rerank = DEFAULT_RERANK if isinstance(model, RetrievalModel) else 0
    depth = max(rerank, *sweep, 0)
    if depth:
        with_itm_head(model)
    announce = prepare or (lambda _: lambda done, total: None)
    clock = _Clock()
    with ExitStack() as stack:
        if cache is None:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with clock("images"):
            tokens = _encode(model, dataset, cache, announce)
            features = cached_features(model, tokens.images)
        kept = [dataset[row] for row in tokens.rows]
        captions, owner = captions_and_owners(kept)
        with clock("texts"):
            texts = _encode_texts(model, captions, announce("Encoding texts"))
        with clock("itc"):
            if index is None:
                itc = itc_similarities(torch.from_numpy(features).to(model.device), texts)
                rankings = rank_by_itc(itc, owner, max(depth, 1), directions)
            else:
                rankings = _rank_through_index(
                    SearchEngine(index, model), kept, captions, texts, owner, depth, directions, announce
                )  # fmt: skip
        logits: dict[Direction, Float32] = {}
        if depth:
            with clock("rerank"):
                pairs = pairs_to_match(rankings, len(captions))
                with autocast(model.device, precision):
                    itm = match_pairs(
                        with_itm_head(model), tokens.images, captions, pairs,
                        memory=memory, on_progress=announce("Reranking pairs"),
                    )  # fmt: skip
            logits = {direction: itm[rows] for direction, rows in pairs.positions.items()}

    def ranks_at(k: int) -> dict[str, Int64]:
        return {
            direction: ranking.reranked(logits[direction], k) if k else ranking.itc_ranks
            for direction, ranking in rankings.items()
        }

    rates = {"texts": len(captions) / clock.seconds["texts"]}
    if tokens.computed:
        rates["images"] = tokens.computed / clock.seconds["images"]
    if depth:
        rates["pairs"] = len(pairs) / clock.seconds["rerank"]
    reported = {"itc": ranks_at(0)} | ({"itc+itm": ranks_at(rerank)} if rerank else {})
    return RetrievalReport(
        model=model.name,
        fingerprint=model.fingerprint,
        images=len(kept),
        captions=len(captions),
        rerank=rerank,
        precision=precision,
        candidates="dense" if index is None else "index",
        mean_query_cosine=mean_query_cosine(features),
        tables={name: rank_statistics(ranks) for name, ranks in reported.items()},
        intervals={name: bootstrap_intervals(ranks, owner) for name, ranks in reported.items()},
        seconds=clock.seconds,
        rates=rates,
        skipped=tuple(tokens.skipped),
        sweep={
            k: Depth(
                table=rank_statistics(ranks_at(k)),
                seconds_per_query=min(k, len(kept)) / rates["pairs"] if k else 0.0,
            )
            for k in sorted(set(sweep))
        },
    )


def _encode(
    model: Embedder, dataset: Sequence[CaptionedImage], cache: Path, announce: Prepare
) -> TokenCache:
    paths = [image.path for image in dataset]
    tokens = encoder_tokens(
        model, paths, cache, DataConfig(augment=False), on_progress=announce("Encoding images")
    )
    if not tokens.rows:
        reason = tokens.skipped[0] if tokens.skipped else "there is none"
        raise DatasetError(f"no image can be evaluated: {reason}")
    return tokens


def _encode_texts(model: Embedder, captions: Sequence[str], on_progress: OnProgress) -> Float32:
    """Return the vectors of captions (B, E); those of like length go together, to waste no padding."""
    order = np.argsort([len(caption) for caption in captions], kind="stable")
    texts = np.empty((len(captions), model.embedding_size), np.float32)
    for start in range(0, len(order), _TEXTS):
        rows = order[start : start + _TEXTS]
        texts[rows] = model.encode_texts([captions[row] for row in rows])
        on_progress(start + len(rows), len(order))
    return texts


def _rank_through_index(
    engine: SearchEngine,
    images: Sequence[CaptionedImage],
    captions: Sequence[str],
    texts: Float32,
    owner: Int64,
    depth: int,
    directions: Sequence[Direction],
    announce: Prepare,
) -> dict[Direction, Ranking]:
    """Rank by what an index answers (ir), and by the vectors as it has stored them (tr)."""
    paths = [os.path.abspath(image.path) for image in images]
    engine.add(paths, on_progress=announce("Indexing images"))
    number = {path: i for i, path in enumerate(paths)}
    stored, features = engine.features()
    if set(stored) != set(number):
        raise DatasetError(
            f"the index in {engine.path} holds other images than this dataset: "
            "name an empty folder, and it will be made there"
        )
    rankings: dict[Direction, Ranking] = {}
    if "tr" in directions:
        order = np.argsort([number[path] for path in stored])
        own = torch.from_numpy(features[order].astype(np.float32))
        itc = itc_similarities(own, texts)
        rankings |= rank_by_itc(itc, owner, max(depth, 1), ["tr"])
    if "ir" in directions:
        # Deep enough for the median of any useful ranking; an image that comes later is not found.
        k = min(len(images), max(depth, DEFAULT_RERANK))
        hits = engine.search_many(captions, k)
        found = np.array([[number[hit.path] for hit in row] for row in hits], np.int64)
        scores = np.array([[hit.itc for hit in row] for row in hits], np.float32)
        rankings["ir"] = _found_by_index(found, scores, owner, len(images), depth)
    return rankings


def _found_by_index(
    found: Int64, scores: Float32, owner: Int64, num_images: int, depth: int
) -> Ranking:
    correct: npt.NDArray[np.bool_] = found == owner[:, None]
    own = np.where(correct, scores, np.inf).min(axis=1)
    ranks = ((scores >= own[:, None]) & ~correct).sum(axis=1)
    ranks = np.where(correct.any(axis=1), ranks, num_images - 1)
    k = max(depth, 1)
    return Ranking(found[:, :k], scores[:, :k], correct[:, :k], ranks)
