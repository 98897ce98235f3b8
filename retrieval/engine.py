"""The search engine: a folder of photographs in, ranked hits out.

A query is compared with the 32 vectors of every image (ITC, max over queries); the best candidates
are then scored by the ITM head (`candidates`). Final score = ITM logit + ITC similarity, as published.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..indexes.base import Float32, SearchResult, VectorIndex, search_any
from ..indexes.errors import (
    ModelMismatchError,
    StoreCorruptError,
    StoreError,
    StoreMissingError,
    VectorIndexError,
)
from ..indexes.manifest import Kind, RerankFeatures, Settings
from ..indexes.recall import Measured
from ..indexes.store import SCHEMA_VERSION, Damage, ImageRecord, Manifest, Store
from ..indexes.stored import StoredIndex, check_memory
from ..indexes.token_files import TokenFiles
from .backends import Backend, open_embedder
from .candidates import Hit, TextHit, decoding_threads, hits_by_itc, rank_texts, reranked
from .embedder import Embedder, Reranker, as_reranker
from .errors import BackendError, CheckpointError
from .indexer import Indexer, IndexReport, Plan, SkippedFile, check_roots, make_plan
from .names import DEFAULT_MODEL
from .onnx_model import OnnxModel
from .progress import OnProgress
from .prompts import PROMPTS

if TYPE_CHECKING:
    from .keys_values import KeptKeysValues

__all__ = ["Hit", "IndexInfo", "IndexReport", "SearchEngine", "SkippedFile", "TextHit"]

log = logging.getLogger(__name__)

# With `mini` R@1 has reached its height at 8 candidates (the sweep in README.md, docs/rerank-sweep.png),
# and each costs a query on two processor cores 9 ms, and 43 more where the index keeps no image tokens.
# Published models gain from more: ask for them.
DEFAULT_RERANK = 10
_GPU_KEYS_VALUES = 2_000_000_000  # bytes, of candidates: 420 images of the published size in fp16
_TOLERATED = 0.2  # share of removed rows that a segment may drag along before it is rewritten


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What an index holds."""

    path: str
    images: int
    vectors_per_image: int
    embedding_size: int
    model_name: str
    model_fingerprint: str
    schema_version: int
    size_on_disk: int  # bytes, without image tokens
    kind: str  # of the index, as asked for: auto, exact or compact
    memory: int  # bytes that a query may go through
    rerank_features: (
        str  # how image tokens are kept beside it: none, int8, fp16; auto: not known yet
    )
    search_bytes: int | None  # that every query goes through; None where shortcuts are missing
    recall: (
        Measured | None
    )  # of a compact index; it is exact where this is None or finds too little
    needs_measuring: bool  # to become compact, or because it has changed much
    preprocessing: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Opened:
    """An index, and the state of the store that it was opened from."""

    index: VectorIndex
    store: Store
    revision: object


