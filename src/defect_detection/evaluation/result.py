"""The result of an evaluation, and of the registration that follows it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from defect_detection.dataset.split import Split
from defect_detection.evaluation import metrics
from defect_detection.evaluation.metrics import Comparison, ErrorRates, Rate, Scores, Unseen
from defect_detection.registry.versions import Version
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.decision import ACCURACY_THRESHOLD, OperatingPoint


@dataclass(frozen=True)
class Evaluation:
    """How a model judges the test images.

    Attributes:
        split: the images.
        point: the model's operating point.
        probabilities: float32 (n,) of a defect, for each test image.
        maps: float32 (n, h, w), evidence of a defect.
        unknown: test images that the model calls unknown.
    """

    split: Split
    point: OperatingPoint
    probabilities: np.ndarray
    maps: np.ndarray
    unknown: Rate

    @property
    def labels(self) -> np.ndarray:
        """Labels of the test images, (n,), 1 = defect."""
        return self.split.testing.labels

    @cached_property
    def scores(self) -> Scores:
        """Counts and rates at the threshold 0.5."""
        return metrics.score(self.labels, self.probabilities, ACCURACY_THRESHOLD)

    @cached_property
    def error_rates(self) -> ErrorRates:
        """Error rates at the operating point, by image."""
        return metrics.error_rates(self.labels, self.probabilities, self.point)

    @cached_property
    def photograph_error_rates(self) -> ErrorRates:
        """Error rates by photograph, which is judged by the mean of its images."""
        by_photograph = metrics.by_photograph(
            self.labels, self.probabilities, self.split.testing.photographs
        )
        return metrics.error_rates(*by_photograph, self.point)

    @cached_property
    def unseen(self) -> Unseen:
        """The test images whose photograph is not in training, at the threshold 0.5."""
        unseen = ~self.split.leaked
        return metrics.unseen(
            self.labels[unseen],
            self.probabilities[unseen],
            self.split.testing.photographs[unseen],
            ACCURACY_THRESHOLD,
        )

    @cached_property
    def leaked_accuracy(self) -> float | None:
        """Accuracy at 0.5 on the test images whose photograph is in training; None without any."""
        leaked = self.split.leaked
        right = metrics.is_right(self.labels, self.probabilities, ACCURACY_THRESHOLD)
        return float(right[leaked].mean()) if leaked.any() else None

    def figures(self) -> dict[str, float]:
        """Return all figures by the names under which they are logged."""
        unseen = self.unseen
        found = self.scores.as_dict() | {
            "unseen_pictures": unseen.pictures,
            "unseen_photographs": unseen.photographs,
            "unseen_photographs_right": unseen.photographs_right,
            "called_unknown": self.unknown.count,
        }
        if unseen.pictures:
            low, high = unseen.bounds
            found |= {"acc_unseen": unseen.accuracy, "acc_unseen_low": low, "acc_unseen_high": high}
        if self.leaked_accuracy is not None:
            found["acc_leaked"] = self.leaked_accuracy
        for of, rates in (("", self.error_rates), ("photographs_", self.photograph_error_rates)):
            found |= {of + name: value for name, value in rates.as_dict().items()}
        return found

    def tags(self) -> dict[str, str]:
        """Return the tags of a registered version beside `acc`."""
        return {
            "acc_unseen": repr(self.unseen.accuracy) if self.unseen.pictures else "unknown",
            "leaked_share": repr(self.split.leaked_share),
            "test_digest": self.split.testing.digest,
            "escapes": str(self.error_rates.escapes),
            "overkill": str(self.error_rates.overkill),
        }

    def sentences(self) -> dict[str, str]:
        """Return the main figures in words, by name."""
        return {
            "escapes": str(self.error_rates.escapes),
            "overkill": str(self.error_rates.overkill),
            "escapes_by_photograph": str(self.photograph_error_rates.escapes),
            "overkill_by_photograph": str(self.photograph_error_rates.overkill),
            "sent_to_a_person": str(self.error_rates.reviewed),
            "escapes_past_review": str(self.error_rates.escapes_past_review),
            "overkill_past_review": str(self.error_rates.overkill_past_review),
            "called_unknown": str(self.unknown),
        }

    def summary(self) -> str:
        """Return the accuracy and the mistakes at 0.5 in a sentence."""
        scores = self.scores
        return (
            f"Test accuracy {scores.accuracy:.4f} on {scores.pictures} images: "
            f"{scores.defects_missed} defects let through, {scores.ok_rejected} good parts "
            f"rejected."
        )


def evaluate(classifier: Classifier, split: Split) -> Evaluation:
    """Judge the test images with a model.

    Raises:
        PipelineError: the model takes another image size and the files have changed meanwhile.
    """
    images = split.testing.images_at(classifier.image_size)
    probabilities, maps = classifier.examine(images)
    unknown = sum(map(bool, classifier.ood_reasons(images)))
    return Evaluation(split, classifier.point, probabilities, maps, Rate(unknown, len(images)))


@dataclass(frozen=True)
class Registration:
    """What became of an evaluated model.

    Attributes:
        version: the version that was registered.
        champion: the version that had the alias prod before, None if none had.
        comparison: with the champion on the same images, None if the champion cannot be run.
        decision: about the alias, in words.
        in_production: whether the version has the alias prod now.
    """

    version: Version
    champion: Version | None
    comparison: Comparison | None
    decision: str
    in_production: bool
