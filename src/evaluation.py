"""Evaluate the model of best_model.json on data/test, register it and write a report.

A test accuracy at or above evaluation_threshold of src/config.yaml registers it as Production_Reg,
where the version with the highest accuracy gets the alias prod. A lower one registers it as
Testing_Reg.
The version in production is judged on the same images.
"""

from defect_detection import cli, settings
from defect_detection.dataset import split as splits
from defect_detection.dataset.field import FieldUse
from defect_detection.dataset.folder import DataFolder
from defect_detection.pipeline import record
from defect_detection.pipeline.best_model import BestModel
from defect_detection.pipeline.evaluate import EvaluationPlan, evaluate_and_register
from defect_detection.pipeline.register import Rules
from defect_detection.registry import promotion, runs, saved_model, store


def main() -> None:
    """Read settings, model and data; then evaluate and register."""
    example = "python src/evaluation.py --data ~/images/castings"
    options = cli.parser(__doc__, example).parse_args()
    env = settings.environment()
    config = settings.read_config(options.config)
    folder = DataFolder.choose(options, env, config)
    promote = cli.command("src/promote.py", options, ["config"])
    plan = EvaluationPlan(Rules(config.names, config.decisions, promotion.actor(env), promote))

    cache = settings.from_root(config.paths.cache)
    uri = settings.tracking_uri(env)
    with store.patience(), store.connected(uri), runs.watched(cache):
        promotion.check_record(config.names.production_model_name)
        best = BestModel.read(config.best_model, cli.command("src/train.py", options))
        classifier = saved_model.load_classifier(best.model_uri)
        use = FieldUse(config.line.field_test_share, learn=False)
        split = splits.load(folder, classifier.takes, use)
        if split.training.digest != best.data_digest:
            print(f"{split.training} has changed since this model was trained on it")
        experiment = store.open_experiment(f"eval/{config.names.experiment_name}")
        tags = {"training_run_id": best.run_id, "model_uri": best.model_uri}
        said = f"The model of the run {best.run_id}, judged on {split.testing} and registered."
        with record.run(experiment, "evaluation", said, tags):
            evaluate_and_register(best, classifier, split, plan)


if __name__ == "__main__":
    cli.run(main)
