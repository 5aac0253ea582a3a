"""The versions found in production, judged on the test images of an evaluation."""

import logging

from defect_detection import PipelineError
from defect_detection.dataset.split import Split
from defect_detection.evaluation import metrics
from defect_detection.evaluation.metrics import Comparison
from defect_detection.evaluation.result import Evaluation, evaluate
from defect_detection.pipeline import tell
from defect_detection.registry import saved_model, versions
from defect_detection.registry.versions import Version

log = logging.getLogger(__name__)


class Champions:
    """Judges each version once."""

    def __init__(self, split: Split):
        self._split = split
        self._judged: dict[int, Evaluation | None] = {}

    def add(self, version: Version, evaluation: Evaluation) -> None:
        """Add a version that was judged on these images."""
        self._judged[version.number] = evaluation

    def judged(self, version: Version) -> Evaluation | None:
        """Judge a version; return None, and log a warning, if it cannot be run."""
        if version.number not in self._judged:
            try:
                classifier = saved_model.load_classifier(version.uri)
            except PipelineError as error:
                log.warning("%s cannot be compared: %s", version.uri, error)
                self._judged[version.number] = None
            else:
                self._judged[version.number] = evaluate(classifier, self._split)
        return self._judged[version.number]

    def compare(self, champion: Version, evaluation: Evaluation) -> Comparison | None:
        """Compare an evaluated model with a version; None if the version cannot be run."""
        judged = self.judged(champion)
        if judged is None:
            return None
        return metrics.compare(
            evaluation.labels,
            judged.probabilities,
            evaluation.probabilities,
            self._split.testing.photographs,
        )

    def update(self, version: Version) -> bool:
        """Update a version's figures to these images, unless they are up to date.

        Returns:
            Whether the version can be run.
        """
        judged = self.judged(version)
        if judged is None:
            return False
        if version.test_digest != self._split.testing.digest:
            # Which of these images it was trained on is not known.
            tags = judged.tags() | {"acc_unseen": "unknown", "leaked_share": "unknown"}
            acc = judged.scores.accuracy
            versions.update(version, acc, tags, f"{judged.summary()} Scored again.")
            tell.scored_again(version, acc)
        return True
