"""What an evaluation found, and the summary of a pipeline in Markdown."""

import json
from dataclasses import dataclass

import numpy as np
from mlflow.entities import Run

from defect_detection.metrics import THRESHOLD, Errors, Scores, Unseen
from defect_detection.registry import Version

# Squares of a text and lines of a chart in the same colours.
SQUARES = {
    "🟦": "#3b78c4",
    "🟧": "#e0812b",
    "🟩": "#4a9a4a",
    "🟪": "#8a5bb5",
    "🟥": "#c9403c",
    "🟫": "#8a5a3c",
}


@dataclass(frozen=True)
class Evaluated:
    """What a model is worth on the test pictures.

    Attributes:
        scores: at the threshold 0.5.
        errors: at the model's operating point, by picture.
        photograph_errors: the same by photograph, judged by the mean of its pictures.
        unseen: on the pictures whose photograph is not in training, at 0.5.
        leaked_share: of the pictures whose photograph is, in [0, 1].
        test_digest: of the test pictures.
        labels: (n,), 1 = defect.
        probabilities: (n,) of a defect.
        maps: (n, height / 4, width / 4), the evidence of a defect.
    """

    scores: Scores
    errors: Errors
    photograph_errors: Errors
    unseen: Unseen
    leaked_share: float
    test_digest: str
    labels: np.ndarray
    probabilities: np.ndarray
    maps: np.ndarray

    def tags(self) -> dict[str, str]:
        """Return what a registered version carries beside `acc`."""
        return {
            "acc_unseen": repr(self.unseen.accuracy) if self.unseen.pictures else "unknown",
            "leaked_share": repr(self.leaked_share),
            "test_digest": self.test_digest,
            "escapes": str(self.errors.escapes),
            "overkill": str(self.errors.overkill),
        }

    def sentences(self) -> dict[str, str]:
        """Return the head figures in words, by name."""
        return {
            "escapes": str(self.errors.escapes),
            "overkill": str(self.errors.overkill),
            "escapes_by_photograph": str(self.photograph_errors.escapes),
            "overkill_by_photograph": str(self.photograph_errors.overkill),
            "sent_to_a_person": str(self.errors.reviewed),
            "escapes_past_review": str(self.errors.escapes_past_review),
            "overkill_past_review": str(self.errors.overkill_past_review),
        }


def markdown(
    sets: list[Run],
    best_run_id: str,
    curves: dict[str, list[float]],
    evaluation: Run,
    production: Version | None,
) -> str:
    """Summarise a pipeline for GitHub's job summary.

    Args:
        sets: the training runs.
        best_run_id: the one that was evaluated.
        curves: validation accuracy per epoch of each set, by name.
        evaluation: the evaluation's run.
        production: the version behind the production alias.
    """
    rows = []
    for run in sets:
        name, values = run.data.tags["mlflow.runName"], run.data.metrics
        shown = f"**{name}**" if run.info.run_id == best_run_id else name
        rows.append(
            f"| {shown} | {values['best_epoch']:.0f} | {values['best_val_accuracy']:.4f} | "
            f"{values['fit_seconds']:.0f} |"
        )
    test, said = evaluation.data.metrics, evaluation.data.tags
    epochs = list(range(1, max(len(values) for values in curves.values()) + 1))
    lowest = min(min(values) for values in curves.values())
    # GitHub draws no legend, and its first colour can hardly be seen.
    legend = ", ".join(f"{square} {name}" for square, name in zip(SQUARES, curves, strict=False))
    theme = {"themeVariables": {"xyChart": {"plotColorPalette": ", ".join(SQUARES.values())}}}
    in_production = "No version is in production."
    if production is not None:
        in_production = f"prod is {_words(production.uri)}, test accuracy {production.acc:.4f}."
    return "\n".join(
        [
            "## Training",
            "",
            "| set | best epoch | validation accuracy | seconds |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
            "Validation accuracy per epoch: " + legend,
            "",
            "```mermaid",
            f"%%{{init: {json.dumps(theme)}}}%%",
            "xychart-beta",
            f'  x-axis "epoch" {epochs}',
            f'  y-axis "validation accuracy" {lowest:.2f} --> 1',
            *(f"  line {[round(value, 4) for value in values]}" for values in curves.values()),
            "```",
            "",
            "## Test",
            "",
            "| | verdict defect | verdict ok |",
            "| --- | ---: | ---: |",
            f"| def_front | {test['defects_found']:.0f} | {test['defects_missed']:.0f} |",
            f"| ok_front | {test['ok_rejected']:.0f} | {test['ok_passed']:.0f} |",
            "",
            f"Accuracy {test['accuracy']:.4f} at {THRESHOLD}, ROC AUC {test['roc_auc']:.4f}.",
            "",
            "| at the model's threshold, 95% bounds | pictures | photographs |",
            "| --- | --- | --- |",
            f"| escapes | {said['escapes']} | {said['escapes_by_photograph']} |",
            f"| overkill | {said['overkill']} | {said['overkill_by_photograph']} |",
            f"| sent to a person | {said['sent_to_a_person']} | |",
            "",
            f"{said['leakage']} Else: {said['unseen']}.",
            "",
            f"{said['comparison']} {said['decision']}.",
            "",
            "## Production",
            "",
            in_production,
        ]
    )


def _words(model_uri: str) -> str:
    """Turn models:/name/3 into 'name version 3'."""
    return model_uri.removeprefix("models:/").replace("/", " version ")
