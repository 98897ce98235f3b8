"""From files and captions to pixels and tokens, as BLIP-2 was evaluated (LAVIS's processors).

Images: EXIF orientation applied, first frame, RGB, squashed to a square with bicubic interpolation and
no crop, then mean and std of the checkpoint. Captions: lower-cased, punctuation blanked, 50 words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ..indexes.base import Float32, Int64
from .config import PreprocessConfig
from .errors import ImageReadError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ImageLike = str | os.PathLike[str] | Image.Image

_BLANKED = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


REDUCED = 2  # times the size that a photograph is squashed to: it is decoded at no less
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # of EXIF


class LoadedImage(NamedTuple):
    """An upright RGB image, perhaps decoded at a fraction of its size, and that size."""

    image: Image.Image
    width: int  # pixels, of the whole upright image
    height: int


def load_image(image: ImageLike | BinaryIO) -> Image.Image:
    """Return an upright RGB image, decoded in full.

    Raises:
        ImageReadError: the file is missing, no image, truncated, or too large to be decoded safely.
    """
    return _load(image, None).image


def load_for(image: ImageLike | BinaryIO, size: tuple[int, int]) -> LoadedImage:
    """Return an upright RGB image that is to be squashed to `size` (width, height).

    A JPEG is decoded at a half, a quarter or an eighth where that leaves twice the size or more,
    which is several times faster for photographs as cameras take them. The benchmarks' images are
    too small for that: their pixels are those of `load_image`.

    Raises:
        ImageReadError: see `load_image`.
    """
    return _load(image, size)


def _load(image: ImageLike | BinaryIO, size: tuple[int, int] | None) -> LoadedImage:
    try:
        if isinstance(image, Image.Image):
            upright = _upright_rgb(image)
            return LoadedImage(upright, *upright.size)
        with Image.open(image) as opened:
            whole, turned = opened.size, opened.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
            if size is not None:
                opened.draft(None, (REDUCED * max(size), REDUCED * max(size)))
            reduced = opened.size != whole
            upright = _upright_rgb(opened)
            if not reduced:
                whole = upright.size
            elif turned:
                whole = whole[::-1]
            return LoadedImage(upright, *whole)
    # Pillow's decoders and its EXIF reader raise whatever a damaged file leads them to.
    except Exception as error:
        path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
        raise ImageReadError(_reason(error), path) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels to be decoded safely"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # convert("RGB") clips 16-bit grey at 255; scale it instead.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        # On white, as a viewer shows it; the colour behind transparent pixels is arbitrary.
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return upright.convert("RGB")


class ImageTransform:
    """Squash and normalise."""

    def __init__(self, config: PreprocessConfig) -> None:
        """Take size, mean and std from the checkpoint's configuration."""
        self.size = (config.image_size, config.image_size)
        self.mean = np.array(config.mean, np.float32)[:, None, None]
        self.std = np.array(config.std, np.float32)[:, None, None]

    def __call__(self, image: ImageLike) -> Float32:
        """Return pixels (3, S, S), float32.

        Raises:
            ImageReadError: see `load_image`.
        """
        return self.to_pixels(load_for(image, self.size).image)

    def to_pixels(self, image: Image.Image) -> Float32:
        """Squash an upright RGB image, and return its pixels (3, S, S), float32."""
        return self.normalise(image.resize(self.size, Image.Resampling.BICUBIC))

    def normalise(self, image: Image.Image) -> Float32:
        """Return pixels of an RGB image that already has the right size: (3, S, S), float32."""
        # Contiguous before the arithmetic: three times as fast.
        pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
        pixels /= 255
        pixels -= self.mean
        pixels /= self.std
        return pixels


def clean_caption(caption: str, max_words: int = 50) -> str:
    """Clean a caption the way BLIP-2's evaluation does.

    >>> clean_caption('A "red" bus.  Parked: downtown!')
    'a red bus parked downtown'
    """
    caption = _BLANKED.sub(" ", caption.lower())
    caption = _SPACES.sub(" ", caption).strip()
    return " ".join(caption.split(" ")[:max_words])


class TokenisedTexts(NamedTuple):
    """Captions as numbers, padded to the longest of them."""

    token_ids: Int64  # (B, T)
    mask: npt.NDArray[np.bool_]  # (B, T), True where there is a token

    def select(self, rows: Int64) -> TokenisedTexts:
        """Return some of the captions, at least one, without the padding that all of them have."""
        mask = self.mask[rows]
        longest = mask.sum(axis=1).max()
        return TokenisedTexts(self.token_ids[rows, :longest], mask[:, :longest])


class TextTransform:
    """Clean and tokenise captions with the checkpoint's own tokenizer."""

    def __init__(self, tokenizer: Tokenizer, config: PreprocessConfig) -> None:
        """Take over a `tokenizers.Tokenizer`; its padding and truncation are set here."""
        self.tokenizer = tokenizer
        self.max_words = config.max_words
        self.max_tokens = config.max_text_tokens
        pad_id = tokenizer.token_to_id("[PAD]")
        tokenizer.enable_padding(pad_id=pad_id or 0, pad_token="[PAD]")
        tokenizer.enable_truncation(config.max_text_tokens)

    @classmethod
    def from_file(cls, path: Path, config: PreprocessConfig) -> TextTransform:
        """Read a `tokenizer.json`."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path)), config)

    def __call__(self, captions: Sequence[str]) -> TokenisedTexts:
        """Return the captions' token ids and their mask; [CLS] stands first, [SEP] last."""
        cleaned = [clean_caption(caption, self.max_words) for caption in captions]
        encodings = self.tokenizer.encode_batch_fast(cleaned)
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], dtype=bool)
        return TokenisedTexts(ids, mask)
