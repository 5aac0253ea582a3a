"""The report of an evaluation, one HTML file."""

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
from PIL import Image

from defect_detection.dataset.split import Split
from defect_detection.evaluation import figures
from defect_detection.evaluation.metrics import Rate
from defect_detection.evaluation.release import Registration
from defect_detection.evaluation.result import Evaluation
from defect_detection.evaluation.robustness import REPEATS, Robustness
from defect_detection.registry.versions import PRODUCTION_ALIAS
from defect_detection.runtime import heatmap, preprocessing
from defect_detection.runtime.decision import ACCURACY_THRESHOLD, CLASSES, is_defect

FILE = "report.html"  # the artifact's name
TEMPLATE = Path(__file__).with_name("report.html")
MISTAKES_SHOWN = 12  # photographs of each kind
MISTAKE_SIDE = 224  # pixels
PACKAGES = ("tensorflow", "keras", "ai-edge-litert", "numpy", "pillow", "mlflow")


@dataclass(frozen=True)
class Mistake:
    """A wrongly judged test image, the worst of its photograph.

    Attributes:
        path: relative to the data folder.
        probability: of a defect.
        others: how many more images of the photograph are wrong in the same way.
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
    """Where an evaluation comes from: the id of its run and the project's commit."""

    run_id: str
    commit: str


def html(
    evaluation: Evaluation,
    registration: Registration,
    robustness: Robustness,
    max_escape_rate: float,
    origin: Origin,
) -> str:
    """Return the report as one page without external files.

    Args:
        evaluation: the figures.
        registration: what became of the model.
        robustness: figures under disturbances.
        max_escape_rate: what the plant allows.
        origin: of the evaluation.
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
        alias=PRODUCTION_ALIAS,
        plain=ACCURACY_THRESHOLD,
        accuracy=Rate(scores.defects_found + scores.ok_passed, scores.pictures),
        asked=max_escape_rate,
        kept=_kept(evaluation.photograph_error_rates.escapes, max_escape_rate),
        leakage=split.leakage,
        leaked=int(split.leaked.sum()),
        mistakes=_mistakes(evaluation),
        disturbed=robustness.disturbed,
        repeatability=robustness.repeatability,
        repeats=REPEATS,
        figures=_figures(evaluation),
        scores=_scores(evaluation),
        provenance=_provenance(split, origin),
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _figures(evaluation: Evaluation) -> dict[str, str]:
    labels, probabilities, point = evaluation.labels, evaluation.probabilities, evaluation.point
    drawn = {
        "confusion": figures.confusion_matrix(
            f"At the threshold {point.threshold:.3f}", evaluation.error_rates.matrix()
        ),
        "plain": figures.confusion_matrix(f"At {ACCURACY_THRESHOLD}", evaluation.scores.matrix()),
        "curves": figures.roc_and_precision(labels, probabilities, point, evaluation.scores),
        "histogram": figures.histogram(labels, probabilities, point),
    }
    return {name: figures.svg(figure) for name, figure in drawn.items()}


def _scores(evaluation: Evaluation) -> str:
    """Return the data from which the page computes error rates and costs."""
    return json.dumps(
        {
            "probabilities": [round(float(p), 6) for p in evaluation.probabilities],
            "defects": [int(label) for label in evaluation.labels],
            "threshold": evaluation.point.threshold,
        }
    )


def _mistakes(evaluation: Evaluation) -> list[tuple[str, str, int, list[Mistake]]]:
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


def _worst(evaluation: Evaluation, rows: np.ndarray) -> list[Mistake]:
    """Return the worst image of each photograph, the worst photographs first."""
    probabilities, point = evaluation.probabilities, evaluation.point
    testing, leaked = evaluation.split.testing, evaluation.split.leaked
    rows = rows[np.argsort(-np.abs(probabilities[rows] - point.threshold))]
    photographs = testing.photographs[rows]
    _, worst = np.unique(photographs, return_index=True)
    found = []
    for place in np.sort(worst)[:MISTAKES_SHOWN]:
        row = rows[place]
        takes = evaluation.takes
        image = preprocessing.decode_within(testing.file(row), MISTAKE_SIDE, takes.channels)
        drawn = heatmap.draw(image, evaluation.maps[row], takes, evaluation.full_evidence)
        found.append(
            Mistake(
                path=testing.paths[row],
                probability=float(probabilities[row]),
                others=int((photographs == photographs[place]).sum()) - 1,
                review=bool(point.needs_review(probabilities[row])),
                leaked=bool(leaked[row]),
                image=_data_uri(Image.fromarray(np.squeeze(image))),
                heatmap=_data_uri(drawn),
            )
        )
    return found


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
