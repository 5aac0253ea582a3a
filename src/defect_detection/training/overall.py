"""What is seen in the image as a whole: a logistic regression on pooled features.

Places alone tell nicks and holes. Shades, wrong shapes and missing parts show in the mean, the
maximum and the deviation of the features over the image.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from defect_detection.training import network
from defect_detection.training.features import Features

BATCH = 128  # images pooled at a time
# Inverse strengths of the L2 penalty, for a total weight of `TOTAL`.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TOTAL = 1000.0
ITERATIONS = 200


@dataclass(frozen=True)
class Overall:
    """A logistic regression for each fit.

    Attributes:
        kernels: (3 * channels, fits), of the pooled features.
        biases: (fits,).
        held_out: log-odds (n,) of the plain images, each by the fit that held it out.
    """

    kernels: np.ndarray
    biases: np.ndarray
    held_out: np.ndarray

    def of_maxima(self, deviations: np.ndarray) -> np.ndarray:
        """Return the weights of the maxima, (channels, fits), for standardised features.

        Args:
            deviations: of the features over all places, (channels,).
        """
        channels = len(deviations)
        return self.kernels[channels : 2 * channels] * deviations[:, np.newaxis]


def fit(
    features: Features,
    rows: np.ndarray,
    weights: np.ndarray,
    plain: np.ndarray,
    folds: list[np.ndarray],
    strengths: tuple[float, ...] = STRENGTHS,
) -> Overall:
    """Fit a logistic regression for each fold, with the penalty that judges best what is held out.

    Args:
        features: of the images.
        rows: numbers of the features to fit to.
        weights: (len(rows), folds) of each row in each fit, 0 for what is held out.
        plain: numbers of the plain images.
        folds: indices in `plain` that each fit holds out.
        strengths: inverse strengths of the penalty to try.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    fitted, judged = _pooled(features, rows), _pooled(features, plain)
    mean, deviation = fitted.mean(0), fitted.std(0) + 1e-6
    fitted, judged = (fitted - mean) / deviation, (judged - mean) / deviation
    labels, truth = features.labels[rows], features.labels[plain]
    best, lowest = None, np.inf
    for strength in strengths:
        kernels, biases = np.empty((fitted.shape[1], len(folds))), np.empty(len(folds))
        held_out = np.empty(len(plain))
        for number, fold in enumerate(folds):
            used = weights[:, number] > 0
            regression = LogisticRegression(C=strength, max_iter=ITERATIONS)
            with warnings.catch_warnings():  # nearly converged will do
                warnings.simplefilter("ignore", ConvergenceWarning)
                share = weights[used, number] / weights[used, number].sum()
                regression.fit(fitted[used], labels[used], TOTAL * share)
            kernels[:, number] = regression.coef_[0] / deviation
            biases[number] = regression.intercept_[0] - kernels[:, number] @ mean
            held_out[fold] = regression.decision_function(judged[fold])
        loss = np.logaddexp(0, np.where(truth == 1, -held_out, held_out)).mean()
        if loss < lowest:
            lowest, best = loss, Overall(kernels, biases, held_out)
    assert best is not None
    return best


def _pooled(features: Features, rows: np.ndarray) -> np.ndarray:
    starts = range(0, len(rows), BATCH)
    return np.concatenate(
        [network.pool(features.take(rows[start : start + BATCH])) for start in starts]
    ).astype(float)
