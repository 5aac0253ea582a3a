"""re_train.py: where it starts from, what it registers."""

import re
import shutil

import mlflow
import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from re_train import re_train

from conftest import ROOT, Project, draw_part, encoded, former_cnn
from defect_detection import settings
from defect_detection.registry import saved_model, store, versions
from defect_detection.runtime.model_files import ServedModel
from defect_detection.runtime.ood import OodDetector
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.settings import HyperParameters, RetrainConfig
from defect_detection.training import network

SCRIPT = "re_train/re_train.py"


def test_the_yaml_is_what_its_users_know():
    assert yaml.safe_load((ROOT / "re_train" / "re_train.yaml").read_text()) == {
        "paths": {"data_path": "data"},
        "model_parameters": {
            "image_size": [128, 128],
            "batch_size": 32,
            "epochs": 12,
            "learning_rate": 0.0001,
        },
        "mlflow": {
            "testing_model_name": "Testing_Reg",
            "testing_model_alias": "re-train",
            "experiment_name": "Re-train",
            "evaluation_threshold": 0.70,
            "production_model_name": "Production_Reg",
        },
        "inference_examples": {
            "defective_image": "test/def_front/cast_def_0_1153.jpeg",
            "ok_image": "test/ok_front/cast_ok_0_10.jpeg",
        },
        "include_inbox": True,  # optional: without it, approved labels are left out
    }
    settings.read_yaml(ROOT / "re_train" / "re_train.yaml", RetrainConfig)


@pytest.fixture(scope="module")
def retrained(tmp_path_factory, learnable):
    """Three retrainings on a fresh store: well, against swapped labels, and well again."""
    project = Project(tmp_path_factory.mktemp("retrained") / "project")
    project.make_store()
    swapped = tmp_path_factory.mktemp("swapped")
    shutil.copytree(learnable / "train", swapped / "train")
    shutil.copytree(learnable / "test" / "def_front", swapped / "test" / "ok_front")
    shutil.copytree(learnable / "test" / "ok_front", swapped / "test" / "def_front")
    project.configure_retraining(image_size=[64, 64], epochs=6, learning_rate=0.01, batch_size=16)
    project.printed = [project.succeed(SCRIPT, "--data", learnable)]
    gently = ("--learning-rate", 0.002)
    project.printed.append(project.succeed(SCRIPT, "--data", swapped, "--epochs", 1, *gently))
    project.configure_retraining(image_size=[128, 128])
    project.printed.append(project.succeed(SCRIPT, "--data", learnable, "--epochs", 2, *gently))
    mlflow.set_tracking_uri(f"sqlite:///{project.root}/mlflow.db")
    return project


def runs() -> list:
    experiment = mlflow.get_experiment_by_name("Re-train")
    found = MlflowClient().search_runs(
        [experiment.experiment_id], order_by=["attributes.start_time ASC"]
    )
    assert all(run.info.status == "FINISHED" for run in found)
    return found


def test_each_start_is_said_and_tagged(retrained):
    expected = [
        "a new model",
        "Production_Reg version 1 (prod)",
        "Testing_Reg version 1 (re-train)",
    ]
    for printed, run, source in zip(retrained.printed, runs(), expected, strict=True):
        assert f"Starting from {source}\n" in printed
        assert run.data.tags["started_from"] == source


def test_good_model_goes_to_production_and_bad_one_waits_in_testing(retrained):
    client = MlflowClient()
    first, second, third = runs()
    assert "Registered as Production_Reg version 1; prod is version 1" in retrained.printed[0]
    said = "Registered as Testing_Reg version 1, below the test accuracy of 70%"
    assert said in retrained.printed[1]
    waiting = client.get_model_version_by_alias("Testing_Reg", "re-train")
    assert waiting.run_id == second.info.run_id
    assert float(waiting.tags["acc"]) == second.data.metrics["test_accuracy"] < 0.7
    assert "Registered as Production_Reg version 2" in retrained.printed[2]
    best = max((first, third), key=lambda run: run.data.metrics["test_accuracy"])
    if first.data.metrics["test_accuracy"] != third.data.metrics["test_accuracy"]:
        behind = client.get_model_version_by_alias("Production_Reg", "prod")
        assert behind.run_id == best.info.run_id


def test_fine_tuning_starts_from_the_weights_of_its_start(retrained):
    # One epoch suffices where the start had learned eight: a new model would not know as much.
    _, second, third = runs()
    assert MlflowClient().get_metric_history(second.info.run_id, "val_accuracy")[0].value > 0.85
    assert MlflowClient().get_metric_history(third.info.run_id, "val_accuracy")[0].value > 0.85


