"""Which images are probably in the wrong class folder, by models that did not see them."""

from dataclasses import dataclass

import numpy as np

from defect_detection.atomic import csv_text, defused
from defect_detection.dataset.split import Dataset
from defect_detection.evaluation import metrics
from defect_detection.runtime.decision import ACCURACY_THRESHOLD, NEGATIVE, POSITIVE

FILE = "label_errors.csv"  # the artifact's name
TRUSTED_RANKING = 0.9  # ROC AUC from which a model may contradict labels


@dataclass(frozen=True)
class LabelError:
    """An image whose label its held-out probability contradicts.

    Attributes:
        path: relative to the data folder.
        label: the class that it is filed under.
        photograph: its number.
        confidence: probability of its label, in [0, 1].
    """

    path: str
    label: str
    photograph: int
    confidence: float


def likely_errors(
    data: Dataset, images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray
) -> list[LabelError]:
    """Find likely label errors by confident learning (Northcutt et al., JAIR 2021).

    An image counts if the other class is at least as probable for it as it is on average for the
    images of that class. The least confident label comes first. Models that rank the images badly
    contradict many labels for no reason; they find none.

    Args:
        data: the training images.
        images: numbers (n,) in `data` of the images that were held out.
        labels: (n,), 1 = defect.
        probabilities: (n,) of a defect, by the fit that held each image out.
    """
    ranking = metrics.score(labels, probabilities, ACCURACY_THRESHOLD).roc_auc
    if not ranking >= TRUSTED_RANKING:  # NaN for one class alone
        return []
    of_defect = np.stack([1 - probabilities, probabilities], axis=1)
    usual = np.array([of_defect[labels == label, label].mean() for label in (0, 1)])
    own = labels.astype(int)
    rows = np.arange(len(own))
    contradicted = of_defect[rows, 1 - own] >= np.maximum(usual[1 - own], 0.5)
    confidence = of_defect[rows, own]
    return [
        LabelError(
            data.paths[images[row]],
            POSITIVE if own[row] else NEGATIVE,
            int(data.photographs[images[row]]),
            float(confidence[row]),
        )
        for row in np.argsort(confidence, kind="stable")
        if contradicted[row]
    ]


def table(errors: list[LabelError]) -> str:
    """Return likely label errors as CSV."""
    rows = [
        (defused(one.path), one.label, one.photograph, f"{one.confidence:.6f}") for one in errors
    ]
    return csv_text([("path", "class", "photograph", "confidence"), *rows])
