"""Train the CNN with each hyper-parameter set of src/config.yaml and keep the best.

Each set is an MLflow run. Which model had the highest accuracy on the pictures held back from
data/train is written to best_model.json, from where src/evaluation.py takes it.
"""

import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import mlflow
import numpy as np

from defect_detection import dataset, report, script, settings, tracking
from defect_detection.dataset import Dataset
from defect_detection.files import require_writable
from defect_detection.settings import Config, HyperParameters, ModelParameters


@dataclass(frozen=True)
class TrainedSet:
    """One row of the table at the end, and where the model is."""

    name: str
    best_epoch: int
    val_accuracy: float
    val_loss: float
    seconds: float
    run_id: str
    model_uri: str


def main() -> None:
    """Settings, data, then for each set: fit and log; keep the best; say what happened."""
    options = script.parser(__doc__, "python src/train.py --data ~/pictures/castings").parse_args()
    env = settings.environment()
    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    folder = script.data_folder(options.data, env, config.paths.data_path)
    best_file = settings.from_root(config.paths.best_model)
    require_writable(best_file.parent)

    with tracking.connected(settings.tracking_uri(env)):
        experiment = tracking.open_experiment(f"train/{config.mlflow.experiment_name}")
        data = load(config, folder)
        trained = train_sets(config.model_parameters, data, folder, experiment)
        best = max(trained, key=lambda one: (one.val_accuracy, -one.val_loss))
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        tracking.BestModel(best.run_id, best.model_uri, best.val_accuracy, data.digest, now).write(
            best_file
        )
    print(table(trained, best))
    print(f"Best: {best.name}, written to {best_file}. Next: python src/evaluation.py")


def load(config: Config, folder: Path) -> Dataset:
    """Load the training pictures and say how many there are."""
    cache = settings.from_root(config.paths.cache)
    data = dataset.load(folder, "train", config.model_parameters.image_size, cache)
    counts = ", ".join(f"{n} {name}" for name, n in data.counts.items())
    print(f"{folder / 'train'}: {counts}", flush=True)
    return data


def train_sets(
    parameters: ModelParameters, data: Dataset, folder: Path, experiment: str
) -> list[TrainedSet]:
    """Fit and log each set in a run of its own, all on the same split."""
    training, validation = dataset.split_validation(
        data.labels, parameters.validation_share, parameters.seed
    )
    trained = []
    for number, hyper in enumerate(parameters.sets, start=1):
        print(f"\nSet {number} of {len(parameters.sets)}: {hyper.name}", flush=True)
        with mlflow.start_run(experiment_id=experiment, run_name=hyper.name):
            tracking.log_dataset(data, folder, "training")
            trained.append(train_set(parameters, hyper, data, training, validation))
    return trained


def train_set(
    parameters: ModelParameters,
    hyper: HyperParameters,
    data: Dataset,
    training_rows: np.ndarray,
    validation_rows: np.ndarray,
) -> TrainedSet:
    """Fit one set and log it in the active run."""
    # TensorFlow takes 4 s to import: not before the options, the data and the store are found good.
    from defect_detection import model, training

    shared = asdict(parameters)
    del shared["sets"]
    mlflow.log_params(asdict(hyper) | shared)
    training.make_deterministic(parameters.seed)
    result = training.fit(
        model.build(parameters.image_size, hyper),
        data.images,
        data.labels,
        training_rows,
        validation_rows,
        hyper,
        parameters.epochs,
        parameters.patience,
        parameters.seed,
        on_epoch=lambda epoch, values: mlflow.log_metrics(values, step=epoch),
        verbose=1 if sys.stdout.isatty() else 2,
    )
    best = {name: values[result.best_epoch - 1] for name, values in result.history.items()}
    mlflow.log_metrics(
        {"best_epoch": result.best_epoch, "fit_seconds": result.seconds}
        | {f"best_{name}": value for name, value in best.items()}
    )
    curves = report.learning_curves(hyper.name, result.history, result.best_epoch)
    mlflow.log_figure(curves, "learning_curves.png")
    return TrainedSet(
        name=hyper.name,
        best_epoch=result.best_epoch,
        val_accuracy=best["val_accuracy"],
        val_loss=best["val_loss"],
        seconds=result.seconds,
        run_id=mlflow.active_run().info.run_id,
        model_uri=tracking.log_model(result.model, data.images[:1]),
    )


def table(trained: list[TrainedSet], best: TrainedSet) -> str:
    """Lay the sets out as a table, the best marked."""
    width = max(8, *(len(one.name) for one in trained))
    lines = [f"\n  {'set':{width}}  best epoch  validation accuracy  seconds  run id"]
    for one in trained:
        mark = "*" if one is best else " "
        lines.append(
            f"{mark} {one.name:{width}}  {one.best_epoch:10}  {one.val_accuracy:19.4f}  "
            f"{one.seconds:7.1f}  {one.run_id}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    script.run(main)
