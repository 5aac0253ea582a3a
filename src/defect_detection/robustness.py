"""How a model judges the same pictures when light, focus, pose or compression are others."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from defect_detection import metrics
from defect_detection.classifier import Classifier
from defect_detection.metrics import THRESHOLD, Rate

REPEATS = 10  # small disturbances of each picture
MOST = 300  # pictures, spread over all: each is judged 18 times
SEED = 0  # the same disturbances at every evaluation

Disturb = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Disturbed:
    """What a model is worth under a disturbance: accuracy at 0.5, errors at its own threshold."""

    name: str
    accuracy: float
    escapes: Rate
    overkill: Rate


@dataclass(frozen=True)
class Repeatability:
    """Verdicts over small disturbances of the same picture.

    Attributes:
        flipped: pictures whose verdict is not the same each time.
        flipped_past_review: those of them that are not in the review band as they are.
    """

    flipped: Rate
    flipped_past_review: Rate


def _lit(picture: np.ndarray, factor: float) -> np.ndarray:
    return cv2.convertScaleAbs(picture, alpha=factor)


def _noisy(picture: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(0, deviation, picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def _moved(picture: np.ndarray, degrees: float, shift: tuple[float, float]) -> np.ndarray:
    height, width = picture.shape
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1)
    turn[:, 2] += shift
    return cv2.warpAffine(picture, turn, (width, height), borderMode=cv2.BORDER_REFLECT)


def _recompressed(picture: np.ndarray, quality: int) -> np.ndarray:
    _, encoded = cv2.imencode(".jpeg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)


def _slightly(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change what differs from shot to shot: 3 % of light, 1 pixel, 1 degree, a little noise."""
    moved = _moved(picture, rng.uniform(-1, 1), tuple(rng.uniform(-1, 1, 2)))
    return _noisy(_lit(moved, rng.uniform(0.97, 1.03)), 1, rng)


# Of pictures at the model's size.
DISTURBANCES: dict[str, Disturb] = {
    "as they are": lambda picture, rng: picture,
    "darker: 70% of the light": lambda picture, rng: _lit(picture, 0.7),
    "brighter: 130% of the light": lambda picture, rng: _lit(picture, 1.3),
    "blurred: Gaussian, 1 pixel": lambda picture, rng: cv2.GaussianBlur(picture, (0, 0), 1),
    "noisier: 8 grey levels": lambda picture, rng: _noisy(picture, 8, rng),
    "rotated: 10 degrees": lambda picture, rng: _moved(picture, 10, (0, 0)),
    "recompressed: JPEG quality 30": lambda picture, rng: _recompressed(picture, 30),
}


def sample(count: int) -> np.ndarray:
    """Return the numbers of up to `MOST` of `count` pictures, evenly spread."""
    return np.linspace(0, count - 1, min(count, MOST)).astype(int)


def table(classifier: Classifier, pictures: np.ndarray, labels: np.ndarray) -> list[Disturbed]:
    """Score the same pictures under each disturbance.

    Args:
        classifier: the model.
        pictures: uint8 (n, height, width, 1).
        labels: (n,), 1 = defect.
    """
    rows = []
    for name, disturb in DISTURBANCES.items():
        probabilities = classifier.probabilities(disturbed(pictures, disturb))
        right = metrics.is_right(labels, probabilities, THRESHOLD)
        errors = metrics.errors(labels, probabilities, classifier.point)
        rows.append(Disturbed(name, float(right.mean()), errors.escapes, errors.overkill))
    return rows


def repeatability(classifier: Classifier, pictures: np.ndarray) -> Repeatability:
    """Judge each picture, uint8 (n, height, width, 1), again with small disturbances."""
    as_they_are = classifier.probabilities(pictures)
    verdict = metrics.is_defect(as_they_are, classifier.point.threshold)
    flipped = np.zeros(len(pictures), bool)
    for repeat in range(REPEATS):
        again = classifier.probabilities(disturbed(pictures, _slightly, repeat))
        flipped |= metrics.is_defect(again, classifier.point.threshold) != verdict
    past = flipped & ~classifier.point.review(as_they_are)
    return Repeatability(
        Rate(int(flipped.sum()), len(flipped)), Rate(int(past.sum()), len(flipped))
    )


def disturbed(pictures: np.ndarray, disturb: Disturb, number: int = 0) -> np.ndarray:
    """Disturb pictures, uint8 (n, height, width, 1); the same `number` gives the same."""
    rng = np.random.default_rng([SEED, number])
    return np.stack([disturb(picture[..., 0], rng) for picture in pictures])[..., np.newaxis]
