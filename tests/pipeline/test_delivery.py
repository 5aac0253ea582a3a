"""Trainings during which MLflow does not answer: nothing that was fitted is lost."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from conftest import Project, draw_folders, free_port, wait_for
from defect_detection.registry import store as stores


@pytest.fixture
def training(project):
    """A project that fits two sets in seconds."""
    draw_folders(project.data, train=40, test=8)
    project.configure(lambda config: config["model_parameters"]["sets"].pop())
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

    def __init__(self, project: Project, uri: str):
        self.process = subprocess.Popen(
            [sys.executable, "-u", project.root / "src" / "train.py"],
            env=project.environment() | {"MLFLOW_TRACKING_URI": uri},
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


def test_store_that_is_locked_for_a_while_gets_everything_at_the_end(training):
    uri = f"sqlite:///{training.root / 'mlflow.db'}"
    with stores.connected(uri, create=True):
        stores.open_experiment("first")
    running = Training(training, uri)
    running.read_until("epoch 1 of")
    other = sqlite3.connect(training.root / "mlflow.db", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(40, other.rollback).start()
    assert running.end() == 0, running.said
    assert "MLflow does not take the run one (" in running.said
    assert "Traceback" not in running.said
    require_whole(training, uri)


class TrackingServer:
    """A tracking server that can be killed and started again."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self.answers, 120)

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "server").mkdir()
    made = TrackingServer(tmp_path / "server")
    yield made
    made.kill()


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


def test_damaged_remains_of_a_training_are_named_and_stop_nothing(training):
    remains = training.cache / "undelivered" / "damaged"
    remains.mkdir(parents=True)
    with stores.connected(f"sqlite:///{training.root / 'mlflow.db'}", create=True):
        stores.open_experiment("first")
    for content in ("", "null", "[]", '{"trained": 1}'):
        (remains / "training.json").write_text(content)
        done = training.run("src/train.py", "--sync")
        assert done.returncode == 0 and "Traceback" not in done.stderr
        assert f"{remains / 'training.json'} cannot be read" in done.stderr
    (remains / "training.json").unlink()
