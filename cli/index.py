"""`blip2-search index`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, render
from .progress import encoding_progress

if TYPE_CHECKING:
    from ..retrieval.engine import IndexReport

SHOWN_SKIPPED = 10


class RerankFeatures(str, Enum):
    """What `--rerank-features` takes."""

    auto = "auto"
    int8 = "int8"
    fp16 = "fp16"
    none = "none"


class Kind(str, Enum):
    """What `--kind` takes."""

    auto = "auto"
    exact = "exact"
    compact = "compact"


def index(
    *,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH",
            show_default=False,
            help="Photographs, and folders, which are searched in depth; - reads them from stdin.",
        ),
    ],
    index: options.IndexOption,
    model: options.ModelOption = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Photographs encoded at once.")
    ] = 32,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Decoding threads.  [default: one a processor, at most 8]"
        ),
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(
            "--kind",
            help="exact finds what comparing everything finds; compact goes through about 32 times less, "
            "and measures what it misses; auto is exact where that fits into --memory. It stays until "
            "changed.  [default: auto]",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="What a query may go through. It stays until changed.  [default: 2GB]",
        ),
    ] = None,
    rerank_features: Annotated[
        RerankFeatures | None,
        typer.Option(
            "--rerank-features",
            help="Keep what the encoder sees of each photograph, so that a rerank need not look at the "
            "files again: int8, fp16 (twice as large), none, or auto: int8 where that is at most 100 KB a photograph. "
            "It stays until changed.  [default: auto]",
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            "--queries",
            metavar="FILE",
            help="Texts as you will ask, one a line, to measure compact with.  [default: some of ours]",
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    backend: options.BackendOption = options.Backend.auto,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Throw the old index away first.")
    ] = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Index photographs, so that `query` finds them.

    Run it again after changes: only new and changed files are encoded, and vanished ones are dropped.
    Files that cannot be read are skipped and counted, linked folders are not followed. Ctrl-C keeps
    what is done.

    JPEG, PNG, WebP, GIF (first frame), BMP and TIFF.

    Examples:
      blip2-search index ~/Pictures
      blip2-search index ./holidays ./portraits cat.jpg
      blip2-search index ~/Pictures --model blip2-itm-vit-g --index ~/big-index
      find . -name '*.jpg' -newer last -print0 | blip2-search index -
    """
    from ..retrieval.engine import SearchEngine

    sources = _read_dashes(paths)
    texts = options.read_texts(queries, "--queries") if queries is not None else []
    engine = SearchEngine(index, model, device=device, backend=backend.value)
    with encoding_progress() as on_progress:
        report = engine.add(
            sources,
            batch_size=batch_size,
            workers=workers,
            kind=None if kind is None else kind.value,
            memory=None if memory is None else options.byte_size(memory),
            rerank_features=None if rerank_features is None else rerank_features.value,
            queries=texts,
            rebuild=rebuild,
            on_progress=on_progress,
        )
    _summarise(report, index, every_skipped=options.is_verbose())
    if report.interrupted:
        again = "the same command without --rebuild" if rebuild else "the same command"
        render.say(f"Interrupted. What was encoded is kept; {again} goes on from there.")
        raise typer.Exit(130)
    if not (report.added or report.updated or report.unchanged or report.removed):
        render.say(
            "error: nothing could be indexed; `blip2-search index --help` names the formats."
        )
        raise typer.Exit(1)
    render.say(f'Next: blip2-search query "a clock tower"{options.index_flag(index)}')


def _read_dashes(paths: Sequence[Path]) -> list[Path]:
    """Replace `-` with the paths on stdin: one a line, or with a zero byte behind each."""
    if Path("-") not in paths:
        return list(paths)
    data = typer.get_binary_stream("stdin").read()
    names = data.split(b"\0" if b"\0" in data else b"\n")
    sources = [path for path in paths if path != Path("-")]
    sources += [Path(os.fsdecode(name)) for name in names if name]
    if not sources:
        raise typer.BadParameter("there are no paths on stdin", param_hint="PATH")
    return sources


def _summarise(report: IndexReport, index: Path, every_skipped: bool) -> None:
    numbers = {
        "added": report.added,
        "updated": report.updated,
        "unchanged": report.unchanged,
        "removed": report.removed,
        "skipped": len(report.skipped),
    }
    render.say(f"{render.counts(numbers)} in {render.duration(report.seconds)}")
    if report.reused:
        render.say(f"{render.images(report.reused)} moved, copied or touched: not encoded again")
    shown = report.skipped if every_skipped else report.skipped[:SHOWN_SKIPPED]
    for file in shown:
        render.say(f"  skipped {render.short_path(file.path)}: {file.reason}")
    if len(shown) < len(report.skipped):
        render.say(f"  and {len(report.skipped) - len(shown):,} more (--verbose lists them all)")
    render.say(f"{render.images(report.total)} in the index {render.short_path(str(index))}")
