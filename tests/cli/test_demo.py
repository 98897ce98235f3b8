"""`blip2-search demo` and its contact sheet, on drawn pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from blip2_search.cli import demo, sheet
from blip2_search.retrieval.engine import Hit

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    files = []
    for i, colour in enumerate(COLOURS):
        files.append(tmp_path / f"{colour}.png")
        Image.new("RGB", (300, 200 + 150 * i), colour).save(files[-1])
    return files


@pytest.fixture
def package(monkeypatch, tmp_path) -> Path:
    """Stand in for scikit-image, with two of its photographs and a file that is none of them."""
    data = tmp_path / "skimage_of_the_test" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").touch()
    for name in ("coffee.png", "rocket.jpg", "cell.png"):
        Image.new("RGB", (40, 30), "brown").save(data / name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "PACKAGE", data.parent.name)
    return data


def test_the_demo_from_end_to_end(run, engine, package, tmp_path):
    out = tmp_path / "out"
    engine.hits = [
        Hit(rank=i + 1, path=str(package / name), score=1.0 - i, itc=0.5, itm=0.5 - i)
        for i, name in enumerate(("coffee.png", "rocket.jpg"))
    ]
    done = run("demo", "--out", out)
    assert done.stdout == f"{out / 'demo.png'}\n"
    assert f"--index {out / 'index'}" in done.stderr
    assert engine.opened == [
        {"index": out / "index", "model": "mini", "device": "auto", "backend": "auto"}
    ]
    indexed, how = engine.calls[0]
    assert [path.name for path in indexed] == ["coffee.png", "rocket.jpg"]
    assert all(path.parent == out / "photos" and path.is_file() for path in indexed)
    assert how["rebuild"]  # so that a demo of another day or model is not in the way
    assert [asked for asked, _ in engine.calls[1:-1]] == list(demo.QUERIES)
    with Image.open(out / "demo.png") as drawn:
        assert drawn.width > 500
    run("demo", "--out", out)


def test_without_scikit_image_the_error_has_the_command(run, engine, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    done = run("demo", code=1)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert 'pip install "blip2-search[demo]"' in done.stderr
    assert not engine.calls


def test_a_scikit_image_without_photographs_is_the_same_error(run, engine, package):
    for file in package.iterdir():
        file.unlink()
    assert "blip2-search[demo]" in run("demo", code=1).stderr


def test_every_photograph_is_in_the_wheel():
    pytest.importorskip("skimage")
    assert [photo.name for photo in demo.find_photos()] == list(demo.PHOTOS)


def test_a_row_a_query_and_a_thumbnail_a_hit(pictures):
    rows = [
        sheet.Row("a red field", [(picture, 3.0 - i) for i, picture in enumerate(pictures)]),
        sheet.Row("blue", [(pictures[2], -1.5)]),
    ]
    drawn = sheet.draw_sheet(rows, "4 images")
    width, height = sheet.THUMB
    assert drawn.width == 2 * sheet.MARGIN + 4 * width + 3 * sheet.GAP
    for i, colour in enumerate(COLOURS):
        middle = sheet.MARGIN + i * (width + sheet.GAP) + width // 2
        pixel = drawn.getpixel((middle, sheet.HEADER + sheet.HEADING + height // 2))
        assert pixel == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    corner = drawn.getpixel((sheet.MARGIN + width + sheet.GAP, sheet.HEADER + sheet.HEADING))
    assert corner != Image.new("RGB", (1, 1), "green").getpixel((0, 0))  # rounded off
    second = sheet.HEADER + sheet.ROW_HEIGHT + sheet.ROW_GAP + sheet.HEADING
    assert drawn.getpixel((sheet.MARGIN + width // 2, second + height // 2)) == (0, 0, 255)


def test_a_photograph_stands_upright(tmp_path):
    turned = Image.new("RGB", (300, 400), "white")
    turned.paste("red", (0, 0, 150, 400))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the left half comes to the top
    file = tmp_path / "turned.jpg"
    turned.save(file, exif=exif, quality=95)
    drawn = sheet.draw_sheet([sheet.Row("red above", [(file, 0.0)])], "")
    x, top = sheet.MARGIN + sheet.THUMB[0] // 4, sheet.HEADER + sheet.HEADING
    assert drawn.getpixel((x, top + sheet.THUMB[1] // 4))[1] < 60
    assert drawn.getpixel((sheet.MARGIN + 3 * sheet.THUMB[0] // 4, top + 40))[1] < 60
    assert drawn.getpixel((x, top + sheet.THUMB[1] - 20))[1] > 200


def test_a_long_line_is_cut_off_before_the_margin(pictures):
    rows = [sheet.Row("a very long question " * 9, [(pictures[0], 1.0)])]
    drawn = sheet.draw_sheet(rows, "a very long remark " * 9)
    right = drawn.crop((drawn.width - sheet.MARGIN + 6, 0, drawn.width, drawn.height))
    assert right.getextrema() == tuple((value, value) for value in drawn.getpixel((0, 0)))


def test_no_hits_are_an_empty_row():
    assert sheet.draw_sheet([sheet.Row("nothing", [])], "").height > sheet.HEADER
