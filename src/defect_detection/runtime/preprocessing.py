"""The one way from an image file to pixels, for training, evaluation and serving."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from defect_detection import PipelineError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".tiff", ".tif", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
# Part of the cache's key: change it whenever `decode` returns other pixels.
PREPROCESSING = "bilinear-3"
TWELVE_BITS = 2**12
BORDER = 127  # grey of the borders of a letterboxed image

Shaping = Literal["letterbox", "stretch"]


@dataclass(frozen=True)
class ImageFormat:
    """The pixels that a model takes.

    Attributes:
        height: in pixels.
        width: in pixels.
        channels: 1 for grey; 3 for red, green and blue.
        fit: an image of another shape gets grey borders ("letterbox"), or is stretched, as models
            were trained before there were borders.
    """

    height: int
    width: int
    channels: int = 1
    fit: Shaping = "letterbox"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the array of an image."""
        return self.height, self.width, self.channels

    def __str__(self) -> str:
        """Return it in words."""
        colour = "grey" if self.channels == 1 else "colour"
        return f"{self.height} x {self.width}, {colour}"

    @property
    def key(self) -> str:
        """What names the files of images that were decoded to it."""
        return f"{self.height}x{self.width}x{self.channels}-{self.fit}-{PREPROCESSING}"


class UnreadableImage(PipelineError):
    """An image that cannot be decoded; the message says why."""


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image; hidden files do not count."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def decode(source: Path | bytes, wanted: ImageFormat) -> np.ndarray:
    """Decode an image to the pixels that a model takes.

    Args:
        source: the file, or its bytes: JPEG, PNG or TIFF (also with 12 or 16 bits), BMP or WebP.
        wanted: size, colour and shape.

    Returns:
        uint8 array of shape `wanted.shape`, 0 = black.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, or in none of these formats.
    """
    height, width, channels = wanted.shape

    def inside(image_width: int, image_height: int) -> tuple[int, int]:
        if wanted.fit == "stretch":
            return height, width
        scale = min(height / image_height, width / image_width)
        return max(1, round(image_height * scale)), max(1, round(image_width * scale))

    pixels = _decode(source, max(height, width), channels, inside)
    if pixels.shape == wanted.shape:
        return pixels
    boxed = np.full(wanted.shape, BORDER, np.uint8)
    top, left = (height - pixels.shape[0]) // 2, (width - pixels.shape[1]) // 2
    boxed[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return boxed


def decode_within(source: Path | bytes, longest: int, channels: int = 1) -> np.ndarray:
    """Decode an image and keep its aspect ratio.

    Returns:
        uint8 array of shape (height, width, channels), the longer side `longest` pixels.

    Raises:
        UnreadableImage: as `decode` raises it.
    """

    def in_proportion(width: int, height: int) -> tuple[int, int]:
        scale = longest / max(width, height)
        return max(1, round(height * scale)), max(1, round(width * scale))

    return _decode(source, longest, channels, in_proportion)


def _decode(
    source: Path | bytes, longest: int, channels: int, choose: Callable[[int, int], tuple[int, int]]
) -> np.ndarray:
    """Decode to the height and width that `choose` returns for the image's width and height."""
    mode = "L" if channels == 1 else "RGB"
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        if not content:
            raise UnreadableImage("is empty (0 bytes)")
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            # JPEG can decode at 1/2, 1/4 or 1/8 of its size, never below the requested size.
            image.draft(mode, (longest, longest))
            upright: Image.Image = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # which convert() would clip at 255
                upright = Image.fromarray(_eight_bits(np.asarray(upright)))
            height, width = choose(*upright.size)
            sized = upright.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"is none of {', '.join(FORMATS)}") from error
    except FileNotFoundError as error:
        raise UnreadableImage("does not exist") from error
    # Pillow raises a dozen kinds of errors for broken files, SyntaxError among them.
    except Exception as error:
        raise UnreadableImage(f"cannot be decoded ({error})") from error
    return np.asarray(sized).reshape(height, width, channels)


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Return pixels of 16 bits as uint8.

    Cameras of 12 bits write values below 4096 into files of 16 bits, and no field of the file
    says so; the values do.
    """
    return (pixels >> (4 if pixels.max() < TWELVE_BITS else 8)).astype(np.uint8)


def dimensions(path: Path) -> tuple[int, int]:
    """Return the width and height of a readable image in pixels, without decoding it."""
    with Image.open(path, formats=FORMATS) as image:
        return image.size


def grey(images: np.ndarray) -> np.ndarray:
    """Return images (n, height, width, channels) as grey, (n, height, width), of the same type."""
    if images.shape[-1] == 1:
        return images[..., 0]
    # ITU-R BT.601, as Pillow converts to "L".
    return (images @ np.array([0.299, 0.587, 0.114], np.float32)).astype(images.dtype)
