"""What is known of images, to measure against: photographs of castings, places of defects."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from math import comb
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import sample
from defect_detection import settings
from defect_detection.runtime import preprocessing
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.decision import ACCURACY_THRESHOLD, is_defect

CASTINGS = settings.ROOT.parent / "shared" / "data" / "casting"


def photographs() -> dict[str, tuple[str, str]]:
    """Return `photo` and `photo_merged` of each image, by its path.

    Images with the same `photo` surely share one; with different `photo_merged`, surely not.
    """
    with (CASTINGS / "photo_groups.csv").open(newline="") as file:
        return {row["path"]: (row["photo"], row["photo_merged"]) for row in csv.DictReader(file)}


def link(paths: Sequence[str], to: Path) -> Path:
    """Make a data folder of some of the castings, by links; return it."""
    for path in paths:
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        (to / path).symlink_to(CASTINGS / path)
    return to


def precision_and_recall(found: dict[str, int]) -> tuple[float, float]:
    """Score photographs by pairs of images; pairs that the truth leaves open do not count.

    Args:
        found: number of the photograph of each image, by its path.
    """
    truth = photographs()

    def pairs(*keys: Sequence[object]) -> int:
        """Count the pairs of images that agree in all keys."""
        return sum(comb(n, 2) for n in Counter(zip(*keys, strict=True)).values())

    number = list(found.values())
    photo, merged = zip(*(truth[path] for path in found), strict=True)
    right = pairs(number, photo)
    wrong = pairs(number) - pairs(number, merged)
    return right / (right + wrong), right / pairs(photo)


def pointed_at(classifier: Classifier, seed: int, count: int) -> tuple[int, int]:
    """Draw defective castings and see where the classifier's map is highest.

    Returns:
        For how many the place (a square of 4 x 4 pixels of the model's image) touches the
        defect, and how many of the `count` are found at all.
    """
    inside = found = 0
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        image, mask = draw_with_mask(rng, rng.choice(list(sample.DEFECTS)))
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        picture = preprocessing.decode(encoded.getvalue(), classifier.takes)
        probabilities, maps = classifier.examine(picture[np.newaxis])
        if is_defect(probabilities[0], ACCURACY_THRESHOLD):
            found += 1
            row, column = np.unravel_index(maps[0].argmax(), maps[0].shape)
            side = mask.shape[0] // maps.shape[1]
            place = mask[row * side : (row + 1) * side, column * side : (column + 1) * side]
            inside += bool(place.any())
    return inside, found


def draw_with_mask(rng: np.random.Generator, defect: str) -> tuple[Image.Image, np.ndarray]:
    """Draw a casting as `sample.draw` does, and say which of the drawn pixels the defect changed.

    The mask is bool, of sample.SCALE times the image's sides.
    """
    masks = []

    def watched(rng: np.random.Generator, part: object, image: Image.Image) -> None:
        before = np.asarray(image).copy()
        draw(rng, part, image)
        masks.append(before != np.asarray(image))

    draw = sample.DEFECTS[defect]
    with mock.patch.dict(sample.DEFECTS, {defect: watched}):
        image = sample.draw(rng, defect)
    return image, masks[0]
