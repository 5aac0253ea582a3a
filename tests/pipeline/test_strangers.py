"""Parts of other kinds, other folders, few defects: what a first user brings, end to end."""

import re
import shutil
from dataclasses import replace

import pytest
import yaml
from mlflow import MlflowClient

import kinds
import train
from conftest import SETS, Project, draw_folders
from defect_detection import PipelineError, settings
from defect_detection.dataset import split
from defect_detection.dataset.folder import DataFolder
from defect_detection.evaluation import release
from defect_detection.registry import store, versions
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.settings import HyperParameters


@pytest.fixture
def one_set(project: Project) -> Project:
    """A project with one set, whose head is wide."""
    project.configure_sets(SETS[1])
    project.make_store()
    return project


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_two_products_in_one_store_do_not_meet(one_set, tmp_path, monkeypatch):
    """The store is a folder here."""
    (one_set.root / ".env").write_text("MLFLOW_TRACKING_URI=file:./mlruns\n")
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
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with store.connected(f"file://{one_set.root}/mlruns"):
        assert versions.with_accuracy("Production_Reg") == []
        assert len(versions.with_accuracy("Production_Reg-tiles")) == 1
        names = {one.name for one in MlflowClient().search_experiments()}
    assert {"train/casting-tiles", "eval/casting-tiles"} <= names
    assert (one_set.root / "src" / "config.yaml").read_text() == before


def test_one_set_can_be_tried_by_its_name():
    sets = settings.read_yaml(settings.CONFIG_FILE, settings.Config).model_parameters
    assert [one.name for one in train.chosen(sets, "small")] == ["small"]
    assert train.chosen(sets, None) == sets.sets
    with pytest.raises(PipelineError, match="There is no set smal, expected one of: local, wide,"):
        train.chosen(sets, "smal")


def test_any_set_learns_from_good_parts_alone_if_there_are_few_defects():
    one, two, three = (HyperParameters(**one) for one in SETS)
    assert train.of_good_parts([one, two, three]) == [replace(two, head="good")]
    assert train.of_good_parts([one, three]) == [replace(one, head="good")]


def test_few_defects_are_said_before_training(tmp_path):
    data = draw_folders(tmp_path / "pictures", train=30, test=6)
    for path in sorted((data / "train" / "def_front").iterdir())[3:]:
        path.unlink()
    loaded = split.load(DataFolder(data, tmp_path / "cache"), ImageFormat(64, 64))
    assert loaded.training.few_defects
    assert release.describe_defects(loaded) == (
        "3 photographs of defects to learn from, fewer than 10: models learn from good parts "
        "alone, and defects are only judged. 6 photographs of defects to test with: if all are "
        "found, up to 45.9% of the defects may pass nevertheless (95% bound)."
    )
