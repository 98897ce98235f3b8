"""A store's images, ready to be searched: its shortcuts, and which kind of index they make.

    shortcuts/directions.npz     the directions (`directions`)
    shortcuts/NAME-KEY.arrow     the shortcut to the segment NAME along the directions KEY (`shortcuts`)
    shortcuts/recall.json        what a compact index was measured to find (`recall`)

The one process that writes to the store brings these up to date. A reader makes in memory what is
missing: slower to open, and the same answers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from .base import Float32
from .bounded import BoundedIndex
from .directions import Directions, find_directions, read_directions, write_directions
from .errors import StoreError, VectorIndexError
from .files import TEMPORARY
from .joined import Joined
from .manifest import Segment
from .recall import Measured, measure, read_measured, write_measured
from .shortcuts import is_whole, make_shortcut, read_shortcut, write_shortcut
from .store import SHORTCUTS, Damage, Store

_DIRECTIONS, _RECALL = "directions.npz", "recall.json"
_OURS = re.compile(  # sweeping touches no other name
    r"[0-9a-f]{32}-[0-9a-f]{16}\.arrow"
    rf"|([0-9a-f]{{32}}-[0-9a-f]{{16}}\.arrow|directions\.npz|recall\.json)\..*{re.escape(TEMPORARY)}"
)
_GROWTH = 4  # how many times more images call for new directions
_STALE = 1.5  # ... and for measuring the recall again
_SAMPLE_IMAGES = 4096  # that directions are found from
_FEWEST_DIRECTIONS = 8  # of the means; with fewer they say too little


def open_index(store: Store) -> BoundedIndex:
    """Opens a store's images for searching; features and bounds are read as they are used.

    Raises:
        StoreCorruptError: a segment is damaged, as far as that is looked at.
    """
    directions = _directions_of(store)
    if directions is None:
        directions = _find(store)
    index = _exact(store, directions)
    measured = measured_recall(store)
    if measured is None or measured.candidates is None:
        return index
    return index.compact(measured.candidates, measured.mean_directions)


def measured_recall(store: Store) -> Measured | None:
    """What the store's compact index was measured to find; None where it has or wants none."""
    directions = _directions_of(store)
    if directions is None or not _wants_compact(store, directions):
        return None
    measured = read_measured(store.directory / SHORTCUTS / _RECALL)
    fits = measured is not None and (
        (measured.directions, measured.mean_directions)
        == (directions.key, _affordable(store, directions))
    )
    return measured if fits else None


def needs_measuring(store: Store, *, again: bool = False) -> bool:
    """Whether a compact index is wanted, and was not measured yet or has grown much since.

    Args:
        store: the store.
        again: measure it in any case, if it is wanted.

    Raises:
        VectorIndexError: the memory given is too little for so many images.
    """
    directions = _directions_of(store)
    if directions is None or not _wants_compact(store, directions):
        return False
    least = 4 * len(store) * min(_FEWEST_DIRECTIONS, len(directions))
    if store.settings.memory < least:
        raise VectorIndexError(
            f"{len(store):,} images need a memory of at least {least:,} bytes, not "
            f"{store.settings.memory:,}: say so with `blip2-search index --memory`"
        )
    measured = measured_recall(store)
    if measured is None or again:
        return True
    return not measured.images / _STALE <= len(store) <= measured.images * _STALE


def bytes_a_search(store: Store) -> int:
    """What every search goes through, beside the images that it looks at: the means, or the bounds."""
    directions = _directions_of(store) or _find(store)
    measured = measured_recall(store)
    if measured is not None and measured.candidates is not None:
        return 4 * len(store) * measured.mean_directions
    return _exact_bytes(store, directions)


