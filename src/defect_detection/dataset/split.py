"""The training and the test images of a data folder, and what they share."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from defect_detection import PipelineError, sketch
from defect_detection.atomic import read_mapping, write_mapping
from defect_detection.dataset import decoded, field, holdout
from defect_detection.dataset.decoded import Decoded
from defect_detection.dataset.field import FieldUse
from defect_detection.dataset.folder import FIELD, SIDES, DataFolder
from defect_detection.runtime.decision import CLASSES, NEGATIVE, POSITIVE
from defect_detection.runtime.preprocessing import ImageFormat

log = logging.getLogger(__name__)

TEST_SHARE, SPLIT_SEED = 0.2, 42  # of a folder without train and test
LARGEST_UNREADABLE_SHARE = 0.05
FEW_DEFECTS = 10  # photographs of defects below which a model learns from good parts alone


@dataclass(frozen=True)
class Dataset(Decoded):
    """The readable images of one side of a data folder, and their photographs.

    Attributes:
        photographs: int (n,), number of the photograph that each image comes from; the same in
            the training and the test images of a folder.
    """

    photographs: np.ndarray

    @property
    def photograph_counts(self) -> list[int]:
        """Photographs of each class, in the order of `CLASSES`."""
        of_class = (self.labels == (name == POSITIVE) for name in CLASSES)
        return [len(np.unique(self.photographs[rows])) for rows in of_class]

    @property
    def few_defects(self) -> bool:
        """Whether there are too few photographs of defects to learn from."""
        return self.photograph_counts[CLASSES.index(POSITIVE)] < FEW_DEFECTS

    def subset(self, rows: Sequence[int], side: str) -> "Dataset":
        """Return some of the images, as those of a side."""
        paths = tuple(self.paths[row] for row in rows)
        contents = tuple(self.contents[row] for row in rows)
        return replace(
            self,
            side=side,
            images=self.images[list(rows)],
            labels=self.labels[list(rows)],
            paths=paths,
            contents=contents,
            digest=decoded.digest_of(list(paths), list(contents)),
            skipped=(),
            photographs=self.photographs[list(rows)],
        )

    def images_as(self, wanted: ImageFormat) -> np.ndarray:
        """Return the same images in another format, uint8 (n, *wanted.shape).

        They are all readable, so the most pixels of `wanted` do not count.

        Raises:
            PipelineError: the files have changed since this data set was read.
        """
        wanted = replace(wanted, most_pixels=self.format.most_pixels)
        if wanted == self.format:
            return self.images
        again = decoded.decode(
            self.folder, [self.file(row) for row in range(len(self))], self.side, wanted
        )
        if again.contents != self.contents:
            raise PipelineError(f"{self}: files were changed while they were read. Run this again")
        return again.images


@dataclass(frozen=True)
class Split:
    """The training and the test images of a data folder.

    Attributes:
        training: what models learn from.
        testing: what they are tested on.
        field: approved images from the line that only test models, None if there are none.
    """

    training: Dataset
    testing: Dataset
    field: Dataset | None = None

    @property
    def leaked(self) -> np.ndarray:
        """Which test images come from a photograph that is also in training: bool (n,)."""
        return np.isin(self.testing.photographs, self.training.photographs)

    @property
    def leaked_share(self) -> float:
        """Share of the test images that are leaked, in [0, 1]."""
        return float(self.leaked.mean())

    @property
    def sketch(self) -> str:
        """A sketch of the contents of all images."""
        return sketch.of([*self.training.contents, *self.testing.contents])

    @property
    def leakage(self) -> str:
        """The leakage in a sentence."""
        return describe_leakage(int(self.leaked.sum()), len(self.testing))


def describe_leakage(leaked: int, testing: int) -> str:
    """Return how many of the test images are leaked, in a sentence."""
    if not leaked:
        return "No test image comes from a photograph that is also in training."
    return (
        f"{leaked} of {testing} test images ({leaked / testing:.1%}) come from a photograph that "
        f"is also in training."
    )


def load(folder: DataFolder, wanted: ImageFormat, use: FieldUse | None = None) -> Split:
    """Load the training and the test images in a format.

    Args:
        folder: the data folder.
        wanted: size, colour and shape of the pixels.
        use: how approved images from the line are used, None if they are not.

    Raises:
        PipelineError: a class folder is missing or holds no readable image, more than 5 % of the
            images are unreadable, or `split.csv` lacks an image.
    """
    if folder.flat and not folder.split_file.exists():
        written = resplit(folder, TEST_SHARE, SPLIT_SEED, wanted)
        log.info(
            "%s has no train and test: %.0f%% of its photographs are test images, as %s says. "
            "Delete it to divide them anew",
            *(folder, 100 * TEST_SHARE, written),
        )
    files = {side: folder.images(side) for side in SIDES}
    if folder.split_file.exists():
        counted = ", ".join(f"{len(files[side])} in {side}" for side in SIDES)
        log.info("Following %s: %s. Delete it to use the folders", folder.split_file, counted)
    every = [decoded.decode(folder, files[side], side, wanted) for side in SIDES]
    for one in every:
        _require_readable(one)
    approved = field.images(folder) if use is not None else []
    if use is None or not approved:
        training, testing = _with_photographs(folder, every)
        return Split(training, testing)
    every.append(decoded.decode(folder, approved, FIELD, wanted))
    for path, why in every[-1].skipped:
        log.warning("%s %s: skipped", path, why)
    return _with_field(folder, _with_photographs(folder, every), use)


def _with_field(folder: DataFolder, every: list[Dataset], use: FieldUse) -> Split:
    """Return training, test and approved images as a split.

    Args:
        folder: the data folder.
        every: its training, test and approved images.
        use: how the approved ones are used.
    """
    training, testing, approved = every
    numbers = {
        path: int(number)
        for one in every
        for path, number in zip(one.paths, one.photographs, strict=True)
    }
    sides = field.assign(folder, every, numbers, use.test_share)
    only_test = [row for row, path in enumerate(approved.paths) if sides[path] == field.TEST]
    if use.learn:
        staying, joining = field.learned_from(training, approved, sides)
        if joining:
            log.info("%d approved images from the line join the training images", len(joining))
            files = folder.by_class(staying + joining)
            joined = decoded.decode(folder, files, training.side, training.format)
            photographs = np.array([numbers[path] for path in joined.paths], int)
            training = Dataset(**vars(joined), photographs=photographs)
    return Split(training, testing, approved.subset(only_test, FIELD) if only_test else None)


def read(folder: DataFolder, files: dict[str, list[Path]], wanted: ImageFormat) -> list[Dataset]:
    """Read image files, however many of them are readable, and find their photographs.

    Args:
        folder: the data folder.
        files: of each side.
        wanted: size, colour and shape of the pixels.

    Returns:
        A data set for each side, in the order of `files`.
    """
    every = [decoded.decode(folder, paths, side, wanted) for side, paths in files.items()]
    return _with_photographs(folder, every)


def _with_photographs(folder: DataFolder, every: list[Decoded]) -> list[Dataset]:
    found = _photographs(folder, every)
    return [
        Dataset(**vars(one), photographs=photographs)
        for one, photographs in zip(every, found, strict=True)
    ]


def resplit(folder: DataFolder, share: float, seed: int, wanted: ImageFormat) -> Path:
    """Write `split.csv`: a test set of `share` that has no photograph in common with training.

    No image is moved. Classes keep their proportions as well as whole photographs allow.

    Returns:
        The file.

    Raises:
        PipelineError: a class has too few photographs.
    """
    every = read(folder, {side: folder.images_in(side) for side in folder.sides}, wanted)
    paths = [path for one in every for path in one.paths]
    labels = np.concatenate([one.labels for one in every])
    photographs = np.concatenate([one.photographs for one in every])
    testing = set(holdout.hold_out(labels, photographs, share, seed)[1])
    # An unreadable image may become readable: it goes to training, where it is skipped.
    rows = {path: "train" for one in every for path, _ in one.skipped}
    rows |= {path: "test" if row in testing else "train" for row, path in enumerate(paths)}
    write_mapping(folder.split_file, "path", "split", dict(sorted(rows.items())))
    return folder.split_file


def _photographs(folder: DataFolder, sides: Sequence[Decoded]) -> list[np.ndarray]:
    """Number the photographs: as `groups.csv` says, and for images that it lacks as found.

    An image that `groups.csv` lacks belongs to the photograph of those that it is found with.
    """
    named: dict[str, str] = {}
    if folder.groups_file.exists():
        named = read_mapping(folder.groups_file, "path", "photo")
    paths = [path for side in sides for path in side.paths]
    found: dict[str, int] = {}
    if any(path not in named for path in paths):
        found = _find_photographs(folder, sides)
    given = {found[path]: named[path] for path in reversed(paths) if path in named and found}
    names: dict[object, int] = {}

    def number(path: str) -> int:
        name = named.get(path) or given.get(found[path]) or found[path]
        return names.setdefault(name, len(names))

    return [np.array([number(path) for path in side.paths], int) for side in sides]


def _find_photographs(folder: DataFolder, sides: Sequence[Decoded]) -> dict[str, int]:
    """Return the number of the photograph of each image, by path."""
    from defect_detection.dataset import photographs  # OpenCV and SciPy

    contents = {
        path: content
        for side in sides
        for content, path in zip(side.contents, side.paths, strict=True)
    }
    files = {content: folder.path / path for path, content in contents.items()}
    most_pixels = max(side.format.most_pixels for side in sides)
    found = photographs.find(files, folder.cache, most_pixels)
    return {path: found[content] for path, content in contents.items()}


def _require_readable(one: Decoded) -> None:
    """Log each unreadable image, and refuse sides with too many of them or without a class."""
    total = len(one) + len(one.skipped)
    split_file = one.folder.split_file
    where = f"{one.side} of {split_file}" if split_file.exists() else str(one)
    for path, why in one.skipped:
        log.warning("%s %s: skipped", path, why)
    if len(one.skipped) > LARGEST_UNREADABLE_SHARE * total:
        path, why = one.skipped[0]
        raise PipelineError(
            f"{where}: {len(one.skipped)} of {total} cannot be read, more than "
            f"{LARGEST_UNREADABLE_SHARE:.0%}. Replace or delete them ({path} {why})"
        )
    if one.skipped:
        log.warning("%s: %d of %d skipped", where, len(one.skipped), total)
    if not one.counts[NEGATIVE]:
        raise PipelineError(f"{one}: no image of {NEGATIVE} can be read")
