"""`blip2-search demo`."""

from __future__ import annotations

import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..indexes.errors import Blip2SearchError
from . import options, render

if TYPE_CHECKING:
    from ..retrieval.engine import SearchEngine
    from .sheet import Row

PACKAGE = "skimage"
# What a person would search among the files of scikit-image's wheel; the rest are charts, masks and
# microscopy. Read from the disk and not through `skimage.data`, which would download what is missing.
PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
QUERIES = (
    "a cat",
    "a cup of coffee on a table",
    "an astronaut in an orange suit",
    "a red motorcycle",
    "stars in the night sky",
    "a man with a camera on a tripod",
)
HITS = 4


def demo(
    *,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where to put photographs, index and sheet."),
    ] = Path("blip2-search-demo"),
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="See `blip2-search models`.")
    ] = "mini",
    device: options.DeviceOption = "auto",
    verbose: options.VerboseOption = False,
) -> None:
    """See it work on a few photographs, with no folder of your own.

    Takes the photographs that come with scikit-image (nothing is downloaded), indexes them, asks six
    questions, and draws what was found: the path of the picture is printed on stdout.

    Examples:
      blip2-search demo
      blip2-search demo --out /tmp/demo
    """
    photos = copy_photos(find_photos(), out / "photos")
    index = out / "index"

    from ..retrieval.engine import SearchEngine
    from .sheet import draw_sheet

    engine = SearchEngine(index, model, device=device)
    render.say(f"Indexing {render.images(len(photos))} of scikit-image ...")
    report = engine.add(photos, rebuild=True)
    if report.interrupted:
        raise KeyboardInterrupt
    rows = ask(engine)
    name = engine.info().model_name
    sheet = draw_sheet(
        rows, f"{render.images(report.total)}, model {name}; score = ITM logit + ITC similarity"
    )
    file = out / "demo.png"
    sheet.save(file, optimize=True)
    render.print_path(file)
    flag = shlex.quote(str(index))
    render.say(f'Look at it, then ask: blip2-search query "an old coin" --index {flag}')


def find_photos() -> list[Path]:
    """Return the photographs of the installed scikit-image.

    Raises:
        Blip2SearchError: it is not installed, or brings none of them.
    """
    spec = find_spec(PACKAGE)
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    photos = [folder / name for name in PHOTOS if (folder / name).is_file()] if folder else []
    if not photos:
        raise Blip2SearchError(
            "the demo needs the photographs of scikit-image: "
            '`pip install "blip2-search[demo]"`, or in a clone `pip install -e ".[demo]"`'
        )
    return photos


def copy_photos(photos: list[Path], folder: Path) -> list[Path]:
    """Copy files into a folder, made if need be; return the copies."""
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy2(photo, folder)) for photo in photos]


def ask(engine: SearchEngine) -> list[Row]:
    """Run the queries; say the first hit of each."""
    from .sheet import Row

    rows = []
    for query in QUERIES:
        hits = engine.search(query, k=HITS)
        rows.append(Row(query, [(Path(hit.path), hit.score) for hit in hits]))
        if hits:
            render.say(f"  {query}: {Path(hits[0].path).name}")
    return rows
