"""A contact sheet: a row a query, its best hits as thumbnails. Drawn with Pillow and its own font."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

PAPER = "#f7f6f3"
INK = "#1d2433"
FADED = "#7b8190"
ACCENT = "#c2410c"  # the best hit

MARGIN = 48
GAP = 20
THUMB = (252, 189)
RADIUS = 10
HEADER = 126
HEADING = 48  # of a row
CAPTION = 32
ROW_HEIGHT = HEADING + THUMB[1] + CAPTION
ROW_GAP = 26
SMOOTH = 4  # corners are drawn so many times larger


class Row(NamedTuple):
    """A query and its hits, best first: file and score."""

    query: str
    hits: Sequence[tuple[Path, float]]


def draw_sheet(rows: Sequence[Row], subtitle: str, title: str = "blip2-search") -> Image.Image:
    """Draw the sheet; it is as wide as the longest row of thumbnails needs."""
    columns = max((len(row.hits) for row in rows), default=1)
    width = 2 * MARGIN + columns * THUMB[0] + (columns - 1) * GAP
    height = HEADER + len(rows) * (ROW_HEIGHT + ROW_GAP) + MARGIN - ROW_GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    _write(sheet, (MARGIN, 38), title, 34, INK)
    _write(sheet, (MARGIN, 82), subtitle, 17, FADED)
    for i, row in enumerate(rows):
        _draw_row(sheet, row, HEADER + i * (ROW_HEIGHT + ROW_GAP))
    return sheet


def _draw_row(sheet: Image.Image, row: Row, top: int) -> None:
    _write(sheet, (MARGIN, top + 4), f"“{row.query}”", 25, INK)
    for i, (file, score) in enumerate(row.hits):
        left = MARGIN + i * (THUMB[0] + GAP)
        _paste_thumbnail(sheet, file, (left, top + HEADING), best=i == 0)
        below = top + HEADING + THUMB[1] + 8
        number = f"{score:.2f}"
        right = left + THUMB[0] - int(_font(16).getlength(number))
        _write(sheet, (right, below), number, 16, ACCENT if i == 0 else FADED)
        room = right - left - GAP
        _write(sheet, (left, below), file.name, 16, INK if i == 0 else FADED, room)


def _paste_thumbnail(
    sheet: Image.Image, file: Path, corner: tuple[int, int], *, best: bool
) -> None:
    with Image.open(file) as opened:
        photo = ImageOps.exif_transpose(opened).convert("RGB")
    thumbnail = ImageOps.fit(photo, THUMB, Image.Resampling.LANCZOS, centering=(0.5, 0.2))
    if best:
        border = 4
        size = (THUMB[0] + 2 * border, THUMB[1] + 2 * border)
        frame = Image.new("RGB", size, ACCENT)
        sheet.paste(
            frame, (corner[0] - border, corner[1] - border), _rounded(size, RADIUS + border)
        )
    sheet.paste(thumbnail, corner, _rounded(THUMB, RADIUS))


def _rounded(size: tuple[int, int], radius: int) -> Image.Image:
    mask = Image.new("L", (size[0] * SMOOTH, size[1] * SMOOTH))
    box = (0, 0, mask.width - 1, mask.height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius * SMOOTH, fill=255)
    return mask.resize(size, Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(
    sheet: Image.Image,
    corner: tuple[int, int],
    text: str,
    size: int,
    colour: str,
    room: int | None = None,
) -> None:
    """Write a line, cut off with an ellipsis where it has no room left."""
    font = _font(size)
    room = room or sheet.width - MARGIN - corner[0]
    if font.getlength(text) > room:
        while text and font.getlength(text + "…") > room:
            text = text[:-1]
        text += "…"
    ImageDraw.Draw(sheet).text(corner, text, fill=colour, font=font)
