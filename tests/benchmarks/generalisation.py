"""How the model judges castings that it has never seen, beside a tutorial's CNN, and how fast.

    python tests/benchmarks/generalisation.py [--seeds 3] [--only ours|tutorial|speed|drawn]

Both are cross-validated on all real castings with the same five folds, no photograph cut apart.
Ours chooses its best epoch and its temperature by photographs held back from the other folds; the
tutorial's has nothing to choose. Prints the table of README and writes docs/benchmark.json.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "data")]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.model_selection import StratifiedGroupKFold  # noqa: E402

import sample  # noqa: E402
import truth  # noqa: E402
from defect_detection import audit, dataset, metrics, model, settings, training  # noqa: E402
from defect_detection.classifier import Classifier  # noqa: E402
from defect_detection.model import keras, tf  # noqa: E402
from defect_detection.settings import ModelParameters  # noqa: E402

RESULTS = ROOT / "docs" / "benchmark.json"
FOLDS = 5
TUTORIAL_EPOCHS = 4
ROTATED = 200  # pictures of a fold
ANGLES = range(15, 360, 30)
FIGURES = (
    "balanced_accuracy",
    "recall_def_front",
    "recall_ok_front",
    "roc_auc",
    "calibration_error",
)
HEADER = "\n                      balanced  recall def  recall ok   ROC AUC       ECE"

Judge = Callable[[np.ndarray], np.ndarray]  # pictures to probabilities of a defect


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--only", choices=("ours", "tutorial", "speed", "drawn"))
    options = parser.parse_args()
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    parameters = settings.read_yaml(settings.CONFIG_FILE, settings.Config).model_parameters
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def keep(section: str, measured: dict) -> None:
        results[section] = measured
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as name:
        if options.only in (None, "drawn"):
            keep("drawn", drawn(parameters, Path(name) / "drawn"))
        if not truth.CASTINGS.is_dir():
            print("the real castings are not here (../shared/data/casting)")
        else:
            castings = Castings(parameters, Path(name))
            if options.only in (None, "speed"):
                keep("speed", speed(parameters, castings))
            if options.only in (None, "tutorial"):
                keep("tutorial", tutorial_folds(parameters, castings))
            if options.only in (None, "ours"):
                keep("ours", our_folds(parameters, castings, options.seeds))
    if results.keys() >= {"drawn", "speed", "tutorial", "ours"}:
        print(f"\n{table(results)}")


def table(results: dict) -> str:
    """Make the table of README from what docs/benchmark.json holds."""
    ours, simple = results["ours"], results["tutorial"]
    seconds, drawn_defects = results["speed"], results["drawn"]

    def mean(lines: list[dict], figure: str) -> float:
        return float(np.mean([one[figure] for one in lines]))

    def worst_fold(lines: list[dict]) -> float:
        return min(
            mean([one for one in lines if one["fold"] == fold], "balanced_accuracy")
            for fold in range(FOLDS)
        )

    seeds = len({one["seed"] for one in ours})
    rows = [
        (f"castings never seen: {FOLDS} folds, {seeds} seeds", "this model", "a tutorial's CNN"),
        ("---", "---", "---"),
        *(
            (name, f"{mean(ours, figure):.3f}", f"{mean(simple, figure):.3f}")
            for name, figure in zip(
                ("balanced accuracy", "recall of defects", "recall of good parts", "ROC AUC")
                + ("expected calibration error",),
                FIGURES,
                strict=True,
            )
        ),
        ("balanced accuracy of the worst fold", *(f"{worst_fold(o):.3f}" for o in (ours, simple))),
        (
            "probability moves when the picture is turned, by",
            f"{mean(ours, 'rotation_replicated'):.3f}",
            f"{mean(simple, 'rotation_replicated'):.3f}",
        ),
        (
            "seconds for an epoch of all pictures",
            *(f"{min(seconds[name]):.1f}" for name in ("ours", "tutorial")),
        ),
        ("parameters", *(f"{seconds['parameters'][name]:,}" for name in ("ours", "tutorial"))),
        (
            "drawn castings: the map's maximum lies in the defect",
            f"{drawn_defects['inside']} of {drawn_defects['found']}",
            "has no map",
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Castings:
    """All real castings, their photographs as they are known, and the five folds."""

    def __init__(self, parameters: ModelParameters, folder: Path):
        known = truth.photographs()
        self.folder = folder
        paths = [
            path for side in dataset.SPLITS for path in dataset.in_folder(truth.CASTINGS, side)
        ]
        cache = settings.from_root(".cache")
        self.data = dataset.read(truth.CASTINGS, paths, "all", parameters.image_size, cache)
        merged = [known[path][1] for path in self.data.paths]
        self.photographs = np.unique(merged, return_inverse=True)[1]
        self.labels = self.data.labels
        divided = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
        self.folds = list(divided.split(self.labels, self.labels, self.photographs))

    def linked(self, rows: np.ndarray, name: str) -> Path:
        """Return a folder with a folder for each class, as tutorials want it."""
        folder = self.folder / name
        for row in rows:
            path = self.data.paths[row]
            link = folder / Path(path).parent.name / path.replace("/", "-")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(truth.CASTINGS / path)
        return folder


def tutorial(image_size: tuple[int, int]) -> keras.Model:
    """Build the CNN of the tutorials: two convolutions, a wide dense layer; 7.4 M parameters."""
    layers = keras.layers
    built = keras.Sequential(
        [
            keras.Input((*image_size, 1)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    built.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return built


def tutorial_batches(folder: Path, image_size: tuple[int, int]) -> tf.data.Dataset:
    """Read pictures as the tutorials do; a defect is 1."""
    return keras.utils.image_dataset_from_directory(
        folder,
        class_names=["ok_front", "def_front"],
        label_mode="binary",
        color_mode="grayscale",
        image_size=image_size,
        batch_size=32,
        seed=0,
        verbose=False,
    )


def fit_ours(
    parameters: ModelParameters, castings: Castings, rows: np.ndarray, seed: int
) -> training.TrainingResult:
    """Fit the first set on some of the castings, a share of their photographs held back."""
    hyper = parameters.sets[0]
    labels, photographs = castings.labels, castings.photographs
    learned, held_back = dataset.split_validation(
        labels[rows], photographs[rows], parameters.validation_share, seed
    )
    training.make_deterministic(seed)
    return training.fit(
        model.build(parameters.image_size, hyper),
        castings.data.images,
        labels,
        photographs,
        rows[learned],
        rows[held_back],
        replace(parameters.schedule(hyper), seed=seed),
        verbose=0,
    )


def tutorial_folds(parameters: ModelParameters, castings: Castings) -> list[dict]:
    """Cross-validate the tutorial's CNN; print a line for each fold."""
    found = []
    print(HEADER)
    for number, (others, fold) in enumerate(castings.folds):
        keras.utils.set_random_seed(0)
        simple = tutorial(parameters.image_size)
        simple.fit(
            tutorial_batches(castings.linked(others, f"fold{number}"), parameters.image_size),
            epochs=TUTORIAL_EPOCHS,
            verbose=0,
        )

        def judge(pictures: np.ndarray, simple: keras.Model = simple) -> np.ndarray:
            return simple.predict(pictures.astype(np.float32), batch_size=64, verbose=0)[:, 0]

        found.append(judged("tutorial", number, 0, castings, fold, judge))
    return found


