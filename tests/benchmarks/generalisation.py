"""How the model judges castings that it has never seen, beside a tutorial's CNN and the former one.

    python tests/benchmarks/generalisation.py [--seeds 3] [--only NAME]

All are cross-validated on all real castings with the same five folds, no photograph cut apart.
Ours holds photographs of the other folds back, to choose a set and its epoch and to calibrate it
by; the tutorial's has nothing to choose. The former model, from before there were pretrained
layers, is fitted by its own commit, which takes another 40 minutes and is done only when asked for
by name.
Prints the table of README and writes docs/benchmark.json.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "data")]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.model_selection import StratifiedGroupKFold  # noqa: E402

import sample  # noqa: E402
import truth  # noqa: E402
from defect_detection import settings  # noqa: E402
from defect_detection.dataset import decoded, holdout  # noqa: E402
from defect_detection.dataset import split as splits  # noqa: E402
from defect_detection.dataset.folder import SIDES, DataFolder  # noqa: E402
from defect_detection.dataset.split import Dataset  # noqa: E402
from defect_detection.evaluation import metrics, robustness  # noqa: E402
from defect_detection.runtime.classifier import Classifier  # noqa: E402
from defect_detection.runtime.decision import (  # noqa: E402
    ACCURACY_THRESHOLD,
    is_defect,
)
from defect_detection.runtime.model_files import ServedModel  # noqa: E402
from defect_detection.settings import ModelParameters  # noqa: E402
from defect_detection.training import features, fitting, good_only, network  # noqa: E402
from defect_detection.training.network import keras, tf  # noqa: E402

RESULTS = ROOT / "docs" / "benchmark.json"
FORMER = "1893409"  # commit of the CNN that was fitted from scratch
FOLDS = 5
TUTORIAL_EPOCHS = 4
ROTATED = 100  # images of a fold
ANGLES = range(15, 360, 60)
DISTURBED = 200  # images of a fold
FIGURES = {
    "balanced_accuracy": "balanced accuracy",
    "recall_def_front": "recall of defects",
    "recall_ok_front": "recall of good parts",
    "roc_auc": "ROC AUC",
    "calibration_error": "expected calibration error",
}
HEADER = "\n                      balanced  recall def  recall ok   ROC AUC       ECE"

Judge = Callable[[np.ndarray], np.ndarray]  # images to probabilities of a defect


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    names = ("drawn", "tutorial", "ours", "good_only", "former")
    parser.add_argument("--only", choices=names)
    options = parser.parse_args()
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    parameters = settings.read_yaml(settings.CONFIG_FILE, settings.Config).model_parameters
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    asked = [options.only] if options.only else names[:-1]

    def keep(section: str, measured: object) -> None:
        results[section] = measured
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as name:
        if "drawn" in asked:
            keep("drawn", drawn(parameters, Path(name) / "drawn"))
        if not truth.CASTINGS.is_dir():
            print("the real castings are not here (../shared/data/casting)")
        else:
            if "tutorial" in asked:
                keep("tutorial", tutorial_folds(Castings(parameters, Path(name))))
            if "ours" in asked:
                castings = Castings(parameters, Path(name))
                keep("ours", our_folds(parameters, castings, options.seeds))
            if "good_only" in asked:
                keep("good_only", good_only_folds(parameters, Castings(parameters, Path(name))))
            if "former" in asked:
                keep("former", former_folds(Path(name) / "former", options.seeds))
    if results.keys() >= set(names):
        print(f"\n{table(results)}\n\n{details(results['ours'])}")


def table(results: dict) -> str:
    """Make the table of README from what docs/benchmark.json holds."""
    names = {
        "ours": "ours",
        "former": "the former CNN, from scratch",
        "tutorial": "a tutorial's CNN",
    }
    columns = [results[name] for name in names]

    def seeds(lines: list[dict]) -> str:
        count = len({one["seed"] for one in lines})
        return f"{count} seed{'s' if count > 1 else ''}"

    def row(name: str, value: Callable[[list[dict]], float]) -> tuple[str, ...]:
        return (name, *(f"{value(lines):.3f}" for lines in columns))

    rows = [
        (
            f"castings never seen: {FOLDS} folds",
            *(f"{name}, {seeds(results[key])}" for key, name in names.items()),
        ),
        ("---",) * 4,
        *(
            row(name, lambda lines, figure=figure: mean(lines, figure))
            for figure, name in FIGURES.items()
        ),
        row("balanced accuracy of the worst fold", worst_fold),
        row(
            "probability moves when the image is rotated, by",
            lambda o: mean(o, "rotation_replicated"),
        ),
    ]
    return "\n".join(f"| {' | '.join(one)} |" for one in rows)


def mean(lines: list[dict], figure: str) -> float:
    """Return the mean over folds and seeds."""
    return float(np.mean([one[figure] for one in lines]))


def worst_fold(lines: list[dict]) -> float:
    """Return the lowest balanced accuracy of a fold, over its seeds."""
    return min(
        mean([one for one in lines if one["fold"] == fold], "balanced_accuracy")
        for fold in range(FOLDS)
    )


def details(lines: list[dict]) -> str:
    """Say what the table of README leaves out, a line for each."""
    wrong: dict[str, int] = {}
    for one in lines:
        for name in one["wrong_photographs"]:
            wrong[name] = wrong.get(name, 0) + 1
    seeds = len({one["seed"] for one in lines})
    by_fold = [
        mean([one for one in lines if one["fold"] == fold], "balanced_accuracy")
        for fold in range(FOLDS)
    ]
    said = [
        "balanced accuracy by fold: " + ", ".join(f"{one:.3f}" for one in by_fold),
        "without the photograph that has both labels: balanced accuracy "
        f"{mean(lines, 'clean_balanced_accuracy'):.3f}, AUC {mean(lines, 'clean_roc_auc'):.4f}",
        "photographs judged wrongly by the mean of their images, in how many of "
        f"{seeds} seeds: " + ", ".join(f"{k} ({v})" for k, v in sorted(wrong.items())),
        f"verdicts that ten small disturbances flip: {mean(lines, 'flipped'):.3f}",
    ]
    for name in lines[0]["disturbed"]:
        change = np.mean([one["disturbed"][name] for one in lines]) - np.mean(
            [one["disturbed"]["as they are"] for one in lines]
        )
        said.append(f"balanced accuracy, {name}: {change:+.3f}")
    return "\n".join(f"  {one}" for one in said)


class Castings:
    """All real castings, their photographs as they are known, and the five folds."""

    def __init__(self, parameters: ModelParameters, folder: Path):
        known = truth.photographs()
        self.folder = folder
        data = DataFolder(truth.CASTINGS, settings.from_root(".cache"))
        paths = [path for side in SIDES for path in data.images_in(side)]
        self.takes = data.image_format(parameters.image_size, parameters.color)
        read = decoded.decode(data, paths, "all", self.takes)
        self.names, self.photographs = np.unique(
            [known[path][1] for path in read.paths], return_inverse=True
        )
        self.labels = read.labels
        self.data = Dataset(**vars(read), photographs=self.photographs)
        of_class = [set(self.photographs[self.labels == label]) for label in (0, 1)]
        self.two_labels = sorted(of_class[0] & of_class[1])
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


def tutorial(shape: tuple[int, int, int]) -> keras.Model:
    """Build the CNN of the tutorials: two convolutions, a wide dense layer; 7.4 M parameters."""
    layers = keras.layers
    built = keras.Sequential(
        [
            keras.Input(shape),
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
    """Read images as the tutorials do; a defect is 1."""
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


def tutorial_folds(castings: Castings) -> list[dict]:
    """Cross-validate the tutorial's CNN; print a line for each fold."""
    found = []
    print(HEADER)
    for number, (others, fold) in enumerate(castings.folds):
        keras.utils.set_random_seed(0)
        simple = tutorial(castings.takes.shape)
        simple.fit(
            tutorial_batches(castings.linked(others, f"fold{number}"), castings.takes.shape[:2]),
            epochs=TUTORIAL_EPOCHS,
            verbose=0,
        )

        def judge(pictures: np.ndarray, simple: keras.Model = simple) -> np.ndarray:
            return simple.predict(pictures.astype(np.float32), batch_size=64, verbose=0)[:, 0]

        found.append(judged("tutorial", number, 0, castings, fold, judge))
    return found


