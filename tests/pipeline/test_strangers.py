"""Parts of other kinds, other folders, few defects: what a first user brings, end to end."""

import re
import shutil

import mlflow
import pytest
import yaml
from mlflow import MlflowClient

import kinds
from conftest import Project, draw_folders
from defect_detection.registry import store, versions

COUNTS = {"train": 24, "test": 8}


@pytest.fixture
def one_set(project: Project) -> Project:
    """A project with one set, whose head is wide."""

    def change(config: dict) -> None:
        config["model_parameters"]["sets"] = config["model_parameters"]["sets"][1:2]

    project.configure(change)
    return project


def test_coloured_parts_of_other_names_below_one_folder(one_set, tmp_path):
    """No train, no test, no def_front: the colour is kept and the wrong one is found."""
    drawn = kinds.draw_folders(tmp_path / "drawn", "cap", {"train": 40})
    flat = tmp_path / "caps"
    shutil.move(drawn / "train", flat)
    (flat / "def_front").rename(flat / "NG")
    (flat / "ok_front").rename(flat / "Good")
    printed = one_set.succeed("src/train.py", "--data", flat)
    assert "32 def_front (in NG), 32 ok_front (in Good), 64 x 64, colour" in printed
    assert (flat / "split.csv").exists()
    judged = one_set.succeed("src/evaluation.py", "--data", flat)
    assert float(re.search(r"accuracy (\d\.\d+)", judged)[1]) >= 0.9
    found = one_set.succeed("src/inference.py", flat / "NG", flat / "Good")
    verdicts = [line.split("  ")[1] for line in found.splitlines()]
    assert verdicts[:40].count("defect") >= 36 and verdicts[40:].count("ok") >= 30


def test_good_parts_alone(one_set, tmp_path):
    """Nothing is known of escapes, so the version is not released, and all scripts say so."""
    data = draw_folders(tmp_path / "pictures", train=30, test=6)
    shutil.rmtree(data / "train" / "def_front")
    shutil.rmtree(data / "test" / "def_front")
    printed = one_set.succeed("src/train.py", "--data", data)
    assert "No photographs of defects to learn from, fewer than 10: models learn from" in printed
    assert "nothing will be known of escapes" in printed
    judged = one_set.succeed("src/evaluation.py", "--data", data)
    assert "there is no defect among the test images, so nothing is known of escapes" in judged
    assert "not released; no version has the alias prod" in judged
    last = one_set.fail("src/inference.py", data / "test" / "ok_front")
    expected = "since none is released. Production_Reg version 1: there is no defect among the test"
    assert expected in last and last.rstrip().endswith("/report.html")


@pytest.mark.parametrize("head", ["map", "wide"])
def test_any_set_learns_from_good_parts_alone_if_there_are_few_defects(project, tmp_path, head):
    def change(config: dict) -> None:
        parameters = config["model_parameters"]
        parameters["sets"] = [one for one in parameters["sets"] if one["head"] == head][:1]

    project.configure(change)
    data = draw_folders(tmp_path / "pictures", train=12, test=2)
    for path in sorted((data / "train" / "def_front").iterdir())[1:]:
        path.unlink()
    project.succeed("src/train.py", "--data", data)
    with store.connected(f"sqlite:///{project.root}/mlflow.db"):
        (run,) = mlflow.search_runs(experiment_names=["train/casting"], output_format="list")
    assert run.data.params["head"] == "good"


def test_few_defects_are_judged_and_tell_what_they_can(one_set, tmp_path):
    data = draw_folders(tmp_path / "pictures", train=30, test=6)
    for path in sorted((data / "train" / "def_front").iterdir())[3:]:
        path.unlink()
    printed = one_set.succeed("src/train.py", "--data", data)
    assert "3 photographs of defects to learn from, fewer than 10" in printed
    assert "6 photographs of defects to test with: if all are found, up to 45.9%" in printed


def test_two_products_in_one_store_do_not_meet(one_set, tmp_path):
    data = draw_folders(tmp_path / "pictures", train=24, test=8)
    config = yaml.safe_load((one_set.root / "src" / "config.yaml").read_text())
    other = tmp_path / "tiles.yaml"
    other.write_text(yaml.safe_dump(config | {"product": "tiles"}))
    before = (one_set.root / "src" / "config.yaml").read_text()
    options = ("--data", data, "--config", other)
    printed = one_set.succeed("src/train.py", *options)
    assert f"Next: python src/evaluation.py --data {data} --config {other}" in printed
    assert (one_set.root / "best_model-tiles.json").exists()
    assert not (one_set.root / "best_model.json").exists()
    last = one_set.fail("src/evaluation.py", "--data", data)
    assert f"Run 'python src/train.py --data {data}' first" in last
    one_set.succeed("src/evaluation.py", *options)
    one_set.succeed("src/inference.py", data / "test" / "ok_front", "--config", other)
    with store.connected(f"sqlite:///{one_set.root}/mlflow.db"):
        assert versions.with_accuracy("Production_Reg") == []
        assert len(versions.with_accuracy("Production_Reg-tiles")) == 1
        names = {one.name for one in MlflowClient().search_experiments()}
    assert {"train/casting-tiles", "eval/casting-tiles"} <= names
    assert (one_set.root / "src" / "config.yaml").read_text() == before


def test_one_set_can_be_tried_by_its_name(project, tmp_path):
    data = draw_folders(tmp_path / "pictures", train=12, test=2)
    printed = project.succeed("src/train.py", "--data", data, "--set", "three")
    assert "Set 1 of 1: three" in printed
    last = project.fail("src/train.py", "--data", data, "--set", "thre")
    assert "There is no set thre, expected one of: one, two, three" in last
