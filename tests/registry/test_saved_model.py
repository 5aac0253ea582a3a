"""Logged models: both forms, their files, the data set beside them."""

import base64
import json

import keras
import mlflow
import numpy as np
import pytest
import yaml

from conftest import draw_part, encoded, small_cnn
from defect_detection import PipelineError
from defect_detection.dataset import split
from defect_detection.pipeline import record
from defect_detection.registry import saved_model
from defect_detection.registry import store as stores
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.decision import OperatingPoint
from defect_detection.runtime.model_files import ServedModel
from defect_detection.runtime.ood import OodDetector
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.training import network

TAKES = ImageFormat(32, 32)
PICTURE = encoded(draw_part(np.random.default_rng(2), defect=True))
POINT = OperatingPoint(0.3, 0.25, 0.45)
OOD = OodDetector.fit(np.random.default_rng(1).integers(0, 256, (20, *TAKES.shape), np.uint8))


@pytest.fixture(scope="module")
def cnn() -> keras.Model:
    keras.utils.set_random_seed(0)
    return small_cnn(TAKES.shape)


@pytest.fixture
def logged(store, cnn) -> str:
    with mlflow.start_run(experiment_id=stores.open_experiment("train/test")):
        return saved_model.log(cnn, ServedModel(network.to_litert(cnn), TAKES, POINT, OOD), PICTURE)


def test_one_logged_model_carries_both_flavours_that_agree(logged, cnn):
    pictures = np.random.default_rng(0).integers(0, 256, (5, *TAKES.shape), np.uint8)
    expected = cnn.predict(pictures.astype("f"), verbose=0)
    with saved_model.fetched(logged) as folder:
        classifier = Classifier.load(folder)
        served = ServedModel.load(folder)
    assert served.takes == TAKES
    assert served.point == POINT
    pixels = pictures[..., 0].astype("f")
    assert served.ood.reasons(pixels) == OOD.reasons(pixels) != [""] * 5
    np.testing.assert_allclose(classifier.probabilities(pictures), expected[:, 0], atol=1e-5)
    loaded = mlflow.tensorflow.load_model(logged)
    np.testing.assert_allclose(loaded.predict(pictures.astype("f"), verbose=0), expected, atol=1e-5)


def test_logged_model_has_signature_example_requirements_and_class_names(logged):
    with saved_model.fetched(logged) as folder:
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


def test_data_set_is_logged_with_digest_and_counts(store, folder, data):
    loaded = split.load(folder, TAKES).training
    with mlflow.start_run(experiment_id=stores.open_experiment("train/test")) as run:
        record.dataset(loaded, "training")
    logged = mlflow.get_run(run.info.run_id)
    (used,) = logged.inputs.dataset_inputs
    assert used.dataset.digest == loaded.digest[:16]
    assert str(data) in used.dataset.source
    assert logged.data.params["training_def_front"] == "10"
    assert logged.data.params["training_digest"] == loaded.digest


def test_model_whose_files_are_gone_is_refused(store):
    with pytest.raises(PipelineError, match="models:/m-none: its files cannot be fetched"):
        with saved_model.fetched("models:/m-none"):
            pass
