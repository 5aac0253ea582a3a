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
    """An affine map of log-odds that makes probabilities agree with observed frequencies."""

    scale: float
    shift: float

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities, float32."""
        log_odds = self.scale * _log_odds(probabilities) + self.shift
        return (1 / (1 + np.exp(-log_odds))).astype(np.float32)


def calibrate(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> Calibration:
    """Return the scale and shift of the log-odds with the lowest cross-entropy (Platt, 1999).

    Args:
        labels: (n,) in [0, 1], 1 = defect; or target probabilities.
        probabilities: (n,) of a defect.
        weights: (n,) of each image in the cross-entropy.
    """
    from scipy.optimize import minimize  # inference does not need it
    from scipy.special import expit, log_expit

    labels, weights = np.asarray(labels, float), np.asarray(weights, float)
    log_odds = _log_odds(probabilities)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        found = values[0] * log_odds + values[1]
        losses = -labels * log_expit(found) - (1 - labels) * log_expit(-found)
        slopes = weights * (expit(found) - labels)
        return np.sum(weights * losses), np.array([slopes @ log_odds, slopes.sum()])

    found = minimize(loss, [1.0, 0.0], jac=True, bounds=[SCALES, SHIFTS], method="L-BFGS-B")
    return Calibration(*map(float, found.x))


def mean_in_log_odds(probabilities: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Average the probabilities of several fits in log-odds.

    Args:
        probabilities: (n, fits) of a defect.
        counted: bool (n, fits), which fits count for an image, at least one.

    Returns:
        The averaged probabilities, (n,).
    """
    log_odds = np.average(_log_odds(probabilities), axis=1, weights=counted)
    return 1 / (1 + np.exp(-log_odds))


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
    distances = np.abs(_log_odds(probabilities) - _log_odds(threshold))
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
    half_way = np.float32(1 / (1 + np.exp(-(_log_odds(found) + _log_odds(passes)) / 2)))
    return float(half_way if passes < half_way <= found else found)


def _log_odds(probabilities: np.ndarray | float) -> np.ndarray | float:
    """Return log-odds; probabilities within EPS of 0 or 1 are clipped."""
    safe = np.clip(np.asarray(probabilities, float), EPS, 1 - EPS)
    return np.log(safe) - np.log1p(-safe)
