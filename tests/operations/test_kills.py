"""Every script is killed at any moment; the next one puts right what it left behind, and it works.

FAULTS=50 python -m pytest tests/operations/test_kills.py -s prints how often each was killed.
"""

import json
import random
import subprocess
import time
from pathlib import Path

import mlflow
import pytest

from conftest import Project, long
from defect_detection.operations import backup
from defect_detection.pipeline.best_model import BestModel
from defect_detection.registry import saved_model, store
from plant import FAULTS, require_no_remains, require_registered

CALLS: dict[str, list[str]] = {
    "audit": ["src/audit.py", "--groups", "groups.csv", "--json", "found.json"],
    "train": ["src/train.py"],
    "evaluation": ["src/evaluation.py"],
    "re_train": ["re_train/re_train.py", "--epochs", "2"],
    "inference": ["src/inference.py", "data", "--jsonl", "rows.jsonl", "--resume"],
    "promote": ["src/promote.py", "--version", "2"],
    "backup": ["src/backup.py", "--to", "backups"],
}


class Killed:
    """A project whose scripts are killed, with a cache of its own."""

    def __init__(self, project: Project, cache: Path):
        self.project, self.cache = project, cache
        project.configure(lambda config: config["paths"].update(cache=str(cache)))
        project.configure_retraining(image_size=[64, 64], batch_size=16)
        for image in project.data.glob("train/*/part_0[2-9]*"):  # twenty of a class are enough
            image.unlink()
        self._known: set[str] = set()

    def require_whole(self) -> None:
        """Nothing is running or half, and what there is can be used."""
        require_no_remains(self.cache)
        with store.connected(f"sqlite:///{self.project.root}/mlflow.db"):
            for run in mlflow.search_runs(search_all_experiments=True, output_format="list"):
                assert run.info.status in ("FINISHED", "FAILED", "KILLED")
            client = mlflow.MlflowClient()
            experiments = [one.experiment_id for one in client.search_experiments()]
            for model in client.search_logged_models(experiments):
                if model.model_id not in self._known and model.status == "READY":
                    saved_model.load_classifier(model.model_uri)
                    self._known.add(model.model_id)
            require_registered("Production_Reg")
        if (self.project.root / "best_model.json").exists():
            BestModel.read(self.project.root / "best_model.json", "train.py")
        for made in (self.project.root / "backups").glob("2*"):
            backup.read(made)

    def written(self) -> dict[str, object]:
        """Return what audit and inference have written, whatever the order of the rows."""
        root = self.project.root
        found: dict[str, object] = {}
        if (root / "found.json").exists():
            found["groups"] = (root / "groups.csv").read_text()
            found["found"] = json.loads((root / "found.json").read_text())
        if (root / "rows.jsonl").exists():
            found["rows"] = sorted((root / "rows.jsonl").read_text().splitlines())
        return found

    def forget(self) -> None:
        """Delete what would spare a script its work."""
        for file in self.cache.glob("*.sqlite*"):
            file.unlink()
        for name in ("groups.csv", "found.json", "rows.jsonl"):
            (self.project.root / name).unlink(missing_ok=True)


# test_faults.py kills a training and an evaluation without a fit.
SLOWEST = {"train", "evaluation", "re_train", "audit"}


@pytest.mark.parametrize(
    "script",
    [long(one) if one in SLOWEST else one for one in CALLS],
)
def test_a_script_is_killed_at_any_moment(trained: Project, tmp_path: Path, script: str):
    call, chance = CALLS[script], random.Random(7)
    plant = Killed(trained, tmp_path / "cache")
    database = trained.root / "mlflow.db"
    before = database.read_bytes()
    started = time.monotonic()
    trained.succeed(*call)
    longest = time.monotonic() - started
    expected, times = plant.written(), 0
    plant.forget()
    for _ in range(FAULTS):
        if script == "promote":  # which else has nothing to do
            database.write_bytes(before)
        try:
            trained.run(*call, within=chance.uniform(0, 1.1 * longest))
            plant.forget()  # else the next call goes on where this one was killed
        except subprocess.TimeoutExpired:
            times += 1
        trained.succeed("src/train.py", "--sync")
        plant.require_whole()
    if script == "promote":
        database.write_bytes(before)
    trained.succeed(*call)
    plant.require_whole()
    assert plant.written() == expected
    print(f"\n{script} killed {times} times of {FAULTS}, nothing lost, nothing half")
