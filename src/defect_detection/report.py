"""The report of an evaluation, one HTML file, and the summary of a pipeline in Markdown."""

import base64
import io
import json
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version as package_version
from pathlib import Path

import jinja2
import numpy as np
from mlflow.entities import Run
from PIL import Image

from defect_detection import images, metrics, plots
from defect_detection.audit import Split
from defect_detection.dataset import CLASSES
from defect_detection.metrics import (
    THRESHOLD,
    Comparison,
    Errors,
    OperatingPoint,
    Rate,
    Scores,
    Unseen,
)
from defect_detection.registry import PRODUCTION_ALIAS, Version
from defect_detection.robustness import REPEATS, Disturbed, Repeatability

FILE = "report.html"  # the artifact's name
TEMPLATE = Path(__file__).with_name("report.html")
MISTAKES_SHOWN = 12  # photographs of each kind
MISTAKE_SIDE = 224  # pixels
PACKAGES = ("tensorflow", "keras", "ai-edge-litert", "numpy", "pillow", "mlflow")
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
        unknown: pictures out of the model's scope, as inference would say.
        unseen: on the pictures whose photograph is not in training, at 0.5.
        leaked_share: of the pictures whose photograph is, in [0, 1].
        test_digest: of the test pictures.
        labels: (n,), 1 = defect.
        probabilities: (n,) of a defect.
        maps: (n, h, w), the evidence of a defect.
    """

    scores: Scores
    errors: Errors
    photograph_errors: Errors
    unknown: Rate
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
            "called_unknown": str(self.unknown),
        }


@dataclass(frozen=True)
class Registered:
    """A version that an evaluation registered.

    Attributes:
        version: the version.
        champion: the version that was behind prod before, None if there was none.
        comparison: with the champion on the same pictures, None if that could not be run.
        decision: what was decided on the alias, in words.
        in_production: whether the version is behind prod now.
    """

    version: Version
    champion: Version | None
    comparison: Comparison | None
    decision: str
    in_production: bool


@dataclass(frozen=True)
class Mistake:
    """A wrongly judged test picture, the worst of its photograph.

    Attributes:
        path: relative to the data folder.
        probability: of a defect.
        others: how many more pictures of the photograph are wrong in the same way.
        review: whether it is in the review band.
        leaked: whether its photograph is in training.
        picture: as a data URI.
        heatmap: the picture with the evidence of a defect over it, as a data URI.
    """

    path: str
    probability: float
    others: int
    review: bool
    leaked: bool
    picture: str
    heatmap: str


def html(
    evaluated: Evaluated,
    registered: Registered,
    point: OperatingPoint,
    max_escape_rate: float,
    split: Split,
    folder: Path,
    disturbed: list[Disturbed],
    repeatability: Repeatability,
    run_id: str,
    commit: str,
) -> str:
    """Write the report as one page that needs nothing else.

    Args:
        evaluated: the figures.
        registered: what became of the model.
        point: its threshold and review band.
        max_escape_rate: what the plant asks for.
        split: the pictures.
        folder: where they lie.
        disturbed: the robustness table.
        repeatability: verdicts over small disturbances.
        run_id: of the evaluation.
        commit: of the project.
    """
    rejected = metrics.is_defect(evaluated.probabilities, point.threshold)
    defect = evaluated.labels == 1
    wrong = (
        ("Escapes", "defects with the verdict ok", defect & ~rejected),
        ("Overkill", "good parts with the verdict defect", ~defect & rejected),
    )
    figures = {
        "confusion": plots.confusion_matrix(
            f"At the threshold {point.threshold:.3f}", evaluated.errors.matrix()
        ),
        "plain": plots.confusion_matrix(f"At {THRESHOLD}", evaluated.scores.matrix()),
        "curves": plots.roc_and_precision(
            evaluated.labels, evaluated.probabilities, point, evaluated.scores
        ),
        "histogram": plots.histogram(evaluated.labels, evaluated.probabilities, point),
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = "{:.1%}".format
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        e=evaluated,
        r=registered,
        point=point,
        alias=PRODUCTION_ALIAS,
        plain=THRESHOLD,
        accuracy=Rate(
            evaluated.scores.defects_found + evaluated.scores.ok_passed, evaluated.scores.pictures
        ),
        asked=max_escape_rate,
        kept=_kept(evaluated.photograph_errors.escapes, max_escape_rate),
        leakage=split.leakage,
        leaked=int(split.leaked.sum()),
        mistakes=[
            (name, meaning, int(rows.sum()), _mistakes(evaluated, rows, point, split, folder))
            for name, meaning, rows in wrong
        ],
        disturbed=disturbed,
        repeatability=repeatability,
        repeats=REPEATS,
        figures={name: plots.svg(figure) for name, figure in figures.items()},
        scores=json.dumps(
            {
                "probabilities": [round(float(p), 6) for p in evaluated.probabilities],
                "defects": [int(label) for label in evaluated.labels],
                "threshold": point.threshold,
            }
        ),
        provenance=_provenance(evaluated, split, folder, run_id, commit),
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _kept(escapes: Rate, asked: float) -> str:
    """Say whether a largest escape rate is kept, as far as the bounds tell."""
    low, high = escapes.bounds
    if high <= asked:
        return "kept"
    return "missed" if low > asked else "open"


def _mistakes(
    evaluated: Evaluated, wrong: np.ndarray, point: OperatingPoint, split: Split, folder: Path
) -> list[Mistake]:
    """Pick the worst picture of each photograph, the worst photographs first."""
    rows = np.flatnonzero(wrong)
    rows = rows[np.argsort(-np.abs(evaluated.probabilities[rows] - point.threshold))]
    photographs = split.testing_photographs[rows]
    _, worst = np.unique(photographs, return_index=True)
    found = []
    for place in np.sort(worst)[:MISTAKES_SHOWN]:
        row = rows[place]
        picture = images.decode_within(folder / split.testing.paths[row], MISTAKE_SIDE)
        found.append(
            Mistake(
                path=split.testing.paths[row],
                probability=float(evaluated.probabilities[row]),
                others=int((photographs == photographs[place]).sum()) - 1,
                review=bool(point.review(evaluated.probabilities[row])),
                leaked=bool(split.leaked[row]),
                picture=_data_uri(Image.fromarray(picture)),
                heatmap=_data_uri(images.lay_over(picture, evaluated.maps[row])),
            )
        )
    return found


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _provenance(
    evaluated: Evaluated, split: Split, folder: Path, run_id: str, commit: str
) -> dict[str, str]:
    counts = split.testing.counts
    packages = ", ".join(f"{name} {package_version(name)}" for name in PACKAGES)
    return {
        "test pictures": f"{folder / 'test'}: "
        + ", ".join(f"{counts[name]} {name}" for name in CLASSES)
        + f", {len(split.testing.skipped)} unreadable",
        "test digest (SHA-256)": evaluated.test_digest,
        "training digest (SHA-256)": split.training.digest,
        "evaluation run": run_id,
        "commit": commit,
        "versions": f"Python {platform.python_version()}, {packages}",
        "machine": platform.platform(),
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
            f"The whole report is the artifact {FILE} of the run {evaluation.info.run_id}.",
            "",
            "## Production",
            "",
            in_production,
        ]
    )


def _words(model_uri: str) -> str:
    """Turn models:/name/3 into 'name version 3'."""
    return model_uri.removeprefix("models:/").replace("/", " version ")
