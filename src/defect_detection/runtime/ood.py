"""Out-of-distribution detection: which images a model may judge at all.

The probability of a defect means nothing for a black image, a blurred one or one of something else.
Such images are not known beforehand, so they are detected by how they differ from training.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from defect_detection.runtime.preprocessing import grey

SIDE = 16  # height and width of an image's thumbnail, pixels
COMPONENTS = 16  # principal components of the thumbnails that are kept
RARE = 0.001  # share of the training images, at either end, that the limits need not admit

# How far beyond the training images an image may lie. Light and contrast may halve, since variants
# of the training images go nearly as far. The model relies on fine detail: half of the range in
# training, plus DETAIL, is allowed beyond it.
LIGHT = 0.5
DETAIL = 0.1
UNLIKENESS = 1.5

FLAT = 1.0  # grey levels; smaller variations are taken for camera noise
REASONS = (
    "too dark",
    "too bright",
    "almost no contrast",
    "not like the training pictures",
    "blurred",
    "noisy",
)


@dataclass(frozen=True)
class OodDetector:
    """Limits of what a model judges, and the principal components of the images it knows.

    Attributes:
        dark: lowest mean, in grey levels.
        bright: highest mean, in grey levels.
        flat: lowest standard deviation of a thumbnail, in grey levels.
        blurred: lowest detail, as `_measure` returns it.
        noisy: highest detail.
        unlike: largest distance of a thumbnail from its reconstruction, in [0, 1].
        mean: of the thumbnails, float32 (SIDE * SIDE,).
        components: principal components, float32 (k, SIDE * SIDE), k <= COMPONENTS.
    """

    dark: float
    bright: float
    flat: float
    blurred: float
    noisy: float
    unlike: float
    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, images: np.ndarray) -> "OodDetector":
        """Learn the limits from training images, uint8 (n, height, width, channels)."""
        starts = range(0, len(images), 256)
        batches = (grey(images[i : i + 256].astype(np.float32)) for i in starts)
        measured = [_measure(batch) for batch in batches]
        light, contrast, detail, thumbnails = map(np.concatenate, zip(*measured, strict=True))
        mean = thumbnails.mean(0)
        # Eigenfaces (Turk and Pentland 1991); the strongest are last.
        _, eigenvectors = np.linalg.eigh((thumbnails - mean).T @ (thumbnails - mean))
        components = eigenvectors.T[-COMPONENTS:]
        darkest, brightest = np.quantile(light, [RARE, 1 - RARE])
        smoothest, finest = np.quantile(detail, [RARE, 1 - RARE])
        margin = (finest - smoothest) / 2 + DETAIL
        unlikeness = _unlikeness(thumbnails, mean, components)
        return cls(
            dark=float(LIGHT * darkest),
            bright=float(255 - LIGHT * (255 - brightest)),
            flat=float(LIGHT * np.quantile(contrast, RARE)),
            blurred=float(smoothest - margin),
            noisy=float(finest + margin),
            unlike=float(UNLIKENESS * np.quantile(unlikeness, 1 - RARE)),
            mean=mean.astype(np.float32),
            components=np.ascontiguousarray(components, np.float32),
        )

    def reasons(self, images: np.ndarray) -> list[str]:
        """Return why each image, float32 (n, height, width), is unlike those of training.

        Returns:
            One of `REASONS` for each image, "" if there is none.
        """
        light, contrast, detail, thumbnails = _measure(images)
        unlikeness = _unlikeness(thumbnails, self.mean, self.components)
        outside = np.array(
            [
                light < self.dark,
                light > self.bright,
                contrast < self.flat,
                unlikeness > self.unlike,
                detail < self.blurred,
                detail > self.noisy,
            ]
        )
        if not outside.any():
            return [""] * len(images)
        first = np.where(outside.any(0), outside.argmax(0), len(REASONS))
        return [(*REASONS, "")[row] for row in first]

    def save(self, path: Path) -> None:
        """Write the detector as a NumPy archive."""
        with path.open("wb") as file:
            np.savez(file, **asdict(self))

    @classmethod
    def load(cls, path: Path | BinaryIO) -> "OodDetector":
        """Read what `save` wrote.

        Raises:
            OSError, KeyError, ValueError: it is missing or damaged.
        """
        with np.load(path) as saved:
            arrays = ("mean", "components")
            values = {name: saved[name] for name in cls.__dataclass_fields__}
        if not all(np.isfinite(value).all() for value in values.values()):
            raise ValueError("its limits are not finite")
        if values["mean"].shape != (SIDE**2,) or values["components"].shape[1:] != (SIDE**2,):
            raise ValueError("its thumbnails have another size")
        found: dict[str, Any] = {n: v if n in arrays else float(v) for n, v in values.items()}
        return cls(**found)


def _measure(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Measure images, float32 (n, height, width).

    Returns:
        Mean and standard deviation of the thumbnails in grey levels; detail; and the thumbnails
        (n, SIDE * SIDE), normalised to mean 0 and length 1 so that light does not matter. Detail
        is the logarithm of the ratio of the mean square second difference along rows to the mean
        square first difference: blur lowers it and noise raises it, whatever the image shows.
        Every eighth row is enough for it.
    """
    n, height, width = images.shape
    some = images[:, ::8]
    first = some[:, :, 1:] - some[:, :, :-1]
    second = first[:, :, 1:] - first[:, :, :-1]
    fine = np.einsum("ijk,ijk->i", second, second) / second[0].size
    coarse = np.einsum("ijk,ijk->i", first, first) / first[0].size
    # Rows and columns that do not fill whole squares are left out, half of them at either edge.
    tall, wide = height // SIDE, width // SIDE
    top, left = (height - tall * SIDE) // 2, (width - wide * SIDE) // 2
    inner = images[:, top : top + tall * SIDE, left : left + wide * SIDE]
    rows = inner.reshape(n, SIDE, tall, wide * SIDE).sum(2)
    thumbnails = rows.reshape(n, -1, wide) @ np.full(wide, 1 / (tall * wide), np.float32)
    light = thumbnails.sum(1) / SIDE**2  # a third of the time of mean()
    thumbnails -= light[:, np.newaxis]
    contrast = np.sqrt(np.einsum("ij,ij->i", thumbnails, thumbnails)) / SIDE
    thumbnails /= SIDE * (contrast + FLAT)[:, np.newaxis]
    return light, contrast, np.log((fine + FLAT) / (coarse + FLAT)), thumbnails


def _unlikeness(thumbnails: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Return the distance of each thumbnail from its reconstruction by the components."""
    centred = thumbnails - mean
    projected = centred @ components.T
    squares = np.einsum("ij,ij->i", centred, centred) - np.einsum("ij,ij->i", projected, projected)
    return np.sqrt(np.maximum(squares, 0))