def our_folds(parameters: ModelParameters, castings: Castings, seeds: int) -> list[dict]:
    """Cross-validate what training does, which keeps one set; print a line for each fold."""
    found = []
    sampling = parameters.sampling(settings.from_root(".cache"))
    print(HEADER)
    for seed in range(seeds):
        seeded = replace(sampling, seed=seed)
        computed = {}
        for hyper in parameters.sets:
            fitting.make_deterministic(seed)
            made = network.build(castings.takes.shape, hyper)
            computed[hyper.name] = features.compute(made, castings.data, seeded)
        for number, (others, fold) in enumerate(castings.folds):
            fitted = {}
            for hyper in parameters.sets:
                fitting.make_deterministic(seed)
                fitted[hyper.name] = fitting.fit(
                    network.build(castings.takes.shape, hyper),
                    computed[hyper.name].among(others),
                    replace(parameters.fit_parameters(hyper), seed=seed),
                )
            best = {
                name: (one.best["val_accuracy"], -one.best["val_loss"])
                for name, one in fitted.items()
            }
            served, of_sets = {}, {}
            for name, one in fitted.items():
                litert = network.to_litert(one.model)
                served[name] = Classifier(ServedModel(litert, castings.takes))
                judge = served[name].probabilities
                of_sets[name] = judged(name, number, seed, castings, fold, judge)
            kept = max(best, key=lambda name: best[name])
            found.append(
                of_sets[kept]
                | {"set": kept, "best_epoch": fitted[kept].best_epoch}
                | {name: one["balanced_accuracy"] for name, one in of_sets.items()}
                | asdict(fitted[kept].calibration)
                | stability(served[kept], castings, fold)
            )
    return found


