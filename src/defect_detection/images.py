"""The one way from a picture to pixels, for training, evaluation and serving."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from defect_detection import PipelineError

SUFFIXES = (".jpeg", ".jpg", ".png")
# Part of the cache's key: change it whenever `decode` gives other pixels.
PREPROCESSING = "grey-bilinear-1"
GLOW = np.array([255, 72, 0])  # colour of a heatmap
MOST_EVIDENCE = 88.0  # LiteRT's softplus gives infinity soon after


class UnreadableImage(PipelineError):
    """A picture that cannot be decoded; the message says why."""


def is_picture(name: str) -> bool:
    """Say of a file's name whether it is taken for a picture; hidden files are not."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


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
    return _decode(source, max(size), lambda width, height: size)[..., np.newaxis]


def decode_within(source: Path | bytes, longest: int) -> np.ndarray:
    """Decode as `decode` does, in proportion: uint8 (height, width), the longer one `longest`."""

    def in_proportion(width: int, height: int) -> tuple[int, int]:
        scale = longest / max(width, height)
        return max(1, round(height * scale)), max(1, round(width * scale))

    return _decode(source, longest, in_proportion)


def _decode(
    source: Path | bytes, longest: int, choose: Callable[[int, int], tuple[int, int]]
) -> np.ndarray:
    """Decode to the height and width that `choose` makes of the picture's width and height."""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        if not content:
            raise UnreadableImage("is empty (0 bytes)")
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            # JPEG can decode at 1/2, 1/4 or 1/8 of its size, never below the size asked for.
            image.draft("L", (longest, longest))
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            height, width = choose(*upright.size)
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
    return np.asarray(grey)


def dimensions(path: Path) -> tuple[int, int]:
    """Return the width and height of a readable picture, in pixels, without decoding it."""
    with Image.open(path, formats=("JPEG", "PNG")) as image:
        return image.size


def lay_over(picture: np.ndarray, evidence: np.ndarray, strength: float = 1.0) -> Image.Image:
    """Lay evidence of a defect over a picture: the more there is, the stronger the colour.

    Args:
        picture: uint8 (height, width).
        evidence: 0 or more, (h, w) of any size.
        strength: of the colour where the most evidence is, in [0, 1]; 1 covers the picture.
    """
    height, width = picture.shape
    evidence = np.minimum(evidence, MOST_EVIDENCE)
    smooth = Image.fromarray(evidence / max(evidence.max(), 1e-9)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    opacity = strength * np.clip(np.asarray(smooth), 0, 1)[..., np.newaxis]
    grey = picture[..., np.newaxis].astype(float)
    return Image.fromarray((grey * (1 - opacity) + GLOW * opacity).astype(np.uint8))
