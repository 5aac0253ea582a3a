"""Figures that measure a model. Everywhere, 1 and "positive" mean a defect."""

import logging
import math
from dataclasses import asdict, dataclass, fields

import numpy as np

from defect_detection.runtime.decision import ACCURACY_THRESHOLD, OperatingPoint, is_defect

TELLING_WIDTH = 0.2  # distance of confidence bounds beyond which they say nothing
LARGEST_EXACT = 250_000  # product of the sizes of two groups for an exact test of both together
SIGNIFICANT = 0.05  # p-value below which a difference is more than chance


@dataclass(frozen=True)
class Rate:
    """How many of the counted things have a property, with exact confidence bounds."""

    count: int
    of: int

    @property
    def share(self) -> float:
        """The share, in [0, 1]; NaN if nothing was counted."""
        return self.count / self.of if self.of else float("nan")

    @property
    def bounds(self) -> tuple[float, float]:
        """95 % bounds of the share."""
        return bounds(self.count, self.of)

    def __str__(self) -> str:
        """Return the count, the share and its bounds in words."""
        if not self.of:
            return "0 of 0"
        low, high = self.bounds
        return f"{self.count} of {self.of} ({self.share:.1%}, 95% bounds {low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class ErrorRates:
    """Error rates at an operating point.

    Attributes:
        escapes: defects with the verdict ok, of all defects.
        overkill: good parts with the verdict defect, of all good parts.
        reviewed: parts that a person reviews, of all parts.
        escapes_past_review: escapes that no person reviews, of all defects.
        overkill_past_review: overkill that no person reviews, of all good parts.
    """

    escapes: Rate
    overkill: Rate
    reviewed: Rate
    escapes_past_review: Rate
    overkill_past_review: Rate

    def matrix(self) -> list[list[int]]:
        """Return the confusion matrix: rows are the folders, columns the verdicts."""
        return [
            [self.escapes.of - self.escapes.count, self.escapes.count],
            [self.overkill.count, self.overkill.of - self.overkill.count],
        ]

    def as_dict(self) -> dict[str, float]:
        """Return counts, shares and bounds by the names under which they are logged."""
        figures: dict[str, float] = {}
        for field in fields(self):
            rate = getattr(self, field.name)
            low, high = rate.bounds
            figures |= {
                field.name: rate.count,
                f"{field.name}_share": rate.share,
                f"{field.name}_low": low,
                f"{field.name}_high": high,
            }
        return figures


@dataclass(frozen=True)
class Paired:
    """The verdicts of two models on the same things.

    Attributes:
        challenger_only: how often only the challenger is right.
        champion_only: how often only the champion is right.
        of: how many things both judged.
    """

    challenger_only: int
    champion_only: int
    of: int

    @property
    def difference(self) -> float:
        """The challenger's accuracy less the champion's, in [-1, 1]."""
        return (self.challenger_only - self.champion_only) / self.of

    @property
    def bounds(self) -> tuple[float, float]:
        """95 % bounds of the difference, exact given how often only one of the two is right."""
        apart = self.challenger_only + self.champion_only
        if not apart:
            return 0.0, 0.0
        low, high = bounds(self.challenger_only, apart)
        return apart * (2 * low - 1) / self.of, apart * (2 * high - 1) / self.of

    @property
    def p_value(self) -> float:
        """p-value of McNemar's exact two-sided test (1947) that the two are equally good."""
        from scipy.stats import binomtest

        apart = self.challenger_only + self.champion_only
        return float(binomtest(self.challenger_only, apart, 0.5).pvalue) if apart else 1.0

    def __str__(self) -> str:
        """Return it in a line."""
        if not self.challenger_only + self.champion_only:
            return f"no difference on any of {self.of}"
        low, high = self.bounds
        return (
            f"difference {self.difference:+.2%}, 95% bounds {low:+.2%} to {high:+.2%}, only the "
            f"challenger right {self.challenger_only}, only the champion right "
            f"{self.champion_only}, McNemar's p {self.p_value:.3g}"
        )


@dataclass(frozen=True)
class Comparison:
    """A challenger against the champion on the same test images, at the threshold 0.5."""

    pictures: Paired
    photographs: Paired

    @property
    def verdict(self) -> str:
        """The challenger is "better", "worse", "the same" or "not significant".

        Tested by photograph, since images of one photograph are not independent.
        """
        if not self.pictures.difference and not self.photographs.difference:
            return "the same"
        if self.photographs.p_value >= SIGNIFICANT:
            return "not significant"
        return "better" if self.photographs.difference > 0 else "worse"

    def __str__(self) -> str:
        """Return it in a line."""
        return f"{self.verdict}; of images: {self.pictures}; of photographs: {self.photographs}"

    def as_dict(self) -> dict[str, float]:
        """Return the figures by the names under which they are logged."""
        figures: dict[str, float] = {}
        for of in ("pictures", "photographs"):
            paired = getattr(self, of)
            low, high = paired.bounds
            figures |= {
                f"{of}_difference": paired.difference,
                f"{of}_difference_low": low,
                f"{of}_difference_high": high,
                f"{of}_p_value": paired.p_value,
            }
        return figures


