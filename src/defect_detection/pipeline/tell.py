"""The one place that prints what the steps of the pipeline found."""

from pathlib import Path

from defect_detection.evaluation import labels
from defect_detection.evaluation.labels import LabelError
from defect_detection.evaluation.parity import Parity
from defect_detection.evaluation.result import Evaluation
from defect_detection.names import printable
from defect_detection.pipeline import record
from defect_detection.pipeline.fit import FitPlan, Fold
from defect_detection.pipeline.record import CROSS_VALIDATED, Trained
from defect_detection.registry.versions import Version


def epoch(plan: FitPlan, number: int, values: dict[str, float]) -> None:
    """Print the metrics of an epoch."""
    shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
    print(f"  epoch {number} of {plan.parameters.epochs}: {shown}", flush=True)


def sets(trained: list[Trained], best: Trained, best_file: Path, next_step: str) -> None:
    """Print a table of the fitted sets, the best marked, where it was written, what comes next."""
    width = max(8, *(len(one.name) for one in trained))
    print(f"\n  {'set':{width}}  best epoch  validation accuracy  seconds  run id")
    for one in trained:
        print(
            f"{'*' if one is best else ' '} {one.name:{width}}  {one.best_epoch:10}  "
            f"{one.val_accuracy:19.4f}  {one.seconds:7.1f}  {one.run_id}"
        )
    print(f"Best: {best.name}, written to {best_file}. Next: {next_step}")


def delivered(names: list[str], best: str) -> None:
    """Print which sets of a former training MLflow has now, and which is the best, if any is."""
    print(f"Delivered from a former training: {', '.join(names)}" + (best and f"; best {best}"))


def label_errors(found: list[LabelError]) -> None:
    """Print which images are probably in the wrong class folder."""
    if found:
        first = found[0]
        print(
            f"  {len(found)} likely label errors, in {labels.FILE} of the run; first "
            f"{printable(first.path)} with a confidence of {first.confidence:.3f}"
        )


def fold(scored: Fold) -> None:
    """Print the score of a fold."""
    print(
        f"  fold {scored.number} of {scored.of}: {scored.images.pictures} images of "
        f"{scored.photographs.pictures} photographs, balanced accuracy "
        f"{scored.images.balanced_accuracy:.4f}",
        flush=True,
    )


def folds(validated: dict[str, list[Fold]]) -> None:
    """Print a table of cross-validated sets by name: mean and range over the folds."""
    width = max(8, *map(len, validated))
    count = len(next(iter(validated.values())))
    lines = [
        f"\n{count} folds, each judged by a model that saw none of its photographs: "
        "mean (lowest to highest)",
        f"  {'set':{width}}  {'of':11}"
        + "".join(f"  {name:22}" for name in CROSS_VALIDATED.values()),
    ]
    for name, every in validated.items():
        for of, scores in (
            ("images", [one.images for one in every]),
            ("photographs", [one.photographs for one in every]),
        ):
            cells = ""
            for figure in CROSS_VALIDATED:
                mean, low, high = record.over_folds(scores, figure)
                cells += f"  {f'{mean:.3f} ({low:.3f} to {high:.3f})':22}"
            lines.append(f"  {name:{width}}  {of:11}{cells}")
    print("\n".join(line.rstrip() for line in lines))


def evaluation(found: Evaluation) -> None:
    """Print an evaluation: accuracy, confusion matrix, leakage, error rates."""
    scores, split = found.scores, found.split
    print(f"{split.testing}: accuracy {scores.accuracy:.4f}, ROC AUC {scores.roc_auc:.4f}")
    print(scores.table())
    print(split.leakage)
    if found.leaked_accuracy is not None:
        print(f"  accuracy on those {found.leaked_accuracy:.4f}")
    print(f"  {found.unseen}")
    print(f"With the threshold {found.point.threshold:.4f}, chosen on validation images:")
    for name, sentence in found.sentences().items():
        print(f"  {name.replace('_', ' '):24}{sentence}")
    if found.field is not None:
        print(found.field)


def parity(found: Parity) -> None:
    """Print how closely the LiteRT model follows the Keras model."""
    print(f"LiteRT against Keras: {found}")


def scored_again(version: Version, acc: float) -> None:
    """Print that a version was scored again."""
    print(f"{version.uri} scored again on these images: accuracy {acc:.4f}")


def comparison(compared: str) -> None:
    """Print the comparison with the champion."""
    print(compared)


def decision(said: str) -> None:
    """Print what was decided about the alias."""
    print(said)


def diagnosis(said: str) -> None:
    """Print why a version is not released, and what to try."""
    print(f"\n{said}")


def report(uri: str) -> None:
    """Print where the report is."""
    print(f"Report: {uri}")
