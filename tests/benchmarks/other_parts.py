"""How the pipeline does on parts that are no castings, drawn by the tests: 100 images a class.

    python tests/benchmarks/other_parts.py [--only KIND]

Each kind is drawn, trained on and evaluated by the scripts, with src/config.yaml as it is, in a
copy of the project. Prints a table and writes docs/benchmark.json.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import kinds  # noqa: E402
from defect_detection.registry import store, versions  # noqa: E402

RESULTS = ROOT / "docs" / "benchmark.json"
ENVIRONMENT = dict(os.environ)  # as it is before MLflow writes its store into it
COUNTS = {"train": 100, "test": 100}
DEFECTS = {
    "cell": "an area that stays darker",
    "panel": "a screw is missing; wide images",
    "cap": "a wrong colour; coloured images",
    "tile": "a thin crack across",
    "bracket": "a bent or short leg",
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=DEFECTS)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text())
    for kind in [options.only] if options.only else DEFECTS:
        with tempfile.TemporaryDirectory() as name:
            results.setdefault("kinds", {})[kind] = measure(kind, Path(name))
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results["kinds"]))


def measure(kind: str, folder: Path) -> dict:
    """Draw, train and evaluate; return the figures."""
    data = kinds.draw_folders(folder / "data", kind, COUNTS)
    project = folder / "project"
    for part in ("src", "re_train"):
        shutil.copytree(ROOT / part, project / part)
    shutil.copy(ROOT / ".env", project)
    for script in ("src/train.py", "src/evaluation.py"):
        command = [sys.executable, str(project / script), "--data", str(data)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
        if "train" in script:
            chosen = re.search(r"Best: (\w+)", done.stdout)[1]
    with store.connected(f"sqlite:///{project}/mlflow.db"):
        import mlflow

        (run,) = mlflow.search_runs(experiment_names=["eval/casting"], output_format="list")
        registered = versions.with_accuracy("Production_Reg")
    figures = run.data.metrics
    names = ("balanced_accuracy", "roc_auc", "escapes_share", "overkill_share")
    found = {name: figures[name] for name in names} | {"set": chosen}
    return found | {"released": bool(registered and registered[-1].released)}


def table(found: dict[str, dict]) -> str:
    """Make the table of the documentation."""
    lines = [
        "| part | the defect | set | balanced accuracy | ROC AUC |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {kind} | {DEFECTS[kind]} | `{one['set']}` | {one['balanced_accuracy']:.3f} | "
        f"{one['roc_auc']:.3f} |"
        for kind, one in found.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
