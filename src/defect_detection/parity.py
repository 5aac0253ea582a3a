"""Whether the LiteRT model judges as the Keras model that it was made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from defect_detection import metrics

if TYPE_CHECKING:
    import keras

# Largest difference of a probability that is allowed, by what the weights are kept as.
TOLERANCES = {"none": 1e-4, "float16": 5e-3, "int8": 5e-2}
BATCH = 16


@dataclass(frozen=True)
class Parity:
    """How far apart two forms of a model are.

    Attributes:
        largest: difference of the probabilities of one picture.
        flipped: pictures with another verdict.
        of: pictures that both judged.
    """

    largest: float
    flipped: int
    of: int

    def within(self, quantize: str) -> bool:
        """Say whether they are near enough; no verdict may flip, whatever the tolerance."""
        return self.largest <= TOLERANCES[quantize] and not self.flipped  # not true of NaN

    def __str__(self) -> str:
        """Say it in a line."""
        flipped = f"{self.flipped} verdicts flip" if self.flipped else "no verdict flips"
        return f"largest difference {self.largest:.1e} on {self.of} pictures, {flipped}"


def compare(
    model: "keras.Model",
    pictures: np.ndarray,
    probabilities: np.ndarray,
    thresholds: tuple[float, ...],
) -> Parity:
    """Compare a Keras model with another form of it.

    Args:
        model: as `model.build` makes it.
        pictures: uint8 (n, height, width, 1).
        probabilities: (n,), what the other form says of them.
        thresholds: a picture whose verdict differs at any of them counts as flipped.
    """
    starts = range(0, len(pictures), BATCH)
    batches = (pictures[i : i + BATCH].astype(np.float32) for i in starts)
    expected = np.concatenate([model.predict_on_batch(batch)[:, 0] for batch in batches])
    flipped = [
        metrics.is_defect(expected, one) != metrics.is_defect(probabilities, one)
        for one in thresholds
    ]
    return Parity(
        float(np.abs(expected - probabilities).max()), int(np.any(flipped, 0).sum()), len(pictures)
    )
