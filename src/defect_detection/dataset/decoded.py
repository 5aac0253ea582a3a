"""Images decoded once: their pixels are kept in a file and mapped into memory."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from defect_detection.atomic import replace_atomically
from defect_detection.dataset.folder import DataFolder
from defect_detection.runtime import preprocessing
from defect_detection.runtime.decision import CLASSES, POSITIVE
from defect_detection.runtime.preprocessing import ImageFormat, UnreadableImage

log = logging.getLogger(__name__)

CACHES_KEPT = 6  # files of decoded images: three versions of the data, train and test
BLOCK = 1024  # images that are decoded before their pixels are written

Skipped = tuple[tuple[str, str], ...]  # path and reason of each unreadable image


@dataclass(frozen=True)
class Decoded:
    """The readable images of one side of a data folder.

    Attributes:
        folder: the data folder, from which the paths count.
        side: "train" or "test".
        images: uint8 (n, *format.shape), memory-mapped, 0 = black.
        format: of the images.
        labels: uint8 (n,), 1 = defect, 0 = ok.
        paths: (n,) paths relative to the folder, sorted by class, then name.
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


def decode(folder: DataFolder, paths: list[Path], side: str, wanted: ImageFormat) -> Decoded:
    """Decode image files, or take their pixels from the cache if their content is known.

    Args:
        folder: holds the files and names the cache.
        paths: of the files.
        side: of the split, named in messages and in the cache.
        wanted: size, colour and shape of the pixels.
    """
    names = [folder.relative(path) for path in paths]
    contents = [hashlib.sha256(_content(path)).hexdigest() for path in paths]
    digest = _digest([_with_class(folder, name) for name in names], contents)
    stem = folder.cache / f"{side}-{digest[:16]}-{wanted.key}"
    skipped = _cached(stem, len(paths), wanted)
    if skipped is None:
        log.info("Decoding %d images of %s", len(paths), folder.path / side)
        skipped = _decode_all(folder, paths, wanted, stem)
        _delete_old(folder.cache)
    shape = (len(paths) - len(skipped), *wanted.shape)
    pixels = np.memmap(_pixels(stem), np.uint8, "c", shape=shape) if shape[0] else np.empty(shape)
    unreadable = {path for path, _ in skipped}
    kept = [number for number, path in enumerate(names) if path not in unreadable]
    return Decoded(
        folder=folder,
        side=side,
        images=pixels,
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


def _digest(names: list[str], contents: list[str]) -> str:
    total = hashlib.sha256()
    for name, content in zip(names, contents, strict=True):
        total.update(name.encode() + b"\0" + bytes.fromhex(content))
    return total.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # `preprocessing.decode` fails for the same reason and names the image
        return b""


def _pixels(stem: Path) -> Path:
    return stem.with_suffix(".pixels")


def _skipped(stem: Path) -> Path:
    return stem.with_suffix(".json")


def _cached(stem: Path, total: int, wanted: ImageFormat) -> Skipped | None:
    """Return what was skipped when the images were decoded; None if the cache is incomplete."""
    try:
        skipped = tuple((path, why) for path, why in json.loads(_skipped(stem).read_text()))
        size = _pixels(stem).stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    return skipped if size == (total - len(skipped)) * math.prod(wanted.shape) else None


def _decode_all(folder: DataFolder, paths: list[Path], wanted: ImageFormat, stem: Path) -> Skipped:
    """Write the pixels of all readable images to the cache; return the unreadable ones."""
    skipped = []
    with replace_atomically(_pixels(stem)) as temporary, temporary.open("wb") as file:
        for path, image in _decoded(paths, wanted):
            if isinstance(image, UnreadableImage):
                skipped.append((folder.relative(path), str(image)))
            else:
                file.write(np.ascontiguousarray(image).data)
    with replace_atomically(_skipped(stem)) as temporary:
        temporary.write_text(json.dumps(skipped))
    return tuple(skipped)


def _decoded(
    paths: list[Path], wanted: ImageFormat
) -> Iterator[tuple[Path, np.ndarray | UnreadableImage]]:
    def attempt(path: Path) -> np.ndarray | UnreadableImage:
        try:
            return preprocessing.decode(path, wanted)
        except UnreadableImage as error:
            return error

    # Threads, since Pillow decodes without the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), BLOCK):
            block = paths[start : start + BLOCK]
            yield from zip(block, pool.map(attempt, block), strict=True)


def _delete_old(cache: Path) -> None:
    newest_first = sorted(cache.glob("*.pixels"), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in newest_first[CACHES_KEPT:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".json").unlink(missing_ok=True)