@dataclass(frozen=True)
class Scores:
    """Counts and rates at one threshold.

    Attributes:
        defects_found: defects with the verdict defect.
        defects_missed: defects with the verdict ok.
        ok_rejected: good parts with the verdict defect.
        ok_passed: good parts with the verdict ok.
        roc_auc: area under the ROC curve, in [0, 1]; NaN if a class is missing.
        calibration_error: as `calibration_error` returns it.
    """

    defects_found: int
    defects_missed: int
    ok_rejected: int
    ok_passed: int
    roc_auc: float
    calibration_error: float

    @property
    def pictures(self) -> int:
        """How many images were scored."""
        return sum(self.counts().values())

    @property
    def accuracy(self) -> float:
        """Share of right verdicts, in [0, 1]."""
        return (self.defects_found + self.ok_passed) / self.pictures

    @property
    def recall_def_front(self) -> float:
        """Share of the defects that are found, in [0, 1]; NaN if there is none."""
        return _share(self.defects_found, self.defects_missed)

    @property
    def recall_ok_front(self) -> float:
        """Share of the good parts that pass, in [0, 1]; NaN if there is none."""
        return _share(self.ok_passed, self.ok_rejected)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the two recalls, in [0, 1]; always guessing one class gives 0.5."""
        return (self.recall_def_front + self.recall_ok_front) / 2

    def counts(self) -> dict[str, int]:
        """Return the cells of the confusion matrix by name."""
        figures = ("roc_auc", "calibration_error")
        return {name: value for name, value in asdict(self).items() if name not in figures}

    def matrix(self) -> list[list[int]]:
        """Return the confusion matrix: rows are the folders, columns the verdicts."""
        return [
            [self.defects_found, self.defects_missed],
            [self.ok_rejected, self.ok_passed],
        ]

    def table(self) -> str:
        """Return the confusion matrix as text: rows are the folders, columns the verdicts."""
        return (
            "               verdict defect  verdict ok\n"
            f"  def_front  {self.defects_found:16}  {self.defects_missed:10}\n"
            f"  ok_front   {self.ok_rejected:16}  {self.ok_passed:10}"
        )

    def as_dict(self) -> dict[str, float]:
        """Return the figures by the names under which they are logged."""
        rates = ("accuracy", "balanced_accuracy", "recall_def_front", "recall_ok_front")
        return asdict(self) | {name: getattr(self, name) for name in rates}


@dataclass(frozen=True)
class Unseen:
    """Test images of photographs that are not in training, at one threshold.

    Attributes:
        pictures: how many there are.
        right: images with the right verdict.
        photographs: how many they come from.
        photographs_right: photographs with the right verdict by the mean of their images.
    """

    pictures: int
    right: int
    photographs: int
    photographs_right: int

    @property
    def accuracy(self) -> float:
        """Share of the images with the right verdict, in [0, 1]; NaN if there is no image."""
        return self.right / self.pictures if self.pictures else float("nan")

    @property
    def bounds(self) -> tuple[float, float]:
        """95 % bounds of the accuracy by photograph, since images of one are not independent."""
        return bounds(self.photographs_right, self.photographs)

    @property
    def too_few(self) -> bool:
        """Whether the bounds are too wide to say anything."""
        low, high = self.bounds
        return high - low > TELLING_WIDTH

    def __str__(self) -> str:
        """Return it in a line."""
        if not self.pictures:
            return "no unseen image: nothing is known about new parts"
        low, high = self.bounds
        return (
            f"accuracy on {self.pictures} unseen images {self.accuracy:.4f}; by photograph "
            f"{self.photographs_right} of {self.photographs} right, 95% bounds {low:.3f} to "
            f"{high:.3f}" + (": too few to tell" if self.too_few else "")
        )


def unseen(
    labels: np.ndarray, probabilities: np.ndarray, photographs: np.ndarray, threshold: float
) -> Unseen:
    """Score unseen images; all arrays (n,), 1 = defect."""
    right = is_right(labels, probabilities, threshold)
    each_right = is_right(*by_photograph(labels, probabilities, photographs), threshold)
    return Unseen(len(right), int(right.sum()), len(each_right), int(each_right.sum()))


def by_photograph(
    labels: np.ndarray, probabilities: np.ndarray, photographs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average the probabilities of each photograph; one with two labels counts once for each.

    Returns:
        Labels and mean probabilities, both (photographs,).
    """
    each, rows = np.unique(np.stack([photographs, labels]), axis=1, return_inverse=True)
    rows = rows.reshape(-1)
    return each[1], np.bincount(rows, probabilities) / np.bincount(rows)