def test_parameters_are_those_of_the_yaml_and_the_options(retrained):
    first, second, _ = runs()
    # A new model has the rate of the first set, a start from the registry that of the YAML.
    assert first.data.params["learning_rate"] == "0.02"
    assert second.data.params["learning_rate"] == "0.002"
    assert first.data.params["batch_size"] == second.data.params["batch_size"] == "16"
    assert (first.data.params["epochs"], second.data.params["epochs"]) == ("6", "1")
    # Layers are said of a new model only: of one that was loaded, the file says nothing.
    assert first.data.params["blocks"] == "8"
    assert "blocks" not in second.data.params


def test_the_two_examples_are_judged_by_the_new_model(retrained):
    lines = retrained.printed[0].splitlines()
    assert sum("does not exist, running" in line for line in lines) == 2
    assert [line.split()[-2] for line in lines[-2:]] == ["defect", "ok"]


def test_model_that_is_fine_tuned_keeps_its_image_size_and_says_so(retrained):
    said = " takes images of 64 x 64, grey; image_size [128, 128] is for a new model"
    assert said in retrained.printed[2] and said not in retrained.printed[1]


def test_what_cannot_be_fine_tuned_is_fitted_anew_and_said(monkeypatch):
    names = settings.read_yaml(ROOT / "re_train" / "re_train.yaml", RetrainConfig).mlflow
    version, takes = versions.Version("Testing_Reg", 3, 0.5), ImageFormat(64, 64)
    few = re_train.choose_start(version, names, takes, good_only=True)
    assert few.version is None
    assert few.source == (
        "a new model and not Testing_Reg version 3 (re-train), since there are too few defects to "
        "fine-tune it"
    )
    built = {
        head: network.build((64, 64, 1), HyperParameters("x", 8, 1, head, 0.01, 0.01, 8, 1))
        for head in ("good", "wide")
    }
    monkeypatch.setattr(saved_model, "load_keras", lambda uri: built["good"])
    anew = re_train.choose_start(version, names, takes, good_only=False)
    assert anew.version is None and "that learned from good parts alone" in anew.source
    monkeypatch.setattr(saved_model, "load_keras", lambda uri: built["wide"])
    assert re_train.choose_start(version, names, takes, good_only=False).version == version


def test_a_new_model_of_another_size_than_that_of_training_is_said(folder, capsys):
    own = settings.read_yaml(ROOT / "re_train" / "re_train.yaml", RetrainConfig)
    shared = settings.read_config().model_parameters
    re_train.choose_format(None, folder, own, shared)
    said = "images of 128 x 128 (re_train.yaml), those of src/train.py 256 x 256: neither replaces"
    assert said in capsys.readouterr().out


@pytest.mark.long
def test_model_from_before_the_pretrained_layers_is_fine_tuned(project, learnable):
    project.configure_retraining(image_size=[64, 64], epochs=2, learning_rate=0.002)
    rng = np.random.default_rng(0)
    former = former_cnn((64, 64, 1))
    ood = OodDetector.fit(rng.integers(0, 256, (20, 64, 64, 1), np.uint8))
    served = ServedModel(network.to_litert(former), ImageFormat(64, 64), ood=ood)
    project.make_store()
    with store.connected(f"sqlite:///{project.root}/mlflow.db"):
        with mlflow.start_run(experiment_id=store.open_experiment("train/former")) as run:
            uri = saved_model.log(former, served, encoded(draw_part(rng, True)))
        version = versions.register(uri, run.info.run_id, 0.5, "", "Testing_Reg", {})
        versions.set_alias(version, "re-train")
        printed = project.succeed(SCRIPT, "--data", learnable)
        assert "Starting from Testing_Reg version 1 (re-train)\n" in printed
        assert "epoch 2 of 2" in printed
        name = re.search(r"Registered as (\w+) version", printed)[1]
        (newest,) = versions.with_accuracy(name)[-1:]
        tuned = saved_model.load_keras(newest.uri)
    assert [layer.name for layer in tuned.layers] == [layer.name for layer in former.layers]
    moved = zip(former.trainable_weights, tuned.trainable_weights, strict=True)
    assert all(np.abs(one.numpy() - other.numpy()).max() > 0 for one, other in moved)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("--epochs", 0, "epochs is 0, expected a whole number, at least 1")]
    + [("--learning-rate", 2, "learning_rate is 2.0, expected a number, more than 0, less than 1")],
)
def test_option_out_of_range_is_one_line(project, option, value, expected):
    assert expected in project.fail(SCRIPT, option, value)


def test_wrong_yaml_is_one_line(project):
    project.configure_retraining(epoch=3)
    assert "re_train.yaml: model_parameters.epoch is not a known key" in project.fail(SCRIPT)
