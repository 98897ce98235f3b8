"""`blip2-search compact`."""

from __future__ import annotations

from . import options, render


def compact(*, index: options.IndexOption, verbose: options.VerboseOption = False) -> None:
    """Tidy an index up: merge small files, and give back the room of removed images.

    `index` does so by itself, but leaves a file alone in which less than a fifth has been removed.

    Examples:
      blip2-search compact
      blip2-search compact --index ~/big-index
    """
    from ..retrieval.engine import SearchEngine

    before, after = SearchEngine(index).compact()
    render.say(f"{render.size(before)} before, {render.size(after)} now")
