"""Whether the LiteRT model gives the same verdicts as the Keras model it was converted from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from defect_detection.runtime.decision import is_defect

if TYPE_CHECKING:
    import keras

# Largest allowed difference of a probability, for each storage of the weights.
TOLERANCES = {"none": 1e-4, "float16": 5e-3, "int8": 5e-2}
BATCH = 16


@dataclass(frozen=True)
class Parity:
    """How far apart two forms of a model are.

    Attributes:
        largest: difference between the probabilities of one image.
        flipped: images with different verdicts.
        of: images that both judged.
    """

    largest: float
    flipped: int
    of: int

    def within(self, quantize: str) -> bool:
        """Return whether they are close enough; no verdict may flip, whatever the tolerance."""
        return self.largest <= TOLERANCES[quantize] and not self.flipped  # false for NaN

    def __str__(self) -> str:
        """Return it in a line."""
        flipped = f"{self.flipped} verdicts flip" if self.flipped else "no verdict flips"
        return f"largest difference {self.largest:.1e} on {self.of} images, {flipped}"


def compare(
    model: "keras.Model",
    images: np.ndarray,
    probabilities: np.ndarray,
    thresholds: tuple[float, ...],
) -> Parity:
    """Compare a Keras model with another form of it.

    Args:
        model: as `network.build` makes it.
        images: uint8 (n, height, width, channels).
        probabilities: (n,) of the other form.
        thresholds: an image whose verdict differs at any of them counts as flipped.
    """
    starts = range(0, len(images), BATCH)
    batches = (images[i : i + BATCH].astype(np.float32) for i in starts)
    expected = np.concatenate([model.predict_on_batch(batch)[:, 0] for batch in batches])
    flipped = [is_defect(expected, one) != is_defect(probabilities, one) for one in thresholds]
    return Parity(
        float(np.abs(expected - probabilities).max()), int(np.any(flipped, 0).sum()), len(images)
    )
