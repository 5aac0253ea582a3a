"""Class folders to uint8 arrays, decoded once; labels, digests; splits by photograph."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from defect_detection import PipelineError, images
from defect_detection.files import read_mapping, replacing
from defect_detection.settings import InferenceExamples

log = logging.getLogger(__name__)

Skipped = tuple[tuple[str, str], ...]  # path and reason of each unreadable picture

# Written once, here: the order of the folders and which of them is positive. A label and a score
# both speak of the defect: 1 is a defect for certain.
CLASSES = ("def_front", "ok_front")
POSITIVE = "def_front"
SPLITS = ("train", "test")
SPLIT_FILE = "split.csv"  # in the data folder: which picture is on which side, whatever its folder

LARGEST_UNREADABLE_SHARE = 0.05
CACHES_KEPT = 6  # files of decoded pictures: three versions of the data, train and test


@dataclass(frozen=True)
class Dataset:
    """The readable pictures of one split, `train` or `test`.

    Attributes:
        images: uint8 (n, height, width, 1), memory-mapped, 0 = black.
        labels: uint8 (n,), 1 = defect, 0 = ok.
        paths: (n,) paths relative to the data folder, sorted by class, then name.
        contents: (n,) SHA-256 of each file.
        digest: SHA-256 over the paths and contents of all pictures, also the unreadable.
        skipped: path and reason of each unreadable picture.
    """

    images: np.ndarray
    labels: np.ndarray
    paths: tuple[str, ...]
    contents: tuple[str, ...]
    digest: str
    skipped: Skipped

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def counts(self) -> dict[str, int]:
        """Pictures in each class folder."""
        return {name: int(np.sum(self.labels == (name == POSITIVE))) for name in CLASSES}


def load(data: Path, split: str, image_size: tuple[int, int], cache: Path) -> Dataset:
    """Load the pictures of a split, from the cache where their content is known.

    They lie in `data/<split>/{def_front,ok_front}`, unless `data/split.csv` says otherwise.

    Args:
        data: folder that holds `train` and `test`.
        split: "train" or "test".
        image_size: height and width in pixels.
        cache: folder of decoded pictures.

    Raises:
        PipelineError: a class folder is missing or holds no readable picture, more than 5 % of
            the pictures are unreadable, or `split.csv` lacks a picture.
    """
    paths = pictures(data, split)
    where = str(data / split)
    if (data / SPLIT_FILE).exists():
        where = f"{split} of {data / SPLIT_FILE}"
        log.info(
            "Following %s, delete it to go back: %d in %s", data / SPLIT_FILE, len(paths), split
        )
    loaded = read(data, paths, split, image_size, cache)
    refuse_many_skipped(loaded.skipped, len(paths), where)
    for name, count in loaded.counts.items():
        if not count:
            raise PipelineError(f"{data / split / name} holds no picture that can be read")
    return loaded


def pictures(data: Path, split: str) -> list[Path]:
    """Return the pictures of a split, sorted by class, then path.

    Raises:
        PipelineError: a class folder is missing or empty, or `split.csv` lacks a picture.
    """
    if not (data / SPLIT_FILE).exists():
        return in_folder(data, split)
    side = read_mapping(data / SPLIT_FILE, "path", "split")
    found = []
    folders = [folder for folder in SPLITS if (data / folder).is_dir()]
    for path in (path for folder in folders for path in in_folder(data, folder)):
        name = path.relative_to(data).as_posix()
        if side.get(name) not in SPLITS:
            raise PipelineError(
                f"{data / SPLIT_FILE} does not say whether {name} is train or test. Run "
                f"'python src/audit.py --resplit 0.2' again, or delete the file"
            )
        if side[name] == split:
            found.append(path)
    return sorted(found, key=lambda path: CLASSES.index(path.parent.name))


def in_folder(data: Path, split: str) -> list[Path]:
    """Return the pictures that lie in `data/<split>`, sorted by class, then name."""
    return [path for name in CLASSES for path in _pictures(data / split / name)]


def read(
    data: Path, paths: list[Path], name: str, image_size: tuple[int, int], cache: Path
) -> Dataset:
    """Load pictures as `load` does, however many of them can be read."""
    names = [path.relative_to(data).as_posix() for path in paths]
    contents = [hashlib.sha256(_content(path)).hexdigest() for path in paths]
    digest = _digest(names, contents)
    height, width = image_size
    stem = cache / f"{name}-{digest[:16]}-{height}x{width}-{images.PREPROCESSING}"
    skipped = _cached(stem, len(paths), image_size)
    if skipped is None:
        log.info("Decoding %d pictures of %s", len(paths), data / name)
        skipped = _decode_all(paths, data, image_size, stem)
        _delete_old(cache)
    shape = (len(paths) - len(skipped), height, width, 1)
    pixels = np.memmap(_pixels(stem), np.uint8, "c", shape=shape) if shape[0] else np.empty(shape)

    unreadable = {path for path, _ in skipped}
    kept = [i for i, path in enumerate(names) if path not in unreadable]
    return Dataset(
        images=pixels,
        labels=np.array([paths[i].parent.name == POSITIVE for i in kept], np.uint8),
        paths=tuple(names[i] for i in kept),
        contents=tuple(contents[i] for i in kept),
        digest=digest,
        skipped=skipped,
    )


def split_validation(
    labels: np.ndarray, photographs: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hold a share of the pictures back, whole photographs only, near to it in each class.

    Args:
        labels: (n,), 1 = defect.
        photographs: (n,) number of the photograph that each picture was made from.
        share: of the pictures to hold back, in (0, 1).
        seed: which photographs.

    Returns:
        Sorted indices of the training and of the held-back pictures, both int64.

    Raises:
        PipelineError: a class has too few photographs to have one on each side.
    """
    for count in range(max(2, round(1 / share)), 1, -1):
        found = [
            (_distance(labels, rows[1], share), rows)
            for rows in _group_folds(labels, photographs, count, seed)
            if all(set(labels[side]) == {0, 1} for side in rows)
        ]
        if found:
            return min(found, key=lambda one: one[0])[1]
    raise _too_few_to_hold_back(labels, photographs, share)


