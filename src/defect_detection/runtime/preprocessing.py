"""The one way from an image file to pixels, for training, evaluation and serving."""

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from defect_detection import PipelineError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".tiff", ".tif", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
# Part of the cache's key: change it whenever `decode` returns other pixels.
PREPROCESSING = "bilinear-2"
DEPTHS = (8, 10, 12, 14, 16)  # bits of a grey level in files with two bytes for it
BORDER = 127  # grey of the borders of a letterboxed image
LARGEST_FILE = 2**30  # bytes

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
        bits: of a grey level in files with two bytes for it, one of `DEPTHS`; cameras of 12 bits
            use the lower ones only, and no field of the file says so.
    """

    height: int
    width: int
    channels: int = 1
    fit: Shaping = "letterbox"
    bits: int = 16

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
        bits = "" if self.bits == DEPTHS[-1] else f"-{self.bits}"
        return f"{self.height}x{self.width}x{self.channels}-{self.fit}{bits}-{PREPROCESSING}"


class UnreadableImage(PipelineError):
    """An image that cannot be decoded; the message says why."""


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image; hidden files do not count."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def files_below(
    folder: str, failed: Callable[[str, OSError], object] | None = None
) -> Iterator[str]:
    """Yield the files in a folder and all folders below it, sorted, without hidden ones.

    Links to folders are followed, but no folder is entered within itself.

    Args:
        folder: to search.
        failed: is told each folder that cannot be searched and each link that leads nowhere, with
            the reason. Without it, a folder that is gone is empty and such a link is a file.

    Raises:
        OSError: a folder cannot be searched, and nobody is told.
    """
    above = {os.path.realpath(folder)}

    def search(here: str, above: set[str]) -> Iterator[str]:
        try:
            files, folders = _entries(here, failed)
        except OSError as error:
            if failed is not None:
                failed(here, error)
            elif not isinstance(error, FileNotFoundError):  # moved away meanwhile
                raise
            return
        yield from files
        for path in folders:
            real = os.path.realpath(path)
            if real not in above:
                yield from search(path, above | {real})

    yield from search(folder, above)


def _entries(
    folder: str, failed: Callable[[str, OSError], object] | None
) -> tuple[list[str], list[str]]:
    """Return the files and the folders in a folder, sorted."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith("."):
                continue
            try:
                if failed is not None and entry.is_symlink():
                    entry.stat()
                (folders if entry.is_dir() else files).append(entry.path)
            except OSError as error:
                if failed is None:
                    raise
                failed(entry.path, error)
    return sorted(files), sorted(folders)


def read_file(path: Path) -> bytes:
    """Return the content of an image file.

    What is no regular file is not even opened: a FIFO waits for a writer, a device may never end.

    Raises:
        UnreadableImage: it is no regular file, or too large.
        OSError: it is missing or cannot be read.
    """
    _require_regular(os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        _require_regular(os.fstat(descriptor))  # it may be another file by now
        return file.readall()


def _require_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise UnreadableImage("is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImage("is no regular file")
    if status.st_size > LARGEST_FILE:
        raise UnreadableImage(f"is larger than {LARGEST_FILE / 2**30:.0f} GiB")


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

    with _opened(source) as image:
        pixels = _sized(image, max(height, width), channels, wanted.bits, inside)
    if pixels.shape == wanted.shape:
        return pixels
    boxed = np.full(wanted.shape, BORDER, np.uint8)
    top, left = (height - pixels.shape[0]) // 2, (width - pixels.shape[1]) // 2
    boxed[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return boxed


def decode_within(
    source: Path | bytes, longest: int, channels: int = 1, bits: int | None = None
) -> np.ndarray:
    """Decode an image and keep its aspect ratio.

    Args:
        source: as for `decode`.
        longest: the longer side of the result, in pixels.
        channels: 1 for grey; 3 for red, green and blue.
        bits: as those of `ImageFormat`; None for what this image uses.

    Returns:
        uint8 array of shape (height, width, channels), the longer side `longest` pixels.

    Raises:
        UnreadableImage: as `decode` raises it.
    """

    def in_proportion(width: int, height: int) -> tuple[int, int]:
        scale = longest / max(width, height)
        return max(1, round(height * scale)), max(1, round(width * scale))

    with _opened(source) as image:
        return _sized(
            image, longest, channels, bits or _bits_of(image) or DEPTHS[-1], in_proportion
        )


def bits_of(path: Path) -> int | None:
    """Return how many bits the grey levels of an image use, one of `DEPTHS`.

    None if the file has one byte for each, as most have.

    Raises:
        UnreadableImage: as `decode` raises it.
    """
    with _opened(path) as image:
        return _bits_of(image)


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong in the block is said of the image."""
    try:
        content = source if isinstance(source, bytes) else read_file(source)
        if not content:
            raise UnreadableImage("is empty (0 bytes)")
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.mode == "F":
                raise UnreadableImage("has grey levels of floating point")
            yield image
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"is none of {', '.join(FORMATS)}") from error
    except FileNotFoundError as error:
        raise UnreadableImage("does not exist") from error
    # Pillow raises a dozen kinds of errors for broken files, SyntaxError among them.
    except Exception as error:
        raise UnreadableImage(f"cannot be decoded ({error})") from error


def _sized(
    image: Image.Image,
    longest: int,
    channels: int,
    bits: int,
    choose: Callable[[int, int], tuple[int, int]],
) -> np.ndarray:
    """Decode to the height and width that `choose` returns for the image's width and height."""
    mode = "L" if channels == 1 else "RGB"
    # JPEG can decode at 1/2, 1/4 or 1/8 of its size, never below the requested size.
    image.draft(mode, (longest, longest))
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # two bytes a grey level, which convert() would clip at 255
        levels = np.minimum(_levels(upright) >> (bits - 8), 255)
        upright = Image.fromarray(levels.astype(np.uint8))
    height, width = choose(*upright.size)
    sized = upright.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(sized).reshape(height, width, channels)


def _bits_of(image: Image.Image) -> int | None:
    if not image.mode.startswith("I"):
        return None
    highest = int(_levels(image).max())
    return next(bits for bits in DEPTHS if highest < 2**bits)


def _levels(image: Image.Image) -> np.ndarray:
    """Return grey levels of up to 16 bits."""
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() >= 2 ** DEPTHS[-1]:
        raise UnreadableImage("has grey levels outside 0 to 65535")
    return levels


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
