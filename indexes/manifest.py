"""`manifest.json`: which model made an index, and which segment files are its live state.

The file names every live segment with its size and checksums, and carries a checksum of itself, so
that nothing damaged is taken for data. Replacing it is the one instant at which a change becomes
real.

N images, Q vectors an image, E numbers a vector.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import StoreCorruptError, StoreError, StoreMissingError, StoreVersionError
from .files import replace_file, writing_to

SCHEMA_VERSION = 3
READABLE = (1, 2, SCHEMA_VERSION)  # what the others lack is added when a segment is written again
MANIFEST = "manifest.json"
Kind = Literal["auto", "exact", "compact"]
KINDS: tuple[Kind, ...] = ("auto", "exact", "compact")
RerankFeatures = Literal["auto", "none", "int8", "fp16"]
RERANK_FEATURES: tuple[RerankFeatures, ...] = ("auto", "none", "int8", "fp16")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What made the features of an index.

    Raises:
        ValueError: num_vectors or dim below 1, or preprocessing that JSON cannot hold.
    """

    schema_version: int = SCHEMA_VERSION
    model_name: str  # what to load again, such as "mini"
    model_fingerprint: str  # tells weights apart that bear the same name
    preprocessing: dict[str, Any]  # the model's own description, JSON
    num_vectors: int  # Q
    dim: int  # E

    def __post_init__(self) -> None:
        """Checks the sizes; gives preprocessing the form in which JSON returns it (no tuples)."""
        if self.num_vectors < 1 or self.dim < 1:
            raise ValueError("num_vectors and dim must be at least 1.")
        try:
            preprocessing = json.loads(json.dumps(self.preprocessing, allow_nan=False))
        except TypeError as error:
            raise ValueError(f"preprocessing must be JSON: {error}") from error
        object.__setattr__(self, "preprocessing", preprocessing)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the index wants to be searched.

    Raises:
        ValueError: no such kind or rerank features, or less than a byte.
    """

    kind: Kind = "auto"
    memory: int = 2_000_000_000  # bytes that a search may go through
    rerank_features: RerankFeatures = "auto"  # how image tokens are kept; auto: until some are seen

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.kind not in KINDS or self.memory < 1:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, and memory at least a byte.")
        if self.rerank_features not in RERANK_FEATURES:
            raise ValueError(f"rerank features are one of {', '.join(RERANK_FEATURES)}.")

    @property
    def keeps_tokens(self) -> bool:
        """Whether every image has its tokens kept."""
        return self.rerank_features in ("int8", "fp16")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A Parquet file that is never written again, and what must be found in it."""

    file: str  # name within the segments folder
    rows: int
    size: int  # bytes
    features_start: (
        int  # the features' bytes within the file; before and after them stand the records
    )
    features_end: int
    features_crc32: int
    records_crc32: int
    features_at: int | None = None  # where the numbers lie in one piece; None before version 3
    removed: tuple[int, ...] = ()  # rows that are dead, ascending

    @property
    def live(self) -> list[int]:
        """The rows that are not removed, ascending."""
        removed = set(self.removed)
        return [row for row in range(self.rows) if row not in removed]

    def __len__(self) -> int:
        """How many rows are not removed."""
        return self.rows - len(self.removed)


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that `manifest.json` says."""

    manifest: Manifest
    next_id: int = 0  # the id of the next image; it only grows
    settings: Settings = Settings()
    segments: tuple[Segment, ...] = ()  # in the order of the rows


def write_state(directory: Path, state: State) -> None:
    """Makes a state the live one, at one instant; its segments must be on the disk already.

    Raises:
        StoreError: the file cannot be written; the old state stays.
    """
    content = dataclasses.asdict(state)
    content["checksum"] = _checksum(content)
    with writing_to(directory):
        replace_file(directory / MANIFEST, json.dumps(content, indent=1).encode())


def read_state(directory: Path) -> State:
    """Reads the live state.

    Raises:
        StoreMissingError: there is no manifest.
        StoreCorruptError: the manifest is damaged.
        StoreVersionError: it is of another schema version.
        StoreError: it cannot be read.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreMissingError(
            f"There is no index in {directory}: make one with "
            f"`blip2-search index FOLDER --index {directory}`."
        ) from error
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error.strerror}.") from error
    try:
        content = json.loads(text)
        if content.pop("checksum") != _checksum(content):
            raise ValueError("the checksum differs")
        version = content["manifest"]["schema_version"]
        if version in READABLE:
            return _parse(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, directory, str(error)) from error
    raise _other_version(directory, version)


def damaged(path: Path, directory: Path, reason: str) -> StoreCorruptError:
    """The error for a damaged file of an index."""
    if path.name == MANIFEST:
        help = f"make it anew with {_rebuild(directory)}"
    else:
        help = f"mend it with `blip2-search verify --repair --index {directory}`"
    return StoreCorruptError(f"The index is damaged at {path} ({reason}): {help}.")


def _checksum(content: dict[str, Any]) -> str:
    """The checksum of the content; the same in every schema version: new is not damaged."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def _parse(content: dict[str, Any]) -> State:
    segments = [
        {**segment, "removed": tuple(segment["removed"])} for segment in content["segments"]
    ]
    return State(
        manifest=Manifest(**content["manifest"] | {"schema_version": SCHEMA_VERSION}),
        next_id=content["next_id"],
        settings=Settings(**content.get("settings", {})),
        segments=tuple(Segment(**segment) for segment in segments),
    )


def _other_version(directory: Path, version: object) -> StoreVersionError:
    newer = isinstance(version, int) and version > SCHEMA_VERSION
    return StoreVersionError(
        f"The index in {directory} has schema version {version}, this program reads "
        f"{' and '.join(map(str, READABLE))}: "
        + ("upgrade blip2-search." if newer else f"make it anew with {_rebuild(directory)}.")
    )


def _rebuild(directory: Path) -> str:
    return f"`blip2-search index --rebuild FOLDER --index {directory}`"
