"""`blip2-search evaluate`."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..indexes.errors import Blip2SearchError
from . import options, render, report
from .progress import Stages

if TYPE_CHECKING:
    from ..retrieval.data import CaptionedImage
    from ..retrieval.embedder import TensorEmbedder
    from ..retrieval.judgements import JudgementReport

ROOT_VARIABLE = "BLIP2_SEARCH_DATA"
SHOWN_SKIPPED = 5
RECALL_OPTIONS = (
    "dataset", "split", "limit", "rerank", "sweep_rerank", "plot", "through_index", "dense",
    "directions", "precision",
)  # fmt: skip


class Dataset(str, Enum):
    """The benchmarks that `--dataset` knows."""

    flickr30k = "flickr30k"
    coco = "coco"
    flickr8k = "flickr8k"


class Directions(str, Enum):
    """What `--directions` takes."""

    both = "both"
    tr = "tr"
    ir = "ir"


class Arithmetic(str, Enum):
    """What `--precision` takes."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def evaluate(
    context: typer.Context,
    *,
    dataset: Annotated[
        Dataset | None,
        typer.Option("--dataset", help="A benchmark, from its usual files under --root."),
    ] = None,
    root: Annotated[
        Path,
        typer.Option(
            "--root", envvar=ROOT_VARIABLE, metavar="DIR", help="Where the benchmarks' folders are."
        ),
    ] = Path("data"),
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Your own captions: .json (Karpathy), .csv, .tsv, .parquet.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="The folder that the paths in FILE are relative to.  [default: the file's own]",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="Which split.  [default: test; everything, where FILE names none]"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="The first N images only.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME",
            help="A name of `blip2-search models`, a folder, a .pth file, or open_clip:NAME/WEIGHTS.",
        ),
    ] = "mini",
    rerank: Annotated[
        int | None,
        typer.Option(
            "--rerank",
            min=0,
            metavar="K",
            help="Candidates a query that ITM scores.  [default: 128; 0 for a model without an ITM head]",
        ),
    ] = None,
    sweep_rerank: Annotated[
        str | None,
        typer.Option(
            "--sweep-rerank",
            metavar="K,K,...",
            help="Recall and time at each of these depths of rerank, and a picture.",
        ),
    ] = None,
    plot: Annotated[
        Path, typer.Option("--plot", metavar="FILE", help="Where --sweep-rerank draws its picture.")
    ] = Path("rerank-sweep.png"),
    through_index: Annotated[
        Path | None,
        typer.Option(
            "--through-index",
            metavar="DIR",
            help="Ask the index in DIR, as `query` does; made if need be. What it loses shows as the "
            "difference to --dense.",
        ),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Compare every image with every text: the default.")
    ] = False,
    judgements: Annotated[
        Path | None,
        typer.Option(
            "--judgements",
            metavar="FILE",
            help="Agreement with people's ratings of captions (Kendall's tau), in place of recall. For "
            "Flickr8k's own files --data is Flickr8k.token.txt.  [default: next to FILE]",
        ),
    ] = None,
    directions: Annotated[
        Directions,
        typer.Option("--directions", help="tr is image to text, ir is text to image."),
    ] = Directions.both,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write that object to a file too.")
    ] = None,
    memory: Annotated[
        str,
        typer.Option(
            "--memory", metavar="SIZE", help="Image tokens held at once; all lie on disk, in fp16."
        ),
    ] = "2GB",
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", metavar="DIR", help="Where they lie.  [default: your cache directory]"
        ),
    ] = None,
    precision: Annotated[
        Arithmetic,
        typer.Option(
            "--precision",
            help="Of the encoder and of ITM; ITC is computed in fp32. auto is fp16 on a GPU, fp32 "
            "elsewhere.",
        ),
    ] = Arithmetic.auto,
    device: options.DeviceOption = "auto",
    backend: Annotated[
        options.Backend,
        typer.Option(
            "--backend",
            help="What computes: torch, by which the figures of this project were measured, onnx, or what "
            "`query` takes (auto).",
        ),
    ] = options.Backend.torch,
    verbose: options.VerboseOption = False,
) -> None:
    """Measure retrieval on captioned photographs, by BLIP-2's protocol.

    ITC similarity is the max over queries, without temperature; the best --rerank candidates of each
    query, in each direction, are ordered by ITM logit + ITC. TR (image to text) is right when any
    caption of the image is among the first, IR (text to image) when the caption's image is. Percent,
    with 95 % intervals from resampled images.

    What was encoded and scored is kept: a killed evaluation goes on from there, and another depth of
    rerank costs what is new in it.

    Layouts under --root:
      flickr30k/dataset_flickr30k.json   flickr30k/flickr30k-images/*.jpg
      coco/dataset_coco.json             coco/val2014/*.jpg
      flickr8k/dataset_flickr8k.json     flickr8k/images/*.jpg

    Examples:
      blip2-search evaluate --dataset flickr30k --model blip2-itm-vit-g-coco
      blip2-search evaluate --dataset flickr30k --model open_clip:ViT-L-14/openai
      blip2-search evaluate --data my.csv --images ~/Pictures --rerank 32
      blip2-search evaluate --dataset flickr8k --split val --sweep-rerank 0,8,16,32,64,128,256
      blip2-search evaluate --dataset flickr8k --through-index /tmp/f8k --json | jq '."itc"'
      blip2-search evaluate --judgements ExpertAnnotations.txt --images Flicker8k_Dataset
    """
    if through_index is not None and dense:
        raise typer.BadParameter("it excludes --through-index", param_hint="--dense")
    depths = _depths(sweep_rerank)
    budget = options.byte_size(memory)
    if depths:
        report.check_plotting(plot)
    if out is not None:
        _check_folder(out)
    if judgements is not None:
        _refuse_recall_options(context)
        _judge(judgements, images, data, model, device, backend, budget, cache, as_json, out)
        return
    photos, name = _read(dataset, root, data, images, split, limit)

    from ..retrieval.evaluation import evaluate as run
    from ..retrieval.reranking import DIRECTIONS

    with _told_that_it_goes_on(), Stages() as stages:
        result = run(
            _open(model, device, backend, "float32"),
            photos,
            rerank=rerank,
            sweep=depths,
            directions=[d for d in DIRECTIONS if directions.value in (d, "both")],
            precision=None if precision is Arithmetic.auto else precision.value,
            memory=budget,
            cache=cache or options.default_cache(),
            index=through_index,
            prepare=stages.prepare,
        )
    say_skipped(result.skipped)
    described = {"dataset": name, "split": photos[0].split, **result.to_dict()}
    if as_json:
        _print_json(described)
    else:
        report.print_retrieval(result, name, photos[0].split)
        report.print_sweep(result)
    if out is not None:
        write_result(described, out, shlex.join(["blip2-search", *sys.argv[1:]]))
    if depths:
        report.draw_sweep(result, plot)
        render.say(f"picture: {render.short_path(str(plot))}")


