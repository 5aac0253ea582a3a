"""Which pictures a model may judge at all: those like the ones that it was trained on.

A probability says nothing of a black picture, a blurred one or one of something else. What such
pictures look like is not known beforehand; what the training pictures look like is.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SIDE = 16  # a picture's thumbnail, pixels in height and width
COMPONENTS = 16  # shapes that thumbnails are composed of
RARE = 0.001  # share of the training pictures, at either end, that limits need not admit

# How far beyond the training pictures a picture may lie. Light and contrast may halve: variants
# of the training pictures go nearly as far. Fine detail is what the model lives by: half of the
# range in training more, and this at least.
LIGHT = 0.5
DETAIL = 0.1
UNLIKENESS = 1.5

FLAT = 1.0  # grey levels; what varies less is taken for noise of the camera
REASONS = (
    "too dark",
    "too bright",
    "almost no contrast",
    "not like the training pictures",
    "blurred",
    "noisy",
)


@dataclass(frozen=True)
class Scope:
    """Limits of what a model judges, and the shapes of the pictures that it knows.

    Attributes:
        dark: lowest mean, in grey levels.
        bright: highest mean, in grey levels.
        flat: lowest standard deviation of a thumbnail, in grey levels.
        blurred: lowest detail, as `_measure` gives it.
        noisy: highest detail.
        unlike: largest distance of a thumbnail from what the components make, in [0, 1].
        mean: of the thumbnails, float32 (SIDE * SIDE,).
        components: their principal components, float32 (k, SIDE * SIDE), k <= COMPONENTS.
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
    def of(cls, pictures: np.ndarray) -> "Scope":
        """Learn the scope from training pictures, uint8 (n, height, width, 1)."""
        starts = range(0, len(pictures), 256)
        batches = (pictures[i : i + 256, ..., 0].astype(np.float32) for i in starts)
        measured = [_measure(batch) for batch in batches]
        light, contrast, detail, thumbnails = map(np.concatenate, zip(*measured, strict=True))
        mean = thumbnails.mean(0)
        # The shapes in which thumbnails differ (Turk and Pentland 1991), the strongest last.
        _, shapes = np.linalg.eigh((thumbnails - mean).T @ (thumbnails - mean))
        components = shapes.T[-COMPONENTS:]
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

    def reasons(self, pictures: np.ndarray) -> list[str]:
        """Say of pictures, float32 (n, height, width), why each is out of scope; "" if it is in."""
        light, contrast, detail, thumbnails = _measure(pictures)
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
            return [""] * len(pictures)
        first = np.where(outside.any(0), outside.argmax(0), len(REASONS))
        return [(*REASONS, "")[row] for row in first]

    def save(self, path: Path) -> None:
        """Write the scope as a NumPy archive."""
        with path.open("wb") as file:
            np.savez(file, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Scope":
        """Read what `save` wrote.

        Raises:
            OSError, KeyError, ValueError: it is missing or damaged.
        """
        with np.load(path) as saved:
            arrays = ("mean", "components")
            values = {name: saved[name] for name in cls.__dataclass_fields__}
        return cls(**{n: v if n in arrays else float(v) for n, v in values.items()})


def _measure(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Measure pictures, float32 (n, height, width).

    Returns:
        Mean and standard deviation of the thumbnails in grey levels; detail; and the thumbnails
        (n, SIDE * SIDE), brought to mean 0 and length 1 to be free of light. Detail is the
        logarithm of the mean square of second differences along rows over that of first ones:
        blur lowers it whatever is shown, noise raises it. Every eighth row is enough for it.
    """
    n, height, width = pictures.shape
    some = pictures[:, ::8]
    first = some[:, :, 1:] - some[:, :, :-1]
    second = first[:, :, 1:] - first[:, :, :-1]
    fine = np.einsum("ijk,ijk->i", second, second) / second[0].size
    coarse = np.einsum("ijk,ijk->i", first, first) / first[0].size
    # What does not make whole squares is left out, half of it at either edge.
    tall, wide = height // SIDE, width // SIDE
    top, left = (height - tall * SIDE) // 2, (width - wide * SIDE) // 2
    inner = pictures[:, top : top + tall * SIDE, left : left + wide * SIDE]
    rows = inner.reshape(n, SIDE, tall, wide * SIDE).sum(2)
    thumbnails = rows.reshape(n, -1, wide) @ np.full(wide, 1 / (tall * wide), np.float32)
    light = thumbnails.sum(1) / SIDE**2  # a third of the time of mean()
    thumbnails -= light[:, np.newaxis]
    contrast = np.sqrt(np.einsum("ij,ij->i", thumbnails, thumbnails)) / SIDE
    thumbnails /= SIDE * (contrast + FLAT)[:, np.newaxis]
    return light, contrast, np.log((fine + FLAT) / (coarse + FLAT)), thumbnails


def _unlikeness(thumbnails: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Return how far each thumbnail is from the nearest that the components make."""
    centred = thumbnails - mean
    made = centred @ components.T
    squares = np.einsum("ij,ij->i", centred, centred) - np.einsum("ij,ij->i", made, made)
    return np.sqrt(np.maximum(squares, 0))