class SearchEngine:
    """Index photographs and search them.

    >>> engine = SearchEngine("index")                                        # doctest: +SKIP
    >>> engine.add(["photos"]).added                                          # doctest: +SKIP
    1200
    >>> engine.search("a clock tower", k=1)[0].path                           # doctest: +SKIP
    '/home/ada/photos/prague.jpg'
    """

    def __init__(
        self,
        index_path: str | os.PathLike[str],
        model: str | Embedder | None = None,
        *,
        device: str = "auto",
        backend: Backend = "auto",
        search_device: str | None = None,
        keys_values_memory: int | None = None,
    ) -> None:
        """Name an index; nothing is read or loaded before it is needed.

        Args:
            index_path: the folder of the index; `add` makes it.
            model: a model or what `load_embedder` takes. None is the model that made the index, and
                `mini` for a new one.
            device: where to load the model.
            backend: what computes; see `open_embedder`.
            search_device: a GPU, such as "cuda", in whose memory all vectors are held for searching
                (16 KB an image with 32 vectors of 256 numbers): exact, and quick for a program that
                stays. None searches on the processor, in the files.
            keys_values_memory: bytes of the model's device in which the keys and values of candidates
                are kept, for those that come again; in PyTorch only. None is 2 GB of a GPU, and
                nothing of a processor's memory.
        """
        self.path = Path(index_path)
        self.device = device
        self.backend = backend
        self.search_device = search_device
        self.keys_values_memory = keys_values_memory
        self._given = model is not None
        self._asked = model if isinstance(model, str) else None
        self._model = None if isinstance(model, str) else model
        self._opened: _Opened | None = None
        self._keys_values: KeptKeysValues | None = None

    # ---- indexing ------------------------------------------------------------------------------

    def add(
        self,
        paths: Sequence[str | Path],
        *,
        batch_size: int = 32,
        workers: int | None = None,
        rebuild: bool = False,
        kind: Kind | None = None,
        memory: int | None = None,
        rerank_features: RerankFeatures | None = None,
        queries: Sequence[str] = (),
        on_progress: OnProgress | None = None,
    ) -> IndexReport:
        """Bring the index up to date with files and folders (searched in depth).

        New and changed files are encoded, vanished ones dropped. Files that cannot be read are
        skipped and reported. Ctrl-C ends the run early and keeps what was encoded.

        Args:
            paths: files and folders.
            batch_size: images a pass of the encoder.
            workers: decoding threads; by default one a processor, eight at most.
            rebuild: throw the old index away first.
            kind: "exact" finds what comparing everything finds; "compact" goes through the mean of
                each image's vectors first, far less, and has its recall of the exact answer
                measured; "auto" is exact as long as that fits into `memory`. None leaves it as it is.
            memory: bytes that a search may go through; None leaves it as it is (2 GB).
            rerank_features: how image tokens are kept, so that a rerank needs no encoder: "int8",
                "fp16" (twice as large), "none", or "auto": int8 where that takes at most 100 KB an
                image. None leaves it as it is; "auto" for a new index.
            queries: texts to measure the recall with, as people will ask; () takes ready-made ones.
            on_progress: called with (files done, files to do).

        Raises:
            ModelMismatchError: the index was made by another model than the one asked for.
            StoreError: the index cannot be read or written.
            ImageReadError: one of `paths` does not exist.
            VectorIndexError: `memory` is too little even for a compact index; nothing is encoded then.
        """
        start = time.perf_counter()
        check_roots(
            paths, [] if rebuild else self.paths()
        )  # a mistyped path leaves no empty index behind
        given = {"kind": kind, "memory": memory, "rerank_features": rerank_features}
        asked = {name: value for name, value in given.items() if value is not None}
        _settings(Settings(), asked)  # complains before an old index is thrown away
        store = self._open_or_create(rebuild)
        settings = _settings(store.settings, asked)
        self._opened = None
        with store.writing():
            kept = TokenFiles(self.path, store.manifest.model_fingerprint)
            plan = make_plan(
                paths,
                store.records,
                lambda one: not settings.keeps_tokens or one.content_hash in kept,
            )
            expected = plan.unchanged + len(plan.new) + len(plan.changed)
            check_memory(settings, expected, store.manifest.dim)
            if settings != store.settings:
                store.change_settings(settings)
            needed = self._given or plan.new or plan.changed  # given another: say so in any case
            model = self._model_of(store) if needed else None
            indexer = Indexer(store, plan, on_progress, tidy=lambda: _tidy(store, _TOLERATED))
            finished = indexer.run(model, batch_size, workers or decoding_threads())
            try:
                _tidy(store, _TOLERATED)
                if finished:
                    self._measure(store, queries)
            except KeyboardInterrupt:  # what was encoded is in the index
                finished = False
        return indexer.report(time.perf_counter() - start, finished)

    def _measure(self, store: Store, queries: Sequence[str]) -> None:
        """Measure what a compact index finds, where that is wanted and not known."""
        stored = StoredIndex(store)
        if stored.needs_measuring or (queries and stored.wants_compact):
            stored.measure(self._model_of(store).encode_texts(list(queries) or PROMPTS))
        elif queries:
            log.warning("the index is exact, so there is nothing to measure with your texts")

    def _open_or_create(self, rebuild: bool) -> Store:
        if not rebuild:
            try:
                return Store.open(self.path)
            except StoreMissingError:
                pass
        model = self._loaded(DEFAULT_MODEL)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model_name=model.name,
            model_fingerprint=model.fingerprint,
            preprocessing=model.preprocessing,
            num_vectors=model.num_vectors,
            dim=model.embedding_size,
        )
        try:
            settings = Store.open(self.path).settings  # a rebuild keeps them
        except StoreError:  # there is no index, or one that cannot be read
            settings = Settings()
        return Store.create(self.path, manifest, settings=settings, replace=rebuild)

    def compact(self) -> tuple[int, int]:
        """Merge small segments, forget removed images and make shortcuts that are missing.

        Returns:
            the bytes on disk before and after.

        Raises:
            StoreMissingError: there is no index.
            StoreError: it cannot be written to.
        """
        store = Store.open(self.path)
        self._opened = None
        with store.writing():
            before = store.size_on_disk()
            tokens = TokenFiles(self.path, store.manifest.model_fingerprint)
            tokens.sweep({one.content_hash for one in store.records})
            _tidy(store, tolerated=0)
            return before, store.size_on_disk()

    def verify(self) -> list[Damage]:
        """Look at every byte of the index; [] says that all is whole.

        Raises:
            StoreMissingError: there is no index.
            StoreCorruptError: its manifest is damaged.
        """
        store = Store.open(self.path)
        return store.verify() + StoredIndex(store).damaged()

    def repair(
        self,
        on_progress: OnProgress | None = None,
        on_damage: Callable[[list[Damage]], None] | None = None,
    ) -> tuple[list[Damage], IndexReport | None]:
        """Drop what is damaged, and encode again what is still there as a file.

        Args:
            on_damage: called with what is damaged before it is dropped.
            on_progress: called with (files done, files to do).

        Returns:
            what was damaged, and what the indexer did; None where there was nothing to encode.

        Raises:
            StoreError, ModelMismatchError: as `add`.
        """
        start = time.perf_counter()
        store = Store.open(self.path)
        self._opened = None
        with store.writing():
            damages = store.verify()
            shortcuts = StoredIndex(store).damaged()
            files = [p for damage in damages for p in damage.paths if os.path.isfile(p)]
            model = self._model_of(store) if files else None  # before anything is dropped
            if on_damage is not None:
                on_damage(damages + shortcuts)
            store.repair(damages)
            for damage in shortcuts:
                damage.file.unlink(missing_ok=True)
            report = None
            if model is not None:
                indexer = Indexer(store, Plan(new=files), on_progress, tidy=lambda: None)
                finished = indexer.run(model, batch_size=32, workers=decoding_threads())
                report = indexer.report(time.perf_counter() - start, finished)
            _tidy(store, _TOLERATED)
        return damages + shortcuts, report

    # ---- searching -----------------------------------------------------------------------------

    def search(
        self, query: str | Path | Image.Image, k: int = 10, rerank: int | None = None
    ) -> list[Hit]:
        """Find the images that fit a text, or that look like an image.

        Args:
            query: a text (str), an image file (Path) or a PIL image.
            k: how many hits.
            rerank: how many of the best by ITC are scored by the ITM head, at least k; 0 is ITC
                alone. None is `DEFAULT_RERANK`, and 0 for a model without an ITM head.
                An image query is ITC alone always: ITM compares an image with a text.

        Returns:
            at most k hits, best first. A reranked candidate whose file can no longer be read is
            left out, with a warning in the log.

        Raises:
            StoreMissingError: there is no index, or it is empty.
            ModelMismatchError: the index was made by another model.
            ImageReadError: the image query cannot be read.
            CheckpointError: a rerank was asked of a model without an ITM head.
            BackendError: keys and values were to be kept by another model than one in PyTorch.
        """
        if k < 1 or (rerank or 0) < 0:
            raise VectorIndexError("k must be at least 1 and rerank at least 0")
        opened, model = self._ready()
        if isinstance(query, str):
            depth = _rerank_depth(model, rerank)
            vectors = model.encode_texts([query])
        else:
            depth, vectors = 0, model.encode_images([query])[0]
        images, itc = self._nearest(opened, vectors, max(k, depth))
        if not depth:
            return hits_by_itc(images, itc)
        kept = TokenFiles(self.path, model.fingerprint)
        reranker = as_reranker(model)
        keys_values = self._kept_keys_values(reranker)
        return reranked(reranker, kept, str(query), images, itc, keys_values)[:k]

    def _kept_keys_values(self, model: Reranker) -> KeptKeysValues | None:
        memory = self.keys_values_memory
        if memory is None and isinstance(model, OnnxModel):  # known without loading PyTorch
            return None
        from .keys_values import KeptKeysValues
        from .model import RetrievalModel

        if not isinstance(model, RetrievalModel):
            if memory:
                raise BackendError("keys and values are kept in PyTorch only: backend='torch'")
            return None
        if memory is None:
            memory = _GPU_KEYS_VALUES if model.device.type == "cuda" else 0
        if memory and self._keys_values is None:
            self._keys_values = KeptKeysValues(model, memory)
        return self._keys_values

    def _nearest(
        self, opened: _Opened, vectors: Float32, count: int
    ) -> tuple[list[ImageRecord], Float32]:
        """Find the images nearest to any of some vectors (M, E), and their similarities (count,)."""
        scores, images = search_any(opened.index, vectors, count)
        try:
            return opened.store.records_at(images), scores
        except StoreCorruptError:
            raise
        except StoreError:  # another process has merged the segments in between
            opened, _ = self._ready()
            scores, images = search_any(opened.index, vectors, count)
            return opened.store.records_at(images), scores

    def rank_texts(
        self,
        image: Path | Image.Image,
        texts: Sequence[str],
        k: int = 10,
        rerank: int | None = None,
    ) -> list[TextHit]:
        """Find the texts that fit an image: the other direction, among texts that you give.

        Args:
            image: an image file or a PIL image; it need not be in the index.
            texts: any number, at least one.
            k: how many hits.
            rerank: as for `search`.

        Returns:
            at most k of the texts, best first; of equals the earlier one.

        Raises:
            ImageReadError: the image cannot be read.
            VectorIndexError: k or rerank is too small, or there is no text.
            ModelMismatchError, CheckpointError: as `search`.
        """
        if k < 1 or (rerank or 0) < 0 or not texts:
            raise VectorIndexError("k must be at least 1, rerank at least 0, and a text be given")
        try:
            model = self._model_of(Store.open(self.path))
        except StoreMissingError:
            model = self._loaded(DEFAULT_MODEL)
        return rank_texts(model, image, texts, k, _rerank_depth(model, rerank))

    def search_vectors(self, vectors: npt.NDArray[np.float32], k: int) -> SearchResult:
        """Find the images nearest to the vectors of many texts, by ITC alone.

        Args:
            vectors: (B, E), of the model's `encode_texts`.
            k: how many images of each.

        Returns:
            scores and image numbers (B, K); the number of an image is its place in `paths`.

        Raises:
            VectorIndexError: k is less than 1.
            StoreMissingError, ModelMismatchError: as `search`.
        """
        opened, _ = self._ready()
        return opened.index.search(vectors, k)

    def paths(self) -> list[str]:
        """Return the paths of all images in the index; [] where there is none."""
        try:
            return [record.path for record in Store.open(self.path).records]
        except StoreMissingError:
            return []

    def kept_tokens(self, paths: Sequence[str]) -> tuple[str, Callable[[int], Float32 | None]]:
        """Return how image tokens are kept, and what reads those of the i-th path.

        It gives (P, D), float32, before `ln_vision`; None where there are none.

        Raises:
            StoreMissingError: there is no index.
        """
        store = Store.open(self.path)
        files = TokenFiles(self.path, store.manifest.model_fingerprint)
        hashes = {record.path: record.content_hash for record in store.records}
        return store.settings.rerank_features, lambda i: files.read(hashes[paths[i]])

    def features(self) -> npt.NDArray[np.float16]:
        """Return the vectors of all images as stored: (N, Q, E), in the order of `paths`.

        Raises:
            StoreMissingError: there is no index.
        """
        return Store.open(self.path).features()

    # ---- the index and its model -----------------------------------------------------------------

    def info(self) -> IndexInfo:
        """Return what the index holds; loads neither model nor features.

        Raises:
            StoreMissingError: there is no index.
        """
        store = Store.open(self.path)
        manifest, stored = store.manifest, StoredIndex(store)
        return IndexInfo(
            path=str(self.path.absolute()),
            images=len(store),
            vectors_per_image=manifest.num_vectors,
            embedding_size=manifest.dim,
            model_name=manifest.model_name,
            model_fingerprint=manifest.model_fingerprint,
            schema_version=manifest.schema_version,
            size_on_disk=store.size_on_disk(),
            kind=store.settings.kind,
            memory=store.settings.memory,
            rerank_features=store.settings.rerank_features,
            search_bytes=stored.search_bytes,
            recall=stored.measured,
            needs_measuring=stored.needs_measuring,
            preprocessing=manifest.preprocessing,
        )

    def _ready(self) -> tuple[_Opened, Embedder]:
        store = Store.open(self.path)
        if len(store) == 0:
            raise StoreMissingError(
                f"The index in {self.path} is empty: fill it with `blip2-search index FOLDER`."
            )
        model = self._model_of(store)
        stored = StoredIndex(store)
        opened = self._opened
        if opened is None or stored.revision != opened.revision:
            opened = self._opened = _Opened(self._index(stored), store, stored.revision)
        return opened, model

    def _index(self, stored: StoredIndex) -> VectorIndex:
        if self.search_device is None:
            return stored.open()
        from .gpu_index import GpuIndex

        return GpuIndex(stored.features(), self.search_device)

    def _model_of(self, store: Store) -> Embedder:
        """Load the model that made the index, and make sure that it is still the same."""
        manifest = store.manifest
        again = "encode again with `blip2-search index --rebuild FOLDER`"
        try:
            model = self._loaded(manifest.model_name)
        except CheckpointError as error:
            if self._given:
                raise
            raise ModelMismatchError(
                f"The index in {self.path} was made by {manifest.model_name!r}, which cannot be "
                f"loaded ({error}): say where it is now with --model, or {again}."
            ) from error
        if model.fingerprint != manifest.model_fingerprint:
            own = (
                "ask without --model to use the index's own"
                if self._given
                else "bring that model back"
            )
            raise ModelMismatchError(
                f"The index in {self.path} was made by {manifest.model_name!r} "
                f"({manifest.model_fingerprint}), not by this {model.name!r} "
                f"({model.fingerprint}): {own}, or {again}."
            )
        return model

    def _loaded(self, default: str) -> Embedder:
        if self._model is None:
            self._model = open_embedder(
                self._asked or default, device=self.device, backend=self.backend
            )
        return self._model


def _settings(old: Settings, asked: Mapping[str, Any]) -> Settings:
    try:
        return replace(old, **asked)
    except ValueError as error:
        raise VectorIndexError(str(error)) from error


def _rerank_depth(model: Embedder, rerank: int | None) -> int:
    """Return how many candidates are reranked, where None leaves it to us."""
    if rerank is not None:
        return rerank
    return DEFAULT_RERANK if model.reranks else 0


def _tidy(store: Store, tolerated: float) -> None:
    """Merge segments and bring the shortcuts up to date, within `store.writing()`."""
    store.compact(tolerated)
    try:
        StoredIndex(store).refresh()
    except StoreCorruptError:
        raise
    except StoreError as error:  # such as a full disk: nothing is lost by it
        log.warning("%s Searching is slower until `blip2-search compact` can do that.", error)
