"""A small store's images: their features tell them apart."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from blip2_search.indexes.store import ImageRecord, Manifest

Q, E = 3, 4
MANIFEST = Manifest(
    model_name="toy",
    model_fingerprint="f00d",
    preprocessing={"size": 224, "mean": (0.5, 0.5, 0.5)},
    num_vectors=Q,
    dim=E,
)


def record(name, **changes):
    fields = {
        "path": f"/photos/{name}",
        "size": 10,
        "mtime_ns": 1_700_000_000_123_456_789,
        "content_hash": hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest(),
        "width": 640,
        "height": 480,
    }
    return ImageRecord(**fields | changes)


def features_of(*names):
    """Features that tell their image: (len(names), Q, E)."""
    seeds = [int.from_bytes(os.fsencode(name), "little") for name in names]
    each = [np.random.default_rng(seed).standard_normal((Q, E)) for seed in seeds]
    return np.array(each).reshape(-1, Q, E).astype(np.float16)


def content(store):
    """Everything that a reader sees."""
    return store.ids.tolist(), store.records, store.features().tobytes(), store.manifest
