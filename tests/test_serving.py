"""The version behind prod, kept on this machine."""

import json
import shutil
import time

import mlflow
import pytest

from conftest import ROOT, wait_for
from defect_detection import PipelineError, registry, serving
from defect_detection.serving import Production


class Line:
    """A machine that follows prod of a registered model of its own."""

    def __init__(self, store, logged_model, project, monkeypatch):
        self.store, self.project = store, project
        self.run_id, self.uri = logged_model
        self.name = f"Serving_{project.root.parent.name}"
        self.cache = project.root / "kept"
        self.asking: list[Production] = []
        project.configure(lambda c: c["mlflow"].update(production_model_name=self.name))
        project.configure(lambda c: c["paths"].update(cache=str(self.cache)))
        self.reach(store)
        # The child process runs the copy of the project, with its configuration.
        monkeypatch.setattr(serving, "__file__", str(project.root / "src/defect_detection/x.py"))
        monkeypatch.setattr(serving, "__name__", "defect_detection.serving")

    def reach(self, uri: str) -> None:
        (self.project.root / ".env").write_text(f"MLFLOW_TRACKING_URI={uri}\n")

    def register(self) -> registry.Version:
        version = registry.register(self.uri, self.run_id, 0.9, "", self.name, {})
        registry.set_alias(version, registry.PRODUCTION_ALIAS)
        return version

    def production(self) -> Production:
        self.asking.append(Production(self.store, self.name, self.cache))
        return self.asking[-1]


@pytest.fixture
def line(store, logged_model, project, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = Line(store, logged_model, project, monkeypatch)
    yield made
    for production in made.asking:
        production.close()


def lose(line) -> None:
    """Take the store away, as a server that is down; it stays known by its name."""
    line.reach("http://127.0.0.1:9")


def test_version_is_fetched_once_and_then_taken_from_the_cache(line):
    line.register()
    first = line.production().current()
    assert (first.name, first.number, first.acc) == (line.name, 1, 0.9)
    marked = f"{first.folder}/marked"
    open(marked, "w").close()
    again = line.production().current()
    assert again.folder == first.folder
    open(marked).close()  # still there: not fetched again


def test_alias_that_moves_is_followed_also_back(line, monkeypatch):
    monkeypatch.setattr(serving, "ASK_EVERY", 0)
    first = line.register()
    production = line.production()
    assert production.current().number == 1
    line.register()
    wait_for(production.moved)
    assert production.current().number == 2
    registry.set_alias(first, registry.PRODUCTION_ALIAS)
    wait_for(production.moved)
    assert production.current().number == 1


def test_without_the_server_the_last_version_goes_on_and_that_is_said(line, caplog, monkeypatch):
    line.register()
    kept = line.production().current()
    with monkeypatch.context() as patch:
        # The child asks a server that is down under the name of the store that was asked before.
        patch.setattr(serving, "_last", lambda *_: serving_last(line))
        lose(line)
        production = line.production()
        assert production.current() == kept
        assert "The tracking server http://127.0.0.1:9 does not answer" in caplog.text
        assert f"Taking {line.name} version 1, behind prod on {kept.asked_at}" in caplog.text
        shutil.rmtree(kept.folder)
        with pytest.raises(PipelineError, match="does not answer"):
            line.production().current()


def serving_last(line):
    (found,) = (line.cache / "models").glob("prod-*.json")
    return found


def test_alias_that_was_taken_away_is_no_reason_to_serve_what_it_named(line):
    line.register()
    line.production().current()
    mlflow.MlflowClient().delete_registered_model_alias(line.name, registry.PRODUCTION_ALIAS)
    with pytest.raises(PipelineError, match="has the alias prod"):
        line.production().current()


def test_watch_goes_on_when_the_registry_is_lost_and_says_so_once(line, caplog, monkeypatch):
    monkeypatch.setattr(serving, "ASK_EVERY", 0)
    line.register()
    production = line.production()
    production.current()
    mlflow.MlflowClient().delete_registered_model_alias(line.name, registry.PRODUCTION_ALIAS)
    ended = time.monotonic() + 6
    while time.monotonic() < ended:
        assert not production.moved()
        time.sleep(0.05)
    assert caplog.text.count("Going on with") == 1
    assert production.current().number == 1


def test_registry_that_says_nonsense_is_one_line(line, monkeypatch):
    (line.project.root / "src/defect_detection/serving.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(PipelineError, match="cannot be asked"):
        line.production().current()


def test_old_versions_are_deleted(line):
    models = line.cache / "models"
    for number in range(6):
        (models / f"old-{number}").mkdir(parents=True)
    line.register()
    served = line.production().current()
    folders = [path for path in models.iterdir() if path.is_dir()]
    assert len(folders) == serving.VERSIONS_KEPT
    assert served.folder in map(str, folders)


def test_answer_is_kept_as_it_was_given(line):
    line.register()
    served = line.production().current()
    assert json.loads(serving_last(line).read_text())["folder"] == served.folder
    assert ROOT not in serving_last(line).parents
