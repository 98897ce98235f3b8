"""From files and captions to pixels and tokens."""

import struct
import zlib

import numpy as np
import pytest
import torch
from foreign import wordpiece
from PIL import Image, ImageOps

from blip2_search.retrieval.config import CLIP_MEAN, CLIP_STD, PreprocessConfig
from blip2_search.retrieval.errors import ImageReadError
from blip2_search.retrieval.preprocess import (
    ImageTransform,
    TextTransform,
    clean_caption,
    load_for,
    load_image,
)
from blip2_search.retrieval.text_batch import TextBatch

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


# ---- captions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Red BUS", "a red bus"),
        ('."!()*#:;~', ""),
        ("one.two!three", "one two three"),
        ("  wide   open\tspaces \n here ", "wide open\tspaces here"),
        ("it's a well-known, fine café?", "it's a well-known, fine café?"),
        ("", ""),
    ],
)
def test_clean_caption(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_clean_caption_keeps_fifty_words():
    words = [str(i) for i in range(60)]
    assert clean_caption(" ".join(words)).split() == words[:50]
    assert clean_caption("a b c d", max_words=2) == "a b"


def test_padding():
    texts = TextTransform(wordpiece(), PreprocessConfig())
    batch = texts(["A red bus.", "two cats on the grass", ""])
    assert batch.token_ids.tolist() == [
        [2, 5, 7, 8, 3, 0, 0, 0],
        [2, 13, 9, 14, 10, 6, 15, 3],
        [2, 3, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.mask.tolist() == (batch.token_ids != 0).tolist()
    assert batch.token_ids.dtype == np.int64
    assert batch.mask.dtype == np.bool_
    assert texts(["a", "the"]).token_ids.shape == (2, 3)  # to the longest of the batch


def test_truncation_keeps_the_separator():
    texts = TextTransform(wordpiece(), PreprocessConfig(max_text_tokens=6))
    ids = texts(["the red bus on the red grass"]).token_ids
    assert ids.tolist() == [[2, 6, 7, 8, 10, 3]]
    assert TextTransform(wordpiece(), PreprocessConfig())(["a " * 99]).token_ids.shape == (1, 35)


def test_selecting_captions():
    texts = TextTransform(wordpiece(), PreprocessConfig())(["a", "red bus", "the cat"])
    batch = TextBatch.of(texts)
    chosen = batch.select(torch.tensor([2, 0]))
    assert torch.equal(chosen.token_ids, batch.token_ids[[2, 0]])
    assert torch.equal(chosen.mask, batch.mask[[2, 0]])


# ---- images ----------------------------------------------------------------------------------------


def halves(left, right, mode="RGB"):
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned clockwise by 90 degrees
    halves(RED, BLUE).save(tmp_path / "turned.png", exif=exif)
    image = load_image(tmp_path / "turned.png")
    assert image.size == (20, 40)
    assert image.getpixel((10, 5)) == RED
    assert image.getpixel((10, 35)) == BLUE


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = halves((0, 0, 0, 0), (0, 0, 0, 255), "RGBA")
    if mode == "P":
        image = halves(0, 1, "P")
        image.putpalette([*GREEN, 0, 0, 0])
        image.info["transparency"] = 0
    image = image if mode == "P" else image.convert(mode)
    image.save(tmp_path / "alpha.png")
    loaded = load_image(tmp_path / "alpha.png")
    assert loaded.mode == "RGB"
    assert loaded.getpixel((5, 5)) == WHITE
    assert loaded.getpixel((35, 5)) == (0, 0, 0)


def test_half_transparent_is_mixed_with_white():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert load_image(image).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled(tmp_path, suffix):
    grey = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / f"grey.{suffix}")
    image = load_image(tmp_path / f"grey.{suffix}")
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    assert load_image(Image.new("RGB", (3, 2), WHITE).convert(mode)).getpixel((1, 1)) == WHITE


def test_first_frame_of_a_gif(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (GREEN, RED)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif").getpixel((4, 4)) == GREEN


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_formats(tmp_path, suffix):
    halves(RED, BLUE).save(tmp_path / f"image.{suffix}")
    image = load_image(str(tmp_path / f"image.{suffix}"))
    assert image.size == (40, 20)
    np.testing.assert_allclose(image.getpixel((5, 10)), RED, atol=8)
    np.testing.assert_allclose(image.getpixel((35, 10)), BLUE, atol=8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_truncated_files(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    file = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ImageReadError, match=r"\w"):
        load_image(file)


def test_no_image(tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.raises(ImageReadError, match="not an image"):
        load_image(tmp_path / "notes.jpg")
    with pytest.raises(ImageReadError, match="No such file"):
        load_image(tmp_path / "missing.jpg")
    with pytest.raises(ImageReadError, match="directory"):
        load_image(tmp_path)


def test_decompression_bomb(tmp_path):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(png)
    with pytest.raises(ImageReadError, match="too many pixels"):
        load_image(tmp_path / "bomb.png")


def test_squashed_and_never_cropped():
    wide = Image.new("RGB", (400, 20), RED)
    wide.paste(BLUE, (395, 0, 400, 20))  # at the very edge: a crop would lose it
    pixels = ImageTransform(PreprocessConfig(image_size=80))(wide)
    assert pixels.shape == (3, 80, 80)
    assert pixels.dtype == np.float32
    shades = pixels * np.array(CLIP_STD)[:, None, None] + np.array(CLIP_MEAN)[:, None, None]
    np.testing.assert_allclose(shades[:, 40, 40], [1, 0, 0], atol=1e-5)
    assert shades[2, 40, 79] > 0.9


def test_normalised_with_the_checkpoints_numbers():
    config = PreprocessConfig(image_size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    pixels = ImageTransform(config)(Image.new("RGB", (9, 9), (255, 0, 51)))
    np.testing.assert_allclose(pixels[:, 2, 2], [1.8, -0.8, -0.1], atol=1e-6)


def test_the_given_image_is_left_alone():
    image = halves(RED, BLUE)
    ImageTransform(PreprocessConfig(image_size=8))(image)
    assert image.size == (40, 20)


def test_whatever_a_decoder_raises_is_an_unreadable_image(monkeypatch):
    def stumble(image):
        raise TypeError("bad operand type for abs()")

    monkeypatch.setattr(ImageOps, "exif_transpose", stumble)
    with pytest.raises(ImageReadError, match="bad operand"):
        load_image(Image.new("RGB", (4, 4)))


def waves(size):
    """Draw smooth stripes, as a photograph has them and a decoder may average."""
    x, y = np.meshgrid(*(np.linspace(0, 9, side) for side in size))
    bands = [127 + 120 * np.sin(x + phase) * np.cos(y) for phase in range(3)]
    return Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))


def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path):
    file = tmp_path / "large.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    waves((1200, 800)).save(file, quality=95, exif=exif)
    image, width, height = load_for(file, (100, 100))
    assert (width, height) == (800, 1200) == load_image(file).size
    assert image.size == (200, 300)  # a quarter: an eighth would be less than twice the 100
    transform = ImageTransform(PreprocessConfig(image_size=100))
    whole = transform.to_pixels(load_image(file))
    assert np.abs(transform(file) - whole).mean() < 0.02


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("size", "suffix"), [((399, 800), ".jpg"), ((1200, 800), ".png"), ((1200, 800), ".tif")]
)
def test_other_images_are_decoded_in_full(tmp_path, size, suffix, orientation):
    file = tmp_path / f"image{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    waves(size).save(file, exif=exif)
    image, *upright = load_for(file, (100, 100))
    assert image == load_image(file)
    assert tuple(upright) == image.size == (size if orientation == 1 else size[::-1])
