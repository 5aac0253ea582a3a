"""What an audit finds, and what follows from it in training and evaluation."""

import csv
import json
import os
import shutil
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from conftest import SETS, draw_folders
from defect_detection import PipelineError
from defect_detection.atomic import write_mapping
from defect_detection.dataset import audit, split
from defect_detection.dataset.folder import DataFolder
from defect_detection.evaluation import figures
from defect_detection.runtime.preprocessing import ImageFormat
from drawings import encoded, photograph, variant

TAKES = ImageFormat(32, 32)
SCRIPT = "src/audit.py"
RESPLIT = "python src/audit.py --resplit 0.2"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Twelve photographs for training and six for the test, no two alike; not to be changed."""
    data = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(8)
    for side, count in (("train", 6), ("test", 3)):
        for name, design in (("def_front", "bracket"), ("ok_front", "plate")):
            (data / side / name).mkdir(parents=True)
            for number in range(count):
                picture = encoded(photograph(rng, design, (120, 120)))
                (data / side / name / f"{number}.jpeg").write_bytes(picture)
    return data


@pytest.fixture
def data(drawn, tmp_path) -> Path:
    """The drawn folder, to plant in."""
    return Path(shutil.copytree(drawn, tmp_path / "pictures"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def inspect(data: Path, cache: Path) -> audit.Audit:
    return audit.inspect(DataFolder(data, cache), TAKES)


def test_clean_folder_is_clean(drawn, cache):
    found = inspect(drawn, cache)
    assert found.clean
    assert found.pictures == {
        "train": {"def_front": 6, "ok_front": 6},
        "test": {"def_front": 3, "ok_front": 3},
    }
    assert (len(found.photographs), found.usual_size) == (18, (120, 120))
    assert found.leaked == {"def_front": [], "ok_front": []}
    said = audit.text(found, RESPLIT)
    assert said.startswith("Nothing found. No test image comes from a photograph that is also in")
    assert found.worst() == []


def test_planted_duplicate_is_found_and_named(data, cache):
    shutil.copy(data / "train/def_front/2.jpeg", data / "test/def_front/again.jpeg")
    found = inspect(data, cache)
    assert found.duplicates == [["test/def_front/again.jpeg", "train/def_front/2.jpeg"]]
    assert found.leaked == {"def_front": ["test/def_front/again.jpeg"], "ok_front": []}
    assert not found.clean
    said = audit.text(found, RESPLIT)
    assert said.startswith("Do not trust an accuracy on this test set. 1 of 7 test images (14.3%")
    assert "test/def_front/again.jpeg  =  train/def_front/2.jpeg" in said


def test_planted_rotated_copy_is_found_and_named(data, cache):
    picture = np.asarray(Image.open(data / "train/ok_front/4.jpeg"))
    turn = cv2.getRotationMatrix2D((60, 60), 110, 1.1)
    copy = cv2.warpAffine(picture[:, ::-1], turn, (120, 120), borderMode=cv2.BORDER_REFLECT)
    (data / "test/ok_front/turned.jpeg").write_bytes(encoded(copy, 80))
    found = inspect(data, cache)
    assert found.leaked == {"def_front": [], "ok_front": ["test/ok_front/turned.jpeg"]}
    assert ["test/ok_front/turned.jpeg", "train/ok_front/4.jpeg"] in found.photographs
    assert found.duplicates == []
    assert "0 of 3 def_front, 1 of 4 ok_front" in audit.text(found, RESPLIT)
    assert found.worst() == [
        ("in test and in training", "test/ok_front/turned.jpeg", "train/ok_front/4.jpeg")
    ]


def test_planted_label_conflict_is_found_and_named(data, cache):
    picture = np.asarray(Image.open(data / "train/ok_front/1.jpeg"))
    copy = encoded(variant(np.random.default_rng(1), picture))
    (data / "train/def_front/same.jpeg").write_bytes(copy)
    found = inspect(data, cache)
    assert found.two_labels == [("train/def_front/same.jpeg", "train/ok_front/1.jpeg")]
    assert not found.clean
    said = audit.text(found, RESPLIT)
    assert said.startswith("Look at these first: 1 with two labels.")
    assert "train/def_front/same.jpeg  and  train/ok_front/1.jpeg" in said


def test_duplicates_and_odd_sizes_are_named_in_the_first_line(data, cache):
    shutil.copy(data / "train/def_front/2.jpeg", data / "train/def_front/again.jpeg")
    Image.new("L", (64, 48), 90).save(data / "test/def_front/small.png")
    said = audit.text(inspect(data, cache), RESPLIT)
    assert said.startswith("Look at these first: 1 in more than one file, 1 of an odd size. No")


def test_unreadable_empty_and_odd_sized_pictures_are_named(data, cache):
    for number in range(6):  # more than training would take
        (data / "train/ok_front" / f"empty{number}.png").write_bytes(b"")
    (data / "train/ok_front/text.jpeg").write_bytes(b"no image")
    Image.new("L", (64, 48), 90).save(data / "test/def_front/small.png")
    found = inspect(data, cache)
    assert len(found.unreadable) == 7
    assert ("train/ok_front/text.jpeg", "is none of JPEG, PNG, BMP, TIFF, WEBP") in found.unreadable
    assert found.odd_sized == [("test/def_front/small.png", 64, 48)]
    said = audit.text(found, RESPLIT)
    assert "train/ok_front/empty0.png is empty (0 bytes)" in said
    assert "and 2 more" in said
    assert "1 are not 120 x 120 as most" in said
    assert not found.clean


def test_image_that_is_deleted_meanwhile_is_named(data, cache, monkeypatch):
    read = audit.read

    def and_delete(*given):
        found = read(*given)
        (data / "train/ok_front/3.jpeg").unlink()
        return found

    monkeypatch.setattr(audit, "read", and_delete)
    with pytest.raises(PipelineError, match=r"train/ok_front/3.jpeg does not exist, but could be"):
        inspect(data, cache)


def test_training_alone_can_be_looked_at(data, cache):
    shutil.rmtree(data / "test")
    found = inspect(data, cache)
    assert (found.clean, found.leaked, list(found.pictures)) == (True, {}, ["train"])
    assert "leaked" not in audit.text(found, RESPLIT)


def test_groups_of_the_users_own_are_used_as_they_are(data, cache):
    paths = [path.relative_to(data).as_posix() for path in data.rglob("*.jpeg")]
    rows = {path: Path(path).stem for path in paths}  # 0 to 5, across classes and splits
    write_mapping(data / "groups.csv", "path", "photo", rows | {"train/ok_front/gone.jpeg": "9"})
    found = inspect(data, cache)
    assert (found.groups_file, len(found.photographs), len(found.two_labels)) == (True, 6, 6)
    assert found.leaked["ok_front"] == [f"test/ok_front/{n}.jpeg" for n in range(3)]
    assert (
        "photographs   6, as groups.csv says for those it names; at most 4 images of one"
        in audit.text(found, RESPLIT)
    )
    loaded = split.load(DataFolder(data, cache), TAKES)
    training = loaded.training
    number = [Path(path).stem for path in training.paths]
    assert len(set(zip(number, training.photographs.tolist(), strict=True))) == 6


def test_groups_may_name_some_pictures_only(data, cache):
    """The others are found by comparing, and follow those that they are found with."""
    for number in (2, 3):
        source = data / f"train/def_front/{number}.jpeg"
        shutil.copy(source, data / f"test/def_front/copy{number}.jpeg")
    named = {"train/def_front/0.jpeg": "a", "train/def_front/1.jpeg": "a"}
    named["train/def_front/2.jpeg"] = "b"
    write_mapping(data / "groups.csv", "path", "photo", named)
    loaded = split.load(DataFolder(data, cache), TAKES)
    of = dict(zip(loaded.training.paths, loaded.training.photographs.tolist(), strict=True))
    of |= dict(zip(loaded.testing.paths, loaded.testing.photographs.tolist(), strict=True))
    assert of["train/def_front/0.jpeg"] == of["train/def_front/1.jpeg"]
    assert of["train/def_front/2.jpeg"] == of["test/def_front/copy2.jpeg"]
    assert of["train/def_front/3.jpeg"] == of["test/def_front/copy3.jpeg"]
    assert len(set(of.values())) == len(of) - 3


def test_found_groups_can_be_given_back(data, cache):
    shutil.copy(data / "train/def_front/2.jpeg", data / "test/def_front/again.jpeg")
    found = inspect(data, cache)
    write_mapping(data / "groups.csv", "path", "photo", found.groups())
    again = inspect(data, cache)
    assert again.groups_file
    assert again.photographs == found.photographs and again.leaked == found.leaked


def test_resplit_is_clean_by_photograph_and_moves_nothing(data, cache):
    rng = np.random.default_rng(2)
    for name in ("def_front", "ok_front"):
        for number in range(3):
            picture = np.asarray(Image.open(data / "train" / name / f"{number}.jpeg"))
            copy = encoded(variant(rng, picture), 90)
            (data / "test" / name / f"copy{number}.jpeg").write_bytes(copy)
    (data / "train/ok_front/broken.jpeg").write_bytes(b"")
    before = {path: path.read_bytes() for path in data.rglob("*.jpeg")}
    assert sum(map(len, inspect(data, cache).leaked.values())) == 6
    written = split.resplit(DataFolder(data, cache), 0.25, 3, TAKES)
    assert written == data / "split.csv"
    assert {path: path.read_bytes() for path in data.rglob("*.jpeg")} == before
    found = inspect(data, cache)
    assert (found.split_file, found.leaked) == (True, {"def_front": [], "ok_front": []})
    assert sum(found.pictures["test"].values()) in range(4, 9)
    assert all(count for side in found.pictures.values() for count in side.values())
    with written.open(newline="") as file:
        rows = {row["path"]: row["split"] for row in csv.DictReader(file)}
    assert set(rows) == {path.relative_to(data).as_posix() for path in before}
    written = split.resplit(DataFolder(data, cache), 0.25, 3, TAKES).read_text()
    assert written == split.resplit(DataFolder(data, cache), 0.25, 3, TAKES).read_text()


def test_contact_sheet_shows_the_worst(data, cache, tmp_path):
    shutil.copy(data / "train/def_front/2.jpeg", data / "test/def_front/again.jpeg")
    figure = figures.contact_sheet(data, inspect(data, cache))
    shown = [child for axes in figure.axes for child in axes.child_axes]
    assert [axes.get_title(loc="left") for axes in shown[:2]] == [
        "test/def_front/\nagain.jpeg",
        "train/def_front/\n2.jpeg",
    ]
    np.testing.assert_array_equal(shown[0].images[0].get_array(), shown[1].images[0].get_array())
    figure.savefig(tmp_path / "sheet.png")
    assert figure.axes[0].get_title(loc="left") == "in test and in training"


def test_names_that_look_like_formulas_of_text_are_drawn_as_they_are(data, cache, tmp_path):
    """Two dollars begin and end a formula for Matplotlib."""
    name = os.fsdecode(b"$a_{$\n\xff.jpeg")
    shutil.copy(data / "train/def_front/2.jpeg", data / "test/def_front" / name)
    figure = figures.contact_sheet(data, inspect(data, cache))
    figure.savefig(tmp_path / "sheet.png")
    (shown,) = [axes for axes in figure.axes[0].child_axes if "$" in axes.get_title(loc="left")]
    assert shown.get_title(loc="left") == "test/def_front/\n$a_{$\\n\\xff.jpeg"


def test_contact_sheet_shows_images_with_as_many_pixels_as_are_allowed(data, cache):
    Image.new("L", (200, 200), 90).save(data / "test/def_front/a.png")
    shutil.copy(data / "test/def_front/a.png", data / "test/def_front/b.png")
    found = inspect(data, cache)
    figures.contact_sheet(data, found, most_pixels=40_000)
    with pytest.raises(PipelineError, match="at most 0.039999 are decoded"):
        figures.contact_sheet(data, found, most_pixels=39_999)


@pytest.mark.long
def test_scripts_take_names_of_all_kinds(project, tmp_path):
    data = draw_folders(tmp_path / "pictures", train=20, test=12)
    names = [b"new\nline", b"car\rriage", b"part_\xff", b'a "b", c', b"=1+1", b"esc\x1b[31m"]
    for folder in sorted(data.glob("*/*")):
        for path, name in zip(sorted(folder.iterdir()), names, strict=False):
            path.rename(os.fsdecode(os.fsencode(folder) + b"/" + name + b".jpeg"))
    shutil.copy(data / "train/def_front/new\nline.jpeg", data / "test/def_front/copy\n.jpeg")
    said = project.succeed(SCRIPT, "--data", data, "--groups", data / "groups.csv")
    assert r"test/def_front/copy\n.jpeg  =  train/def_front/new\nline.jpeg" in said
    assert "as groups.csv says" in project.succeed(SCRIPT, "--data", data, "--resplit", "0.3")
    assert "No test image comes from" in project.succeed("src/train.py", "--data", data)
    assert "Registered as" in project.succeed("src/evaluation.py", "--data", data)
    (table,) = (project.root / "mlruns").rglob("images.csv")
    with table.open(newline="", encoding="utf-8") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    there = [path.relative_to(data).as_posix() for path in data.rglob("*.jpeg")]
    assert {*paths} <= {path.encode(errors="backslashreplace").decode() for path in there}


def test_script_reports_writes_and_ends_with_1_when_strict(project, data, tmp_path):
    clean = project.run(SCRIPT, "--data", data, "--strict")
    assert (clean.returncode, clean.stdout[:13]) == (0, "Nothing found")
    shutil.copy(data / "train/def_front/2.jpeg", data / "test/def_front/again.jpeg")
    files = ["--json", "a.json", "--groups", "new/g.csv", "--sheet", "a.png"]
    done = project.run(SCRIPT, "--data", data, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Do not trust an accuracy on this test set. 1 of 7")
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["clean"] is False
    assert written["leaked"]["def_front"] == ["test/def_front/again.jpeg"]
    with (tmp_path / "new" / "g.csv").open(newline="") as file:
        photos = {row["path"]: row["photo"] for row in csv.DictReader(file)}
    assert photos["test/def_front/again.jpeg"] == photos["train/def_front/2.jpeg"] == "1"
    assert len(photos) == 19 and len(set(photos.values())) == 18
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size[0] > 1000
    assert project.run(SCRIPT, "--data", data, "--strict").returncode == 1
    resplit = project.run(SCRIPT, "--data", data, "--strict", "--resplit", "0.3")
    assert resplit.returncode == 0, resplit.stderr
    assert f"Written: {data / 'split.csv'}" in resplit.stdout
    assert "No test image comes from a photograph that is also in training" in resplit.stdout


@pytest.mark.parametrize("share", ["0", "1", "-0.2", "20%", "nan"])
def test_share_that_is_none_is_refused(project, data, share):
    done = project.run(SCRIPT, "--data", data, f"--resplit={share}")
    assert done.returncode == 2
    assert f"{share} is not a share between 0 and 1" in done.stderr


def test_missing_folders_are_one_line(project, tmp_path):
    (tmp_path / "nothing").mkdir()
    last = project.fail(SCRIPT, "--data", tmp_path / "nothing")
    assert "holds no folder of ok_front" in last


def test_leakage_is_said_and_logged_by_training_evaluation_and_version(project, _trained):
    data = shutil.copytree(_trained.root / "data", project.data)  # its features are known
    project.make_store()
    for name in ("def_front", "ok_front"):
        for number in range(5):
            shutil.copy(data / "train" / name / f"part_00{number}.jpeg", data / "test" / name)
    line = "10 of 20 test images (50.0%) come from a photograph that is also in training."
    assert line in project.succeed("src/train.py", "--data", data)
    printed = project.succeed("src/evaluation.py", "--data", data)
    assert line in printed
    mlflow.set_tracking_uri(f"sqlite:///{project.root}/mlflow.db")
    client = MlflowClient()
    runs = [
        client.search_runs([client.get_experiment_by_name(name).experiment_id])[0]
        for name in ("train/casting", "eval/casting")
    ]
    for run in runs:
        assert run.data.metrics["leaked_share"] == 0.5
        assert run.data.tags["leakage"] == line
        assert float(run.data.tags["leaked_share"]) == 0.5
    figures, tags = runs[1].data.metrics, runs[1].data.tags
    assert (figures["unseen_pictures"], figures["unseen_photographs"]) == (10, 10)
    both = (figures["acc_leaked"] + figures["acc_unseen"]) / 2
    assert figures["accuracy"] == pytest.approx(both)
    assert figures["acc_unseen_low"] <= figures["acc_unseen"] <= figures["acc_unseen_high"]
    assert f"accuracy on those {figures['acc_leaked']:.4f}" in printed
    assert tags["unseen"] in printed and tags["unseen"].endswith("too few to tell")
    found = client.search_model_versions("")
    assert [float(version.tags["acc_unseen"]) for version in found] == [figures["acc_unseen"]]
    assert [float(version.tags["leaked_share"]) for version in found] == [0.5]
    assert found[0].tags["test_digest"] == runs[1].data.params["testing_digest"]
    assert "50.0% of the images come from photographs of training" in found[0].description

    shutil.copy(data / "test/ok_front/part_009.jpeg", data / "train/ok_front/more.jpeg")
    again = project.succeed("src/evaluation.py", "--data", data)
    assert "train has changed since this model was trained on it" in again
    assert "11 of 20 test images" in again


@pytest.mark.long
def test_cross_validation_reports_each_set_by_picture_and_by_photograph(project, tmp_path):
    data = draw_folders(tmp_path / "pictures", train=36, test=1)
    rows = {}
    for path in data.rglob("*.jpeg"):  # three images a photograph
        name = path.relative_to(data).as_posix()
        rows[name] = f"{path.parent}{int(path.stem[-3:]) // 3}"
    write_mapping(data / "groups.csv", "path", "photo", rows)
    project.configure_sets(*SETS[:2])
    printed = project.succeed("src/train.py", "--data", data, "--folds", 2)
    assert printed.count("fold 2 of 2: 36 images of 12 photographs") == 2
    lines = [line.split() for line in printed.splitlines() if "(" in line]
    assert [line[:2] for line in lines[-4:]] == [
        ["one", "images"],
        ["one", "photographs"],
        ["two", "images"],
        ["two", "photographs"],
    ]
    assert not (project.root / "best_model.json").exists()
    mlflow.set_tracking_uri(f"sqlite:///{project.root}/mlflow.db")
    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("train/casting").experiment_id])
    assert {run.data.tags["mlflow.runName"] for run in runs} == {"one 2 folds", "two 2 folds"}
    for run in runs:
        for of, pictures in (("pictures", 36), ("photographs", 12)):
            history = [
                client.get_metric_history(run.info.run_id, f"{of}_{name}")
                for name in ("defects_found", "defects_missed", "ok_rejected", "ok_passed")
            ]
            assert [sum(m.value for m in fold) for fold in zip(*history, strict=True)] == [
                pictures,
                pictures,
            ]
            balanced = [
                metric.value
                for metric in client.get_metric_history(run.info.run_id, f"{of}_balanced_accuracy")
            ]
            figures = run.data.metrics
            assert figures[f"{of}_balanced_accuracy_mean"] == pytest.approx(np.mean(balanced))
            assert figures[f"{of}_balanced_accuracy_lowest"] == min(balanced)
            assert figures[f"{of}_balanced_accuracy_highest"] == max(balanced)


def test_too_many_folds_are_one_line(project, tmp_path):
    data = draw_folders(tmp_path / "pictures", train=4, test=1)
    last = project.fail("src/train.py", "--data", data, "--folds", 9)
    assert "Too few photographs for 9 folds: 4 of def_front, 4 of ok_front" in last
    assert project.run("src/train.py", "--folds", "1").returncode == 2
    assert project.run("src/train.py", "--ray", "").returncode == 2
