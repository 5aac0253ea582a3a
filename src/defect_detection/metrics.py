"""What a model is measured by. Everywhere, 1 and "positive" mean a defect."""

from dataclasses import asdict, dataclass, fields

import numpy as np

TELLING_WIDTH = 0.2  # between bounds; wider ones tell nothing
EPS = 1e-7  # the least probability that a float32 sigmoid is trusted with
# Of log-odds. A few photographs that are all judged rightly would ask for endless certainty.
SCALES, SHIFTS = (0.2, 4.0), (-3.0, 3.0)
THRESHOLD = 0.5  # of the probability; the accuracy that decides on registration is taken at it
SIGNIFICANT = 0.05  # p-value below which a difference is more than chance


@dataclass(frozen=True)
class Rate:
    """How many of the things that were counted have a property."""

    count: int
    of: int

    @property
    def share(self) -> float:
        """The share, in [0, 1]; NaN of nothing."""
        return self.count / self.of if self.of else float("nan")

    @property
    def bounds(self) -> tuple[float, float]:
        """95 % bounds of the share."""
        return bounds(self.count, self.of)

    def __str__(self) -> str:
        """Say it with its bounds."""
        if not self.of:
            return "0 of 0"
        low, high = self.bounds
        return f"{self.count} of {self.of} ({self.share:.1%}, 95% bounds {low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class OperatingPoint:
    """What turns a probability into a decision.

    Attributes:
        threshold: probability of a defect from which on the verdict is defect.
        review_low: probability from which on a part is sent to a person,
        review_high: and from which on no longer; the band is empty where both are the same.
    """

    threshold: float
    review_low: float
    review_high: float

    def review(self, probabilities: np.ndarray | float) -> np.ndarray | bool:
        """Say which parts are sent to a person."""
        return (probabilities >= self.review_low) & (probabilities < self.review_high)


PLAIN = OperatingPoint(THRESHOLD, THRESHOLD, THRESHOLD)


@dataclass(frozen=True)
class Calibration:
    """What makes log-odds that are too sure, not sure enough or to one side fit the labels."""

    scale: float
    shift: float

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities, float32."""
        log_odds = self.scale * _log_odds(probabilities) + self.shift
        return (1 / (1 + np.exp(-log_odds))).astype(np.float32)


@dataclass(frozen=True)
class Errors:
    """What goes wrong at an operating point.

    Attributes:
        escapes: of the defects, those with the verdict ok.
        overkill: of the good parts, those with the verdict defect.
        reviewed: of all parts, those that are sent to a person.
        escapes_past_review: of the defects, escapes that are not sent to a person.
        overkill_past_review: of the good parts, overkill that is not sent to a person.
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
        """Return counts, shares and bounds by name, as they are logged."""
        figures = {}
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
    """Two models' verdicts on the same things.

    Attributes:
        challenger_only: how often only the challenger is right.
        champion_only: how often only the champion is right.
        of: how many things were judged by both.
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
        """95 % bounds of the difference: exact, given how often just one of the two is right."""
        apart = self.challenger_only + self.champion_only
        if not apart:
            return 0.0, 0.0
        low, high = bounds(self.challenger_only, apart)
        return apart * (2 * low - 1) / self.of, apart * (2 * high - 1) / self.of

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided (McNemar 1947): that the two are equally good."""
        from scipy.stats import binomtest

        apart = self.challenger_only + self.champion_only
        return float(binomtest(self.challenger_only, apart, 0.5).pvalue) if apart else 1.0

    def __str__(self) -> str:
        """Say it in a line."""
        if not self.challenger_only + self.champion_only:
            return f"no difference on any of {self.of}"
        low, high = self.bounds
        return (
            f"difference {self.difference:+.2%}, 95% bounds {low:+.2%} to {high:+.2%}, right alone "
            f"{self.challenger_only} to {self.champion_only}, McNemar's p {self.p_value:.3g}"
        )


@dataclass(frozen=True)
class Comparison:
    """A challenger and the champion on the same test pictures, at the threshold 0.5."""

    pictures: Paired
    photographs: Paired

    @property
    def verdict(self) -> str:
        """Which is better: "better", "worse" (the challenger), "the same" or "inside the noise".

        By photograph, since pictures of one are not independent.
        """
        if not self.pictures.difference and not self.photographs.difference:
            return "the same"
        if self.photographs.p_value >= SIGNIFICANT:
            return "inside the noise"
        return "better" if self.photographs.difference > 0 else "worse"

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.verdict}; of pictures: {self.pictures}; of photographs: {self.photographs}"

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name, as they are logged."""
        figures = {}
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

    def matrix(self) -> list[list[int]]:
        """Return the confusion matrix: rows are the folders, columns the verdicts."""
        return [
            [self.defects_found, self.defects_missed],
            [self.ok_rejected, self.ok_passed],
        ]

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
    right = is_right(labels, probabilities, threshold)
    each_right = is_right(*by_photograph(labels, probabilities, photographs), threshold)
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


def is_right(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Say which verdicts are right: bool (n,), for labels (n,), 1 = defect."""
    return is_defect(probabilities, threshold) == (labels == 1)


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


