"""The classes, and the way from the probability of a defect to a decision."""

from dataclasses import dataclass

import numpy as np

# Written once, here: the class folders in their order and which class is positive. Labels and
# probabilities both refer to the defect: 1 is a defect.
CLASSES = POSITIVE, NEGATIVE = "def_front", "ok_front"

# The threshold for accuracies: the same for all models, so that they can be compared.
ACCURACY_THRESHOLD = 0.5


@dataclass(frozen=True)
class OperatingPoint:
    """How probabilities become verdicts.

    Attributes:
        threshold: the verdict is defect at this probability or above.
        review_low: lowest probability at which a person reviews the part.
        review_high: probability above the review band; the band is empty if it equals `review_low`.
    """

    threshold: float
    review_low: float
    review_high: float

    def __post_init__(self) -> None:
        """Refuse values that no calibration gives, by which every part could pass.

        Raises:
            TypeError, ValueError: a value is no number, or out of range.
        """
        highest = float(np.nextafter(np.float32(1), np.float32(2)))  # above a probability of 1
        if not (0 <= self.threshold <= 1 and 0 <= self.review_low <= self.review_high <= highest):
            raise ValueError(f"{self} is out of range")

    def needs_review(self, probabilities: np.ndarray) -> np.ndarray:
        """Return which probabilities lie in the review band, bool of the same shape."""
        return (probabilities >= self.review_low) & (probabilities < self.review_high)


# For versions that were registered before operating points were saved.
DEFAULT_OPERATING_POINT = OperatingPoint(ACCURACY_THRESHOLD, ACCURACY_THRESHOLD, ACCURACY_THRESHOLD)


def is_defect(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Return which probabilities are called a defect, bool of the same shape."""
    return probabilities >= threshold
