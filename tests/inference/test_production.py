"""The version in production, kept on this machine."""

import json
import os
import re
import shutil
from pathlib import Path

import mlflow
import pytest

from conftest import wait_for
from defect_detection import PipelineError
from defect_detection.inference import fetch
from defect_detection.inference import production as following
from defect_detection.inference.judge import NamedModel
from defect_detection.inference.production import LocalVersion, Production, Source
from defect_detection.registry import saved_model, versions
from defect_detection.registry import store as stores
from defect_detection.runtime import checksums
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.model_files import ServedModel


class Line:
    """A machine that follows prod of a registered model of its own."""

    def __init__(self, store, logged_model, tmp_path):
        self.store, self.cache = store, tmp_path / "kept"
        self.run_id, self.uri = logged_model
        self.name = f"Followed_{tmp_path.name}"
        self.asking: list[Production] = []

    def register(self) -> versions.Version:
        version = versions.register(self.uri, self.run_id, 0.9, "", self.name, {})
        versions.set_alias(version, versions.PRODUCTION_ALIAS)
        return version

    def register_own(self) -> versions.Version:
        """Register a model of its own, whose files a test may damage."""
        with mlflow.start_run(experiment_id=stores.open_experiment("train/own")) as run:
            logged = saved_model.load_keras(self.uri)
            with saved_model.fetched(self.uri) as files:
                uri = saved_model.log(logged, ServedModel.load(files), b"")
        tags = {saved_model.CHECKSUM: saved_model.checksum(uri)}
        version = versions.register(uri, run.info.run_id, 0.9, "", self.name, tags)
        versions.set_alias(version, versions.PRODUCTION_ALIAS)
        return version

    def production(self, store: str | None = None) -> Production:
        self.asking.append(Production(store or self.store, self.name, self.cache))
        return self.asking[-1]

    def last_file(self, store: str):
        return Source(store, self.name, str(self.cache)).last_file


@pytest.fixture
def line(store, logged_model, tmp_path):
    made = Line(store, logged_model, tmp_path)
    yield made
    for one in made.asking:
        one.close()


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
    monkeypatch.setattr(following, "ASK_EVERY", 0)
    first = line.register()
    production = line.production()
    assert production.current().number == 1
    line.register()
    wait_for(production.moved)
    assert production.current().number == 2
    versions.set_alias(first, versions.PRODUCTION_ALIAS)
    wait_for(production.moved)
    assert production.current().number == 1


@pytest.mark.long
def test_without_the_server_the_last_version_goes_on_and_that_is_said(line, caplog):
    line.register()
    kept = line.production().current()
    gone = "http://127.0.0.1:9"
    shutil.copy(line.last_file(line.store), line.last_file(gone))
    assert line.production(gone).current() == kept
    assert f"The tracking server {gone} does not answer" in caplog.text
    assert f"Using {line.name} version 1, in production on {kept.asked_at}" in caplog.text
    shutil.rmtree(kept.folder)
    with pytest.raises(PipelineError, match="does not answer"):
        line.production(gone).current()


def test_neither_env_nor_yaml_is_read_by_whoever_asks(line, monkeypatch):
    """The store, the name and the cache are those that were given."""
    line.register()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert line.production().current().number == 1
    assert not (line.cache.parent / "mlflow.db").exists()


def test_store_does_not_stand_on_the_command_line_that_anyone_can_read(line):
    """A URI may hold a password."""
    asking = line.production("http://user:secret@127.0.0.1:9")
    assert "secret" not in " ".join(map(str, asking._child.args))


def test_alias_that_was_taken_away_is_no_reason_to_serve_what_it_named(line):
    line.register()
    line.production().current()
    mlflow.MlflowClient().delete_registered_model_alias(line.name, versions.PRODUCTION_ALIAS)
    with pytest.raises(PipelineError, match="has the alias prod. Train one with src/train.py"):
        line.production().current()


def test_a_version_that_waits_for_retraining_is_named_with_its_reason_and_report(line):
    run = mlflow.get_run(line.run_id)
    tags = {
        "released": "false",
        "not_released": "a test accuracy of 0.51",
        "evaluation_run": line.run_id,
    }
    versions.register(line.uri, line.run_id, 0.51, "", f"{line.name}_testing", tags)
    asking = Production(line.store, line.name, line.cache, f"{line.name}_testing")
    line.asking.append(asking)
    expected = (
        f"{line.name}_testing version 1: a test accuracy of 0.51. What to try is in its report, "
        f"{run.info.artifact_uri}/report.html"
    )
    with pytest.raises(PipelineError, match=re.escape(expected)):
        asking.current()


def count_answers(monkeypatch) -> list[dict]:
    """Return a list that the registry's answers are put into as they come."""
    answers, read = [], Production._read_answer

    def note(production):
        answers.append(read(production))
        return answers[-1]

    monkeypatch.setattr(Production, "_read_answer", note)
    return answers


