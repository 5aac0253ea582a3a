"""Trainings during which MLflow does not answer: nothing that was fitted is lost."""

import errno
import json
import shutil
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import mlflow
import pytest
from mlflow import MlflowClient

from conftest import SETS, Project, TrackingServer, draw_folders
from defect_detection import PipelineError, StoreError, locks
from defect_detection.pipeline import delivery, journal, record
from defect_detection.pipeline.delivery import Purpose
from defect_detection.pipeline.journal import RunInfo
from defect_detection.pipeline.record import Trained
from defect_detection.registry import store as stores
from plant import kept_training


@pytest.fixture
def training(project):
    """A project that fits two sets in seconds."""
    draw_folders(project.data, train=40, test=8)
    project.configure_sets(*SETS[:2])
    project.make_store()
    return project


def runs(uri: str) -> list:
    with stores.connected(uri):
        experiment = mlflow.get_experiment_by_name("train/casting")
        return MlflowClient().search_runs([experiment.experiment_id])


def undelivered(project: Project) -> list[Path]:
    return list((project.cache / "undelivered").glob("*/*/run.json"))


def require_whole(project: Project, uri: str) -> None:
    """Both sets are in MLflow with everything, the best is in best_model.json, nothing is left."""
    best = json.loads((project.root / "best_model.json").read_text())
    found = runs(uri)
    assert [run.info.status for run in found] == ["FINISHED"] * 2
    assert best["run_id"] in [run.info.run_id for run in found]
    highest = max(run.data.metrics["val_accuracy"] for run in found)
    assert best["val_accuracy"] == highest
    with stores.connected(uri):
        for run in found:
            client = MlflowClient()
            assert {"training_digest", "epochs", "fits"} <= set(run.data.params)
            history = client.get_metric_history(run.info.run_id, "loss")
            assert [one.step for one in history] == list(range(1, 8))
            artifacts = {one.path for one in client.list_artifacts(run.info.run_id)}
            assert {"learning_curves.png", "label_errors.csv"} <= artifacts
            assert len(run.inputs.dataset_inputs) == 1 and len(run.outputs.model_outputs) == 1
            assert "leakage" in run.data.tags and run.data.tags["mlflow.note.content"]
    assert not undelivered(project)
    assert "accuracy" in project.succeed("src/evaluation.py", MLFLOW_TRACKING_URI=uri)


