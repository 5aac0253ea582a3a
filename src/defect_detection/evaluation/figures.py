"""Figures of an audit, a training and an evaluation."""

import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter, SymmetricalLogLocator

from defect_detection.dataset.audit import Audit
from defect_detection.evaluation.metrics import Scores
from defect_detection.names import printable
from defect_detection.runtime import preprocessing
from defect_detection.runtime.decision import (
    ACCURACY_THRESHOLD,
    CLASSES,
    OperatingPoint,
    is_defect,
)
from defect_detection.runtime.opening import MOST_PIXELS

PAIRS_SHOWN = 12
LINEAR = 10  # images of a bar up to which the scale of a histogram is linear
# Readable on white and on black.
TRAINING, VALIDATION, QUIET = "#5b7fae", "#d1622b", "#8a8a8a"
RIGHT, WRONG = "#4a8fd0", "#d1622b"


def contact_sheet(folder: Path, audit: Audit, most_pixels: int = MOST_PIXELS) -> Figure:
    """Draw the worst findings of an audit, two images for each, of at most so many pixels."""
    worst = audit.worst()
    shown = worst[:PAIRS_SHOWN]
    rows = max(1, -(-len(shown) // 3))
    figure = Figure(figsize=(12, 0.6 + 2.7 * rows), dpi=120, layout="constrained")
    title = f"The {len(shown)} worst of {len(worst)} findings" if worst else "Nothing found"
    # A dollar in a name begins no formula.
    figure.suptitle(f"{title}\n{printable(audit.folder)}", fontsize=11, parse_math=False)
    cells = figure.subplots(rows, 3, squeeze=False).ravel()
    for axes in cells:
        axes.set_axis_off()
    for axes, (what, *pair) in zip(cells, shown, strict=False):
        axes.set_title(what, fontsize=10, fontweight="bold", loc="left")
        for column, path in enumerate(pair):
            place = axes.inset_axes((0.48 * column, 0.1, 0.46, 0.9))
            image = preprocessing.decode_within(folder / path, 256, 3, None, most_pixels)
            place.imshow(image)
            place.set_axis_off()
            parent, _, name = printable(path).rpartition("/")
            place.set_title(f"{parent}/\n{name}", fontsize=7, loc="left", y=-0.2, parse_math=False)
    return figure


def learning_curves(title: str, history: dict[str, list[float]], best_epoch: int) -> Figure:
    """Draw accuracy and loss per epoch, training and validation; `best_epoch` counts from 1."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    epochs = range(1, len(history["loss"]) + 1)
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        axes.axvline(best_epoch, color=QUIET, linewidth=1, linestyle=":", label="best epoch")
        axes.plot(epochs, history[name], ".-", color=TRAINING, label="training")
        axes.plot(epochs, history[f"val_{name}"], ".-", color=VALIDATION, label="validation")
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(axes)
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


def roc_and_precision(
    labels: np.ndarray, probabilities: np.ndarray, point: OperatingPoint, scores: Scores
) -> Figure:
    """Draw the ROC and the precision-recall curve, with 0.5 and the threshold marked on them."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure = Figure(figsize=(7.6, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    overkill, found, _ = roc_curve(labels, probabilities)
    left.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=":")
    left.plot(overkill, found, color=TRAINING, linewidth=1.8)
    left.set_title(f"ROC, area {scores.roc_auc:.3f}", fontsize=10)
    left.set_xlabel("good parts rejected (overkill)")
    left.set_ylabel("defects found")
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    right.plot(recall, precision, color=TRAINING, linewidth=1.8, drawstyle="steps-pre")
    right.set_title("Precision and recall", fontsize=10)
    right.set_xlabel("defects found (recall)")
    right.set_ylabel("defects among the rejected (precision)")
    defect = labels == 1
    for threshold, marker, colour, name in (
        (ACCURACY_THRESHOLD, "o", QUIET, f"at {ACCURACY_THRESHOLD}"),
        (point.threshold, "D", VALIDATION, f"at {point.threshold:.3f}, the threshold"),
    ):
        rejected = is_defect(probabilities, threshold)
        share = rejected[defect].mean()
        left.plot(rejected[~defect].mean(), share, marker, color=colour, label=name)
        right.plot(share, defect[rejected].mean() if rejected.any() else 1, marker, color=colour)
    left.legend(frameon=False, fontsize=9, loc="lower right")
    for axes in (left, right):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        _plain(axes)
    return figure


def histogram(labels: np.ndarray, probabilities: np.ndarray, point: OperatingPoint) -> Figure:
    """Draw the probabilities of each class as a histogram, with threshold and review band."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(0, 1, 41).tolist()
    for label, name, colour in ((0, CLASSES[1], RIGHT), (1, CLASSES[0], WRONG)):
        axes.hist(probabilities[labels == label], bins, color=colour, alpha=0.6, label=name)
    if axes.get_ylim()[1] > LINEAR:
        axes.set_yscale("symlog", linthresh=LINEAR)
        ticks = SymmetricalLogLocator(base=10, linthresh=LINEAR, subs=(1, 2, 5))
        axes.yaxis.set_major_locator(ticks)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter("{x:g}")
    if point.review_high > point.review_low:
        axes.axvspan(
            point.review_low, point.review_high, color=QUIET, alpha=0.25, lw=0, label="to a person"
        )
    axes.axvline(point.threshold, color=VALIDATION, linewidth=1.8, label="threshold")
    axes.axvline(
        ACCURACY_THRESHOLD, color=QUIET, linewidth=1, linestyle=":", label=f"{ACCURACY_THRESHOLD}"
    )
    axes.set(xlim=(0, 1))
    axes.set_xlabel("probability of a defect")
    axes.set_ylabel("images")
    axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=5)
    axes.set_ylim(top=axes.get_ylim()[1] * 2)  # room for the legend
    _plain(axes)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def svg(figure: Figure) -> str:
    """Return a figure as SVG for a page, in the page's font and text colour."""
    file = io.StringIO()
    fonts = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "report"}
    with matplotlib.rc_context(fonts):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()[file.getvalue().index("<svg") :]
    # Black becomes the page's text colour in either theme; text without a fill inherits it.
    drawn = re.sub(r"(fill|stroke): #(000000|262626)", r"\1: currentColor", drawn)
    drawn = drawn.replace("stroke: #b0b0b0", "stroke: currentColor")  # grid lines, made faint
    drawn = re.sub(r"font-family: [^;\"]*;? ?", "", drawn)
    return re.sub(r'<svg ([^>]*)width="[^"]*" height="[^"]*"', r"<svg \1", drawn, count=1)
