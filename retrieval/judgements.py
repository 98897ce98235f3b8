"""How well ITC, ITM and their sum agree with people: Kendall's tau with ratings of captions.

As the captioning literature counts (Hodosh et al., JAIR 2013, collected the ratings; SPICE and
CLIPScore set the protocol): each rating is an observation of its own, paired with the score of its
image and caption, and captions that were written for the very image are left out. Tau-c is customary
for Flickr8k-Expert, tau-b for Flickr8k-CF, whose rating is the share of people who said yes.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .data import CAPTION_COLUMNS, PATH_COLUMNS, RATING, read_columns
from .embedder import TensorEmbedder, as_reranker
from .errors import DatasetError
from .feature_cache import cached_features, plain_tokens
from .model import itc_similarities
from .progress import Prepare
from .reranking import MEMORY, Pairs, match_pairs

TOKEN_FILE = "Flickr8k.token.txt"  # captions by their ids, as Flickr8k comes


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What people think of a caption for an image."""

    image: Path
    caption: str
    ratings: tuple[float, ...]  # higher is better


@dataclass(frozen=True, kw_only=True)
class JudgementReport:
    """Agreement with people; `tau` is {"itc": {"tau_b": ..., "tau_c": ...}, "itm": ..., "itc+itm": ...}.

    A model without an ITM head has "itc" alone. Tau is in [-1, 1]; the literature prints it times 100.
    """

    model: str
    fingerprint: str
    pairs: int  # of image and caption
    ratings: int
    tau: dict[str, dict[str, float]]
    skipped: tuple[str, ...]  # why images were left out


def read_judgements(file: Path, images: Path, captions: Path | None = None) -> list[Judgement]:
    """Read ratings of captions.

    Understood are a CSV, TSV or Parquet table with a column of images, one of captions and one or
    several of ratings (rating, rating_1, ...); Flickr8k's ExpertAnnotations.txt and
    CrowdFlowerAnnotations.txt; and JSON as CLIPScore's authors keep both.

    Args:
        file: the ratings.
        images: the folder that the images in it are relative to.
        captions: for Flickr8k's own files, which name captions by id: Flickr8k.token.txt. None is
            the file of that name next to them.

    Raises:
        DatasetError: a file is missing or of another format.
    """
    suffix = file.suffix.lower()
    if suffix == ".txt":
        found = _read_flickr8k(file, images, captions or file.with_name(TOKEN_FILE))
    elif suffix == ".json":
        found = _read_clipscore(file, images)
    elif suffix in (".csv", ".tsv", ".parquet"):
        found = _read_table(file, images)
    else:
        raise DatasetError(f"{file}: judgements come as .csv, .tsv, .parquet, .txt or .json")
    if not found:
        raise DatasetError(
            f"{file} has no judgement of a caption that was written for another image"
        )
    return found


