"""The one way from a picture to pixels, for training, evaluation and serving."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from defect_detection import PipelineError

SUFFIXES = (".jpeg", ".jpg", ".png")
# Part of the cache's key: change it whenever `decode` gives other pixels.
PREPROCESSING = "grey-bilinear-1"


class UnreadableImage(PipelineError):
    """A picture that cannot be decoded; the message says why."""


def decode(source: Path | bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode a JPEG or PNG picture to grey and resize it.

    Args:
        source: the file, or its bytes.
        size: height and width in pixels; the aspect ratio is not kept.

    Returns:
        uint8 array of shape (height, width, 1), 0 = black.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, or neither JPEG nor PNG.
    """
    height, width = size
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        if not content:
            raise UnreadableImage("is empty (0 bytes)")
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            # JPEG can decode at 1/2, 1/4 or 1/8 of its size, never below the size asked for.
            image.draft("L", (max(size), max(size)))
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            grey = upright.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("is neither JPEG nor PNG") from error
    except FileNotFoundError as error:
        raise UnreadableImage("does not exist") from error
    except (
        Exception
    ) as error:  # Pillow raises a dozen kinds on broken files, SyntaxError among them
        raise UnreadableImage(f"cannot be decoded ({error})") from error
    return np.asarray(grey)[..., np.newaxis]
