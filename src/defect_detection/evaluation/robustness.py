"""How a model judges the same images under other light, focus, pose or compression."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from defect_detection.dataset.split import Dataset
from defect_detection.evaluation import metrics
from defect_detection.evaluation.metrics import Rate
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.decision import ACCURACY_THRESHOLD, is_defect

REPEATS = 10  # small disturbances of each image
MOST = 300  # images, spread over all, since each is judged 18 times
SEED = 0  # the same disturbances at every evaluation

Disturb = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Disturbed:
    """Accuracy at 0.5 and error rates at the model's threshold under a disturbance."""

    name: str
    accuracy: float
    escapes: Rate
    overkill: Rate


@dataclass(frozen=True)
class Repeatability:
    """How steady verdicts are under small disturbances of the same image.

    Attributes:
        flipped: images whose verdict changes.
        flipped_past_review: those of them that are outside the review band without disturbance.
    """

    flipped: Rate
    flipped_past_review: Rate


def _lit(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.convertScaleAbs(image, alpha=factor)


def _noisy(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(0, deviation, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def _moved(image: np.ndarray, degrees: float, shift: tuple[float, float]) -> np.ndarray:
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1)
    turn[:, 2] += shift
    return cv2.warpAffine(image, turn, (width, height), borderMode=cv2.BORDER_REFLECT)


def _recompressed(image: np.ndarray, quality: int) -> np.ndarray:
    _, encoded = cv2.imencode(".jpeg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)


def _slightly(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vary an image as shots vary: 3 % of light, 1 pixel, 1 degree, 1 grey level of noise."""
    moved = _moved(image, rng.uniform(-1, 1), tuple(rng.uniform(-1, 1, 2)))
    return _noisy(_lit(moved, rng.uniform(0.97, 1.03)), 1, rng)


# Of images at the model's size.
DISTURBANCES: dict[str, Disturb] = {
    "as they are": lambda image, rng: image,
    "darker: 70% of the light": lambda image, rng: _lit(image, 0.7),
    "brighter: 130% of the light": lambda image, rng: _lit(image, 1.3),
    "blurred: Gaussian, 1 pixel": lambda image, rng: cv2.GaussianBlur(image, (0, 0), 1),
    "noisier: 8 grey levels": lambda image, rng: _noisy(image, 8, rng),
    "rotated: 10 degrees": lambda image, rng: _moved(image, 10, (0, 0)),
    "recompressed: JPEG quality 30": lambda image, rng: _recompressed(image, 30),
}


@dataclass(frozen=True)
class Robustness:
    """A model's figures under disturbances of the same test images.

    Attributes:
        images: how many images were used.
        disturbed: figures under each disturbance.
        repeatability: steadiness under small ones.
    """

    images: int
    disturbed: list[Disturbed]
    repeatability: Repeatability


def measure(classifier: Classifier, testing: Dataset) -> Robustness:
    """Measure a model's robustness on up to `MOST` test images of its size, evenly spread."""
    some = np.linspace(0, len(testing) - 1, min(len(testing), MOST)).astype(int)
    images = testing.images_as(classifier.takes)[some]
    return Robustness(
        len(some),
        table(classifier, images, testing.labels[some]),
        repeatability(classifier, images),
    )


def table(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> list[Disturbed]:
    """Score the same images under each disturbance.

    Args:
        classifier: the model.
        images: uint8 (n, height, width, channels).
        labels: (n,), 1 = defect.
    """
    rows = []
    for name, disturb in DISTURBANCES.items():
        probabilities = classifier.probabilities(disturbed(images, disturb))
        right = metrics.is_right(labels, probabilities, ACCURACY_THRESHOLD)
        errors = metrics.error_rates(labels, probabilities, classifier.point)
        rows.append(Disturbed(name, float(right.mean()), errors.escapes, errors.overkill))
    return rows


def repeatability(classifier: Classifier, images: np.ndarray) -> Repeatability:
    """Judge each image, uint8 (n, height, width, channels), again with small disturbances."""
    undisturbed = classifier.probabilities(images)
    verdict = is_defect(undisturbed, classifier.point.threshold)
    flipped = np.zeros(len(images), bool)
    for repeat in range(REPEATS):
        again = classifier.probabilities(disturbed(images, _slightly, repeat))
        flipped |= is_defect(again, classifier.point.threshold) != verdict
    past = flipped & ~classifier.point.needs_review(undisturbed)
    return Repeatability(
        Rate(int(flipped.sum()), len(flipped)), Rate(int(past.sum()), len(flipped))
    )


def disturbed(images: np.ndarray, disturb: Disturb, number: int = 0) -> np.ndarray:
    """Disturb images, uint8 (n, height, width, c); the same `number` gives the same."""
    rng = np.random.default_rng([SEED, number])
    return np.stack([disturb(np.squeeze(image), rng) for image in images]).reshape(images.shape)
