"""All that is printed: data on stdout, in a form for people or for pipes; messages on stderr.

A file name may hold anything: bytes that are no UTF-8 (surrogates, to Python), newlines, control
characters that a terminal would obey. Pipes get the name byte for byte; people get it readable.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..retrieval.engine import Hit, IndexInfo, TextHit

_RERANK = {
    "auto": "decodes and encodes the candidates",
    "none": "decodes and encodes the candidates",
    "int8": "from kept image tokens, int8",
    "fp16": "from kept image tokens, fp16",
}
_ESCAPED = frozenset(
    ("Cc", "Cs", "Zl", "Zp")
)  # controls, surrogates, line and paragraph separators


def say(message: str) -> None:
    """Print a message to stderr."""
    typer.echo("\n".join(map(printable, message.split("\n"))), err=True)


def print_hits(hits: Iterable[Hit]) -> None:
    """Print a table for people.

    A score is the ITM logit plus the ITC similarity, or the latter alone without rerank.
    """
    _print_ranked("path", ((hit, short_path(hit.path)) for hit in hits))


def print_texts(hits: Iterable[TextHit]) -> None:
    """Print a table of texts for people; the scores are those of `print_hits`."""
    _print_ranked("text", ((hit, hit.text) for hit in hits))


def _print_ranked(title: str, rows: Iterable[tuple[Hit | TextHit, str]]) -> None:
    from rich.text import Text

    table = new_table("#", title, "score", "ITC", "ITM", right=("#", "score", "ITC", "ITM"))
    for hit, name in rows:
        itm = "-" if hit.itm is None else f"{hit.itm:.3f}"
        shown = Text(printable(name), overflow="fold")
        table.add_row(str(hit.rank), shown, f"{hit.score:.3f}", f"{hit.itc:.3f}", itm)
    print_table(table)


def print_json(hits: Iterable[Hit | TextHit]) -> None:
    r"""Print one JSON object a line.

    All of it is ASCII, so that it survives every encoding; a byte that is no UTF-8 becomes `\udcXX`,
    which Python's `json.loads` and `os.fsencode` turn into that byte again.
    """
    for hit in hits:
        typer.echo(json.dumps(asdict(hit)))


def print_paths(hits: Iterable[Hit], end: str = "\n") -> None:
    """Print paths byte for byte, each with `end` behind it."""
    print_lines((hit.path for hit in hits), end)


def print_title(text: str) -> None:
    """Print a line of what goes with a table."""
    typer.echo(printable(text))


def print_lines(paths: Iterable[str], end: str = "\n") -> None:
    """Print paths byte for byte, each with `end` behind it."""
    for path in paths:
        typer.echo(os.fsencode(path + end), nl=False)


def print_path(path: Path) -> None:
    """Print the path of a file that was made, byte for byte."""
    typer.echo(os.fsencode(path))


def print_info(info: IndexInfo) -> None:
    """Print what an index holds, for people."""
    shape = f"{info.vectors_per_image} x {info.embedding_size}"
    settings = "; ".join(f"{name} {value}" for name, value in info.preprocessing.items())
    rows = {
        "index": info.path,
        "images": f"{info.images:,}",
        "vectors": f"{info.images * info.vectors_per_image:,} ({shape} an image)",
        "size on disk": size(info.size_on_disk)
        + (" and image tokens" if info.rerank_features in ("int8", "fp16") else ""),
        "model": f"{info.model_name} (fingerprint {info.model_fingerprint})",
        "preprocessing": settings,
        "layout": f"version {info.schema_version}",
        "search": search_kind(info),
        "rerank": _RERANK[info.rerank_features],
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:<{width}}  {printable(value)}")


def search_kind(info: IndexInfo) -> str:
    """Say which kind of index it is, and what it was measured to find."""
    recall = info.recall
    if info.search_bytes is None:
        return "exact, slow to open: run `blip2-search compact` once"
    through = f"through {size(info.search_bytes)} a query"
    if recall is None and info.needs_measuring:
        return f"exact, {through}, until compact is measured: run `blip2-search index` again"
    if recall is None:
        return f"exact, {through}"
    found = f"recall@10 of exact {recall.recall_at_10:.4f}, recall@128 {recall.recall_at_128:.4f}"
    if recall.candidates is None:
        return f"exact, {through}: compact finds too little ({found})"
    return f"compact, {through}: {found} ({recall.candidates:,} candidates, {recall.queries} texts)"


def print_info_json(info: IndexInfo) -> None:
    """Print what an index holds as one JSON object, its fields those of `IndexInfo`."""
    typer.echo(json.dumps(asdict(info)))


def print_models(rows: Iterable[Sequence[str]]) -> None:
    """Print a table of name, image size and weights."""
    table = new_table("name", "image size", "weights")
    for row in rows:
        table.add_row(*row)
    print_table(table)


def counts(numbers: Mapping[str, int]) -> str:
    """Join counts into a line.

    >>> counts({"added": 1200, "removed": 0})
    '1,200 added, 0 removed'
    """
    return ", ".join(f"{number:,} {name}" for name, number in numbers.items())


def images(number: int) -> str:
    """Count images.

    >>> images(1), images(2000)
    ('1 image', '2,000 images')
    """
    return f"{number:,} image" + ("" if number == 1 else "s")


def size(number: int) -> str:
    """Write a number of bytes, in powers of 1000.

    >>> size(999), size(16_384), size(2_500_000_000)
    ('999 B', '16.4 kB', '2.5 GB')
    """
    if number < 1000:
        return f"{number} B"
    value = float(number)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def duration(seconds: float) -> str:
    """Write a time.

    >>> duration(4.26), duration(75), duration(7380)
    ('4.3 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def printable(text: str) -> str:
    r"""Escape what a terminal would choke on or obey.

    >>> printable("caf\xe9 \udcff\x1b[31m")
    'café \\udcff\\x1b[31m'
    """
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _ESCAPED else c for c in text)


def short_path(path: str) -> str:
    """Return the shortest name: relative to the working directory, to home (`~`), or as it is."""
    names = [path]
    for folder, prefix in ((Path.cwd(), ""), (Path.home(), f"~{os.sep}")):
        if Path(path).is_relative_to(folder):
            names.append(f"{prefix}{Path(path).relative_to(folder)}")
    return min(names, key=len)


def new_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table with these columns, those of `right` aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        if name in right:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table, folded in a terminal only."""
    from rich.console import Console

    # In a pipe there is no edge to fold lines at.
    Console(highlight=False, width=None if sys.stdout.isatty() else 1000).print(table)
