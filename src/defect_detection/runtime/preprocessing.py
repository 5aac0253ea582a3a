"""The one way from an image file to pixels, for training, evaluation and serving."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from defect_detection import PipelineError

SUFFIXES = (".jpeg", ".jpg", ".png")
# Part of the cache's key: change it whenever `decode` returns other pixels.
PREPROCESSING = "grey-bilinear-1"


class UnreadableImage(PipelineError):
    """An image that cannot be decoded; the message says why."""


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image; hidden files do not count."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def decode(source: Path | bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode a JPEG or PNG image to grey and resize it.

    Args:
        source: the file, or its bytes.
        size: height and width in pixels; the aspect ratio is not kept.

    Returns:
        uint8 array of shape (height, width, 1), 0 = black.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, or neither JPEG nor PNG.
    """
    return _decode(source, max(size), lambda width, height: size)[..., np.newaxis]


def decode_within(source: Path | bytes, longest: int) -> np.ndarray:
    """Decode as `decode` does, but keep the aspect ratio.

    Returns:
        uint8 array of shape (height, width), the longer side `longest` pixels.

    Raises:
        UnreadableImage: as `decode` raises it.
    """

    def in_proportion(width: int, height: int) -> tuple[int, int]:
        scale = longest / max(width, height)
        return max(1, round(height * scale)), max(1, round(width * scale))

    return _decode(source, longest, in_proportion)


def _decode(
    source: Path | bytes, longest: int, choose: Callable[[int, int], tuple[int, int]]
) -> np.ndarray:
    """Decode to the height and width that `choose` returns for the image's width and height."""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        if not content:
            raise UnreadableImage("is empty (0 bytes)")
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            # JPEG can decode at 1/2, 1/4 or 1/8 of its size, never below the requested size.
            image.draft("L", (longest, longest))
            upright: Image.Image = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            height, width = choose(*upright.size)
            grey = upright.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("is neither JPEG nor PNG") from error
    except FileNotFoundError as error:
        raise UnreadableImage("does not exist") from error
    # Pillow raises a dozen kinds of errors for broken files, SyntaxError among them.
    except Exception as error:
        raise UnreadableImage(f"cannot be decoded ({error})") from error
    return np.asarray(grey)


def dimensions(path: Path) -> tuple[int, int]:
    """Return the width and height of a readable image in pixels, without decoding it."""
    with Image.open(path, formats=("JPEG", "PNG")) as image:
        return image.size
