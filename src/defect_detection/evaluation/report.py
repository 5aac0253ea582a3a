"""The report of an evaluation, one HTML file."""

import base64
import io
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version as package_version
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from defect_detection.atomic import csv_text, defused
from defect_detection.dataset.split import Split
from defect_detection.evaluation import figures
from defect_detection.evaluation.metrics import Rate
from defect_detection.evaluation.release import Registration
from defect_detection.evaluation.result import Evaluation
from defect_detection.evaluation.robustness import REPEATS, Robustness
from defect_detection.names import printable
from defect_detection.registry.versions import PRODUCTION_ALIAS
from defect_detection.runtime import heatmap, preprocessing
from defect_detection.runtime.decision import (
    ACCURACY_THRESHOLD,
    CLASSES,
    NEGATIVE,
    POSITIVE,
    is_defect,
)
from defect_detection.settings import Decisions

FILE = "report.html"  # the artifact's name
TEMPLATE = Path(__file__).with_name("report.html")
MISTAKES_SHOWN = 12  # photographs of each kind
RIGHT_SHOWN = 3  # of each class
SHOWN_SIDE = 224  # pixels
TABLE = "images.csv"  # the artifact's name
TABLE_COLUMNS = (
    *("path", "class", "photograph", "probability", "verdict", "review"),
    "photograph_in_training",
)
PACKAGES = ("tensorflow", "keras", "ai-edge-litert", "numpy", "pillow", "mlflow")


@dataclass(frozen=True)
class Shown:
    """A test image with the evidence that the model saw.

    Attributes:
        path: relative to the data folder.
        probability: of a defect.
        others: how many more images of the photograph are judged in the same way.
        review: whether it is in the review band.
        leaked: whether its photograph is in training.
        image: as a data URI.
        heatmap: the image with the evidence of a defect drawn over it, as a data URI.
    """

    path: str
    probability: float
    others: int
    review: bool
    leaked: bool
    image: str
    heatmap: str


@dataclass(frozen=True)
class Origin:
    """Where an evaluation comes from.

    Attributes:
        run_id: of the evaluation.
        commit: of the project.
        parameters: of the training run, by name.
        curves: its metrics per epoch, as `TrainingResult.history` has them; may be empty.
    """

    run_id: str
    commit: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, list[float]] = field(default_factory=dict)


def html(
    evaluation: Evaluation,
    registration: Registration,
    robustness: Robustness,
    decisions: Decisions,
    origin: Origin,
    line: Rate,
) -> str:
    """Return the report as one page without external files.

    Args:
        evaluation: the figures.
        registration: what became of the model.
        robustness: figures under disturbances.
        decisions: what the plant demands.
        origin: of the evaluation.
        line: defects among the parts that the champion passed at the line, by the random sample.
    """
    scores, split = evaluation.scores, evaluation.split
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = "{:.1%}".format
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        e=evaluation,
        r=registration,
        point=evaluation.point,
        line=line,
        alias=PRODUCTION_ALIAS,
        plain=ACCURACY_THRESHOLD,
        accuracy=Rate(scores.defects_found + scores.ok_passed, scores.pictures),
        asked=decisions.max_escape_rate,
        asked_overkill=decisions.max_overkill_rate,
        light=_light(evaluation, registration),
        headline=_headline(evaluation, registration),
        optimistic=_optimistic(evaluation),
        right=_right(evaluation),
        parameters=origin.parameters,
        kept=_kept(evaluation.photograph_error_rates.escapes, decisions.max_escape_rate),
        leakage=split.leakage,
        leaked=int(split.leaked.sum()),
        mistakes=_mistakes(evaluation),
        disturbed=robustness.disturbed,
        repeatability=robustness.repeatability,
        repeats=REPEATS,
        figures=_figures(evaluation, origin),
        scores=_scores(evaluation),
        provenance=_provenance(split, origin),
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _light(evaluation: Evaluation, registration: Registration) -> str:
    """Return the colour of the light: "good", "warn" or "bad"."""
    if not registration.release.released:
        return "bad"
    return "good" if registration.in_production and not _optimistic(evaluation) else "warn"


def _headline(evaluation: Evaluation, registration: Registration) -> str:
    """Return what a manager has to know, in a sentence."""
    rates = evaluation.error_rates
    if not registration.release.released:
        return "Not released: " + "; ".join(registration.release.reasons) + "."
    passes = f"{rates.escapes.share:.1%} of the defective parts pass"
    if not rates.escapes.of:
        passes = "nothing is known of escapes"
    rejected = f"{rates.overkill.share:.1%} of the good parts are rejected"
    state = "in production" if registration.in_production else "not in production"
    known = ""
    if _optimistic(evaluation):
        share = evaluation.split.leaked_share
        known = f" {share:.1%} of these images show photographs that the model learned from."
    return (
        f"Released and {state}: on the test images {passes}, {rejected}, and a person looks at "
        f"{rates.reviewed.share:.1%} of all parts.{known}"
    )


def _optimistic(evaluation: Evaluation) -> str:
    """Return whether leakage makes the accuracy better than it is: "is", "may be" or ""."""
    if evaluation.leaked_accuracy is None:
        return ""
    unseen = evaluation.unseen
    if unseen.pictures and not unseen.too_few and evaluation.leaked_accuracy <= unseen.accuracy:
        return ""
    return "is" if unseen.pictures and evaluation.leaked_accuracy > unseen.bounds[1] else "may be"


