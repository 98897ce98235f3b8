"""Options that several commands share, and what they mean."""

from __future__ import annotations

import logging
import os
import re
import shlex
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

INDEX_VARIABLE = "BLIP2_SEARCH_INDEX"

log = logging.getLogger("blip2_search")


class Backend(str, Enum):
    """What `--backend` takes."""

    auto = "auto"
    torch = "torch"
    onnx = "onnx"


def default_index() -> Path:
    """Return the folder of the index when nobody names one: in the user's data directory."""
    from platformdirs import user_data_path

    return user_data_path("blip2-search", appauthor=False) / "index"


def default_cache() -> Path:
    """Return the folder of encoded images when nobody names one: in the user's cache directory."""
    from ..retrieval.cache import cache_folder

    return cache_folder() / "tokens"


def set_verbose(verbose: bool) -> bool:
    """Let errors come with their traceback; an option's callback, which returns its value."""
    if verbose:
        log.setLevel(logging.DEBUG)
    return verbose


def is_verbose() -> bool:
    """Tell whether `--verbose` was given."""
    return log.isEnabledFor(logging.DEBUG)


def start_logging() -> None:
    """Send the project's warnings to stderr, each as one line; forget an earlier `--verbose`."""
    handler = logging.StreamHandler()  # the stderr of now
    handler.setFormatter(logging.Formatter("blip2-search: %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF, large images: read all the same


def index_flag(index: Path) -> str:
    """Return what a suggested command has to add in order to find this index."""
    found = index == default_index() or str(index) == os.environ.get(INDEX_VARIABLE)
    return "" if found else f" --index {shlex.quote(str(index))}"


def byte_size(text: str) -> int:
    """Read a size.

    >>> byte_size("2GB"), byte_size("512 MB"), byte_size("1000")
    (2000000000, 512000000, 1000)
    """
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)B?", text.strip().upper())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise typer.BadParameter("give a size as 2GB or 512MB", param_hint="--memory")
    return int(number * 1000 ** " KMGT".index(match[2] or " "))


def read_texts(file: Path, option: str) -> list[str]:
    """Read texts, one a line, for an option of this name."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text", param_hint=option) from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise typer.BadParameter(f"there are no texts in {file}", param_hint=option)
    return texts


IndexOption = Annotated[
    Path,
    typer.Option(
        "--index",
        envvar=INDEX_VARIABLE,
        metavar="DIR",
        default_factory=default_index,
        show_default="your data directory",
        help="The folder of the index.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="A name of `blip2-search models`, a folder, a LAVIS .pth file, or open_clip:NAME/WEIGHTS.  "
        "[default: the index's own; mini for a new one]",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, ..."),
]
BackendOption = Annotated[
    Backend,
    typer.Option(
        "--backend",
        help="What computes: torch, on a GPU if there is one, or onnx, which starts at once and is quicker on "
        "processors. auto is onnx where there is no GPU and the model has been exported: mini has, another "
        "BLIP-2 is the first time that you say onnx (which needs blip2-search[onnx]).",
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", callback=set_verbose, help="Show whole lists, and the tracebacks of errors."
    ),
]