def measure_recall(store: Store, queries: Float32) -> Measured:
    """Chooses how many candidates a compact index looks at, by what it finds for queries (B, E).

    Raises:
        StoreError: the folder cannot be written to.
    """
    directions = _directions_of(store) or _find(store)
    exact = _exact(store, directions)
    measured = measure(exact, queries, _affordable(store, directions))
    try:
        write_measured(store.directory / SHORTCUTS / _RECALL, measured)
    except OSError as error:
        raise _cannot_write(store, error) from error
    return measured


def refresh_shortcuts(store: Store) -> None:
    """Makes what is missing and deletes what has become useless; within `store.writing()`.

    Raises:
        StoreError: the folder cannot be written to.
        StoreCorruptError: a segment is damaged.
    """
    if not len(store):
        return
    folder = store.directory / SHORTCUTS
    try:
        folder.mkdir(exist_ok=True)
        directions = _directions_of(store)
        if directions is None or len(store) >= _GROWTH * directions.found_on:
            directions = _find(store)
            write_directions(folder / _DIRECTIONS, directions)
        needed = {_path(store, segment, directions): segment for segment in store.segments}
        for path, segment in needed.items():
            if not path.exists():
                write_shortcut(path, make_shortcut(directions, store.map_features(segment)))
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and path not in needed:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(store, error) from error


def damaged_shortcuts(store: Store) -> list[Damage]:
    """The files of shortcuts that are not whole: no image's features are lost, but hits may be."""
    folder = store.directory / SHORTCUTS
    files = [path for path in sorted(folder.glob("*.arrow")) if not is_whole(path)]
    directions = folder / _DIRECTIONS
    if directions.exists() and read_directions(directions) is None:
        files.append(directions)
    reason = "the checksum differs"
    return [Damage(file=path, reason=reason, images=0, rows=(), paths=()) for path in files]


def _directions_of(store: Store) -> Directions | None:
    directions = read_directions(store.directory / SHORTCUTS / _DIRECTIONS)
    return directions if directions is not None and directions.dim == store.manifest.dim else None


def _find(store: Store) -> Directions:
    features = _features(store)
    step = max(1, len(features) // _SAMPLE_IMAGES)
    return find_directions(features[np.arange(0, len(features), step)], found_on=len(features))


def _features(store: Store) -> Joined:
    return Joined(
        [store.map_features(segment) for segment in store.segments],
        [np.array(segment.live) if segment.removed else None for segment in store.segments],
    )


def _exact(store: Store, directions: Directions) -> BoundedIndex:
    features = _features(store)
    per_image = store.manifest.num_vectors
    shortcuts = [
        read_shortcut(_path(store, segment, directions), segment.rows, per_image, len(directions))
        or make_shortcut(directions, part)
        for segment, part in zip(store.segments, features.parts, strict=True)
    ]
    return BoundedIndex(features, shortcuts, directions)


def _path(store: Store, segment: Segment, directions: Directions) -> Path:
    stem = os.path.splitext(segment.file)[0]
    return store.directory / SHORTCUTS / f"{stem}-{directions.key}.arrow"


def _wants_compact(store: Store, directions: Directions) -> bool:
    """Whether a compact index was asked for, or is needed because the bounds are too many."""
    kind, memory = store.settings.kind, store.settings.memory
    return kind == "compact" or (kind == "auto" and _exact_bytes(store, directions) > memory)


def _exact_bytes(store: Store, directions: Directions) -> int:
    return 4 * len(store) * store.manifest.num_vectors * (len(directions) + 1)


def _affordable(store: Store, directions: Directions) -> int:
    """How many directions of the means fit into the memory given, in steps as images are added."""
    fit = store.settings.memory // (4 * max(1, len(store)))
    steps = fit // _FEWEST_DIRECTIONS * _FEWEST_DIRECTIONS
    return min(max(steps, _FEWEST_DIRECTIONS), len(directions))


def _cannot_write(store: Store, error: OSError) -> StoreError:
    reason = error.strerror or error
    return StoreError(f"Cannot write to the index in {store.directory}: {reason}.")
