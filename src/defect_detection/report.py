"""The summary of a pipeline in Markdown."""

import json

from mlflow.entities import Run

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
    test = evaluation.data.metrics
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
            f"Accuracy {test['accuracy']:.4f}, ROC AUC {test['roc_auc']:.4f}. Registered as "
            f"{_words(evaluation.data.tags['registered_version'])}.",
            "",
            f"{evaluation.data.tags['leakage']} Else: {evaluation.data.tags['unseen']}.",
            "",
            "## Production",
            "",
            in_production,
        ]
    )


def _words(model_uri: str) -> str:
    """Turn models:/name/3 into 'name version 3'."""
    return model_uri.removeprefix("models:/").replace("/", " version ")
