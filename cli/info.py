"""`blip2-search info`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options, render


def info(
    *,
    index: options.IndexOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Show what an index holds, its model and its size on disk.

    Examples:
      blip2-search info
      blip2-search info --index ~/big-index
      blip2-search info --json | jq .images
    """
    from ..retrieval.engine import SearchEngine

    found = SearchEngine(index).info()
    if as_json:
        render.print_info_json(found)
    else:
        render.print_info(found)
