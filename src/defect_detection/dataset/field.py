"""Approved images from the line: which of them are learned from, and which only test models.

They lie in `field/` of the data folder, in a folder for each class. `field/split.csv` says on which
side each is. What was learned from never becomes a test, so that no model is tested on what it, or
one that it was fine-tuned from, has seen.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from defect_detection.atomic import read_mapping, write_mapping
from defect_detection.dataset.decoded import Decoded
from defect_detection.dataset.folder import FIELD, SIDES, DataFolder
from defect_detection.runtime import preprocessing
from defect_detection.runtime.decision import CLASSES

log = logging.getLogger(__name__)

SPLIT = f"{FIELD}/split.csv"
TRAIN, TEST = SIDES


@dataclass(frozen=True)
class FieldUse:
    """How approved images are used.

    Attributes:
        test_share: share of their photographs that only test models.
        learn: whether the others are learned from.
    """

    test_share: float
    learn: bool


def images(folder: DataFolder) -> list[Path]:
    """Return the approved images of a data folder, sorted by class, then path."""
    return [
        Path(file)
        for name in CLASSES
        for file in preprocessing.files_below(str(folder.path / FIELD / name))
        if preprocessing.is_image(Path(file).name)
    ]


def assign(
    folder: DataFolder, sides: Sequence[Decoded], photographs: Mapping[str, int], share: float
) -> dict[str, str]:
    """Return the side of each approved image by its path, and write it down.

    All images of a photograph are on one side. It is that of training if an image of it is in
    `train`, or was learned from before; that of testing if one is in `test`. Any other photograph
    is drawn by a hash of its content, so that each has the same chance, whenever it comes.

    Args:
        folder: the data folder.
        sides: its training, test and approved images.
        photographs: number of the photograph of each image, by path.
        share: of the photographs that only test.

    Raises:
        PipelineError: the file of the sides cannot be read or written.
    """
    training, testing, approved = sides
    file = folder.path / SPLIT
    known = read_mapping(file, "path", "split") if file.exists() else {}
    learned = {photographs[path] for path in training.paths}
    tested = {photographs[path] for path in testing.paths}
    # By name, which is the content's SHA-256: an image may have moved to the other class.
    by_name = {Path(path).name: side for path, side in known.items()}
    for path in approved.paths:
        if by_name.get(Path(path).name) == TRAIN:
            learned.add(photographs[path])
        elif by_name.get(Path(path).name) == TEST:
            tested.add(photographs[path])
    first: dict[int, str] = {}  # content of each photograph, by which it is drawn
    for path, content in zip(approved.paths, approved.contents, strict=True):
        number = photographs[path]
        first[number] = min(content, first.get(number, content))

    def side(number: int) -> str:
        if number in learned:
            return TRAIN
        # Hashed again, as the first of several hashes is small more often than one.
        drawn = int(hashlib.sha256(first[number].encode()).hexdigest()[:12], 16) / 16**12
        return TEST if number in tested or drawn < share else TRAIN

    found = {path: side(photographs[path]) for path in approved.paths}
    if {**known, **found} != known:
        write_mapping(file, "path", "split", {**known, **found})
    return found


def learned_from(
    training: Decoded, approved: Decoded, sides: Mapping[str, str]
) -> tuple[list[Path], list[Path]]:
    """Return the training images that stay, and the approved ones that join them.

    An image that is in `train` already does not join. If it lies there under the other label, the
    approved label replaces that one.
    """
    label_of = dict(zip(training.contents, training.labels, strict=True))
    corrected = set()
    joining = []
    for row, (path, content) in enumerate(zip(approved.paths, approved.contents, strict=True)):
        if sides[path] != TRAIN:
            continue
        if content not in label_of:
            joining.append(approved.file(row))
        elif label_of[content] != approved.labels[row]:
            log.info("%s replaces the label of the same image in train", path)
            corrected.add(content)
            joining.append(approved.file(row))
    unreadable = [training.folder.path / path for path, _ in training.skipped]
    staying = [
        training.file(row)
        for row, content in enumerate(training.contents)
        if content not in corrected
    ]
    return staying + unreadable, joining
