"""BLIP-2's retrieval protocol, whole: recall by ITC alone, and with the best candidates reranked.

ITC similarity is the max over queries, without temperature. The best k candidates of each query, in
each direction, are scored by ITM logit + ITC (BLIP-2, section 4.4); `reranking.py` has the steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..indexes.base import Float16, Float32, Int64
from .data import CaptionedImage, captions_and_owners
from .embedder import TensorEmbedder, as_reranker
from .engine import SearchEngine
from .errors import BackendError, DatasetError, DeviceMemoryError
from .feature_cache import cached_features, plain_tokens
from .itm_cache import ItmCache, itm_cache_name
from .metrics import bootstrap_intervals, rank_statistics
from .model import Precision, autocast, itc_similarities
from .onnx_model import OnnxModel
from .progress import Prepare
from .report import Depth, RetrievalReport
from .reranking import (
    DIRECTIONS,
    MEMORY,
    Direction,
    Ranking,
    match_pairs,
    pairs_to_match,
    rank_by_itc,
)
from .validation import mean_query_cosine

DEFAULT_RERANK = 128  # candidates a query, as published
_TEXTS = 256  # captions a pass
_TIMED_IMAGES = 32  # encoded once more for the time of a query in a sweep


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
    model: TensorEmbedder,
    dataset: Sequence[CaptionedImage],
    *,
    rerank: int | None = None,
    sweep: Sequence[int] = (),
    directions: Sequence[Direction] = DIRECTIONS,
    precision: Precision | None = None,
    memory: int = MEMORY,
    cache: Path | None = None,
    index: str | os.PathLike[str] | None = None,
    prepare: Prepare | None = None,
) -> RetrievalReport:
    """Measure retrieval on captioned images.

    Args:
        model: of `load_embedder` or `open_embedder`.
        dataset: images with their captions, of one split; images that cannot be read are left out
            with their captions, and reported.
        rerank: candidates a query that ITM scores; None is 128, and 0 without an ITM head.
        sweep: further depths of rerank to report.
        directions: "tr" (image -> text), "ir" (text -> image), or both.
        precision: of the encoder and of ITM, by autocast; what ITC compares is computed in the
            model's own. None is fp16 on a GPU and fp32 elsewhere.
        memory: bytes of image tokens that are held at once. All of them are kept in fp16 on disk.
        cache: the folder of encoded images and scored pairs, with which a killed evaluation goes on
            and another depth costs only what is new; None is a temporary one.
        index: the folder of a `SearchEngine`'s index: text queries then go through it, and images
            are compared as it has stored them. Made, or completed, if need be.
        prepare: called with the name of a long piece of work, gives its progress callback.

    Raises:
        CheckpointError: a rerank was asked of a model without an ITM head.
        DatasetError: no image can be read, or the index holds other images as well.
        DeviceMemoryError: a batch does not fit into the GPU's memory.
        ModelMismatchError: the index was made by another model.
        BackendError: another precision than fp32 was asked of ONNX Runtime.
        ScoreError: a score is no number.
        TokenOverflowError: image tokens do not fit into float16.
    """
    if rerank is None:
        rerank = DEFAULT_RERANK if model.reranks else 0
    depth = max(rerank, *sweep, 0)
    if depth:
        as_reranker(model)
    if precision is None:
        precision = "fp16" if model.device.type == "cuda" else "fp32"
    if precision != "fp32" and isinstance(model, OnnxModel):
        raise BackendError(f"ONNX Runtime computes in fp32, not in {precision}: --backend torch")
    try:
        return _Evaluation(
            model, rerank, sorted(set(sweep)), depth, directions, precision, memory,
            prepare or (lambda _: lambda done, total: None),
        ).run(dataset, cache, index)  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            "the evaluation does not fit into the GPU's memory: a smaller --memory or "
            "--device cpu may help; what was encoded is kept"
        ) from error


@dataclass(frozen=True)
class _AsKept(Sequence[Float16]):
    """Image tokens as an index keeps them, or as encoded where it does not: what a query reranks by."""

    read: Callable[[int], Float32 | None]
    encoded: Sequence[Float16]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: Any) -> Any:
        found = self.read(row)
        return self.encoded[row] if found is None else found.astype(np.float16)


@dataclass
class _Evaluation:
    """One evaluation; the fields are `evaluate`'s arguments, made definite."""

    model: TensorEmbedder
    rerank: int
    sweep: Sequence[int]
    depth: int
    directions: Sequence[Direction]
    precision: Precision
    memory: int
    announce: Prepare
    clock: _Clock = field(default_factory=_Clock)
    rates: dict[str, float] = field(default_factory=dict)

    def run(
        self,
        dataset: Sequence[CaptionedImage],
        cache: Path | None,
        index: str | os.PathLike[str] | None,
    ) -> RetrievalReport:
        model, clock = self.model, self.clock
        start = time.perf_counter()
        with plain_tokens(
            model,
            [image.path for image in dataset],
            cache,
            self.precision,
            self.announce("Encoding images"),
        ) as tokens:
            clock.seconds["images"] = time.perf_counter() - start
            images = [dataset[row] for row in tokens.rows]
            captions, owner = captions_and_owners(images)
            with clock("features"):
                features = cached_features(model, tokens.images)
            with clock("texts"):
                texts = self._encode_texts(captions)
            image_tokens: Sequence[Float16] = tokens.images
            kept = "none"
            if index is None:
                with clock("itc"):
                    itc = itc_similarities(torch.from_numpy(features).to(model.device), texts)
                    rankings = rank_by_itc(itc, owner, max(self.depth, 1), self.directions)
            else:
                engine = SearchEngine(index, model)
                rankings = self._rank_through(engine, images, texts, owner)
                kept, read = engine.kept_tokens([os.path.abspath(image.path) for image in images])
                image_tokens = _AsKept(read, tokens.images)
            folder = tokens.folder / itm_cache_name(model, captions, f"{self.precision} {kept}")
            logits = self._match(image_tokens, captions, rankings, folder) if self.depth else {}

        def ranks_at(k: int) -> dict[str, Int64]:
            return {
                direction: ranking.reranked(logits[direction], k) if k else ranking.itc_ranks
                for direction, ranking in rankings.items()
            }

        rates = self.rates | {"texts": len(captions) / clock.seconds["texts"]}
        if tokens.computed:
            rates["images"] = tokens.computed / clock.seconds["images"]
        reported = {"itc": ranks_at(0)}
        if self.rerank:
            reported["itc+itm"] = ranks_at(self.rerank)
        itm = 1 / rates["pairs"] if self.depth else 0.0
        encoding = self._seconds_an_image(images) if any(self.sweep) else 0.0
        half = model.dtype in (torch.float16, torch.bfloat16)
        return RetrievalReport(
            model=model.name,
            fingerprint=model.fingerprint,
            images=len(images),
            captions=len(captions),
            rerank=self.rerank,
            precision=str(model.dtype).removeprefix("torch.") if half else self.precision,
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
                    itm_seconds=min(k, len(images)) * itm,
                    seconds=min(k, len(images)) * (itm + encoding),
                )
                for k in self.sweep
            },
        )

    def _encode_texts(self, captions: Sequence[str]) -> Float32:
        """Return the vectors of captions (B, E); those of like length go together."""
        on_progress = self.announce("Encoding texts")
        order = np.argsort([len(caption) for caption in captions], kind="stable")
        texts = np.empty((len(captions), self.model.embedding_size), np.float32)
        for start in range(0, len(order), _TEXTS):
            rows = order[start : start + _TEXTS]
            texts[rows] = self.model.encode_texts([captions[row] for row in rows])
            on_progress(start + len(rows), len(order))
        return texts

    def _match(
        self,
        image_tokens: Sequence[Float16],
        captions: Sequence[str],
        rankings: dict[Direction, Ranking],
        folder: Path,
    ) -> dict[Direction, Float32]:
        """Return the ITM logits (R, K) of the candidates of each direction."""
        model = as_reranker(self.model)
        pairs = pairs_to_match(rankings, len(captions))
        with (
            self.clock("rerank"),
            autocast(self.model.device, self.precision),
            ItmCache(folder) as cache,
        ):
            itm = match_pairs(
                model, image_tokens, captions, pairs,
                memory=self.memory, cache=cache, on_progress=self.announce("Reranking pairs"),
            )  # fmt: skip
        self.rates["pairs"] = cache.pairs / cache.seconds
        return {direction: itm[places] for direction, places in pairs.positions.items()}

    def _seconds_an_image(self, images: Sequence[CaptionedImage]) -> float:
        """Return what decoding and encoding a candidate takes: a query does it, the evaluation not."""
        paths = [image.path for image in images[:_TIMED_IMAGES]]
        for part in (paths[:1], paths):  # the first may be the model's first work, which is slower
            start = time.perf_counter()
            with torch.inference_mode(), autocast(self.model.device, self.precision):
                pixels = np.stack([self.model.image_transform(path) for path in part])
                self.model.encode_pixels(torch.from_numpy(pixels)).cpu()
        return (time.perf_counter() - start) / len(paths)

    def _rank_through(
        self,
        engine: SearchEngine,
        images: Sequence[CaptionedImage],
        texts: Float32,
        owner: Int64,
    ) -> dict[Direction, Ranking]:
        """Rank by what an index answers (ir), and by the vectors as it has stored them (tr)."""
        paths = [os.path.abspath(image.path) for image in images]
        if set(engine.paths()) - set(paths):
            raise DatasetError(
                f"the index in {engine.path} holds other images than this dataset: "
                "name an empty folder, and it will be made there"
            )
        with self.clock("index"):
            if engine.add(paths, on_progress=self.announce("Indexing images")).interrupted:
                raise KeyboardInterrupt
        number = {path: row for row, path in enumerate(engine.paths())}
        rows = np.array([number[path] for path in paths], np.int64)  # of the index
        k = max(self.depth, 1)
        rankings: dict[Direction, Ranking] = {}
        with self.clock("itc"):
            if "tr" in self.directions:
                stored = torch.from_numpy(engine.features()[rows].astype(np.float32))
                rankings |= rank_by_itc(itc_similarities(stored, texts), owner, k, ["tr"])
            if "ir" in self.directions:
                image_of = np.zeros(len(number), np.int64)
                image_of[rows] = np.arange(len(rows))
                rankings["ir"] = _rank_by_index(engine, texts, rows[owner], image_of, k)
        return rankings