def our_folds(parameters: ModelParameters, castings: Castings, seeds: int) -> list[dict]:
    """Cross-validate the first set; print a line for each fold and seed."""
    found = []
    print(HEADER)
    for number, (others, fold) in enumerate(castings.folds):
        for seed in range(seeds):
            fitted = fit_ours(parameters, castings, others, seed)
            litert = model.to_litert(fitted.model)
            judge = Classifier(litert, parameters.image_size).probabilities
            chosen = {"best_epoch": fitted.best_epoch, "temperature": fitted.temperature}
            found.append(judged("ours", number, seed, castings, fold, judge) | chosen)
    return found


def judged(
    name: str, number: int, seed: int, castings: Castings, fold: np.ndarray, judge: Judge
) -> dict:
    """Score a model on a fold as it is and turned; print it."""
    labels, images = castings.labels[fold], castings.data.images[fold]
    probabilities = judge(images)
    figures = metrics.score(labels, probabilities, metrics.THRESHOLD).as_dict()
    shown = "".join(f"{figures[key]:11.3f}" for key in FIGURES)
    print(f"{f'{name} fold {number} seed {seed}':20}{shown}", flush=True)
    found = {"fold": number, "seed": seed} | {key: figures[key] for key in FIGURES}
    return found | rotation(judge, images, probabilities)


