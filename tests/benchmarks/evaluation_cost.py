"""Measure how long src/evaluation.py takes with 715 test images, and how large its report is.

    python tests/benchmarks/evaluation_cost.py

The images are drawn, as many as the public casting set has for its test. The model is fitted for
one epoch only, so the report shows as many mistakes as it ever does. The second evaluation finds a
version in production to compare with.
"""

import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "data", "tests")]

import sample  # noqa: E402
from conftest import Project  # noqa: E402
from defect_detection import settings  # noqa: E402

DRAWN = {"train": {"def_front": 60, "ok_front": 60}, "test": {"def_front": 453, "ok_front": 262}}


def main() -> None:
    """Draw, train, evaluate twice and print."""
    with tempfile.TemporaryDirectory() as folder:
        Project.cache = Path(folder) / "cache"
        project = Project(Path(folder) / "project")
        parameters = yaml.safe_load(settings.CONFIG_FILE.read_text())["model_parameters"]
        parameters |= {"variants": 200, "sets": [parameters["sets"][0] | {"epochs": 1}]}
        project.configure(lambda config: config["model_parameters"].update(parameters))
        project.configure(lambda config: config["mlflow"].update(evaluation_threshold=0.0))
        sample.draw_all(project.data, 0, DRAWN)
        project.succeed("src/train.py")
        for what in ("alone", "with a version to compare with"):
            started = time.perf_counter()
            printed = project.succeed("src/evaluation.py")
            print(f"evaluation of 715 images, {what}: {time.perf_counter() - started:.1f} s")
        page = Path(printed.split("Report: file://")[1].splitlines()[0])
        print(f"report: {page.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
