"""Train the CNN with each hyper-parameter set of src/config.yaml and keep the best.

Each set is an MLflow run. Which model had the highest accuracy on the photographs held back from
data/train is written to best_model.json, from where src/evaluation.py takes it.

With --folds no model is kept: each set is cross-validated on data/train, by photograph.
"""

from argparse import ArgumentTypeError
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow

from defect_detection import audit, script, settings, steps, tracking
from defect_detection.audit import Split
from defect_detection.files import require_writable
from defect_detection.settings import Config, HyperParameters, ModelParameters
from defect_detection.steps import CrossValidated, Fitted

if TYPE_CHECKING:
    import keras


def main() -> None:
    """Settings, data, then for each set: fit and log; keep the best; say what happened."""
    parser = script.parser(__doc__, "python src/train.py --data ~/pictures/castings")
    parser.add_argument("--folds", type=_folds, metavar="N", help="cross-validate instead")
    options = parser.parse_args()
    env = settings.environment()
    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    folder = script.data_folder(options.data, env, config.paths.data_path)
    device = settings.device(env)
    best_file = settings.from_root(config.paths.best_model)
    require_writable(best_file.parent)

    with tracking.connected(settings.tracking_uri(env)):
        experiment = tracking.open_experiment(f"train/{config.mlflow.experiment_name}")
        cache = settings.from_root(config.paths.cache)
        split = audit.load(folder, config.model_parameters.image_size, cache)
        print(f"{folder / 'train'}: {split.training.counts}\n{split.leakage}", flush=True)
        if options.folds:
            validated = validate_sets(config, options.folds, split, folder, experiment, device)
            print(folds_table(validated, options.folds))
            return
        fitted = fit_sets(config, split, folder, experiment, device)
        best = max(fitted, key=lambda one: (one.val_accuracy, -one.val_loss))
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        kept = tracking.BestModel(
            best.run_id, best.model_uri, best.val_accuracy, split.training.digest, now
        )
        kept.write(best_file)
    print(table(fitted, best))
    print(f"Best: {best.name}, written to {best_file}. Next: python src/evaluation.py")


def fit_sets(
    config: Config, split: Split, folder: Path, experiment: str, device: str
) -> list[Fitted]:
    """Fit and log each set in a run of its own, all on the same pictures."""
    parameters = config.model_parameters
    fitted, training = [], {tracking.TRAINING_TAG: datetime.now(timezone.utc).isoformat()}
    for number, hyper in enumerate(parameters.sets, start=1):
        print(f"\nSet {number} of {len(parameters.sets)}: {hyper.name}", flush=True)
        with mlflow.start_run(experiment_id=experiment, run_name=hyper.name, tags=training):
            tracking.log_dataset(split.training, folder, "training")
            steps.log_leakage(split)
            mlflow.log_params({"set": hyper.name} | hyper.layers())
            one = steps.fit(
                hyper.name,
                partial(build, parameters, hyper),
                split,
                folder,
                parameters.sampling(settings.from_root(config.paths.cache)),
                parameters.schedule(hyper),
                config.decisions,
                parameters.quantize,
                device,
            )
            fitted.append(one)
    return fitted


def validate_sets(
    config: Config,
    folds: int,
    split: Split,
    folder: Path,
    experiment: str,
    device: str,
) -> list[CrossValidated]:
    """Cross-validate and log each set in a run of its own, all on the same folds."""
    parameters, validated = config.model_parameters, []
    for number, hyper in enumerate(parameters.sets, start=1):
        print(f"\nSet {number} of {len(parameters.sets)}: {hyper.name}", flush=True)
        name = f"{hyper.name} {folds} folds"
        with mlflow.start_run(experiment_id=experiment, run_name=name):
            tracking.log_dataset(split.training, folder, "training")
            mlflow.log_params({"set": hyper.name, "folds": folds} | hyper.layers())
            one = steps.cross_validate(
                hyper.name,
                partial(build, parameters, hyper),
                split,
                folds,
                parameters.sampling(settings.from_root(config.paths.cache)),
                parameters.schedule(hyper),
                device,
            )
            validated.append(one)
    return validated


def build(parameters: ModelParameters, hyper: HyperParameters) -> "keras.Model":
    """Build the CNN of a set."""
    from defect_detection import model  # TensorFlow: 4 s that an earlier error need not wait for

    return model.build(parameters.image_size, hyper)


def folds_table(validated: list[CrossValidated], folds: int) -> str:
    """Lay a cross-validation out: mean and range over the folds."""
    names = steps.CROSS_VALIDATED
    width = max(8, *(len(one.name) for one in validated))
    lines = [
        f"\n{folds} folds, each judged by a model that saw none of its photographs: "
        "mean (lowest to highest)",
        f"  {'set':{width}}  {'of':11}" + "".join(f"  {name:22}" for name in names.values()),
    ]
    for one in validated:
        for of, scores in (("pictures", one.pictures), ("photographs", one.photographs)):
            cells = ""
            for name in names:
                mean, low, high = steps.over_folds(scores, name)
                cells += f"  {f'{mean:.3f} ({low:.3f} to {high:.3f})':22}"
            lines.append(f"  {one.name:{width}}  {of:11}{cells}")
    return "\n".join(line.rstrip() for line in lines)


def _folds(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise ArgumentTypeError(f"{text} is not a number of folds, 2 or more")
    return int(text)


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
