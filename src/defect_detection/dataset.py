"""Class folders to uint8 arrays, decoded once; labels, digest, validation split."""

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

from defect_detection import PipelineError, images
from defect_detection.files import replacing

log = logging.getLogger(__name__)

Skipped = tuple[tuple[str, str], ...]  # path and reason of each unreadable picture

# Written once, here: the order of the folders and which of them is positive. A label and a score
# both speak of the defect: 1 is a defect for certain.
CLASSES = ("def_front", "ok_front")
POSITIVE = "def_front"

LARGEST_UNREADABLE_SHARE = 0.05
CACHES_KEPT = 6  # files of decoded pictures: three versions of the data, train and test


@dataclass(frozen=True)
class Dataset:
    """The readable pictures of one folder, `train` or `test`.

    Attributes:
        images: uint8 (n, height, width, 1), memory-mapped, 0 = black.
        labels: uint8 (n,), 1 = defect, 0 = ok.
        paths: (n,) paths relative to the data folder, sorted by class, then name.
        digest: SHA-256 over the paths and contents of all pictures, also the unreadable.
        skipped: path and reason of each unreadable picture.
    """

    images: np.ndarray
    labels: np.ndarray
    paths: tuple[str, ...]
    digest: str
    skipped: Skipped

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def counts(self) -> dict[str, int]:
        """Pictures in each class folder."""
        return {name: int(np.sum(self.labels == (name == POSITIVE))) for name in CLASSES}


def load(data: Path, split: str, image_size: tuple[int, int], cache: Path) -> Dataset:
    """Load `data/<split>/{def_front,ok_front}`, from the cache where its content is known.

    Args:
        data: folder that holds `train` and `test`.
        split: "train" or "test".
        image_size: height and width in pixels.
        cache: folder of decoded pictures.

    Raises:
        PipelineError: a class folder is missing or holds no readable picture, or more than
            5 % of the pictures are unreadable.
    """
    paths = [path for name in CLASSES for path in _pictures(data / split / name)]
    digest = _digest(paths, data)
    height, width = image_size
    stem = cache / f"{split}-{digest[:16]}-{height}x{width}-{images.PREPROCESSING}"
    skipped = _cached(stem, len(paths), image_size)
    if skipped is None:
        log.info("Decoding %d pictures of %s", len(paths), data / split)
        skipped = _decode_all(paths, data, image_size, stem)
        _delete_old(cache)
    refuse_many_skipped(skipped, len(paths), str(data / split))
    shape = (len(paths) - len(skipped), height, width, 1)
    pixels = np.memmap(_pixels(stem), np.uint8, "r", shape=shape)

    unreadable = {path for path, _ in skipped}
    names = [p.relative_to(data).as_posix() for p in paths]
    kept = tuple(name for name in names if name not in unreadable)
    labels = np.array([Path(name).parent.name == POSITIVE for name in kept], np.uint8)
    loaded = Dataset(pixels, labels, kept, digest, skipped)
    for name, count in loaded.counts.items():
        if not count:
            raise PipelineError(f"{data / split / name} holds no picture that can be read")
    return loaded


def split_validation(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split at random, keeping the classes' proportions.

    Returns:
        Sorted indices of the training and of the validation pictures, both int64.

    Raises:
        PipelineError: a class has too few pictures to have one on each side.
    """
    from sklearn.model_selection import train_test_split  # 1 s that inference does not need

    try:
        train, validation = train_test_split(
            np.arange(len(labels)), test_size=share, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise PipelineError(
            f"Too few pictures to hold {share:.0%} back for validation: "
            f"{int(labels.sum())} defects, {int((1 - labels).sum())} ok"
        ) from error
    return np.sort(train), np.sort(validation)


def first_picture(data: Path, split: str, class_name: str) -> Path:
    """Return the first picture of a class folder, by name.

    Raises:
        PipelineError: the folder is missing or holds none.
    """
    return _pictures(data / split / class_name)[0]


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures right in `folder`, sorted by name; hidden files are left out."""
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in images.SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def refuse_many_skipped(skipped: Skipped, total: int, where: str) -> None:
    """Name and count the unreadable pictures of `total`.

    Raises:
        PipelineError: they are more than 5 %.
    """
    for path, why in skipped:
        log.warning("%s %s: skipped", path, why)
    if len(skipped) > LARGEST_UNREADABLE_SHARE * total:
        path, why = skipped[0]
        raise PipelineError(
            f"{where}: {len(skipped)} of {total} cannot be read, more than "
            f"{LARGEST_UNREADABLE_SHARE:.0%}. Replace or delete them ({path} {why})"
        )
    if skipped:
        log.warning("%s: %d of %d skipped", where, len(skipped), total)


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise PipelineError(f"{folder} does not exist. See data/README.md, or run 'make sample'")
    found = list_pictures(folder)
    if not found:
        raise PipelineError(
            f"{folder} holds no pictures. Put .jpeg, .jpg or .png files there, or run 'make sample'"
        )
    ignored = sum(1 for p in folder.iterdir() if not p.name.startswith(".")) - len(found)
    if ignored:
        log.warning("%s: %d entries that are not .jpeg, .jpg or .png are ignored", folder, ignored)
    return found


def _digest(paths: list[Path], data: Path) -> str:
    total = hashlib.sha256()
    for path, content in zip(paths, map(_content, paths), strict=True):
        total.update(path.relative_to(data).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # decode() finds the same and names the picture
        return b""


def _pixels(stem: Path) -> Path:
    return stem.with_suffix(".pixels")


def _skipped(stem: Path) -> Path:
    return stem.with_suffix(".json")


def _cached(stem: Path, total: int, image_size: tuple[int, int]) -> Skipped | None:
    """Return what was skipped when the pictures were decoded; None if the cache is not whole."""
    try:
        skipped = tuple((path, why) for path, why in json.loads(_skipped(stem).read_text()))
        size = _pixels(stem).stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    return skipped if size == (total - len(skipped)) * math.prod(image_size) else None


def _decode_all(paths: list[Path], data: Path, image_size: tuple[int, int], stem: Path) -> Skipped:
    """Decode into the cache, one readable picture's bytes after the other; return the rest."""
    skipped = []
    with replacing(_pixels(stem)) as temporary, temporary.open("wb") as file:
        for path, image in _decoded(paths, image_size):
            if isinstance(image, images.UnreadableImage):
                skipped.append((path.relative_to(data).as_posix(), str(image)))
            else:
                file.write(image)
    with replacing(_skipped(stem)) as temporary:
        temporary.write_text(json.dumps(skipped))
    return tuple(skipped)


def _decoded(
    paths: list[Path], image_size: tuple[int, int]
) -> Iterator[tuple[Path, np.ndarray | images.UnreadableImage]]:
    def attempt(path: Path) -> np.ndarray | images.UnreadableImage:
        try:
            return images.decode(path, image_size)
        except images.UnreadableImage as error:
            return error

    # Threads, since Pillow decodes outside the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), 1024):
            block = paths[start : start + 1024]
            yield from zip(block, pool.map(attempt, block), strict=True)


def _delete_old(cache: Path) -> None:
    newest_first = sorted(cache.glob("*.pixels"), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in newest_first[CACHES_KEPT:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".json").unlink(missing_ok=True)
