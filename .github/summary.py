"""Print the job summary of the workflow as Markdown: the sets, the test, the registry."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))


from defect_detection import registry, report, script, settings, tracking  # noqa: E402
from defect_detection.settings import Config  # noqa: E402
from defect_detection.tracking import BestModel  # noqa: E402


def main() -> None:
    """Find the runs of the last training and evaluation and print them."""
    env = settings.environment()
    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    with tracking.connected(settings.tracking_uri(env)):
        best = BestModel.read(settings.from_root(config.paths.best_model))
        sets = tracking.training_runs(best)
        curves = {
            run.data.tags["mlflow.runName"]: tracking.history(run, "val_accuracy") for run in sets
        }
        evaluation = tracking.newest_evaluation(best, f"eval/{config.mlflow.experiment_name}")
        production = registry.behind_alias(
            config.mlflow.production_model_name, registry.PRODUCTION_ALIAS
        )
    print(report.markdown(sets, best.run_id, curves, evaluation, production))


if __name__ == "__main__":
    script.run(main)
