"""The order in which an evaluation registers, reports and moves the alias."""

import errno
import os
import signal
from dataclasses import replace

import mlflow
import pytest

from conftest import Project, draw_folders
from defect_detection import PipelineError, settings
from defect_detection.dataset import split as splits
from defect_detection.dataset.folder import DataFolder
from defect_detection.pipeline import record
from defect_detection.pipeline.best_model import BestModel
from defect_detection.pipeline.evaluate import EvaluationPlan, evaluate_and_register
from defect_detection.pipeline.register import Rules
from defect_detection.registry import saved_model, store, versions
from defect_detection.settings import CONFIG_FILE, Config


class Line:
    """Evaluates a model and notes which version was in production when something happened."""

    def __init__(self, logged_model, folder, names, decisions):
        self.run_id, self.uri = logged_model
        self.classifier = saved_model.load_classifier(self.uri)
        data = DataFolder(draw_folders(folder / "data", train=3, test=8), Project.cache)
        self.split = splits.load(data, self.classifier.takes)
        self.names, self.rules = names, Rules(names, decisions, "tester")
        self.noted: list[tuple[str, bool]] = []

    def note(self, what: str) -> None:
        self.noted.append((what, versions.in_production(self.name) is not None))

    @property
    def name(self) -> str:
        return self.names.production_model_name

    def prepare(self, registry: str, version: int, acc: float) -> None:
        self.note("room")

    def result(self, registry: str, version: int, acc: float) -> None:
        self.note("result")

    def evaluate(self) -> versions.Version:
        model = BestModel(self.run_id, self.uri, 0.5, "digest", "now")
        with mlflow.start_run(experiment_id=store.open_experiment("eval/order")):
            plan = EvaluationPlan(self.rules, outcome=self)
            return evaluate_and_register(model, self.classifier, self.split, plan)


@pytest.fixture
def line(store, logged_model, tmp_path, monkeypatch):
    config = settings.read_yaml(CONFIG_FILE, Config)
    names = replace(
        config.mlflow,
        production_model_name=f"Production_{tmp_path.name}",
        testing_model_name=f"Testing_{tmp_path.name}",
        evaluation_threshold=0.0,
    )
    lenient = {"refuse_chance": False, "refuse_escapes": False, "refuse_overkill": False}
    made = Line(logged_model, tmp_path, names, replace(config.decisions, **lenient))
    log_page = record.page

    def noting(*page: str) -> str:
        made.note("report")
        return log_page(*page)

    monkeypatch.setattr(record, "page", noting)
    return made


def test_report_and_room_for_the_result_come_before_the_alias_and_the_result_right_after(line):
    line.evaluate()
    assert line.noted == [("report", False), ("room", False), ("result", True)]


def test_full_disk_at_the_report_leaves_the_alias_where_it_was(line, monkeypatch):
    def full(*page: str) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.html")

    monkeypatch.setattr(record, "page", full)
    with pytest.raises(OSError, match="No space left"):
        line.evaluate()
    assert versions.in_production(line.name) is None
    (version,) = versions.with_accuracy(line.name)
    assert version.why_not_released == "its evaluation did not end"


def test_no_room_for_the_result_leaves_the_alias_where_it_was(line, monkeypatch):
    def full(*registered: object) -> None:
        raise PipelineError("result.json: cannot be written (No space left on device)")

    monkeypatch.setattr(line, "prepare", full, raising=False)
    with pytest.raises(PipelineError, match="No space left"):
        line.evaluate()
    assert versions.in_production(line.name) is None


def test_signal_while_the_alias_moves_waits_for_the_result(line, monkeypatch):
    before = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(143)))
    set_alias = versions.set_alias

    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        set_alias(*arguments)

    monkeypatch.setattr(versions, "set_alias", interrupted)
    try:
        with pytest.raises(SystemExit):
            line.evaluate()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert line.noted[-1] == ("result", True)
