"""Train the CNN with each hyper-parameter set of src/config.yaml and keep the best.

Each set is an MLflow run. Which model had the highest accuracy on the pictures held back from
data/train is written to best_model.json, from where src/evaluation.py takes it.
"""

import sys
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import mlflow

from defect_detection import dataset, script, settings, steps, tracking
from defect_detection.dataset import Dataset
from defect_detection.files import require_writable
from defect_detection.settings import Config, ModelParameters
from defect_detection.steps import Fitted


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
        cache = settings.from_root(config.paths.cache)
        data = dataset.load(folder, "train", config.model_parameters.image_size, cache)
        print(f"{folder / 'train'}: {data.counts}", flush=True)
        fitted = fit_sets(config.model_parameters, data, folder, experiment)
        best = max(fitted, key=lambda one: (one.val_accuracy, -one.val_loss))
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        kept = tracking.BestModel(best.run_id, best.model_uri, best.val_accuracy, data.digest, now)
        kept.write(best_file)
    print(table(fitted, best))
    print(f"Best: {best.name}, written to {best_file}. Next: python src/evaluation.py")


def fit_sets(
    parameters: ModelParameters, data: Dataset, folder: Path, experiment: str
) -> list[Fitted]:
    """Fit and log each set in a run of its own, all on the same split."""
    from defect_detection import model  # TensorFlow: 4 s that an earlier error need not wait for

    rows = dataset.split_validation(data.labels, parameters.validation_share, parameters.seed)
    fitted, training = [], {tracking.TRAINING_TAG: datetime.now(timezone.utc).isoformat()}
    for number, hyper in enumerate(parameters.sets, start=1):
        print(f"\nSet {number} of {len(parameters.sets)}: {hyper.name}", flush=True)
        with mlflow.start_run(experiment_id=experiment, run_name=hyper.name, tags=training):
            tracking.log_dataset(data, folder, "training")
            mlflow.log_params({"set": hyper.name} | hyper.layers())
            one = steps.fit(
                hyper.name,
                partial(model.build, parameters.image_size, hyper),
                data,
                rows,
                parameters.schedule(hyper),
                verbose=1 if sys.stdout.isatty() else 2,
            )
            fitted.append(one)
    return fitted


def table(fitted: list[Fitted], best: Fitted) -> str:
    """Lay the sets out as a table, the best marked."""
    width = max(8, *(len(one.name) for one in fitted))
    lines = [f"\n  {'set':{width}}  best epoch  validation accuracy  seconds  run id"]
    for one in fitted:
        mark = "*" if one is best else " "
        lines.append(
            f"{mark} {one.name:{width}}  {one.best_epoch:10}  {one.val_accuracy:19.4f}  "
            f"{one.seconds:7.1f}  {one.run_id}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    script.run(main)