def errors(labels: np.ndarray, probabilities: np.ndarray, point: OperatingPoint) -> Errors:
    """Count what goes wrong at an operating point; arrays (n,), 1 = defect."""
    defect, found = labels == 1, is_defect(probabilities, point.threshold)
    review = point.review(probabilities)

    def rate(which: np.ndarray, of: np.ndarray) -> Rate:
        return Rate(int((which & of).sum()), int(of.sum()))

    return Errors(
        escapes=rate(~found, defect),
        overkill=rate(found, ~defect),
        reviewed=rate(review, np.ones_like(defect)),
        escapes_past_review=rate(~found & ~review, defect),
        overkill_past_review=rate(found & ~review, ~defect),
    )


def operating_point(
    labels: np.ndarray, probabilities: np.ndarray, max_escape_rate: float, review_share: float
) -> OperatingPoint:
    """Choose threshold and review band on validation pictures.

    Args:
        labels: (n,), 1 = defect; both classes must be there.
        probabilities: (n,) of a defect.
        max_escape_rate: as for `choose_threshold`.
        review_share: of the pictures, those nearest to the threshold in log-odds lie in the band:
            as many as do not exceed this share.
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
    """Return the threshold that rejects the fewest good parts and lets no more defects through.

    Of all thresholds that let no more than a share of the defects through, it rejects the fewest
    good parts, and of those that reject as few it lets the fewest defects through: it lies in the
    gap above the highest good part that passes, half-way in log-odds to the next defect.

    Args:
        labels: (n,), 1 = defect; there must be one.
        probabilities: (n,) of a defect.
        max_escape_rate: in [0, 1).
    """
    defects = np.sort(probabilities[labels == 1])
    highest = defects[int(max_escape_rate * len(defects))]
    good = probabilities[(labels != 1) & (probabilities < highest)]
    if not len(good):
        return float(defects[0])
    passes = good.max()
    found = defects[defects > passes][0]
    half_way = 1 / (1 + np.exp(-(_log_odds(found) + _log_odds(passes)) / 2))
    # As a float32, like the probabilities: else one picture and a batch could differ by rounding.
    half_way = np.float32(half_way)
    return float(half_way if passes < half_way <= found else found)


def compare(
    labels: np.ndarray, champion: np.ndarray, challenger: np.ndarray, photographs: np.ndarray
) -> Comparison:
    """Compare two models' probabilities of the same pictures; all arrays (n,), 1 = defect."""

    def paired(labels: np.ndarray, champion: np.ndarray, challenger: np.ndarray) -> Paired:
        old, new = (is_right(labels, one, THRESHOLD) for one in (champion, challenger))
        return Paired(int((new & ~old).sum()), int((old & ~new).sum()), len(labels))

    each_label, each_champion = by_photograph(labels, champion, photographs)
    _, each_challenger = by_photograph(labels, challenger, photographs)
    return Comparison(
        paired(labels, champion, challenger), paired(each_label, each_champion, each_challenger)
    )


def _log_odds(probabilities: np.ndarray | float) -> np.ndarray | float:
    """Return log-odds, of probabilities that no float32 sigmoid can tell from 0 or 1 the last."""
    safe = np.clip(np.asarray(probabilities, float), EPS, 1 - EPS)
    return np.log(safe) - np.log1p(-safe)


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error, in [0, 1].

    It is the mean distance between the probability of a defect and the share of defects, in
    `bins` classes of the same width (Naeini et al., AAAI 2015; Guo et al., ICML 2017).
    """
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    gap = np.bincount(which, probabilities - (labels == 1), bins)
    return float(np.abs(gap).sum() / len(labels))


def mean_in_log_odds(probabilities: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return the probability (n,) that has the mean log-odds of those that are counted.

    Args:
        probabilities: (n, judges) of a defect.
        counted: bool (n, judges), at least one of each row.
    """
    log_odds = np.average(_log_odds(probabilities), axis=1, weights=counted)
    return 1 / (1 + np.exp(-log_odds))


def calibration(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> Calibration:
    """Return the scale and shift of the log-odds with the lowest cross-entropy (Platt, 1999).

    Args:
        labels: (n,) in [0, 1], 1 = defect; or probabilities that are to be met.
        probabilities: (n,) of a defect.
        weights: (n,) how much each counts.
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