def good_only_folds(parameters: ModelParameters, castings: Castings) -> list[dict]:
    """Fit to good castings alone, without those of each fold; judge these and all defects."""
    hyper = replace(parameters.sets[1], head="good")
    most = settings.read_config().decisions.max_overkill_rate
    clear = ~np.isin(castings.photographs, castings.two_labels)
    good = np.flatnonzero((castings.labels == 0) & clear)
    defects = np.flatnonzero((castings.labels == 1) & clear)[::3]
    sampling = parameters.sampling(settings.from_root(".cache"))
    made = network.build(castings.takes.shape, hyper)
    computed = features.compute(made, castings.data, sampling)
    found = []
    print("\ngood castings only   AUC by photograph   good photographs rejected   defects found")
    for number, part in enumerate(holdout.parts(castings.photographs[good], 0.2, 0)):
        fold = np.concatenate([good[part], defects])
        fitting.make_deterministic(parameters.seed)
        model = network.build(castings.takes.shape, hyper)
        others = computed.among(np.setdiff1d(good, good[part]))
        good_only.fit(model, others, parameters.fit_parameters(hyper), most, lambda *_: None)
        served = Classifier(ServedModel(network.to_litert(model), castings.takes))
        probabilities = served.probabilities(castings.data.images[fold])
        of = metrics.by_photograph(castings.labels[fold], probabilities, castings.photographs[fold])
        scores = metrics.score(*of, ACCURACY_THRESHOLD)
        images = metrics.score(castings.labels[fold], probabilities, ACCURACY_THRESHOLD)
        found.append(
            {
                "fold": number,
                "roc_auc": scores.roc_auc,
                "rejected": scores.ok_rejected,
                "good": scores.ok_rejected + scores.ok_passed,
                "recall_def_front": scores.recall_def_front,
                "overkill_of_images": 1 - images.recall_ok_front,
            }
        )
        print(
            f"fold {number}{scores.roc_auc:32.3f}{scores.ok_rejected:16} of "
            f"{found[-1]['good']}{scores.recall_def_front:22.3f}",
            flush=True,
        )
    return found


