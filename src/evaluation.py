"""Evaluate the model of best_model.json on data/test and register it.

A test accuracy at or above the threshold of src/config.yaml registers it as Production_Reg, whose
version with the highest accuracy gets the alias prod; one below, as Testing_Reg.
"""

from pathlib import Path

import mlflow

from defect_detection import dataset, metrics, registry, report, script, settings, tracking
from defect_detection.classifier import Classifier
from defect_detection.dataset import Dataset
from defect_detection.metrics import Scores
from defect_detection.settings import Config, MLflowNames
from defect_detection.tracking import BestModel


def main() -> None:
    """Settings, model, data; then score, log, register and say what happened."""
    example = "python src/evaluation.py --data ~/pictures/castings"
    options = script.parser(__doc__, example).parse_args()
    env = settings.environment()
    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    folder = script.data_folder(options.data, env, config.paths.data_path)

    with tracking.connected(settings.tracking_uri(env)):
        best = BestModel.read(settings.from_root(config.paths.best_model))
        with tracking.fetched(best.model_uri) as files:
            classifier = Classifier.load(files)
        cache = settings.from_root(config.paths.cache)
        data = dataset.load(folder, "test", classifier.image_size, cache)
        scores = metrics.score(
            data.labels, classifier.probabilities(data.images), classifier.threshold
        )
        experiment = tracking.open_experiment(f"eval/{config.mlflow.experiment_name}")
        print(summary(folder, scores))
        with mlflow.start_run(experiment_id=experiment, run_name="evaluation"):
            log(best, data, folder, scores)
            version = register(best, scores, len(data), config.mlflow)
            mlflow.set_tag("registered_version", version.uri)
            print(decide_aliases(version, config.mlflow))


def log(best: BestModel, data: Dataset, folder: Path, scores: Scores) -> None:
    """Log the evaluation in the active run and link it with the training."""
    mlflow.set_tags({"training_run_id": best.run_id, "model_uri": best.model_uri})
    tracking.log_dataset(data, folder, "testing")
    mlflow.log_metrics(scores.as_dict())
    counts = ("defects_found", "defects_missed", "ok_rejected", "ok_passed")
    mlflow.log_dict({name: getattr(scores, name) for name in counts}, "confusion_matrix.json")
    title = f"Test accuracy {scores.accuracy:.2%}"
    mlflow.log_figure(report.confusion_matrix(title, scores), "confusion_matrix.png")


def register(
    best: BestModel, scores: Scores, pictures: int, names: MLflowNames
) -> registry.Version:
    """Register the model under the name that its test accuracy earns."""
    description = (
        f"Test accuracy {scores.accuracy:.4f} on {pictures} pictures: "
        f"{scores.defects_missed} defects let through, {scores.ok_rejected} good parts rejected. "
        f"Validation accuracy {best.val_accuracy:.4f}."
    )
    name = registry.gate(scores.accuracy, names)
    return registry.register(best.model_uri, best.run_id, scores.accuracy, description, name)


def decide_aliases(version: registry.Version, names: MLflowNames) -> str:
    """Move the alias of the registered model, and say where it points."""
    if version.name == names.testing_model_name:
        queued = registry.queue_for_retraining(names)
        return (
            f"Registered as {version.name} version {version.number}, below the threshold of "
            f"{names.evaluation_threshold:.0%}; {names.testing_model_alias} is version "
            f"{queued.number}"
        )
    first = registry.promote(names)
    return (
        f"Registered as {version.name} version {version.number}; {names.production_model_alias} "
        f"is version {first.number} with a test accuracy of {first.acc:.4f}"
    )


def summary(folder: Path, scores: Scores) -> str:
    """Say what the test showed."""
    return "\n".join(
        [
            f"{folder / 'test'}: accuracy {scores.accuracy:.4f}, ROC AUC {scores.roc_auc:.4f}",
            "               verdict defect  verdict ok",
            f"  def_front  {scores.defects_found:16}  {scores.defects_missed:10}",
            f"  ok_front   {scores.ok_rejected:16}  {scores.ok_passed:10}",
        ]
    )


if __name__ == "__main__":
    script.run(main)
