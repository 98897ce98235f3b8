"""`blip2-search verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, render
from .progress import encoding_progress

if TYPE_CHECKING:
    from ..indexes.store import Damage
    from ..retrieval.engine import IndexReport


def verify(
    *,
    index: options.IndexOption,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop what is damaged, and encode it again.")
    ] = False,
    model: options.ModelOption = None,
    device: options.DeviceOption = "auto",
    verbose: options.VerboseOption = False,
) -> None:
    """Look at every byte of an index, and name the images whose features are damaged.

    Their paths go to stdout, one a line. The exit code is 0 when all is whole or was repaired, and 1
    otherwise. What is damaged and no file any more is dropped by a repair.

    Examples:
      blip2-search verify
      blip2-search verify --index ~/big-index --repair
    """
    from ..retrieval.engine import SearchEngine

    engine = SearchEngine(index, model, device=device)
    if not repair:
        damages = engine.verify()
        _describe(damages)
        if damages:
            render.say(
                f"{_affected(damages)}: mend it with "
                f"`blip2-search verify --repair{options.index_flag(index)}`"
            )
            raise typer.Exit(1)
    else:
        with encoding_progress() as on_progress:
            damages, report = engine.repair(on_progress, on_damage=_describe)
        if damages:
            _summarise(damages, report)
            return
    render.say(f"{render.images(len(engine.paths()))}: all is whole")


def _describe(damages: Sequence[Damage]) -> None:
    for damage in damages:
        render.say(f"{damage.file}: {damage.reason}")
        render.print_lines(damage.paths)
        if damage.rows is None:
            render.say(f"  {render.images(damage.images)} of it, nobody can tell which")


def _affected(damages: Sequence[Damage]) -> str:
    images = sum(damage.images for damage in damages)
    return f"{render.images(images)} damaged" if images else "no image's features are damaged"


def _summarise(damages: Sequence[Damage], report: IndexReport | None) -> None:
    again = 0 if report is None else report.added
    named = sum(len(damage.paths) for damage in damages)
    render.say(f"{_affected(damages)}, {again:,} encoded again")
    if report is not None and report.interrupted:
        render.say("Interrupted: run `blip2-search index` on your folders, for the others.")
        raise typer.Exit(130)
    for file in report.skipped if report is not None else ():
        render.say(f"  skipped {render.short_path(file.path)}: {file.reason}")
    if again < named:
        render.say(f"{named - again:,} dropped: no longer there, or not readable")
    if any(damage.rows is None for damage in damages):
        render.say("Run `blip2-search index` on your folders again, for what nobody can name.")
        raise typer.Exit(1)
