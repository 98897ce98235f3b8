"""`blip2-search verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options, render
from .progress import encoding_progress

if TYPE_CHECKING:
    from ..indexes.store import Damage


def verify(
    *,
    index: options.IndexOption,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop what is damaged, and encode it again.")
    ] = False,
    device: options.DeviceOption = "auto",
    verbose: options.VerboseOption = False,
) -> None:
    """Look at every byte of an index, and name the images whose features are damaged.

    Their paths go to stdout, one a line. The exit code is 0 when all is whole or was repaired, and 1
    otherwise.

    Examples:
      blip2-search verify
      blip2-search verify --index ~/big-index --repair
    """
    from ..retrieval.engine import SearchEngine

    engine = SearchEngine(index, device=device)
    if repair:
        with encoding_progress() as on_progress:
            damages, report = engine.repair(on_progress)
    else:
        damages, report = engine.verify(), None
    for damage in damages:
        _describe(damage)
    if not damages:
        render.say(f"{render.images(len(engine.paths()))}: all is whole")
        return
    affected = sum(damage.images for damage in damages)
    if not repair:
        render.say(
            f"{render.images(affected)} damaged: mend it with "
            f"`blip2-search verify --repair{options.index_flag(index)}`"
        )
        raise typer.Exit(1)
    mended = 0 if report is None else report.added
    render.say(f"{mended:,} of {render.images(affected)} encoded again")
    if mended < affected:
        render.say("Run `blip2-search index` on your folders again, for the others.")
        raise typer.Exit(1)


def _describe(damage: Damage) -> None:
    render.say(f"{damage.file}: {damage.reason}")
    render.print_lines(damage.paths)
    if damage.rows is None:
        render.say(f"  {render.images(damage.images)} of it, nobody can tell which")
