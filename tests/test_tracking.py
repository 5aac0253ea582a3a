"""Stores, experiments, runs and the logged model."""

import base64
import json
import socket
import time
from pathlib import Path

import keras
import mlflow
import numpy as np
import pytest
import yaml

from conftest import draw_part, encoded, small_cnn
from defect_detection import PipelineError, dataset, model, tracking
from defect_detection.classifier import Classifier
from defect_detection.metrics import OperatingPoint
from defect_detection.scope import Scope
from defect_detection.tracking import BestModel

SIZE = (32, 32)
PICTURE = encoded(draw_part(np.random.default_rng(2), defect=True))
POINT = OperatingPoint(0.3, 0.25, 0.45)
SCOPE = Scope.of(np.random.default_rng(1).integers(0, 256, (20, *SIZE, 1), np.uint8))


@pytest.fixture(scope="module")
def cnn() -> keras.Model:
    keras.utils.set_random_seed(0)
    return small_cnn(SIZE)


@pytest.fixture
def logged(store, cnn) -> str:
    with mlflow.start_run(experiment_id=tracking.open_experiment("train/test")):
        return tracking.log_model(cnn, model.to_litert(cnn), "none", POINT, SCOPE, PICTURE)


def test_one_logged_model_carries_both_flavours_that_agree(logged, cnn):
    pictures = np.random.default_rng(0).integers(0, 256, (5, *SIZE, 1), np.uint8)
    expected = cnn.predict(pictures.astype("f"), verbose=0)
    with tracking.fetched(logged) as folder:
        served = Classifier.load(folder)
    assert served.image_size == SIZE
    assert served.point == POINT
    pixels = pictures[..., 0].astype("f")
    assert served.scope.reasons(pixels) == SCOPE.reasons(pixels) != [""] * 5
    np.testing.assert_allclose(served.probabilities(pictures), expected[:, 0], atol=1e-5)
    loaded = mlflow.tensorflow.load_model(logged)
    np.testing.assert_allclose(loaded.predict(pictures.astype("f"), verbose=0), expected, atol=1e-5)


def test_logged_model_has_signature_example_requirements_and_class_names(logged):
    with tracking.fetched(logged) as folder:
        described = yaml.safe_load((folder / "MLmodel").read_text())
        needed = (folder / "requirements.txt").read_text()
        example = json.loads((folder / "serving_input_example.json").read_text())
    (column,) = json.loads(described["signature"]["inputs"])
    assert (column["name"], column["type"]) == ("picture", "binary")
    (picture,) = example["dataframe_split"]["data"][0]
    assert base64.b64decode(picture) == PICTURE
    assert "tensorflow==" in needed and "keras==" in needed
    assert described["flavors"]["litert"]["class_names"] == ["def_front", "ok_front"]
    assert described["flavors"]["litert"]["positive_class"] == "def_front"


def test_data_set_is_logged_with_digest_and_counts(store, data, tmp_path):
    loaded = dataset.load(data, "train", SIZE, tmp_path / "cache")
    with mlflow.start_run(experiment_id=tracking.open_experiment("train/test")) as run:
        tracking.log_dataset(loaded, data, "training")
    logged = mlflow.get_run(run.info.run_id)
    (used,) = logged.inputs.dataset_inputs
    assert used.dataset.digest == loaded.digest[:16]
    assert str(data) in used.dataset.source
    assert logged.data.params["training_def_front"] == "10"
    assert logged.data.params["training_digest"] == loaded.digest


def test_artifacts_of_a_sqlite_store_lie_beside_it(store):
    experiment = mlflow.get_experiment(tracking.open_experiment("train/test"))
    folder = Path(store.removeprefix("sqlite:///")).parent
    assert experiment.artifact_location.startswith(f"file://{folder}/mlruns")


def test_opening_an_experiment_twice_gives_the_same(store):
    assert tracking.open_experiment("train/twice") == tracking.open_experiment("train/twice")


def test_deleted_experiment_is_refused_with_the_way_back(store):
    experiment = tracking.open_experiment("train/deleted")
    mlflow.delete_experiment(experiment)
    with pytest.raises(PipelineError, match=f"restore --experiment-id {experiment}"):
        tracking.open_experiment("train/deleted")


def _best(run_id: str) -> BestModel:
    return BestModel(run_id, "models:/m-1", 0.9, "0" * 64, "2026-01-01T00:00:00+00:00")


def test_best_model_comes_back_as_it_was_written(store, tmp_path):
    with mlflow.start_run(experiment_id=tracking.open_experiment("train/test")) as run:
        pass
    best = _best(run.info.run_id)
    best.write(tmp_path / "best_model.json")
    assert BestModel.read(tmp_path / "best_model.json") == best


@pytest.mark.parametrize("gone", ["0123456789abcdef0123456789abcdef", None])
def test_best_model_of_a_run_that_is_gone_is_refused(store, tmp_path, gone):
    if gone is None:
        with mlflow.start_run(experiment_id=tracking.open_experiment("train/test")) as run:
            gone = run.info.run_id
        mlflow.delete_run(gone)
    _best(gone).write(tmp_path / "best_model.json")
    with pytest.raises(PipelineError, match=f"run {gone}, which is not in the tracking store"):
        BestModel.read(tmp_path / "best_model.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": "1"}', '{"unknown": 1}'])
def test_damaged_best_model_is_refused(tmp_path, text):
    (tmp_path / "best_model.json").write_text(text)
    with pytest.raises(PipelineError, match="is damaged"):
        BestModel.read(tmp_path / "best_model.json")


def test_missing_best_model_names_the_script_that_writes_it(tmp_path):
    with pytest.raises(PipelineError, match=r"does not exist. Run 'python src/train\.py' first"):
        BestModel.read(tmp_path / "best_model.json")


def test_model_whose_files_are_gone_is_refused(store):
    with pytest.raises(PipelineError, match="models:/m-none: its files cannot be had"):
        with tracking.fetched("models:/m-none"):
            pass


def test_server_that_is_not_there_is_told_at_once_and_without_its_password():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(PipelineError, match="does not answer") as raised:
            with tracking.connected(uri):
                pass
    assert "secret" not in str(raised.value)


def test_server_that_accepts_and_is_silent_is_given_up():
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(PipelineError, match="does not answer"):
            uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
            with tracking.connected(uri, seconds=0.5):
                pass
    assert time.monotonic() - started < 5
    assert tracking.CONNECT_SECONDS < 30


@pytest.mark.parametrize("scheme", ["sqlite:///{}/mlflow.db", "file://{}"])
def test_store_that_cannot_be_written_is_named(tmp_path, scheme):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PipelineError, match="cannot be written"):
        with tracking.connected(scheme.format(tmp_path / "file" / "below")):
            pass


def test_file_that_is_no_database_is_one_line(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(PipelineError, match="file is not a database") as raised:
        with tracking.connected(f"sqlite:///{tmp_path}/mlflow.db"):
            tracking.open_experiment("any")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("uri", ["nonsense://user:secret@host/", "postgresql://u:secret@[::1]:1/x"])
def test_database_that_cannot_be_used_is_one_line_without_its_password(uri):
    with pytest.raises(PipelineError, match="cannot be used") as raised:
        with tracking.connected(uri):
            pass
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_error_of_mlflow_comes_out_in_one_line(_store):
    with pytest.raises(PipelineError, match="MLflow at sqlite:///.*not found") as raised:
        with tracking.connected(_store):
            mlflow.get_run("0123456789abcdef0123456789abcdef")
    assert "\n" not in str(raised.value)
