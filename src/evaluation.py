"""Evaluate the model of best_model.json on data/test, register it and write a report.

A test accuracy at or above the threshold of src/config.yaml registers it as Production_Reg, whose
version with the highest accuracy gets the alias prod; one below, as Testing_Reg. The version that
is behind prod is judged on the same pictures.
"""

import mlflow

from defect_detection import audit, promotion, registry, script, settings, steps, tracking
from defect_detection.settings import Config
from defect_detection.tracking import BestModel


def main() -> None:
    """Settings, model, data; then score, register and say what happened."""
    example = "python src/evaluation.py --data ~/pictures/castings"
    options = script.parser(__doc__, example).parse_args()
    env = settings.environment()
    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    folder = script.data_folder(options.data, env, config.paths.data_path)

    with tracking.connected(settings.tracking_uri(env)):
        best = BestModel.read(settings.from_root(config.paths.best_model))
        classifier = registry.load_classifier(best.model_uri)
        cache = settings.from_root(config.paths.cache)
        split = audit.load(folder, classifier.image_size, cache)
        if split.training.digest != best.data_digest:
            print(f"{folder / 'train'} has changed since this model was trained on it")
        experiment = tracking.open_experiment(f"eval/{config.mlflow.experiment_name}")
        tags = {"training_run_id": best.run_id, "model_uri": best.model_uri}
        with mlflow.start_run(experiment_id=experiment, run_name="evaluation", tags=tags):
            steps.evaluate_and_register(
                classifier,
                best,
                split,
                folder,
                cache,
                config.mlflow,
                config.decisions,
                promotion.whoever(env),
            )


if __name__ == "__main__":
    script.run(main)
