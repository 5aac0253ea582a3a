"""Figures of an audit, a training and an evaluation."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from defect_detection import images
from defect_detection.audit import Audit
from defect_detection.dataset import CLASSES

PAIRS_SHOWN = 12
TRAINING, VALIDATION, BEST = "#5b6f8a", "#d1622b", "#8a8a8a"
RIGHT, WRONG = "#4a8fd0", "#d1622b"


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


def confusion_matrix(title: str, counts: list[list[int]]) -> Figure:
    """Draw the counts of an evaluation: rows are the folders, columns the verdicts."""
    figure = Figure(figsize=(3.9, 3.5), layout="constrained")
    axes = figure.subplots()
    for row, of_folder in enumerate(counts):
        for column, count in enumerate(of_folder):
            share = count / max(1, sum(of_folder))
            tone = RIGHT if row == column else WRONG
            square = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(square, 1, 1, facecolor=tone, alpha=0.08 + 0.62 * share))
            axes.text(column, row, f"{count}\n{share:.1%}", ha="center", va="center", fontsize=12)
    axes.set(xlim=(-0.5, 1.5), ylim=(1.5, -0.5))
    axes.set_xticks([0, 1], ["defect", "ok"])
    axes.set_yticks([0, 1], CLASSES, rotation=90, va="center")
    axes.set_xlabel("verdict")
    axes.set_ylabel("folder")
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
