"""The connection to the tracking store, and what it says when that fails."""

import socket
from pathlib import Path

import mlflow
import pytest

from defect_detection import PipelineError
from defect_detection.registry import store as stores


def test_artifacts_of_a_sqlite_store_lie_beside_it(store):
    experiment = mlflow.get_experiment(stores.open_experiment("train/test"))
    folder = Path(store.removeprefix("sqlite:///")).parent
    assert experiment.artifact_location.startswith(f"file://{folder}/mlruns")


def test_experiments_open_on_the_page_of_trainings(store):
    """Without this tag MLflow shows traces, of which there are none."""
    experiment = mlflow.get_experiment(stores.open_experiment("train/opened"))
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_opening_an_experiment_twice_gives_the_same(store):
    assert stores.open_experiment("train/twice") == stores.open_experiment("train/twice")


def test_deleted_experiment_is_refused_with_the_way_back(store):
    experiment = stores.open_experiment("train/deleted")
    mlflow.delete_experiment(experiment)
    with pytest.raises(PipelineError, match=f"restore --experiment-id {experiment}"):
        stores.open_experiment("train/deleted")


def test_server_that_is_not_there_is_told_at_once_and_without_its_password():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(PipelineError, match="does not answer") as raised:
            with stores.connected(uri):
                pass
    assert "secret" not in str(raised.value)


def test_server_that_accepts_and_is_silent_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(PipelineError, match="does not answer"):
            uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
            with stores.connected(uri, seconds=0.5):
                pass


@pytest.mark.parametrize("scheme", ["sqlite:///{}/mlflow.db", "file://{}"])
def test_store_that_cannot_be_written_is_named(tmp_path, scheme):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PipelineError, match="cannot be written"):
        with stores.connected(scheme.format(tmp_path / "file" / "below")):
            pass


def test_file_that_is_no_database_is_one_line(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(PipelineError, match="file is not a database") as raised:
        with stores.connected(f"sqlite:///{tmp_path}/mlflow.db"):
            stores.open_experiment("any")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("uri", ["nonsense://user:secret@host/", "postgresql://u:secret@[::1]:1/x"])
def test_database_that_cannot_be_used_is_one_line_without_its_password(uri):
    with pytest.raises(PipelineError, match="cannot be used") as raised:
        with stores.connected(uri):
            pass
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_error_of_mlflow_comes_out_in_one_line(_store):
    with pytest.raises(PipelineError, match="MLflow at sqlite:///.*not found") as raised:
        with stores.connected(_store):
            mlflow.get_run("0123456789abcdef0123456789abcdef")
    assert "\n" not in str(raised.value)