def judge(
    model: TensorEmbedder,
    judgements: Sequence[Judgement],
    *,
    memory: int = MEMORY,
    cache: Path | None = None,
    prepare: Prepare | None = None,
) -> JudgementReport:
    """Compare a model's scores with what people think.

    Args:
        model: of `load_embedder` or `open_embedder`.
        judgements: of `read_judgements`; those of images that cannot be read are left out.
        memory: bytes of image tokens that are held at once.
        cache: the folder of encoded images; None is a temporary one.
        prepare: called with the name of a long piece of work, gives its progress callback.

    Raises:
        DatasetError: scipy is not installed, or no image can be read.
    """
    if importlib.util.find_spec("scipy") is None:
        raise DatasetError("Kendall's tau needs scipy: pip install 'blip2-search[evaluate]'")
    announce = prepare or (lambda _: lambda done, total: None)
    paths = list(dict.fromkeys(one.image for one in judgements))
    with plain_tokens(model, paths, cache, on_progress=announce("Encoding images")) as tokens:
        number = {paths[row]: i for i, row in enumerate(tokens.rows)}
        kept = [one for one in judgements if one.image in number]
        captions = list(dict.fromkeys(one.caption for one in kept))
        text_number = {caption: i for i, caption in enumerate(captions)}
        images = np.array([number[one.image] for one in kept])
        texts = np.array([text_number[one.caption] for one in kept])
        features = torch.from_numpy(cached_features(model, tokens.images)).to(model.device)
        itc = itc_similarities(features, model.encode_texts(captions))[images, texts]
        scores = {"itc": itc}
        if model.reranks:
            ids, inverse = np.unique(images * len(captions) + texts, return_inverse=True)
            pairs = Pairs(ids // len(captions), ids % len(captions), {})
            itm = match_pairs(
                as_reranker(model), tokens.images, captions, pairs,
                memory=memory, on_progress=announce("Matching pairs"),
            )[inverse.ravel()]  # fmt: skip
            scores |= {"itm": itm, "itc+itm": itc + itm}
    times = [len(one.ratings) for one in kept]
    ratings = np.array([rating for one in kept for rating in one.ratings])
    return JudgementReport(
        model=model.name,
        fingerprint=model.fingerprint,
        pairs=len(kept),
        ratings=len(ratings),
        tau={name: _taus(np.repeat(score, times), ratings) for name, score in scores.items()},
        skipped=tuple(tokens.skipped),
    )


def _taus(scores: npt.NDArray[np.float32], ratings: npt.NDArray[np.float64]) -> dict[str, float]:
    from scipy.stats import kendalltau

    return {
        f"tau_{variant}": float(kendalltau(scores, ratings, variant=variant).statistic)
        for variant in ("b", "c")
    }


def _read_table(file: Path, images: Path) -> list[Judgement]:
    names, rows = read_columns(file)
    path = next((name for name in PATH_COLUMNS if name in names), None)
    caption = next((name for name in CAPTION_COLUMNS if name in names), None)
    columns = [name for name in names if RATING.fullmatch(name)]
    if path is None or caption is None or not columns:
        raise DatasetError(
            f"{file} needs columns called {PATH_COLUMNS[0]}, {CAPTION_COLUMNS[0]} and rating; "
            f"it has {', '.join(names)}"
        )
    if not all(isinstance(row[name], str) for row in rows for name in (path, caption)):
        raise DatasetError(f"{file}: every row needs one image and one caption")
    return [
        Judgement(
            image=images / row[path],
            caption=row[caption],
            ratings=_numbers([row[name] for name in columns], file),
        )
        for row in rows
    ]


def _read_flickr8k(file: Path, images: Path, captions: Path) -> list[Judgement]:
    """Read ExpertAnnotations.txt or CrowdFlowerAnnotations.txt: they differ in their last columns.

    The former has three ratings from 1 to 4, the latter the share of yes and the counts of yes and no.
    """
    by_id = dict(line[:2] for line in _tabs(captions) if len(line) > 1)
    lines = _tabs(file)
    if any(len(line) != 5 for line in lines):
        raise DatasetError(f"{file} is not in Flickr8k's format: image, caption id, three numbers")
    numbers = [_numbers(line[2:], file) for line in lines]
    is_expert = all(value in (1, 2, 3, 4) for row in numbers for value in row)
    found = []
    for (image, caption, *_), ratings in zip(lines, numbers, strict=True):
        if caption.partition("#")[0] == image:
            continue  # written for this very image
        if caption not in by_id:
            raise DatasetError(f"{captions} has no caption {caption}, which {file} judges")
        found.append(
            Judgement(
                image=images / image,
                caption=by_id[caption],
                ratings=ratings if is_expert else ratings[:1],
            )
        )
    return found


def _read_clipscore(file: Path, images: Path) -> list[Judgement]:
    """Read {"id": {"human_judgement": [{"image_path", "caption", "rating"}, ...]}, ...}."""
    try:
        data: dict[str, Any] = json.loads(_text(file))
        judged = [one for entry in data.values() for one in entry["human_judgement"]]
        return [
            Judgement(
                image=images / one["image_path"],
                caption=one["caption"],
                ratings=(float(one["rating"]),),
            )
            for one in judged
            if not math.isnan(float(one["rating"]))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file} is not in CLIPScore's format: {error!r}") from error


def _tabs(file: Path) -> list[list[str]]:
    return [line.split("\t") for line in _text(file).splitlines() if line.strip()]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {file}: {getattr(error, 'strerror', error)}") from error


def _numbers(cells: Sequence[Any], file: Path) -> tuple[float, ...]:
    flat = [x for cell in cells for x in (cell if isinstance(cell, list) else [cell])]
    try:
        return tuple(float(x) for x in flat if x is not None)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{file}: a rating is no number: {error}") from error