def validation_parts(
    labels: np.ndarray, photographs: np.ndarray, share: float, seed: int
) -> list[np.ndarray]:
    """Divide pictures into parts to hold back in turn, whole photographs only.

    Args:
        labels: (n,), 1 = defect.
        photographs: (n,) number of the photograph that each picture was made from.
        share: of the pictures in a part, in (0, 1); larger if there are few photographs.
        seed: which photographs go together.

    Returns:
        Sorted indices of each part; together they are all pictures.

    Raises:
        PipelineError: a class has too few photographs to have one on each side.
    """
    for count in range(max(2, round(1 / share)), 1, -1):
        made = _group_folds(labels, photographs, count, seed)
        if made and all(set(labels[side]) == {0, 1} for rows in made for side in rows):
            return [held_back for _, held_back in made]
    raise _too_few_to_hold_back(labels, photographs, share)


def folds(
    labels: np.ndarray, photographs: np.ndarray, count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide pictures for cross-validation; no photograph is cut apart.

    Returns:
        For each fold the sorted indices of its training and of its held-out pictures.

    Raises:
        PipelineError: a fold would lack a class.
    """
    made = _group_folds(labels, photographs, count, seed)
    if len(made) < count or any(set(labels[side]) != {0, 1} for rows in made for side in rows):
        raise PipelineError(
            f"Too few photographs for {count} folds: {_photographs_of_each(labels, photographs)}"
        )
    return made


def _group_folds(
    labels: np.ndarray, photographs: np.ndarray, count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedGroupKFold  # 1 s that inference does not need

    if count > min(labels.sum(), len(labels) - labels.sum()):
        return []
    folder = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    return list(folder.split(labels, labels, photographs))


def _distance(labels: np.ndarray, held_back: np.ndarray, share: float) -> float:
    return max(abs((labels[held_back] == c).sum() / (labels == c).sum() - share) for c in (0, 1))


def _too_few_to_hold_back(
    labels: np.ndarray, photographs: np.ndarray, share: float
) -> PipelineError:
    return PipelineError(
        f"Too few photographs to hold {share:.0%} of the pictures back: "
        f"{_photographs_of_each(labels, photographs)}"
    )


def _photographs_of_each(labels: np.ndarray, photographs: np.ndarray) -> str:
    return ", ".join(
        f"{len(np.unique(photographs[labels == (name == POSITIVE)]))} of {name}" for name in CLASSES
    )


def first_picture(data: Path, split: str, class_name: str) -> Path:
    """Return the first picture of a class folder, by name.

    Raises:
        PipelineError: the folder is missing or holds none.
    """
    return _pictures(data / split / class_name)[0]


def example_pictures(
    data: Path, configured: InferenceExamples, say: Callable[[str], None]
) -> list[Path]:
    """Return a defective and a good example, the first of its class where one is not there.

    Args:
        data: the data folder.
        configured: the examples, relative to it.
        say: is told of each example that is not there.

    Raises:
        PipelineError: nor is any other picture of the class.
    """
    found = []
    for name, class_name in (
        (configured.defective_image, "def_front"),
        (configured.ok_image, "ok_front"),
    ):
        example = data / name
        if not example.is_file():
            instead = first_picture(data, "test", class_name)
            say(f"{example} is not there, running {instead} instead")
            example = instead
        found.append(example)
    return found


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures right in `folder`, sorted by name; hidden files are left out."""
    return sorted(p for p in folder.iterdir() if images.is_picture(p.name) and p.is_file())


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


def _digest(names: list[str], contents: list[str]) -> str:
    total = hashlib.sha256()
    for name, content in zip(names, contents, strict=True):
        total.update(name.encode() + b"\0" + bytes.fromhex(content))
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
