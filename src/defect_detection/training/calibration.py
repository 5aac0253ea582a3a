"""Calibrates the probabilities of a fit, and chooses the operating point.

Everything here is chosen on held-out photographs, which the fit has not seen.
"""

from dataclasses import dataclass

import numpy as np

from defect_detection.runtime.decision import OperatingPoint

EPS = 1e-7  # the smallest probability at which a float32 sigmoid is trusted
# Limits of the calibration: on a few photographs without an error the scale would have no bound.
SCALES, SHIFTS = (0.2, 4.0), (-3.0, 3.0)


@dataclass(frozen=True)
class Calibration:
    """An affine map of log-odds that makes probabilities agree with observed frequencies.

    Attributes:
        scale: of the log-odds.
        shift: added to them.
        overall: scale of the log-odds from the image as a whole, in a model that weighs it.
    """

    scale: float
    shift: float
    overall: float = 0.0

    def apply(self, probabilities: np.ndarray, overall: np.ndarray | float = 0.0) -> np.ndarray:
        """Return calibrated probabilities, float32 (n,).

        Args:
            probabilities: (n,) of a defect.
            overall: log-odds (n,) from the image as a whole.
        """
        found = self.scale * log_odds(probabilities) + self.overall * overall + self.shift
        return (1 / (1 + np.exp(-found))).astype(np.float32)


def calibrate(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> Calibration:
    """Return the scale and shift of the log-odds with the lowest cross-entropy (Platt, 1999).

    Args:
        labels: (n,) in [0, 1], 1 = defect; or target probabilities.
        probabilities: (n,) of a defect.
        weights: (n,) of each image in the cross-entropy.
    """
    (scale,), shift = _regression(labels, [log_odds(probabilities)], weights, [SCALES])
    return Calibration(scale, shift)


def combine(
    labels: np.ndarray, probabilities: np.ndarray, overall: np.ndarray, weights: np.ndarray
) -> Calibration:
    """Weigh two sources of evidence by what they say of held-out images (Wolpert, 1992).

    Args:
        labels: (n,), 1 = defect.
        probabilities: (n,) of a defect, from the map.
        overall: log-odds (n,) from the image as a whole.
        weights: (n,) of each image in the cross-entropy.
    """
    # Neither counts the wrong way round, and one that says nothing may count for nothing.
    limits = [(0.0, SCALES[1])] * 2
    scales, shift = _regression(labels, [log_odds(probabilities), overall], weights, limits)
    return Calibration(scales[0], shift, scales[1])


def _regression(
    labels: np.ndarray,
    evidence: list[np.ndarray],
    weights: np.ndarray,
    limits: list[tuple[float, float]],
) -> tuple[list[float], float]:
    """Return a scale for each of `evidence`, log-odds, within its limits, and a shift."""
    from scipy.optimize import minimize  # inference does not need it
    from scipy.special import expit, log_expit

    labels, weights = np.asarray(labels, float), np.asarray(weights, float)
    columns = np.stack([*evidence, np.ones(len(labels))], axis=1)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        found = columns @ values
        losses = -labels * log_expit(found) - (1 - labels) * log_expit(-found)
        slopes = weights * (expit(found) - labels)
        return np.sum(weights * losses), slopes @ columns

    start = [1 / len(evidence)] * len(evidence) + [0.0]
    found = minimize(loss, start, jac=True, bounds=[*limits, SHIFTS], method="L-BFGS-B")
    *scales, shift = map(float, found.x)
    return scales, shift


def mean_in_log_odds(probabilities: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Average the probabilities of several fits in log-odds.

    Args:
        probabilities: (n, fits) of a defect.
        counted: bool (n, fits), which fits count for an image, at least one.

    Returns:
        The averaged probabilities, (n,).
    """
    average = np.average(log_odds(probabilities), axis=1, weights=counted)
    return 1 / (1 + np.exp(-average))


def choose_operating_point(
    labels: np.ndarray, probabilities: np.ndarray, max_escape_rate: float, review_share: float
) -> OperatingPoint:
    """Choose the threshold and the review band.

    Args:
        labels: (n,), 1 = defect, of both classes.
        probabilities: (n,) of a defect.
        max_escape_rate: as for `choose_threshold`.
        review_share: largest share of the images in the review band, which holds those nearest
            to the threshold in log-odds.
    """
    threshold = choose_threshold(labels, probabilities, max_escape_rate)
    return around(threshold, probabilities, review_share)


def around(threshold: float, probabilities: np.ndarray, review_share: float) -> OperatingPoint:
    """Choose the review band around a threshold; arguments as for `choose_operating_point`."""
    distances = np.abs(log_odds(probabilities) - log_odds(threshold))
    first_outside = np.sort(distances)[int(review_share * len(distances))]
    inside = probabilities[distances < first_outside]
    if not len(inside):
        return OperatingPoint(threshold, threshold, threshold)
    low, high = float(inside.min()), float(np.nextafter(inside.max(), inside.dtype.type(2)))
    return OperatingPoint(threshold, min(low, threshold), max(high, threshold))


def choose_threshold(
    labels: np.ndarray, probabilities: np.ndarray, max_escape_rate: float
) -> float:
    """Return the threshold with the least overkill at a largest escape rate.

    Of the thresholds with the same overkill it has the fewest escapes: it lies above the highest
    good part that passes, half-way in log-odds to the next defect.

    Args:
        labels: (n,), 1 = defect, at least one defect.
        probabilities: (n,) of a defect.
        max_escape_rate: largest share of the defects below the threshold, in [0, 1).
    """
    defects = np.sort(probabilities[labels == 1])
    highest = defects[int(max_escape_rate * len(defects))]
    good = probabilities[(labels != 1) & (probabilities < highest)]
    if not len(good):
        return float(defects[0])
    passes = good.max()
    found = defects[defects > passes][0]
    # A float32 like the probabilities, so that rounding cannot make a difference.
    half_way = np.float32(1 / (1 + np.exp(-(log_odds(found) + log_odds(passes)) / 2)))
    return float(half_way if passes < half_way <= found else found)


def log_odds(probabilities: np.ndarray | float) -> np.ndarray:
    """Return log-odds; probabilities within EPS of 0 or 1 are clipped."""
    safe = np.clip(np.asarray(probabilities, float), EPS, 1 - EPS)
    return np.log(safe) - np.log1p(-safe)
