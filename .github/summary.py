"""Print the job summary of the workflow as Markdown: the sets, the test, the registry."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from defect_detection import cli, settings  # noqa: E402
from defect_detection.pipeline.best_model import BestModel  # noqa: E402
from defect_detection.pipeline.summary import Summary  # noqa: E402
from defect_detection.registry import store  # noqa: E402


def main() -> None:
    """Collect the last training and evaluation, and print them."""
    config = settings.read_config()
    names = config.names
    with store.connected(settings.tracking_uri(settings.environment())):
        best = BestModel.read(config.best_model, "python src/train.py")
        experiment = f"eval/{names.experiment_name}"
        print(Summary.collect(best, experiment, names.production_model_name).markdown())


if __name__ == "__main__":
    cli.run(main)