def _rank_by_index(
    engine: SearchEngine, texts: Float32, own: Int64, image_of: Int64, k: int
) -> Ranking:
    """Rank the images of each text as an index finds them.

    Where the right one is not among the first, the index is asked for all; one that it does not give
    then either comes last.

    Args:
        engine: of the index.
        texts: (B, E).
        own: (B,), the index's number of each text's image.
        image_of: (N,), the dataset's number of each of the index's images.
        k: candidates to keep.
    """
    num_images = len(image_of)
    found = engine.search_vectors(texts, min(num_images, max(k, DEFAULT_RERANK)))
    candidates, scores = found.images[:, :k], found.scores[:, :k]
    ranks = _ranks_in(found.images, found.scores, own, num_images)
    missed = np.flatnonzero(ranks == num_images)
    if len(missed):
        every = engine.search_vectors(texts[missed], num_images)
        ranks[missed] = _ranks_in(every.images, every.scores, own[missed], num_images)
    return Ranking(
        image_of[candidates],
        scores,
        candidates == own[:, None],
        np.minimum(ranks, num_images - 1),
    )


def _ranks_in(images: Int64, scores: Float32, own: Int64, missing: int) -> Int64:
    """Return the rank of each row's own image, ties against us, or `missing`."""
    correct = images == own[:, None]
    best = np.where(correct, scores, np.inf).min(axis=1)
    ranks = ((scores >= best[:, None]) & ~correct).sum(axis=1)
    return np.where(correct.any(axis=1), ranks, missing)
