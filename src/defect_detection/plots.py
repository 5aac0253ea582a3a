"""Figures of an audit, a training and an evaluation."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from defect_detection import images
from defect_detection.audit import Audit
from defect_detection.dataset import CLASSES
from defect_detection.metrics import Scores

PAIRS_SHOWN = 12
TRAINING, VALIDATION, BEST = "#5b6f8a", "#d1622b", "#8a8a8a"


def contact_sheet(data: Path, audit: Audit) -> Figure:
    """Show the worst that an audit found, two pictures for each."""
    worst = audit.worst()
    shown = worst[:PAIRS_SHOWN]
    rows = max(1, -(-len(shown) // 3))
    figure = Figure(figsize=(12, 0.6 + 2.7 * rows), dpi=120, layout="constrained")
    title = f"The {len(shown)} worst of {len(worst)} findings" if worst else "Nothing found"
    figure.suptitle(f"{title}\n{audit.folder}", fontsize=11)
    cells = figure.subplots(rows, 3, squeeze=False).ravel()
    for axes in cells:
        axes.set_axis_off()
    for axes, (what, *pair) in zip(cells, shown, strict=False):
        axes.set_title(what, fontsize=10, fontweight="bold", loc="left")
        for column, path in enumerate(pair):
            place = axes.inset_axes((0.48 * column, 0.1, 0.46, 0.9))
            place.imshow(images.decode_within(data / path, 256), cmap="gray", vmin=0, vmax=255)
            place.set_axis_off()
            folder, _, name = path.rpartition("/")
            place.set_title(f"{folder}/\n{name}", fontsize=7, loc="left", y=-0.2)
    return figure


def learning_curves(title: str, history: dict[str, list[float]], best_epoch: int) -> Figure:
    """Draw accuracy and loss per epoch, training and validation; `best_epoch` counts from 1."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    epochs = range(1, len(history["loss"]) + 1)
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        axes.axvline(best_epoch, color=BEST, linewidth=1, linestyle=":", label="best epoch")
        axes.plot(epochs, history[name], ".-", color=TRAINING, label="training")
        axes.plot(epochs, history[f"val_{name}"], ".-", color=VALIDATION, label="validation")
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.legend(frameon=False)
    return figure


def confusion_matrix(title: str, scores: Scores) -> Figure:
    """Draw the counts of an evaluation: rows are the folders, columns the verdicts."""
    counts = [
        [scores.defects_found, scores.defects_missed],
        [scores.ok_rejected, scores.ok_passed],
    ]
    figure = Figure(figsize=(4.6, 4), layout="constrained")
    axes = figure.subplots()
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(2):
        for column in range(2):
            share = shares[row][column]
            axes.text(
                column,
                row,
                f"{counts[row][column]}\n{share:.1%}",
                ha="center",
                va="center",
                color="white" if share > 0.5 else "black",
            )
    axes.set_xticks([0, 1], ["defect", "ok"])
    axes.set_yticks([0, 1], CLASSES, rotation=90, va="center")
    axes.set_xlabel("verdict")
    axes.set_ylabel("folder")
    axes.set_title(title)
    return figure