def _open(model: str, device: str, backend: options.Backend, dtype: str) -> TensorEmbedder:
    from ..retrieval.backends import open_embedder

    # Of PyTorch or of ONNX Runtime, it can be taken apart.
    return cast("TensorEmbedder", open_embedder(model, device, backend.value, dtype))


def _read(
    dataset: Dataset | None,
    root: Path,
    data: Path | None,
    images: Path | None,
    split: str | None,
    limit: int | None,
) -> tuple[list[CaptionedImage], str]:
    """Return the images to evaluate on, and what to call them."""
    from ..retrieval.data import read_split
    from ..retrieval.datasets import BENCHMARKS

    if dataset is not None and data is None:
        if images is not None:
            raise typer.BadParameter("it goes with --data, not --dataset", param_hint="--images")
        file, folder = BENCHMARKS[dataset.value].find(root)
        return read_split(file, folder, split)[:limit], dataset.value
    if data is not None and dataset is None:
        return read_split(data, images or data.parent, split)[:limit], data.stem
    raise typer.BadParameter("give either --dataset or --data FILE", param_hint="--dataset")


def _judge(
    judgements: Path,
    images: Path | None,
    captions: Path | None,
    model: str,
    device: str,
    backend: options.Backend,
    memory: int,
    cache: Path | None,
    as_json: bool,
    out: Path | None,
) -> None:
    from dataclasses import asdict

    from ..retrieval.judgements import judge, read_judgements

    read = read_judgements(judgements, images or judgements.parent, captions)
    with _told_that_it_goes_on(), Stages() as stages:
        result: JudgementReport = judge(
            _open(model, device, backend, "auto"),
            read,
            memory=memory,
            cache=cache or options.default_cache(),
            prepare=stages.prepare,
        )
    say_skipped(result.skipped)
    described = {"judgements": judgements.name, **asdict(result)}
    if as_json:
        _print_json(described)
    else:
        report.print_judgements(result, judgements.stem)
    if out is not None:
        write_result(described, out, shlex.join(["blip2-search", *sys.argv[1:]]))


@contextmanager
def _told_that_it_goes_on() -> Iterator[None]:
    """Say on Ctrl-C what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        render.say(
            "Interrupted. What was encoded and scored is kept; the same command goes on from there."
        )
        raise typer.Exit(130) from None


def _refuse_recall_options(context: typer.Context) -> None:
    """Refuse what says nothing about judgements, rather than leave it out quietly."""
    for parameter in context.command.params:
        if parameter.name not in RECALL_OPTIONS:
            continue
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"it excludes {parameter.opts[0]}", param_hint="--judgements")


def _check_folder(file: Path) -> None:
    """Make the folder of a file that is written after hours of work.

    Raises:
        Blip2SearchError: nothing can be written there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Blip2SearchError(f"cannot write {file}: {error.strerror}") from error
    if not os.access(file.parent, os.W_OK):
        raise Blip2SearchError(f"cannot write {file}: its folder is read-only")


def _depths(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        depths = [int(part) for part in text.split(",")]
    except ValueError:
        depths = [-1]
    if min(depths) < 0:
        raise typer.BadParameter("give depths as 0,8,32,128", param_hint="--sweep-rerank")
    return depths


def say_skipped(reasons: Sequence[str]) -> None:
    """Name the images that could not be read, the first of them at least."""
    for reason in reasons[:SHOWN_SKIPPED]:
        render.say(f"skipped {reason}")
    if reasons:
        render.say(
            f"{render.images(len(reasons))} could not be read: the figures are of the others"
        )


def _print_json(described: dict[str, Any]) -> None:
    typer.echo(json.dumps(described))


def write_result(described: dict[str, Any], out: Path, command: str) -> None:
    """Write a result as JSON, with the command that gave it and the day.

    Raises:
        Blip2SearchError: the file cannot be written.
    """
    from blip2_search import __version__

    from ..indexes.files import replace_file

    content = described | {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "version": __version__,
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise Blip2SearchError(f"cannot write {out}: {error.strerror}") from error
