"""Images decoded once: their pixels are kept in a file and mapped into memory."""

import hashlib
import json
import logging
import math
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from defect_detection import PipelineError
from defect_detection.atomic import replace_atomically
from defect_detection.dataset.folder import DataFolder
from defect_detection.runtime import preprocessing
from defect_detection.runtime.decision import CLASSES, POSITIVE
from defect_detection.runtime.preprocessing import ImageFormat, UnreadableImage

log = logging.getLogger(__name__)

CACHES_KEPT = 9  # files of decoded images: three versions of train, test and approved ones
BLOCK = 1024  # images that are decoded before their pixels are written
CHECKED = 64  # images whose checksums a thread computes at a time

Skipped = tuple[tuple[str, str], ...]  # path and reason of each unreadable image


@dataclass(frozen=True)
class Decoded:
    """The readable images of one side of a data folder.

    Attributes:
        folder: the data folder, from which the paths count.
        side: "train", "test", or "field" for approved images from the line.
        images: uint8 (n, *format.shape), memory-mapped, 0 = black.
        format: of the images.
        labels: uint8 (n,), 1 = defect, 0 = ok.
        paths: (n,) paths relative to the folder, sorted by class.
        contents: (n,) SHA-256 of each file.
        digest: SHA-256 of the paths and contents of all images, the unreadable ones included.
        skipped: path and reason of each unreadable image.
    """

    folder: DataFolder
    side: str
    images: np.ndarray
    format: ImageFormat
    labels: np.ndarray
    paths: tuple[str, ...]
    contents: tuple[str, ...]
    digest: str
    skipped: Skipped

    def __len__(self) -> int:
        return len(self.paths)

    def __str__(self) -> str:
        """Return where the images lie."""
        return str(self.folder.path / self.side)

    @property
    def counts(self) -> dict[str, int]:
        """Images of each class."""
        return {name: int(np.sum(self.labels == (name == POSITIVE))) for name in CLASSES}

    def file(self, row: int) -> Path:
        """Return the file of an image."""
        return self.folder.path / self.paths[row]

    def content(self, row: int) -> bytes:
        """Return the content of the file of an image.

        Raises:
            PipelineError: the file has changed since it was read.
        """
        return read_unchanged(self.file(row), self.contents[row])


def decode(folder: DataFolder, paths: list[Path], side: str, wanted: ImageFormat) -> Decoded:
    """Decode image files, or take their pixels from the cache if their content is known.

    Args:
        folder: holds the files and names the cache.
        paths: of the files.
        side: of the split, named in messages and in the cache.
        wanted: size, colour and shape of the pixels.

    Raises:
        PipelineError: a file was changed meanwhile, or the cache cannot be read or written.
    """
    names = [folder.relative(path) for path in paths]
    contents = [_content(path)[1] for path in paths]
    digest = digest_of([_with_class(folder, name) for name in names], contents)
    stem = folder.cache / f"{side}-{digest[:16]}-{wanted.key}-{wanted.most_pixels}"
    found = _cached(stem, len(paths), wanted)
    if found is None:
        log.info("Decoding %d images of %s", len(paths), folder.path / side)
        _write(stem, zip(names, _decoded(paths, contents, wanted), strict=True))
        _delete_old(folder.cache)
        found = _cached(stem, len(paths), wanted)
        if found is None:
            raise PipelineError(f"{_pixels(stem)}: is not what was written there. Check the disk")
    images, skipped = found
    unreadable = {path for path, _ in skipped}
    kept = [number for number, path in enumerate(names) if path not in unreadable]
    return Decoded(
        folder=folder,
        side=side,
        images=images,
        format=wanted,
        labels=np.array([folder.class_of(names[number]) == POSITIVE for number in kept], np.uint8),
        paths=tuple(names[number] for number in kept),
        contents=tuple(contents[number] for number in kept),
        digest=digest,
        skipped=skipped,
    )


def _with_class(folder: DataFolder, name: str) -> str:
    """Return a path, and its class if no folder of it has that name: settings may change it."""
    label = folder.class_of(name)
    return name if label in name.split("/") else f"{name} is {label}"


def digest_of(names: list[str], contents: list[str]) -> str:
    """Return the SHA-256 of the paths and contents of images."""
    total = hashlib.sha256()
    for name, content in zip(names, contents, strict=True):
        total.update(name.encode(errors="surrogateescape") + b"\0" + bytes.fromhex(content))
    return total.hexdigest()


