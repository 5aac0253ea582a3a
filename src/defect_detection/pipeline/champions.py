"""The versions found in production, judged on the test images of an evaluation."""

import logging
import math

from defect_detection import PipelineError, StoreError
from defect_detection.dataset.split import Split
from defect_detection.evaluation import metrics
from defect_detection.evaluation.metrics import Comparison
from defect_detection.evaluation.result import Evaluation, evaluate
from defect_detection.pipeline import tell
from defect_detection.registry import saved_model, versions
from defect_detection.registry.versions import TEST_DIGEST, TESTED, Version
from defect_detection.runtime.decision import CLASSES

log = logging.getLogger(__name__)


def tested_on(evaluation: Evaluation) -> dict[str, str]:
    """Return the tags that say on which images, and how many photographs, `acc` was measured."""
    testing = evaluation.split.testing
    photographs = dict(zip(CLASSES, testing.photograph_counts, strict=True))
    return {TEST_DIGEST: testing.digest, TESTED: versions.tested(photographs)}


class Champions:
    """Judges each version once."""

    def __init__(self, split: Split):
        self._split = split
        self._judged: dict[int, Evaluation | None] = {}
        self._out_of_reach: dict[int, str] = {}

    def add(self, version: Version, evaluation: Evaluation) -> None:
        """Add a version that was judged on these images."""
        self._judged[version.number] = evaluation

    def judged(self, version: Version) -> Evaluation | None:
        """Judge a version; return None, and log a warning, if it cannot be run."""
        if version.number not in self._judged:
            try:
                classifier = saved_model.load_classifier(version.uri)
            except StoreError as error:
                self._out_of_reach[version.number] = f"it cannot be compared now ({error})"
                self._judged[version.number] = None
            except PipelineError as error:
                log.warning("%s cannot be compared: %s", version.uri, error)
                self._judged[version.number] = None
            else:
                self._judged[version.number] = evaluate(classifier, self._split)
        return self._judged[version.number]

    def out_of_reach(self, version: Version) -> str:
        """Return why the files of a version cannot be fetched now, "" if they can.

        A moment without the store's files is no reason to replace the version.
        """
        self.judged(version)
        return self._out_of_reach.get(version.number, "")

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

        Raises:
            StoreError: its files cannot be fetched now.
        """
        if reason := self.out_of_reach(version):
            raise StoreError(f"{version.uri}: {reason}. Run this again")
        judged = self.judged(version)
        if judged is None:
            return False
        current = version.test_digest == self._split.testing.digest
        if not current or math.isnan(version.acc):  # someone may have edited the tag
            # Which of these images it was trained on is not known.
            tags = judged.tags() | {"acc_unseen": "unknown", "leaked_share": "unknown"}
            tags |= tested_on(judged)
            acc = judged.scores.accuracy
            versions.update(version, acc, tags, f"{judged.summary()} Scored again.")
            tell.scored_again(version, acc)
        elif judged.field and version.tags.get("field_digest") != judged.field.data.digest:
            versions.set_tags(version, judged.field.tags())
        return True
