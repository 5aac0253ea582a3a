"""The summary of a pipeline's runs in Markdown, for GitHub's job summary."""

import json
from dataclasses import dataclass

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run

from defect_detection import PipelineError
from defect_detection.evaluation import report
from defect_detection.pipeline import record
from defect_detection.pipeline.best_model import BestModel
from defect_detection.pipeline.record import TRAINING_TAG
from defect_detection.registry import store, versions
from defect_detection.registry.versions import Version
from defect_detection.runtime.decision import ACCURACY_THRESHOLD

# The squares of the legend have the colours of the lines in the chart.
SQUARES = {
    "🟦": "#3b78c4",
    "🟧": "#e0812b",
    "🟩": "#4a9a4a",
    "🟪": "#8a5bb5",
    "🟥": "#c9403c",
    "🟫": "#8a5a3c",
}


@dataclass(frozen=True)
class Summary:
    """The last training and evaluation.

    Attributes:
        sets: the training runs.
        best_run_id: the one whose model was evaluated.
        curves: validation accuracy per epoch of each set, by name.
        evaluation: the evaluation's run.
        production: the version with the alias prod, None if there is none.
    """

    sets: list[Run]
    best_run_id: str
    curves: dict[str, list[float]]
    evaluation: Run
    production: Version | None

    @classmethod
    def collect(cls, best: BestModel, experiment: str, registered_model: str) -> "Summary":
        """Collect the runs from the store.

        Args:
            best: the model that was evaluated.
            experiment: of the evaluations.
            registered_model: the one whose production version is named.

        Raises:
            PipelineError: the model was never evaluated.
        """
        sets = _training_runs(best)
        return cls(
            sets,
            best.run_id,
            {run.data.tags["mlflow.runName"]: record.history(run, "val_accuracy") for run in sets},
            _newest_evaluation(best, experiment),
            versions.in_production(registered_model),
        )

    def markdown(self) -> str:
        """Return the summary as Markdown."""
        shown = "No version is in production."
        if self.production is not None:
            name = f"{self.production.name} version {self.production.number}"
            shown = f"prod is {name}, test accuracy {self.production.acc:.4f}."
        parts = [self._training(), self._chart(), self._test(), f"## Production\n\n{shown}"]
        return "\n\n".join(parts)

    def _training(self) -> str:
        lines = [
            "## Training",
            "",
            "| set | best epoch | validation accuracy | seconds |",
            "| --- | ---: | ---: | ---: |",
        ]
        for run in self.sets:
            name, values = run.data.tags["mlflow.runName"], run.data.metrics
            shown = f"**{name}**" if run.info.run_id == self.best_run_id else name
            lines.append(
                f"| {shown} | {values['best_epoch']:.0f} | {values['best_val_accuracy']:.4f} | "
                f"{values['fit_seconds']:.0f} |"
            )
        return "\n".join(lines)

    def _chart(self) -> str:
        epochs = list(range(1, max(map(len, self.curves.values())) + 1))
        lowest = min(min(values) for values in self.curves.values())
        # GitHub draws no legend, and its first colour is hardly visible.
        named = zip(SQUARES, self.curves, strict=False)
        legend = ", ".join(f"{square} {name}" for square, name in named)
        theme = {"themeVariables": {"xyChart": {"plotColorPalette": ", ".join(SQUARES.values())}}}
        return "\n".join(
            [
                "Validation accuracy per epoch: " + legend,
                "",
                "```mermaid",
                f"%%{{init: {json.dumps(theme)}}}%%",
                "xychart-beta",
                f'  x-axis "epoch" {epochs}',
                f'  y-axis "validation accuracy" {lowest:.2f} --> 1',
                *(
                    f"  line {[round(value, 4) for value in values]}"
                    for values in self.curves.values()
                ),
                "```",
            ]
        )

    def _test(self) -> str:
        test, said = self.evaluation.data.metrics, self.evaluation.data.tags
        return "\n".join(
            [
                "## Test",
                "",
                "| | verdict defect | verdict ok |",
                "| --- | ---: | ---: |",
                f"| def_front | {test['defects_found']:.0f} | {test['defects_missed']:.0f} |",
                f"| ok_front | {test['ok_rejected']:.0f} | {test['ok_passed']:.0f} |",
                "",
                f"Accuracy {test['accuracy']:.4f} at {ACCURACY_THRESHOLD}, ROC AUC "
                f"{test['roc_auc']:.4f}.",
                "",
                "| at the model's threshold, 95% bounds | images | photographs |",
                "| --- | --- | --- |",
                f"| escapes | {said['escapes']} | {said['escapes_by_photograph']} |",
                f"| overkill | {said['overkill']} | {said['overkill_by_photograph']} |",
                f"| sent to a person | {said['sent_to_a_person']} | |",
                "",
                f"{said['leakage']} On new parts: {said['unseen']}.",
                "",
                f"{said['comparison']} {said['decision']}.",
                "",
                f"The whole report is the artifact {report.FILE} of the run "
                f"{self.evaluation.info.run_id}.",
            ]
        )


def _training_runs(best: BestModel) -> list[Run]:
    """Return the runs of the training that produced the best model, in their order."""
    run = mlflow.get_run(best.run_id)
    training = run.data.tags[TRAINING_TAG]
    return MlflowClient().search_runs(
        [run.info.experiment_id],
        f"tags.{TRAINING_TAG} = '{training}'",
        order_by=["attributes.start_time ASC"],
    )


def _newest_evaluation(best: BestModel, experiment: str) -> Run:
    """Return the newest evaluation of a model.

    Raises:
        PipelineError: it was never evaluated.
    """
    found = MlflowClient().search_runs(
        [store.open_experiment(experiment)],
        f"tags.training_run_id = '{best.run_id}' and attributes.status = 'FINISHED'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    if not found:
        raise PipelineError("The best model was not evaluated. Run 'python src/evaluation.py'")
    return found[0]
