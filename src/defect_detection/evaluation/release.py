"""Whether a version may go into production: what a plant needs beside a high accuracy."""

import math
from dataclasses import dataclass

from defect_detection.dataset.split import FEW_DEFECTS, Split
from defect_detection.evaluation import metrics
from defect_detection.evaluation.metrics import Comparison, ErrorRates, Rate, Scores
from defect_detection.evaluation.result import Evaluation
from defect_detection.registry.versions import Version
from defect_detection.runtime.decision import ACCURACY_THRESHOLD, CLASSES, POSITIVE
from defect_detection.settings import Decisions

COIN = 0.5  # share that is judged rightly by chance
CHANCE = 0.025  # p-value from which a model may be guessing; that of a 95 % bound on one side
FEW_PHOTOGRAPHS = 50  # of a class in training, below which more are the first thing to try
GOOD_RANKING = 0.9  # ROC AUC from which the threshold, not the model, is the problem


@dataclass(frozen=True)
class Release:
    """Whether a version is released.

    Attributes:
        reasons: why it is not, empty if it is.
        advice: what to try, empty if it is.
    """

    reasons: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def released(self) -> bool:
        """Whether the version may get the alias prod."""
        return not self.reasons

    def __str__(self) -> str:
        """Return it in a sentence without its full stop."""
        return "released" if self.released else "not released: " + "; ".join(self.reasons)


def describe_defects(split: Split) -> str:
    """Return what the photographs of defects can show, before training."""
    training, testing = (
        one.photograph_counts[CLASSES.index(POSITIVE)] for one in (split.training, split.testing)
    )
    said = []
    if split.training.few_defects:
        said.append(
            f"{_photographs_of_defects(training)} to learn from, fewer than {FEW_DEFECTS}: models "
            f"learn from good parts alone, and defects are only judged."
        )
    if not testing:
        said.append("No defect among the test images: nothing will be known of escapes.")
    else:
        _, most = Rate(0, testing).bounds
        said.append(
            f"{_photographs_of_defects(testing)} to test with: if all are found, up to {most:.1%} "
            f"of the defects may pass nevertheless (95% bound)."
        )
    return " ".join(said)


def _photographs_of_defects(count: int) -> str:
    return f"{count or 'No'} photograph{'' if count == 1 else 's'} of defects"


def judge(evaluation: Evaluation, decisions: Decisions, least_accuracy: float) -> Release:
    """Judge a version by photograph, since images of one photograph are not independent.

    Args:
        evaluation: of the version.
        decisions: what the plant demands.
        least_accuracy: test accuracy from which a version goes to production.
    """
    rates, accuracy = evaluation.photograph_error_rates, evaluation.scores.accuracy
    reasons = []
    if accuracy < least_accuracy:
        reasons.append(f"a test accuracy of {accuracy:.4f} is below {least_accuracy:.0%}")
    if decisions.refuse_chance and not rates.escapes.of:
        reasons.append("there is no defect among the test images, so nothing is known of escapes")
    elif decisions.refuse_chance and too_few(rates):
        reasons.append(too_few(rates))
    elif decisions.refuse_chance and _by_chance(evaluation.photograph_scores):
        balanced = evaluation.photograph_scores.balanced_accuracy
        reasons.append(f"a balanced accuracy of {balanced:.2f} by photograph may be chance")
    if decisions.refuse_escapes and _beyond(rates.escapes, decisions.max_escape_rate):
        reasons.append(_exceeds(rates.escapes, "defects pass", decisions.max_escape_rate))
    if decisions.refuse_overkill and _beyond(rates.overkill, decisions.max_overkill_rate):
        reasons.append(
            _exceeds(rates.overkill, "good parts are rejected", decisions.max_overkill_rate)
        )
    return Release(tuple(reasons), _advice(evaluation) if reasons else ())


def too_few(rates: ErrorRates) -> str:
    """Return of which class there are too few photographs to test with, "" if there are enough.

    There are enough if judging all of them rightly would show, by the exact bounds, more than what
    tossing a coin does.
    """
    for what, count in (("defects", rates.escapes.of), ("good parts", rates.overkill.of)):
        low, high = Rate(count, count).bounds
        if low <= COIN:
            return (
                f"{count} photograph{'' if count == 1 else 's'} of {what} cannot tell a model from "
                f"chance, not even if all are judged rightly (95% bounds {low:.0%} to {high:.0%})"
            )
    return ""


def _by_chance(scores: Scores) -> bool:
    """Return whether both classes may get the verdict defect equally often.

    An exact test on one side asks whether the balanced accuracy is above one half, whatever share
    of the parts the model rejects.
    """
    table = [
        [scores.defects_found, scores.ok_rejected],
        [scores.defects_missed, scores.ok_passed],
    ]
    return metrics.p_value_of_more(table) >= CHANCE


def _beyond(rate: Rate, largest: float) -> bool:
    """Return whether a rate exceeds the largest one beyond doubt: its lower bound does."""
    return rate.bounds[0] > largest


def _exceeds(rate: Rate, what: str, largest: float) -> str:
    low, high = rate.bounds
    return (
        f"{rate.count} of {rate.of} photographs of {what} ({rate.share:.0%}, 95% bounds {low:.0%} "
        f"to {high:.0%}), at most {largest:.0%} were asked for"
    )


def _advice(evaluation: Evaluation) -> tuple[str, ...]:
    training, takes = evaluation.split.training, evaluation.takes
    found = []
    for name, count in zip(CLASSES, training.photograph_counts, strict=True):
        if count < FEW_PHOTOGRAPHS:
            found.append(f"more photographs of {name}: training has {count}")
    if evaluation.scores.roc_auc >= GOOD_RANKING:
        found.append(
            f"another threshold: the model ranks the parts well (ROC AUC "
            f"{evaluation.scores.roc_auc:.2f}); max_escape_rate in src/config.yaml decides how "
            f"many good parts it rejects"
        )
    else:
        found.append(
            f"larger images, if defects are smaller than a thirtieth of the image: image_size is "
            f"[{takes.height}, {takes.width}]"
        )
    found.append(
        "the labels: the worst mistakes are in the report, likely errors in label_errors.csv of "
        "the training run"
    )
    return tuple(found)


def diagnosis(evaluation: Evaluation, release: Release, report: str) -> str:
    """Return what was reached, what is needed, what to try and where the report is."""
    scores, rates = evaluation.scores, evaluation.photograph_error_rates
    lines = [
        "Not released, so it does not go into production:",
        *(f"  needed   {reason}" for reason in release.reasons),
        f"  reached  accuracy {scores.accuracy:.4f} at {ACCURACY_THRESHOLD}, balanced "
        f"{_known(scores.balanced_accuracy)}, ROC AUC {_known(scores.roc_auc)}; by photograph "
        f"{rates.escapes.count} of {rates.escapes.of} defects pass and {rates.overkill.count} of "
        f"{rates.overkill.of} good parts are rejected",
        *(f"  try      {one}" for one in release.advice),
        f"  report   {report}",
    ]
    return "\n".join(lines)


def _known(figure: float) -> str:
    return "unknown" if math.isnan(figure) else f"{figure:.4f}"


@dataclass(frozen=True)
class Registration:
    """What became of an evaluated model.

    Attributes:
        version: the version that was registered.
        champion: the version that had the alias prod before, None if none had.
        comparison: with the champion on the same images, None if the champion cannot be run.
        release: whether it may get the alias prod.
        decision: about the alias, in words.
        in_production: whether the version has the alias prod now.
    """

    version: Version
    champion: Version | None
    comparison: Comparison | None
    release: Release
    decision: str
    in_production: bool
