"""What a model is measured by. Everywhere, 1 and "positive" mean a defect."""

from dataclasses import asdict, dataclass

import numpy as np

TELLING_WIDTH = 0.2  # between bounds; wider ones tell nothing
EPS = 1e-7  # the least probability that a float32 sigmoid is trusted with
# A few photographs that are all judged rightly would ask for endless certainty.
TEMPERATURES = (0.25, 5.0)
THRESHOLD = 0.5  # of the probability; the accuracy that decides on registration is taken at it


@dataclass(frozen=True)
class Scores:
    """Counts and rates at one threshold.

    Attributes:
        defects_found: defects with the verdict defect.
        defects_missed: defects with the verdict ok.
        ok_rejected: good parts with the verdict defect.
        ok_passed: good parts with the verdict ok.
        roc_auc: area under the ROC curve, in [0, 1].
        calibration_error: as `calibration_error` gives it.
    """

    defects_found: int
    defects_missed: int
    ok_rejected: int
    ok_passed: int
    roc_auc: float
    calibration_error: float

    @property
    def pictures(self) -> int:
        """How many pictures were scored."""
        return sum(self.counts().values())

    @property
    def accuracy(self) -> float:
        """Share of right verdicts, in [0, 1]."""
        return (self.defects_found + self.ok_passed) / self.pictures

    @property
    def recall_def_front(self) -> float:
        """Share of the defects that are found, in [0, 1]."""
        return self.defects_found / (self.defects_found + self.defects_missed)

    @property
    def recall_ok_front(self) -> float:
        """Share of the good parts that pass, in [0, 1]."""
        return self.ok_passed / (self.ok_passed + self.ok_rejected)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the two recalls, in [0, 1]: what guessing one class does not raise."""
        return (self.recall_def_front + self.recall_ok_front) / 2

    def counts(self) -> dict[str, int]:
        """Return the confusion matrix by name."""
        figures = ("roc_auc", "calibration_error")
        return {name: value for name, value in asdict(self).items() if name not in figures}

    def table(self) -> str:
        """Lay the confusion matrix out: rows are the folders, columns the verdicts."""
        return (
            "               verdict defect  verdict ok\n"
            f"  def_front  {self.defects_found:16}  {self.defects_missed:10}\n"
            f"  ok_front   {self.ok_rejected:16}  {self.ok_passed:10}"
        )

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name, as they are logged."""
        rates = ("accuracy", "balanced_accuracy", "recall_def_front", "recall_ok_front")
        return asdict(self) | {name: getattr(self, name) for name in rates}


@dataclass(frozen=True)
class Unseen:
    """Test pictures of photographs that are not in training, at one threshold.

    Attributes:
        pictures: how many there are.
        right: pictures with the right verdict.
        photographs: how many they show.
        photographs_right: photographs with the right verdict by the mean of their pictures.
    """

    pictures: int
    right: int
    photographs: int
    photographs_right: int

    @property
    def accuracy(self) -> float:
        """Share of the pictures with the right verdict, in [0, 1]; NaN if there is none."""
        return self.right / self.pictures if self.pictures else float("nan")

    @property
    def bounds(self) -> tuple[float, float]:
        """95 % bounds of the accuracy by photograph: pictures of one are not independent."""
        return bounds(self.photographs_right, self.photographs)

    @property
    def too_few(self) -> bool:
        """Whether the bounds leave the accuracy open."""
        low, high = self.bounds
        return high - low > TELLING_WIDTH

    def __str__(self) -> str:
        """Say it in a line."""
        if not self.pictures:
            return "no unseen picture: nothing is known about new parts"
        low, high = self.bounds
        return (
            f"accuracy on {self.pictures} unseen pictures {self.accuracy:.4f}; by photograph "
            f"{self.photographs_right} of {self.photographs} right, 95% bounds {low:.3f} to "
            f"{high:.3f}" + (": too few to tell" if self.too_few else "")
        )


def unseen(
    labels: np.ndarray, probabilities: np.ndarray, photographs: np.ndarray, threshold: float
) -> Unseen:
    """Judge unseen pictures, all arrays (n,), 1 = defect."""
    right = is_defect(probabilities, threshold) == (labels == 1)
    each_label, each_probability = by_photograph(labels, probabilities, photographs)
    each_right = is_defect(each_probability, threshold) == (each_label == 1)
    return Unseen(len(right), int(right.sum()), len(each_right), int(each_right.sum()))


def by_photograph(
    labels: np.ndarray, probabilities: np.ndarray, photographs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average the probabilities of each photograph; one under two labels counts once for each.

    Returns:
        Labels and mean probabilities, both (photographs,).
    """
    each, rows = np.unique(np.stack([photographs, labels]), axis=1, return_inverse=True)
    rows = rows.reshape(-1)
    return each[1], np.bincount(rows, probabilities) / np.bincount(rows)


def bounds(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) bounds of a rate; 0 and 1 without any trial."""
    from scipy.stats import binomtest  # 1 s that inference does not need

    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def is_defect(probabilities: np.ndarray | float, threshold: float) -> np.ndarray | bool:
    """Turn probabilities of a defect into verdicts, True = defect."""
    return probabilities >= threshold


def score(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> Scores:
    """Compare probabilities (n,) with labels (n,), 1 = defect; both classes must be there."""
    from sklearn.metrics import roc_auc_score  # 1 s that inference does not need

    defect, found = labels == 1, is_defect(probabilities, threshold)
    return Scores(
        defects_found=int((defect & found).sum()),
        defects_missed=int((defect & ~found).sum()),
        ok_rejected=int((~defect & found).sum()),
        ok_passed=int((~defect & ~found).sum()),
        roc_auc=float(roc_auc_score(labels, probabilities)),
        calibration_error=calibration_error(labels, probabilities),
    )


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error, in [0, 1].

    It is the mean distance between the probability of a defect and the share of defects, in
    `bins` classes of the same width (Naeini et al., AAAI 2015; Guo et al., ICML 2017).
    """
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    gap = np.bincount(which, probabilities - (labels == 1), bins)
    return float(np.abs(gap).sum() / len(labels))


def temperature(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> float:
    """Return what to divide the log-odds by for the lowest cross-entropy (Guo et al., 2017).

    Args:
        labels: (n,), 1 = defect.
        probabilities: (n,) of a defect.
        weights: (n,) how much each counts.
    """
    from scipy.optimize import minimize_scalar  # inference does not need it
    from scipy.special import log_expit, logit

    # The sign of the log-odds of what is true: negative where the verdict is wrong.
    safe = np.clip(probabilities.astype(float), EPS, 1 - EPS)
    margins = np.where(labels == 1, 1, -1) * logit(safe)
    low, high = (np.log(limit) for limit in TEMPERATURES)
    found = minimize_scalar(
        lambda x: -np.sum(weights * log_expit(margins / np.exp(x))),
        bounds=(low, high),
        method="bounded",
    )
    return float(np.exp(found.x))