def _content(path: Path) -> tuple[bytes | UnreadableImage, str]:
    """Return the content of a file, or why it cannot be read; and the content's SHA-256."""
    try:
        content = preprocessing.read_file(path)
    except UnreadableImage as error:
        return error, hashlib.sha256().hexdigest()
    return content, hashlib.sha256(content).hexdigest()


def read_unchanged(path: Path, before: str) -> bytes:
    """Return the content of a file that had the SHA-256 `before`.

    Raises:
        PipelineError: it has another one now.
        UnreadableImage: it could not be read before either.
    """
    content, now = _content(path)
    if now != before:
        raise PipelineError(f"{path} was changed while the images were read. Run this again")
    if isinstance(content, UnreadableImage):
        raise content
    return content


def _decoded(
    paths: list[Path], contents: list[str], wanted: ImageFormat
) -> Iterator[np.ndarray | UnreadableImage]:
    """Yield the pixels of files that still have the SHA-256 `contents`, or why there are none."""

    def attempt(path: Path, before: str) -> np.ndarray | UnreadableImage:
        try:
            return preprocessing.decode(read_unchanged(path, before), wanted)
        except UnreadableImage as error:
            return error

    # Threads, since Pillow decodes without the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), BLOCK):
            rows = slice(start, start + BLOCK)
            yield from pool.map(attempt, paths[rows], contents[rows])


def _pixels(stem: Path) -> Path:
    return stem.with_suffix(".pixels")


def _index(stem: Path) -> Path:
    return stem.with_suffix(".json")


def _write(stem: Path, decoded: Iterable[tuple[str, np.ndarray | UnreadableImage]]) -> None:
    """Write the pixels of readable images to the cache; beside them the others and checksums."""
    skipped: list[tuple[str, str]] = []
    checks: list[int] = []
    start = _start(stem)
    with replace_atomically(_pixels(stem)) as temporary, temporary.open("wb") as file:
        for name, image in decoded:
            if isinstance(image, UnreadableImage):
                skipped.append((name, str(image)))
            else:
                pixels = np.ascontiguousarray(image)
                file.write(pixels.data)
                checks.append(zlib.crc32(pixels.data, start))
    checks.append(_check(tuple(skipped), start))
    with replace_atomically(_index(stem)) as temporary:
        temporary.write_text(json.dumps({"skipped": skipped, "checks": checks}))


def _cached(stem: Path, total: int, wanted: ImageFormat) -> tuple[np.ndarray, Skipped] | None:
    """Return the pixels of `total` images without the skipped ones, and these.

    None if they were not decoded yet, or are not what was written.

    Raises:
        PipelineError: a file of the cache cannot be read.
    """
    found, start = None, _start(stem)
    try:
        index = json.loads(_index(stem).read_bytes())
        skipped = tuple((path, why) for path, why in index["skipped"])
        with _pixels(stem).open("rb") as file:
            images, checks = _mapped(file, (total - len(skipped), *wanted.shape), start)
        if [*checks, _check(skipped, start)] == index["checks"]:
            found = images, skipped
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PipelineError(f"{error.filename}: cannot be read ({error.strerror})") from error
    # Damaged JSON may hold anything, in any depth.
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    if found is None:
        log.warning("%s is damaged: the images are decoded again", _pixels(stem))
    return found


def _start(stem: Path) -> int:
    """Return the checksum of the name; all others start from it, so that no other file passes."""
    return zlib.crc32(stem.name.encode())


def _check(skipped: Skipped, start: int) -> int:
    return zlib.crc32(json.dumps(skipped).encode(), start)


def _mapped(file: BinaryIO, shape: tuple[int, ...], start: int) -> tuple[np.ndarray, list[int]]:
    """Map pixels into memory; return them, and the checksum of each image.

    Raises:
        ValueError: the file has another size.
    """
    if os.fstat(file.fileno()).st_size != math.prod(shape):
        raise ValueError("another size")
    if not shape[0]:
        return np.empty(shape, np.uint8), []
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    images = np.frombuffer(mapped, np.uint8).reshape(shape)
    blocks = [images[first : first + CHECKED] for first in range(0, len(images), CHECKED)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda block: [zlib.crc32(image, start) for image in block], blocks)
        checks = list(chain.from_iterable(found))
    mapped.madvise(mmap.MADV_DONTNEED)  # else all that was read counts as memory of the process
    return images, checks


def _delete_old(cache: Path) -> None:
    used = {}
    for path in cache.glob("*.pixels"):
        with suppress(FileNotFoundError):  # another process deleted it
            used[path] = path.stat().st_mtime
    for old in sorted(used, key=lambda path: used[path], reverse=True)[CACHES_KEPT:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".json").unlink(missing_ok=True)