def rotation(judge: Judge, images: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Return how far the probability moves on average when the picture is turned."""
    rows = np.linspace(0, len(images) - 1, ROTATED).astype(int)
    height, width = images.shape[1:3]
    changes = {}
    for name, border in (("replicated", cv2.BORDER_REPLICATE), ("black", cv2.BORDER_CONSTANT)):
        moved = []
        for angle in ANGLES:
            turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
            turned = [
                cv2.warpAffine(np.asarray(images[row]), turn, (width, height), borderMode=border)
                for row in rows
            ]
            after = judge(np.stack(turned)[..., np.newaxis])
            moved.append(np.abs(after - before[rows]).mean())
        changes[f"rotation_{name}"] = float(np.mean(moved))
    return changes


def speed(parameters: ModelParameters, castings: Castings) -> dict:
    """Time epochs of both in turn, the first of each left out: it builds the graph."""
    rows = np.arange(len(castings.labels))
    folder = castings.linked(rows, "all")
    hyper = parameters.sets[0]
    batches = tutorial_batches(folder, parameters.image_size)
    simple = tutorial(parameters.image_size)
    simple.fit(batches.take(5), verbose=0)
    seconds: dict[str, list[float]] = {"tutorial": [], "ours": []}
    for _ in range(2):
        started = time.perf_counter()
        simple.fit(batches, epochs=1, verbose=0)
        seconds["tutorial"].append(time.perf_counter() - started)
        ends: list[float] = []
        training.fit(
            model.build(parameters.image_size, hyper),
            castings.data.images,
            castings.labels,
            castings.photographs,
            rows,
            rows[::50],
            replace(parameters.schedule(hyper), epochs=3, patience=3),
            on_epoch=lambda *_, ends=ends: ends.append(time.perf_counter()),
            verbose=0,
        )
        seconds["ours"].append((ends[-1] - ends[0]) / 2)
    ours, theirs = min(seconds["ours"]), min(seconds["tutorial"])
    print(f"\nan epoch of {len(rows)} pictures, {parameters.image_size[0]} pixels:")
    print(f"  tutorial {theirs:.1f} s, ours {ours:.1f} s: 1/{theirs / ours:.1f} of it")
    sizes = {"ours": model.build(parameters.image_size, hyper), "tutorial": simple}
    return seconds | {"parameters": {name: one.count_params() for name, one in sizes.items()}}


def drawn(parameters: ModelParameters, folder: Path) -> dict:
    """Train on drawn castings; count how often the map's maximum lies in the drawn defect."""
    sample.draw_all(folder, 0)
    split = audit.load(folder, parameters.image_size, folder / "cache")
    hyper = parameters.sets[0]
    training.make_deterministic(parameters.seed)
    fitted = training.fit(
        model.build(parameters.image_size, hyper),
        split.training.images,
        split.training.labels,
        split.training_photographs,
        *split.hold_back(parameters.validation_share, parameters.seed),
        parameters.schedule(hyper),
        verbose=0,
    )
    classifier = Classifier(model.to_litert(fitted.model), parameters.image_size)
    probabilities = classifier.probabilities(split.testing.images)
    scores = metrics.score(split.testing.labels, probabilities, metrics.THRESHOLD)
    inside, found = truth.pointed_at(classifier, seed=99, count=200)
    print(f"\ndrawn castings: test accuracy {scores.accuracy:.4f}")
    print(f"  the map's maximum lies in the defect for {inside} of {found} defects that are found")
    return {"accuracy": scores.accuracy, "found": found, "inside": inside}


if __name__ == "__main__":
    main()