def bounds(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact bounds of a rate; 0 and 1 if there was no trial.

    They are quantiles of beta distributions (Clopper and Pearson, Biometrika 1934).
    """
    from scipy.special import betaincinv  # takes 0.3 s

    failures, tail = trials - successes, (1 - confidence) / 2
    low = float(betaincinv(successes, failures + 1, tail)) if successes else 0.0
    high = float(betaincinv(successes + 1, failures, 1 - tail)) if failures else 1.0
    return low, high


def p_value_of_more(table: list[list[int]]) -> float:
    """Return the one-sided p-value of Boschloo's exact test (1970), for large groups Fisher's.

    Args:
        table: the columns are two groups, the rows how many have a property and how many do not.

    Returns:
        How likely at most the first group has the property that much more often by chance.
    """
    from scipy.stats import boschloo_exact, fisher_exact

    first, second = np.sum(table, axis=0)
    if not first or not second:
        return 1.0
    if first * second > LARGEST_EXACT:  # where the two hardly differ
        return float(fisher_exact(table, alternative="greater").pvalue)
    logged = logging.root.manager.disable
    logging.disable(logging.INFO)  # SciPy's optimiser logs its bounds
    try:
        return float(boschloo_exact(table, alternative="greater").pvalue)
    finally:
        logging.disable(logged)


def is_right(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Return which verdicts are right, bool (n,); labels (n,), 1 = defect."""
    return is_defect(probabilities, threshold) == (labels == 1)


def _share(count: int, others: int) -> float:
    return count / (count + others) if count + others else math.nan


def score(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> Scores:
    """Score probabilities (n,) against labels (n,), 1 = defect."""
    from sklearn.metrics import roc_auc_score  # takes 1 s

    defect, found = labels == 1, is_defect(probabilities, threshold)
    return Scores(
        defects_found=int((defect & found).sum()),
        defects_missed=int((defect & ~found).sum()),
        ok_rejected=int((~defect & found).sum()),
        ok_passed=int((~defect & ~found).sum()),
        roc_auc=float(roc_auc_score(labels, probabilities)) if len(set(labels)) == 2 else math.nan,
        calibration_error=calibration_error(labels, probabilities),
    )


def error_rates(labels: np.ndarray, probabilities: np.ndarray, point: OperatingPoint) -> ErrorRates:
    """Count the errors at an operating point; arrays (n,), 1 = defect."""
    defect, found = labels == 1, is_defect(probabilities, point.threshold)
    review = point.needs_review(probabilities)

    def rate(which: np.ndarray, of: np.ndarray) -> Rate:
        return Rate(int((which & of).sum()), int(of.sum()))

    return ErrorRates(
        escapes=rate(~found, defect),
        overkill=rate(found, ~defect),
        reviewed=rate(review, np.ones_like(defect)),
        escapes_past_review=rate(~found & ~review, defect),
        overkill_past_review=rate(found & ~review, ~defect),
    )


def compare(
    labels: np.ndarray, champion: np.ndarray, challenger: np.ndarray, photographs: np.ndarray
) -> Comparison:
    """Compare the probabilities of two models on the same images; arrays (n,), 1 = defect."""

    def paired(labels: np.ndarray, champion: np.ndarray, challenger: np.ndarray) -> Paired:
        old, new = (is_right(labels, one, ACCURACY_THRESHOLD) for one in (champion, challenger))
        return Paired(int((new & ~old).sum()), int((old & ~new).sum()), len(labels))

    each_label, each_champion = by_photograph(labels, champion, photographs)
    _, each_challenger = by_photograph(labels, challenger, photographs)
    return Comparison(
        paired(labels, champion, challenger), paired(each_label, each_champion, each_challenger)
    )


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error, in [0, 1].

    It is the mean distance between the probability of a defect and the share of defects, over
    `bins` intervals of the same width (Naeini et al., AAAI 2015; Guo et al., ICML 2017).
    """
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    gap = np.bincount(which, probabilities - (labels == 1), bins)
    return float(np.abs(gap).sum() / len(labels))
