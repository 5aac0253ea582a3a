"""The one way from an image file to pixels, for training, evaluation and serving."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

from defect_detection import PipelineError
from defect_detection.runtime import opening
from defect_detection.runtime.opening import FORMATS, MOST_PIXELS, TooLarge

SUFFIXES = (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".tiff", ".tif", ".webp")
# Of images that cannot be read: whoever asks for a verdict on such a file must hear of it.
OTHER_IMAGES = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".gif", ".apng"),
    *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"),
    *(".pgm", ".ppm", ".pnm", ".pbm", ".pam", ".pfm", ".tga", ".pcx", ".dib", ".ico", ".icns"),
    *(".svg", ".psd", ".psb", ".xcf", ".exr", ".hdr", ".dds", ".dcm", ".raw"),
)
MOST_BYTES = 10**9  # of a file
# Part of the cache's key: change it whenever `decode` returns other pixels.
PREPROCESSING = "bilinear-2"
TURNS: dict[object, Image.Transpose] = {  # by the orientation that EXIF says
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180},
    **{4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE},
    **{6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90},
}
DEPTHS = (8, 10, 12, 14, 16)  # bits of a grey level in files with two bytes for it
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
        bits: of a grey level in files with two bytes for it, one of `DEPTHS`; cameras of 12 bits
            use the lower ones only, and no field of the file says so.
        most_pixels: that an image may have before it is reduced.
    """

    height: int
    width: int
    channels: int = 1
    fit: Shaping = "letterbox"
    bits: int = 16
    most_pixels: int = MOST_PIXELS

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


def read_file(path: Path | str) -> bytes:
    """Return the content of an image file.

    Only regular files are read: a named pipe or a device may keep its reader waiting for ever.

    Raises:
        UnreadableImage: it is missing, no regular file or too large, or may not be read.
    """
    with _open_regular(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise UnreadableImage(f"cannot be read ({error.strerror})") from error


def _open_regular(path: Path | str) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode  # opening a pipe would wake its writer
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UnreadableImage(_irregular(mode))
        file = open(path, "rb", opener=_open_without_waiting)
    except FileNotFoundError as error:
        raise UnreadableImage("does not exist") from error
    except OSError as error:
        if error.errno == errno.ENXIO:  # of sockets, and of devices that are not there
            raise UnreadableImage(_irregular(os.stat(path).st_mode)) from error
        raise UnreadableImage(f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # no file can have this name
        raise UnreadableImage(f"cannot be read ({error})") from error
    status, refused = os.fstat(file.fileno()), ""
    if not stat.S_ISREG(status.st_mode):
        refused = _irregular(status.st_mode)
    elif status.st_size > MOST_BYTES:
        refused = f"has {status.st_size / 1e9:.1f} GB, at most {MOST_BYTES / 1e9:g} GB is read"
    if refused:
        file.close()
        raise UnreadableImage(refused)
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has none


def _irregular(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return f"is {kinds.get(stat.S_IFMT(mode), 'a device')}; only regular files are read"


def decode(source: Path | bytes, wanted: ImageFormat) -> np.ndarray:
    """Decode an image to the pixels that a model takes.

    Args:
        source: the file, or its bytes: JPEG, PNG or TIFF (also with 12 or 16 bits), BMP or WebP.
        wanted: size, colour and shape.

    Returns:
        uint8 array of shape `wanted.shape`, 0 = black.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, in none of these formats, too large
            or no regular file.
    """
    height, width, channels = wanted.shape

    def inside(image_width: int, image_height: int) -> tuple[int, int]:
        if wanted.fit == "stretch":
            return height, width
        scale = min(height / image_height, width / image_width)
        return max(1, round(image_height * scale)), max(1, round(image_width * scale))

    with _opened(source, wanted.most_pixels) as image:
        pixels = _sized(image, max(height, width), channels, wanted.bits, inside)
    if pixels.shape == wanted.shape:
        return pixels
    boxed = np.full(wanted.shape, BORDER, np.uint8)
    top, left = (height - pixels.shape[0]) // 2, (width - pixels.shape[1]) // 2
    boxed[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return boxed


def decode_within(
    source: Path | bytes,
    longest: int,
    channels: int = 1,
    bits: int | None = None,
    most_pixels: int = MOST_PIXELS,
) -> np.ndarray:
    """Decode an image and keep its aspect ratio.

    Args:
        source: as for `decode`.
        longest: the longer side of the result, in pixels.
        channels: 1 for grey; 3 for red, green and blue.
        bits: as those of `ImageFormat`; None for what this image uses.
        most_pixels: as those of `ImageFormat`.

    Returns:
        uint8 array of shape (height, width, channels), the longer side `longest` pixels.

    Raises:
        UnreadableImage: as `decode` raises it.
    """

    def in_proportion(width: int, height: int) -> tuple[int, int]:
        scale = longest / max(width, height)
        return max(1, round(height * scale)), max(1, round(width * scale))

    with _opened(source, most_pixels) as image:
        return _sized(
            image, longest, channels, bits or _bits_of(image) or DEPTHS[-1], in_proportion
        )


def bits_of(source: Path | bytes, most_pixels: int = MOST_PIXELS) -> int | None:
    """Return how many bits the grey levels of an image use, one of `DEPTHS`.

    None if the file has one byte for each, as most have.

    Raises:
        UnreadableImage: as `decode` raises it.
    """
    with _opened(source, most_pixels) as image:
        return _bits_of(image)


@contextmanager
def _opened(source: Path | bytes, most_pixels: int) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong in the block is said of the image."""
    with _said_of_the_image():
        content = source if isinstance(source, bytes) else read_file(source)
        if not content:
            raise UnreadableImage("is empty (0 bytes)")
        image = opening.opened(content, most_pixels)
        if image is None:
            raise UnreadableImage(f"is none of {', '.join(FORMATS)}")
        if image.mode == "F":
            raise UnreadableImage("has grey levels of floating point")
        yield image


@contextmanager
def _said_of_the_image() -> Iterator[None]:
    try:
        yield
    except UnreadableImage:
        raise
    except TooLarge as error:
        raise UnreadableImage(str(error)) from error
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
    image.load()
    turn = TURNS.get(image.getexif().get(opening.ORIENTATION))
    # A large image has no room for copies that change nothing.
    upright = image if turn is None else image.transpose(turn)
    if upright.mode.startswith("I"):  # two bytes a grey level, which convert() would clip at 255
        levels = np.minimum(_levels(upright) >> (bits - 8), 255)
        upright = Image.fromarray(levels.astype(np.uint8))
    height, width = choose(*upright.size)
    in_mode = upright if upright.mode == mode else upright.convert(mode)
    sized = in_mode.resize((width, height), Image.Resampling.BILINEAR)
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
    """Return the width and height of an image in pixels, without decoding it.

    Raises:
        UnreadableImage: as `decode` raises it.
    """
    with _said_of_the_image(), _open_regular(path) as file:
        image = opening.reader(file)
        if image is None:
            raise UnreadableImage(f"is none of {', '.join(FORMATS)}")
        return image.size


def grey(images: np.ndarray) -> np.ndarray:
    """Return images (n, height, width, channels) as grey, (n, height, width), of the same type."""
    if images.shape[-1] == 1:
        return images[..., 0]
    # ITU-R BT.601, as Pillow converts to "L".
    return (images @ np.array([0.299, 0.587, 0.114], np.float32)).astype(images.dtype)