def former_folds(folder: Path, seeds: int) -> list[dict]:
    """Cross-validate the CNN of the commit `FORMER` by its own benchmark."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(folder / "project"), FORMER], check=True)
    try:
        (folder / "shared").symlink_to(ROOT.parent / "shared")
        script = folder / "project" / "tests" / "benchmarks" / "generalisation.py"
        command = [sys.executable, str(script), "--only", "ours", "--seeds", str(seeds)]
        subprocess.run(command, check=True)
        return json.loads((folder / "project" / "docs" / "benchmark.json").read_text())["ours"]
    finally:
        subprocess.run([*git, "remove", "--force", str(folder / "project")], check=True)


def judged(
    name: str, number: int, seed: int, castings: Castings, fold: np.ndarray, judge: Judge
) -> dict:
    """Score a model on a fold as it is and turned; print it."""
    labels, images = castings.labels[fold], castings.data.images[fold]
    photographs = castings.photographs[fold]
    probabilities = judge(images)
    figures = metrics.score(labels, probabilities, ACCURACY_THRESHOLD).as_dict()
    shown = "".join(f"{figures[key]:11.3f}" for key in FIGURES)
    print(f"{f'{name} fold {number} seed {seed}':20}{shown}", flush=True)
    found = {"fold": number, "seed": seed} | {key: figures[key] for key in FIGURES}
    clear = ~np.isin(photographs, castings.two_labels)
    clean = metrics.score(labels[clear], probabilities[clear], ACCURACY_THRESHOLD).as_dict()
    found |= {f"clean_{key}": clean[key] for key in ("balanced_accuracy", "roc_auc")}
    wrong = []
    for label in (0, 1):
        for one in np.unique(photographs[labels == label]):
            mean = probabilities[(photographs == one) & (labels == label)].mean()
            if is_defect(mean, ACCURACY_THRESHOLD) != (label == 1):
                wrong.append(f"{castings.names[one]} {('ok', 'def')[label]}")
    return found | {"wrong_photographs": wrong} | rotation(judge, images, probabilities)


def stability(classifier: Classifier, castings: Castings, fold: np.ndarray) -> dict:
    """Return balanced accuracy under each disturbance and the share of flipped verdicts."""
    rows = fold[np.linspace(0, len(fold) - 1, DISTURBED).astype(int)]
    images, labels = castings.data.images[rows], castings.labels[rows]
    accuracies = {}
    for name, disturb in robustness.DISTURBANCES.items():
        probabilities = classifier.probabilities(robustness.disturbed(images, disturb))
        scores = metrics.score(labels, probabilities, ACCURACY_THRESHOLD)
        accuracies[name] = scores.balanced_accuracy
    flipped = robustness.repeatability(classifier, images).flipped
    return {"disturbed": accuracies, "flipped": flipped.share}


def rotation(judge: Judge, images: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Return how far the probability moves on average when the image is turned."""
    rows = np.linspace(0, len(images) - 1, ROTATED).astype(int)
    height, width = images.shape[1:3]
    moved = []
    for angle in ANGLES:
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
        turned = [
            cv2.warpAffine(
                np.asarray(images[row]), turn, (width, height), borderMode=cv2.BORDER_REPLICATE
            )
            for row in rows
        ]
        after = judge(np.stack(turned)[..., np.newaxis])
        moved.append(np.abs(after - before[rows]).mean())
    return {"rotation_replicated": float(np.mean(moved))}


def drawn(parameters: ModelParameters, folder: Path) -> dict:
    """Train on drawn castings; count how often the map's maximum lies in the drawn defect."""
    sample.draw_all(folder, 0)
    drawn_folder = DataFolder(folder, folder / "cache")
    takes = drawn_folder.image_format(parameters.image_size, parameters.color)
    split = splits.load(drawn_folder, takes)
    hyper = parameters.sets[0]
    fitting.make_deterministic(parameters.seed)
    made = network.build(takes.shape, hyper)
    sampling = parameters.sampling(folder / "cache")
    computed = features.compute(made, split.training, sampling)
    fitted = fitting.fit(made, computed, parameters.fit_parameters(hyper))
    served = ServedModel(network.to_litert(fitted.model), takes)
    classifier = Classifier(served)
    probabilities = classifier.probabilities(split.testing.images)
    scores = metrics.score(split.testing.labels, probabilities, ACCURACY_THRESHOLD)
    inside, found = truth.pointed_at(classifier, seed=99, count=200)
    print(f"\ndrawn castings: test accuracy {scores.accuracy:.4f}")
    print(f"  the map's maximum lies in the defect for {inside} of {found} defects that are found")
    return {"accuracy": scores.accuracy, "found": found, "inside": inside}


if __name__ == "__main__":
    main()
