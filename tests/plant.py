"""A tracking store and what works with it, without fits: for tests of what fails behind it."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

import preloaded
from defect_detection import settings
from defect_detection.dataset import split as splits
from defect_detection.dataset.folder import DataFolder
from defect_detection.pipeline import delivery, journal, record
from defect_detection.pipeline.best_model import BestModel
from defect_detection.pipeline.delivery import Purpose
from defect_detection.pipeline.evaluate import EvaluationPlan, evaluate_and_register
from defect_detection.pipeline.journal import RunInfo
from defect_detection.pipeline.record import Trained
from defect_detection.pipeline.register import Rules
from defect_detection.registry import promotion, runs, saved_model, store, versions
from defect_detection.runtime.model_files import ServedModel

FAULTS = int(os.environ.get("FAULTS", "1"))  # how often what is a race is tried
SETS, EPOCHS = 2, 3


class Plant:
    """A tracking store, and what works with it: a training without a fit, a real evaluation."""

    def __init__(self, folder: Path, uri: str, model: Path, shared: Path):
        self.folder, self.uri, self.model = folder, uri, model
        self.cache, self.best, self.told = folder / "cache", folder / "best.json", folder / "told"
        self.name, self.shared = f"{folder.parent.name}-{folder.name}", shared

    def train(self) -> None:
        """Log two sets as `src/train.py` does, each with a model; say which are fitted."""
        import keras

        network = keras.saving.load_model(self.model / "data" / "model.keras", compile=False)
        served = ServedModel.load(self.model)
        with self.connected():
            delivery.deliver_all(self.cache)
            purpose = Purpose(SETS, "digest", str(self.best), "train.py --sync")
            with delivery.training(self.cache, purpose) as kept:
                for number in range(SETS):
                    name = f"set {number} of {os.getpid()}"
                    with kept.run(RunInfo(f"train/{self.name}", name, "", {})) as fitted:
                        record._sink.log_params({"epochs": EPOCHS})
                        for epoch in range(1, EPOCHS + 1):
                            record.epoch(epoch, {"loss": 1 / epoch})
                        record._sink.log_text("a,b\n" * 1000, "label_errors.csv")
                        uri = record._sink.log_model(network, served, b"image")
                        accuracy = 0.8 + number / 10
                        one = Trained(name, 1, accuracy, 0.1, 1.0, record.run_id(), uri)
                        fitted.append(one)
                    with self.told.open("a") as told:
                        told.write(f"{name}\n")
                kept.finish()

    def evaluate(self) -> None:
        """Evaluate and register the model as `src/evaluation.py` does."""
        config = settings.read_config()
        names = replace(
            config.mlflow,
            production_model_name=self.name,
            testing_model_name=f"testing-{self.name}",
            evaluation_threshold=0.0,
        )
        lenient = {"refuse_chance": False, "refuse_escapes": False, "refuse_overkill": False}
        rules = Rules(names, replace(config.decisions, **lenient), "tester")
        with store.patience(), self.connected():
            best = BestModel.read(self.best, "train.py")
            classifier = saved_model.load_classifier(best.model_uri)
            data = DataFolder(self.shared / "data", self.shared / "cache")
            split = splits.load(data, classifier.takes)
            with record.run(store.open_experiment(f"eval/{self.name}"), "evaluation", "said"):
                evaluate_and_register(best, classifier, split, EvaluationPlan(rules))

    @contextmanager
    def connected(self) -> Iterator[None]:
        with store.connected(self.uri, create=True), runs.watched(self.cache):
            yield

    def start_again(self) -> None:
        """Do what each script does first."""
        with self.connected():
            delivery.deliver_all(self.cache, strict=True)

    def require_whole(self) -> None:
        """Nothing is left running or half, and all that was said to be fitted is there."""
        require_no_remains(self.cache)
        with store.connected(self.uri):
            every = self._runs("train") + self._runs("eval") + self._runs("promotion")
            assert {run.info.status for run in every} <= {"FINISHED", "FAILED", "KILLED"}
            finished = [run for run in self._runs("train") if run.info.status == "FINISHED"]
            for run in finished:
                self._require_trained(run)
            told = self.told.read_text().splitlines() if self.told.exists() else []
            assert set(told) <= {run.info.run_name for run in finished}
            if self.best.exists():
                BestModel.read(self.best, "train.py")
            require_registered(self.name)

    def _runs(self, kind: str) -> list[Run]:
        found = mlflow.get_experiment_by_name(f"{kind}/{self.name}")
        return MlflowClient().search_runs([found.experiment_id]) if found else []

    def _require_trained(self, run: Run) -> None:
        client, experiment = MlflowClient(), run.info.experiment_id
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [one.step for one in history] == [1, 2, 3]
        (model,) = client.search_logged_models([experiment], f"source_run_id = '{run.info.run_id}'")
        saved_model.load_classifier(model.model_uri)
        assert "label_errors.csv" in {one.path for one in client.list_artifacts(run.info.run_id)}


def kept_training(cache: Path, experiment: str, name: str, best_file: str = "") -> Path:
    """Do as a training of one set that MLflow does not take; return where it keeps the set."""
    refused = mock.patch.object(journal, "_start", side_effect=MlflowException("no answer"))
    purpose = Purpose(1, "digest", best_file, "train.py --sync")
    with refused, delivery.training(cache, purpose) as training:
        with training.run(RunInfo(experiment, name, "", {})) as fitted:
            record.epoch(1, {"loss": 0.5})
            fitted.append(Trained(name, 1, 0.9, 0.1, 1.0, "", ""))
    (folder,) = training.folder.glob("*/run.json")
    return folder.parent


def require_no_remains(cache: Path) -> None:
    """Nothing waits to be delivered or to be ended."""
    assert not list((cache / "undelivered").glob("*/*/run.json"))
    assert not list((cache / runs.FOLDER).glob("*.json"))


def require_registered(name: str) -> None:
    """No version is half registered, and the record of the alias is whole."""
    for version in versions.with_accuracy(name):
        assert version.released or version.why_not_released not in ("", versions.UNFINISHED)
        assert mlflow.get_run(version.tags["evaluation_run"]).info.status != "RUNNING"
    assert not promotion.moved_outside(name)
    if (found := versions.in_production(name)) is not None:
        assert found.released


def figures(run: Run) -> dict[str, float]:
    """Return the metrics of a run, without how long it took."""
    return {name: value for name, value in run.data.metrics.items() if name != "fit_seconds"}


def seconds_of(work: Callable[[], None]) -> float:
    started = time.monotonic()
    assert in_a_process(work).exitcode == 0
    return time.monotonic() - started


def in_a_process(work: Callable[[], None], until: float = 240):
    """Run in a process of its own that is killed after some seconds."""
    process = preloaded.processes().Process(target=work)
    process.start()
    process.join(until)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process