def test_watch_goes_on_when_the_registry_is_lost_and_says_so_once(line, caplog, monkeypatch):
    monkeypatch.setattr(following, "ASK_EVERY", 0)
    line.register()
    production = line.production()
    production.current()
    mlflow.MlflowClient().delete_registered_model_alias(line.name, versions.PRODUCTION_ALIAS)
    answers = count_answers(monkeypatch)
    wait_for(lambda: production.moved() or len(answers) == 3)
    assert caplog.text.count("Continuing with") == 1
    assert production.current().number == 1


def files_of(line, number: int):
    """The folder in the store that holds the files of a version, to be damaged."""
    source = versions.with_accuracy(line.name)[number - 1].source
    location = mlflow.get_logged_model(source.removeprefix("models:/")).artifact_location
    return Path(location.removeprefix("file://"))


@pytest.mark.long
def test_version_without_its_files_for_a_moment_is_fetched_when_they_are_back(line, caplog):
    """Neither an empty nor a cut download is kept."""
    line.register_own()
    files = files_of(line, 1)
    kept = shutil.copytree(files, files.with_name("kept"))
    for damage in (
        lambda: shutil.rmtree(files),
        lambda: (shutil.rmtree(files), files.mkdir()),
        lambda: (files / "model.tflite").write_bytes(b""),
        lambda: (files / "conda.yaml").unlink(),
        lambda: os.truncate(files / "scope.npz", 1000),
    ):
        damage()
        with pytest.raises(PipelineError, match=f"models:/{line.name}/1: its files"):
            line.production().current()
        shutil.copytree(kept, files, dirs_exist_ok=True)
    assert Classifier.load(Path(line.production().current().folder))


@pytest.mark.long
def test_watch_goes_on_with_the_last_good_version_when_prod_moves_to_a_broken_one(
    line, caplog, monkeypatch
):
    monkeypatch.setattr(following, "ASK_EVERY", 0)
    line.register_own()
    production = line.production()
    model = NamedModel.in_production(production)
    line.register_own()
    whole = (files_of(line, 2) / "model.tflite").read_bytes()
    (files_of(line, 2) / "model.tflite").write_bytes(bytes(len(whole)))
    wait_for(lambda: production.moved() or "Using" in caplog.text)
    assert production.current().number == 1
    assert f"models:/{line.name}/2: its files in the store are damaged" in caplog.text
    # A machine that starts now does likewise.
    assert line.production().current().number == 1
    (files_of(line, 2) / "model.tflite").write_bytes(whole)
    wait_for(production.moved)
    assert model.followed(production).name == f"{line.name}/2"


@pytest.mark.long
def test_watch_keeps_its_model_when_the_files_here_are_damaged(line, caplog, monkeypatch):
    monkeypatch.setattr(following, "ASK_EVERY", 0)
    line.register_own()
    production = line.production()
    model = NamedModel.in_production(production)
    line.register_own()
    wait_for(production.moved)
    (Path(production.current().folder) / "model.tflite").write_bytes(b"")
    assert model.followed(production) is model
    assert "Continuing with" in caplog.text and "model.tflite is not the file" in caplog.text
    # They are fetched again when it asks next.
    wait_for(production.moved)
    assert model.followed(production).name == f"{line.name}/2"


@pytest.mark.long
def test_files_here_of_another_version_are_not_taken_for_it(line):
    line.register_own()
    kept = Path(line.production().current().folder)
    line.register_own()
    other = Path(line.production().current().folder)
    shutil.rmtree(other)
    shutil.copytree(kept, other)
    found = line.production().current()
    assert NamedModel.in_production(line.production())
    assert checksums.read(other, found.checksum) and found.number == 2


def test_alias_that_was_moved_outside_is_said_once(line, caplog, monkeypatch):
    monkeypatch.setattr(following, "ASK_EVERY", 0)
    answers = count_answers(monkeypatch)
    line.register()
    production = line.production()
    production.current()
    wait_for(lambda: production.moved() or len(answers) == 3)
    said = f"prod of {line.name} is version 1, but the record gave it to no version"
    assert caplog.text.count(said) == 1


def test_registry_that_says_nonsense_is_one_line(line, monkeypatch):
    monkeypatch.setattr(following, "FETCH", "this")  # prints a poem
    with pytest.raises(PipelineError, match="cannot be asked"):
        line.production().current()


def test_old_versions_are_deleted(line):
    models = line.cache / "models"
    for number in range(6):
        (models / f"old-{number}").mkdir(parents=True)
    line.register()
    served = line.production().current()
    folders = [path for path in models.iterdir() if path.is_dir()]
    assert len(folders) == fetch.VERSIONS_KEPT
    assert served.folder in map(str, folders)


def test_answer_is_kept_as_it_was_given(line):
    line.register()
    current = line.production().current()
    assert LocalVersion(**json.loads(line.last_file(line.store).read_text())) == current
