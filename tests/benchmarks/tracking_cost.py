"""Measure the seconds that MLflow adds to a training of the three sets of src/config.yaml.

    python tests/benchmarks/tracking_cost.py

Each set is fitted without MLflow and with it, in turn. What MLflow adds does not depend on the
number of images, so few are drawn: with many, the difference drowns in the noise of the fits.
The store is a new sqlite database, whose migrations are counted, as is the export for serving.
"""

import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "data")]

import sample  # noqa: E402
import train  # noqa: E402
from defect_detection import settings  # noqa: E402
from defect_detection.dataset import split as splits  # noqa: E402
from defect_detection.dataset.folder import DataFolder  # noqa: E402
from defect_detection.pipeline import delivery  # noqa: E402
from defect_detection.pipeline.delivery import Purpose  # noqa: E402
from defect_detection.registry import store  # noqa: E402
from defect_detection.training import features, fitting, network  # noqa: E402

DRAWN = {"train": {"def_front": 32, "ok_front": 32}, "test": {"def_front": 1, "ok_front": 1}}


def main() -> None:
    """Fit the sets of src/config.yaml twice and print both times."""
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    config = settings.read_yaml(settings.CONFIG_FILE, settings.Config)
    parameters = config.model_parameters
    parameters = replace(parameters, variants=100)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        sample.draw_all(pictures, 0, DRAWN)
        drawn = DataFolder(pictures, Path(folder) / "cache")
        takes = drawn.image_format(parameters.image_size, parameters.color)
        split = splits.load(drawn, takes)
        fitted, tracked = 0.0, 0.0
        started = time.perf_counter()
        purpose = Purpose(len(parameters.sets), split.training.digest, f"{folder}/best", "")
        with (
            store.connected(f"sqlite:///{folder}/mlflow.db", create=True),
            delivery.training(Path(folder), purpose) as kept,
        ):
            store.open_experiment("train/benchmark")
            tracked += time.perf_counter() - started
            for hyper in parameters.sets:
                fitting.make_deterministic(parameters.seed)
                started = time.perf_counter()
                made = network.build(takes.shape, hyper)
                sampling = parameters.sampling(Path(folder) / hyper.name)
                computed = features.compute(made, split.training, sampling)
                fitting.fit(made, computed, parameters.fit_parameters(hyper))
                fitted += time.perf_counter() - started
                one = replace(config, model_parameters=parameters)
                plan = train.plan(one, hyper, takes, Path(folder) / f"{hyper.name}-tracked", "cpu")
                started = time.perf_counter()
                train.fit_sets([plan], split, "train/benchmark", kept)
                tracked += time.perf_counter() - started
    print(f"{len(parameters.sets)} sets, {len(split.training)} images")
    print(f"without MLflow {fitted:.1f} s, with MLflow {tracked:.1f} s: {tracked - fitted:+.1f} s")


if __name__ == "__main__":
    main()