def _figures(evaluation: Evaluation, origin: Origin) -> dict[str, str]:
    labels, probabilities, point = evaluation.labels, evaluation.probabilities, evaluation.point
    drawn = {
        "confusion": figures.confusion_matrix(
            f"At the threshold {point.threshold:.3f}", evaluation.error_rates.matrix()
        ),
        "plain": figures.confusion_matrix(f"At {ACCURACY_THRESHOLD}", evaluation.scores.matrix()),
        "histogram": figures.histogram(labels, probabilities, point),
    }
    if len(set(labels)) == 2:
        drawn["curves"] = figures.roc_and_precision(labels, probabilities, point, evaluation.scores)
    if origin.curves:
        kept = int(np.argmin(origin.curves["val_loss"])) + 1
        drawn["learning"] = figures.learning_curves("", dict(origin.curves), kept)
    return {name: figures.svg(figure) for name, figure in drawn.items()}


def _scores(evaluation: Evaluation) -> str:
    """Return the data from which the page computes error rates and costs."""
    return json.dumps(
        {
            "probabilities": [round(float(p), 6) for p in evaluation.probabilities],
            "defects": [int(label) for label in evaluation.labels],
            "threshold": evaluation.point.threshold,
            "band": [evaluation.point.review_low, evaluation.point.review_high],
        }
    )


def _mistakes(evaluation: Evaluation) -> list[tuple[str, str, int, list[Shown]]]:
    """Return for each kind of mistake its name, its meaning, its count and the worst ones."""
    rejected = is_defect(evaluation.probabilities, evaluation.point.threshold)
    defect = evaluation.labels == 1
    kinds = (
        ("Escapes", "defects with the verdict ok", defect & ~rejected),
        ("Overkill", "good parts with the verdict defect", ~defect & rejected),
    )
    return [
        (name, meaning, int(rows.sum()), _worst(evaluation, np.flatnonzero(rows)))
        for name, meaning, rows in kinds
    ]


def _kept(escapes: Rate, asked: float) -> str:
    """Return whether the largest escape rate is "kept", "missed" or still "open"."""
    low, high = escapes.bounds
    if high <= asked:
        return "kept"
    return "missed" if low > asked else "open"


def _worst(evaluation: Evaluation, rows: np.ndarray) -> list[Shown]:
    """Return the worst image of each photograph, the worst photographs first."""
    probabilities, point = evaluation.probabilities, evaluation.point
    testing = evaluation.split.testing
    rows = rows[np.argsort(-np.abs(probabilities[rows] - point.threshold))]
    photographs = testing.photographs[rows]
    _, worst = np.unique(photographs, return_index=True)
    return [
        _show(evaluation, rows[place], int((photographs == photographs[place]).sum()) - 1)
        for place in np.sort(worst)[:MISTAKES_SHOWN]
    ]


def _right(evaluation: Evaluation) -> list[tuple[str, list[Shown]]]:
    """Return examples that are judged rightly, of each class, from clear ones to the nearest."""
    probabilities, labels = evaluation.probabilities, evaluation.labels
    rejected = is_defect(probabilities, evaluation.point.threshold)
    found = []
    for name, label in (("Defects that are found", 1), ("Good parts that pass", 0)):
        rows = np.flatnonzero((labels == label) & (rejected == (label == 1)))
        rows = rows[np.argsort(-np.abs(probabilities[rows] - evaluation.point.threshold))]
        some = np.linspace(0, len(rows) - 1, min(len(rows), RIGHT_SHOWN)).astype(int)
        found.append((name, [_show(evaluation, row, 0) for row in rows[some]]))
    return found


def _show(evaluation: Evaluation, row: int, others: int) -> Shown:
    testing, takes = evaluation.split.testing, evaluation.takes
    content, most = testing.content(row), testing.format.most_pixels
    image = preprocessing.decode_within(content, SHOWN_SIDE, takes.channels, takes.bits, most)
    drawn = heatmap.draw(image, evaluation.maps[row], takes, evaluation.full_evidence)
    probability = float(evaluation.probabilities[row])
    return Shown(
        path=printable(testing.paths[row]),
        probability=probability,
        others=others,
        review=bool(evaluation.point.needs_review(np.array(probability))),
        leaked=bool(evaluation.split.leaked[row]),
        image=_data_uri(Image.fromarray(np.squeeze(image))),
        heatmap=_data_uri(drawn),
    )


def table(evaluation: Evaluation) -> str:
    """Return every test image and what became of it, as CSV."""
    testing, point = evaluation.split.testing, evaluation.point
    found = is_defect(evaluation.probabilities, point.threshold)
    review = point.needs_review(evaluation.probabilities)
    rows = [
        (
            *(
                defused(path),
                POSITIVE if testing.labels[row] else NEGATIVE,
                testing.photographs[row],
            ),
            *(f"{evaluation.probabilities[row]:.6f}", "defect" if found[row] else "ok"),
            *(bool(review[row]), bool(evaluation.split.leaked[row])),
        )
        for row, path in enumerate(testing.paths)
    ]
    return csv_text([TABLE_COLUMNS, *rows])


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _provenance(split: Split, origin: Origin) -> dict[str, str]:
    testing = split.testing
    counts = ", ".join(f"{testing.counts[name]} {name}" for name in CLASSES)
    return {
        "test images": f"{testing}: {counts}, {len(testing.skipped)} unreadable",
        "test digest (SHA-256)": testing.digest,
        "training digest (SHA-256)": split.training.digest,
        "evaluation run": origin.run_id,
        "commit": origin.commit,
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {package_version(name)}" for name in PACKAGES),
        "machine": platform.platform(),
    }