class Training:
    """`src/train.py` as a process of which each line can be waited for."""

    def __init__(self, project: Project, uri: str, script: str = "src/train.py"):
        self.process = subprocess.Popen(
            [sys.executable, "-u", project.root / script],
            env=project.environment()
            | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""

    def read_until(self, words: str) -> None:
        for line in self.process.stdout:
            self.said += line
            if words in line:
                return
        raise AssertionError(self.said)

    def end(self) -> int:
        with self.process:
            self.said += self.process.stdout.read()
        return self.process.returncode


def lock_until_it_is_said(running: Training, project: Project) -> None:
    other = sqlite3.connect(project.root / "mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    running.read_until("MLflow does not take the run ")
    other.rollback()
    other.close()


@pytest.mark.long
def test_retraining_goes_on_and_is_evaluated_while_the_store_is_locked(training):
    uri = f"sqlite:///{training.root / 'mlflow.db'}"
    training.configure_retraining(epochs=2)
    running = Training(training, uri, "re_train/re_train.py")
    running.read_until("epoch 1 of")
    lock_until_it_is_said(running, training)
    assert running.end() == 0, running.said
    with stores.connected(uri):
        found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    (run,) = [one for one in found if one.info.run_name == "re-train"]
    assert run.info.status == "FINISHED"
    assert "test_accuracy" in run.data.metrics and "loss" in run.data.metrics
    assert f"Registered as {run.data.tags['registered_version'].split('/')[1]}" in running.said
    assert {one.info.run_name for one in found} <= {"re-train", "prod: version 1"}
    assert not undelivered(training)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "server").mkdir()
    made = TrackingServer(tmp_path / "server")
    yield made
    made.kill()


@pytest.mark.long
def test_what_was_fitted_without_the_server_is_delivered_when_it_is_back(training, server):
    running = Training(training, server.uri)
    running.read_until("epoch 1 of")
    server.kill()
    assert running.end() == 1
    assert "Traceback" not in running.said
    last = running.said.strip().splitlines()[-1]
    assert last.startswith("error: MLflow does not take what was fitted")
    assert "--sync' delivers it" in last
    assert len(undelivered(training)) == 2
    assert "does not answer" in training.fail(
        "src/train.py", "--sync", MLFLOW_TRACKING_URI=server.uri
    )
    server.start()
    said = training.succeed("src/train.py", "--sync", MLFLOW_TRACKING_URI=server.uri)
    assert said.startswith("Delivered from a former training: one, two; best ")
    require_whole(training, server.uri)
    assert training.succeed("src/train.py", "--sync", MLFLOW_TRACKING_URI=server.uri) == ""


@pytest.mark.long
def test_run_of_a_killed_training_does_not_stay_running(training):
    uri = f"sqlite:///{training.root / 'mlflow.db'}"
    running = Training(training, uri)
    running.read_until("Set 2 of 2")
    running.read_until("epoch 1 of")
    # What runs is left alone.
    assert training.succeed("src/train.py", "--sync", MLFLOW_TRACKING_URI=uri) == ""
    running.process.kill()
    running.end()
    assert sorted(run.info.status for run in runs(uri)) == ["FINISHED", "RUNNING"]
    said = training.succeed("src/train.py", "--sync", MLFLOW_TRACKING_URI=uri)
    assert said == "Delivered from a former training: one\n"
    assert sorted(run.info.status for run in runs(uri)) == ["FINISHED", "KILLED"]
    assert not (training.root / "best_model.json").exists()
    assert not undelivered(training)


# Without a fit: what is kept of a training, and what becomes of it.


@pytest.fixture
def kept(store, tmp_path):
    """Makes trainings that MLflow did not take; returns their folders."""
    return partial(kept_training, tmp_path, "train/kept")


def known_runs(name: str) -> list:
    found = mlflow.search_runs(experiment_names=["train/kept"], output_format="list")
    return [run for run in found if run.info.run_name == name]


def test_training_is_delivered_to_its_own_store_only(kept, store, tmp_path, capsys, caplog):
    folder = kept("own")
    mlflow.set_tracking_uri("sqlite:////another/mlflow.db")
    delivery.deliver_all(tmp_path, strict=True)
    assert folder.exists() and capsys.readouterr().out == ""
    assert f"is for the store {store}, and stays" in caplog.text
    mlflow.set_tracking_uri(store)
    delivery.deliver_all(tmp_path, strict=True)
    assert capsys.readouterr().out == "Delivered from a former training: own\n"
    (run,) = known_runs("own")
    assert run.data.metrics == {"loss": 0.5}
    assert not folder.parent.exists()


def test_kill_between_two_notes_of_a_delivery_loses_nothing(kept, store, tmp_path, capsys):
    """MLflow has the run, and what is kept does not say which."""
    folder = kept("noted", str(tmp_path / "best.json"))
    run = journal.deliver(folder).run_id
    assert run and run not in (folder.parent / "training.json").read_text()
    delivery.deliver_all(tmp_path, strict=True)
    assert json.loads((tmp_path / "best.json").read_text())["run_id"] == run
    assert not folder.parent.exists()


def test_file_that_names_the_best_model_is_written_when_there_is_room(kept, store, tmp_path):
    best = tmp_path / "full" / "best.json"
    folder = kept("unwritten", str(best)).parent
    best.parent.write_text("no folder")
    with pytest.raises(PipelineError, match="best.json"):
        delivery.deliver_all(tmp_path, strict=True)
    assert folder.exists()
    best.parent.unlink()
    delivery.deliver_all(tmp_path, strict=True)
    assert best.exists() and not folder.exists()
    purpose = Purpose(1, "digest", str(best), "train.py --sync")
    with pytest.raises(KeyboardInterrupt), delivery.training(tmp_path, purpose) as training:
        with training.run(RunInfo("train/kept", "fitted", "", {})) as trained:
            trained.append(Trained("fitted", 1, 0.9, 0.1, 1.0, record.run_id(), ""))
        raise KeyboardInterrupt
    assert training.folder.exists()
    delivery.deliver_all(tmp_path, strict=True)
    assert json.loads(best.read_text())["run_id"] == training.trained.popitem()[1].run_id
    assert not training.folder.exists()


def test_late_training_leaves_the_best_model_of_one_that_was_fitted_after_it(
    kept, store, tmp_path, monkeypatch
):
    best = tmp_path / "best.json"
    monkeypatch.setattr(delivery, "_now", lambda: "2026-01-01T10:00:00+00:00")
    older = kept("fitted first", str(best))
    monkeypatch.setattr(delivery, "_now", lambda: "2026-01-01T11:00:00+00:00")
    newer = kept("fitted second", str(best))
    aside = shutil.move(older.parent, tmp_path / "aside")
    delivery.deliver_all(tmp_path)
    named = json.loads(best.read_text())
    assert named["created_at"] == "2026-01-01T11:00:00+00:00" and not newer.exists()
    shutil.move(aside, older.parent)
    delivery.deliver_all(tmp_path)
    assert json.loads(best.read_text()) == named
    assert len(known_runs("fitted first")) == 1 and not older.exists()


def test_run_that_ends_on_a_full_disk_has_failed_in_mlflow(store, tmp_path, monkeypatch):
    """MLflow itself ends a run as FINISHED when its process ends."""
    opened = journal.Journal(tmp_path / "run", RunInfo("train/kept", "on a full disk", "", {}))
    full = mock.Mock(**{"write.side_effect": OSError(errno.ENOSPC, "No space left on device")})
    opened._entries.close()
    monkeypatch.setattr(opened, "_entries", full)
    with pytest.raises(OSError, match="No space left"):
        opened.end("FAILED")
    (run,) = known_runs("on a full disk")
    assert run.info.status == "FAILED" and mlflow.active_run() is None


def test_what_is_kept_from_before_the_end_of_a_run_does_not_open_it_again(kept, store, tmp_path):
    """As a restored backup has it: it is older than what the store has of the run."""
    folder = kept("older")
    copy = Path(shutil.copytree(folder.parent, tmp_path / "copy"))
    delivery.deliver_all(tmp_path, strict=True)
    (run,) = known_runs("older")
    entries = (copy / folder.name / "entries.jsonl").read_text().splitlines()
    (copy / folder.name / "entries.jsonl").write_text(entries[0])
    shutil.move(copy, folder.parent)
    delivery.deliver_all(tmp_path, strict=True)
    (after,) = known_runs("older")
    assert (after.info.status, after.info.end_time) == ("FINISHED", run.info.end_time)
    assert not folder.parent.exists()


def gone_run(folder: Path) -> None:
    run = MlflowClient().create_run(stores.open_experiment("train/kept"))
    MlflowClient().delete_run(run.info.run_id)
    info = json.loads((folder / "run.json").read_text()) | {"run_id": run.info.run_id}
    (folder / "run.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    "spoil",
    [
        gone_run,
        lambda folder: (folder / "entries.jsonl").unlink(),
        lambda folder: (folder / "run.json").write_text(""),
        lambda folder: (folder / "run.json").write_text("{}"),
        lambda folder: (folder / "entries.jsonl").write_text('{"call": "params"}\n'),
    ],
)
def test_training_that_cannot_be_delivered_stops_no_other(
    kept, store, tmp_path, caplog, capsys, spoil
):
    spoiled = kept("spoiled")
    spoil(spoiled)
    whole = kept("whole")
    caplog.clear()
    delivery.deliver_all(tmp_path)
    assert capsys.readouterr().out == "Delivered from a former training: whole\n"
    assert not whole.exists() and spoiled.exists()
    (message,) = caplog.messages
    assert message.startswith("MLflow does not take what was fitted (")
    assert f"but does not evaluate it. If nobody needs it, delete {spoiled.parent}" in message
    with pytest.raises(StoreError, match="MLflow does not take what was fitted"):
        delivery.deliver_all(tmp_path, strict=True)
    assert mlflow.active_run() is None


def test_folder_that_another_process_has_just_delivered_is_left_alone(
    kept, store, tmp_path, monkeypatch, capsys
):
    folder = kept("another").parent
    held = locks.held

    def too_late(file: Path, make: bool):
        shutil.rmtree(file.parent)
        return held(file, make)

    monkeypatch.setattr(locks, "held", too_late)
    delivery.deliver_all(tmp_path, strict=True)
    assert capsys.readouterr().out == "" and not folder.exists()


@pytest.mark.parametrize("content", ["", "null", "[]", '{"trained": 1}', '{"trained": {}}'])
def test_damaged_remains_of_a_training_are_named_and_stop_nothing(
    kept, store, tmp_path, caplog, capsys, content
):
    remains = tmp_path / "undelivered" / "damaged"
    remains.mkdir(parents=True)
    (remains / "training.json").write_text(content)
    kept("whole")
    delivery.deliver_all(tmp_path, strict=True)
    assert f"{remains / 'training.json'} cannot be read" in caplog.text
    assert capsys.readouterr().out == "Delivered from a former training: whole\n"
