"""`blip2-search query`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..indexes.errors import Blip2SearchError
from . import options, render

if TYPE_CHECKING:
    from ..retrieval.engine import Hit, SearchEngine


def query(
    *,
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            show_default=False,
            help="What the photograph shows, in English; - reads a line from stdin.",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Find what looks like this, in place of TEXT.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            "--texts",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Rank these texts, one a line, by how well they fit --image; no index is needed.",
        ),
    ] = None,
    index: options.IndexOption,
    k: Annotated[int, typer.Option("-k", min=1, metavar="N", help="How many hits.")] = 10,
    rerank: Annotated[
        int | None,
        typer.Option(
            "--rerank",
            min=0,
            metavar="N",
            help="How many of the best are looked at a second time; 0 is faster and less exact.  "
            "[default: 10; 0 for a model without an ITM head]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    as_paths: Annotated[bool, typer.Option("--paths", help="Print one path a line.")] = False,
    null: Annotated[
        bool, typer.Option("-0", "--null", help="Print paths with a zero byte behind each.")
    ] = False,
    device: options.DeviceOption = "auto",
    backend: options.BackendOption = options.Backend.auto,
    model: options.ModelOption = None,
    verbose: options.VerboseOption = False,
) -> None:
    """Find photographs that fit a text, or that look like an image; or texts that fit an image.

    The 32 vectors of each photograph are compared with the text (ITC, the best of the 32 counts);
    the best --rerank photographs are then looked at again, together with the text (ITM).
    The score is ITM + ITC: it orders the hits, and is no probability.

    Examples:
      blip2-search query "a dog in the snow"
      blip2-search query "a clock tower" -k 3
      blip2-search query --image holiday.jpg
      blip2-search query --image holiday.jpg --texts labels.txt
      blip2-search query "a red car" --json | jq -r .path
      blip2-search query "a red car" -0 | xargs -0 cp -t ./cars
    """
    if as_json and (as_paths or null):
        raise typer.BadParameter("it excludes --paths", param_hint="--json")
    if texts is not None and (image is None or text is not None or as_paths or null):
        raise typer.BadParameter("it goes with --image, and finds no paths", param_hint="--texts")
    question = _question(text, image)

    from ..retrieval.engine import SearchEngine

    engine = SearchEngine(index, model, device=device, backend=backend.value)
    if texts is not None and image is not None:
        found = engine.rank_texts(image, options.read_texts(texts, "--texts"), k, rerank)
        (render.print_json if as_json else render.print_texts)(found)
        return
    hits = _search(engine, question, k, rerank)
    if as_json:
        render.print_json(hits)
    elif as_paths or null:
        render.print_paths(hits, end="\0" if null else "\n")
    else:
        render.print_hits(hits)


def _question(text: str | None, image: Path | None) -> str | Path:
    if (text is None) == (image is None):
        raise typer.BadParameter("give either a text or --image FILE", param_hint="TEXT")
    if image is not None:
        return image
    if text == "-":
        text = typer.get_text_stream("stdin").readline()
    if text is None or not text.strip():
        raise typer.BadParameter("the text is empty", param_hint="TEXT")
    return text.strip()


def _search(engine: SearchEngine, question: str | Path, k: int, rerank: int | None) -> list[Hit]:
    hits = engine.search(question, k=k, rerank=rerank)
    if not hits:
        raise Blip2SearchError(
            "what came closest cannot be read any more: run `blip2-search index` on its folder "
            "again, to bring the index up to date"
        )
    return hits
