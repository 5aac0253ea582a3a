"""Opens encoded images with Pillow, and refuses those that would take all memory or time.

A file of some kilobytes may say that it has a billion pixels, or that it has thousands of notes, of
which each is as long as the file. Pillow's own limit on pixels is one for the whole process.
"""

import io
import math
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
MOST_PIXELS = 100_000_000
MOST_EXIF = 2**17  # bytes; Pillow's memory for it grows with its square
MOST_READ = 4  # times its size that a file is read: all its notes may point to the same bytes
MOST_SCANS = 50  # of a JPEG with the most pixels; each is a pass over all, cameras write ten

ORIENTATION = 0x0112  # tag of EXIF and TIFF
TILE_WIDTH, TILE_LENGTH = 0x0142, 0x0143  # tags of TIFF

# Pillow's names of its readers; each is imported for the first image of its format.
_READERS = {
    **{b"\xff\xd8\xff": "Jpeg", b"\x89PNG\r\n\x1a\n": "Png", b"BM": "Bmp", b"RIFF": "WebP"},
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+"), "Tiff"),
}


class TooLarge(Exception):
    """An image that would take too much memory or time; the message says why."""


def opened(content: bytes, most_pixels: int) -> "ImageFile | None":
    """Open an image; its pixels are not decoded yet.

    Args:
        content: of its file.
        most_pixels: that it may have.

    Returns:
        The image, None if it has none of `FORMATS`.

    Raises:
        TooLarge: it has more pixels, or would take too much for another reason.
        Exception: it is broken. Pillow raises a dozen kinds of errors, SyntaxError among them.
    """
    image = reader(_Content(content))
    if image is None:
        return None
    pixels = image.width * image.height
    _require_few(pixels, most_pixels, "")
    if image.format == "JPEG":
        scans = content.count(b"\xff\xda")
        if scans * pixels > MOST_SCANS * most_pixels:
            raise TooLarge(f"has {scans} scans, which would take too long to decode")
    elif image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        _require_few(tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0), most_pixels, " in a tile")
        # Pillow reads what other tags point to when it decodes.
        notes = image.getexif()
        for tag in set(notes) - {ORIENTATION}:
            del notes[tag]
    return image


def reader(file: BinaryIO) -> "ImageFile | None":
    """Read the header of an image, None if it has none of `FORMATS`; raise as `opened` does."""
    start = file.read(8)
    file.seek(0)
    for signature, name in _READERS.items():
        if start.startswith(signature):
            return _reader(name)(file)
    return None


def suffix_of(content: bytes) -> str:
    """Return the suffix of an image's file by its content, such as ".jpeg"; ".bin" for no image."""
    for signature, name in _READERS.items():
        if content.startswith(signature):
            return f".{name.lower()}"
    return ".bin"


def _require_few(pixels: int, most: int, where: str) -> None:
    if pixels > most:
        raise TooLarge(
            f"has {math.ceil(pixels / 1e6)} megapixels{where}, at most {most / 1e6:g} are decoded "
            f"(max_megapixels in src/config.yaml, when the model is trained)"
        )


class _Content(io.BytesIO):
    """The content of a file, which is read a few times over at most."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self._left = MOST_READ * len(content) + 2**20

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self._left -= len(found)
        if self._left < 0:
            raise TooLarge("has parts that share the same bytes, which would take too much memory")
        return found


@cache
def _reader(name: str) -> "type[ImageFile]":
    """Return Pillow's reader of a format, with the limits of this module instead of Pillow's."""
    plain: Any = getattr(import_module(f"PIL.{name}ImagePlugin"), f"{name}ImageFile")

    class Reader(plain):  # type: ignore[misc]
        def getexif(self) -> Image.Exif:
            for key in ("exif", "Raw profile type exif"):
                if len(self.info.get(key) or "") > MOST_EXIF:
                    raise TooLarge(f"has {len(self.info[key])} bytes of EXIF, too many to read")
            return super().getexif()

        def load_prepare(self) -> None:
            # Pillow compares the size of a TIFF with its limit where it makes room for it.
            if hasattr(self, "_tile_size") and self._im is None:
                self.im = Image.core.new(self.mode, self._tile_size)
            super().load_prepare()

    return Reader
