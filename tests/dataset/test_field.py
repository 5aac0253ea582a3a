"""Approved images from the line: by photograph, on one side for ever."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import draw_folders, draw_part, encoded
from defect_detection.atomic import read_mapping
from defect_detection.dataset import split
from defect_detection.dataset.field import FieldUse
from defect_detection.dataset.folder import DataFolder
from defect_detection.runtime.preprocessing import ImageFormat

TAKES = ImageFormat(64, 64)
LEARN, TEST_ONLY = FieldUse(0.5, learn=True), FieldUse(0.5, learn=False)


def approve(data: Path, count: int, name: str = "def_front", seed: int = 1) -> list[Path]:
    """Draw images as if they had been approved; return their files."""
    rng = np.random.default_rng(seed)
    folder = data / "field" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        files.append(folder / f"{seed}-{number:02}.jpeg")
        files[-1].write_bytes(encoded(draw_part(rng, defect=name == "def_front")))
    return files


def sides(folder: DataFolder) -> dict[str, str]:
    return read_mapping(folder.path / "field" / "split.csv", "path", "split")


def test_each_approved_image_either_joins_training_or_only_tests(folder):
    plain = split.load(folder, TAKES)
    approve(folder.path, 20)
    approve(folder.path, 20, "ok_front", 2)
    loaded = split.load(folder, TAKES, LEARN)
    joined = set(loaded.training.paths) - set(plain.training.paths)
    tested = set(loaded.field.paths)
    assert joined | tested == set(sides(folder)) and not joined & tested
    assert len(joined | tested) == 40 and len(joined) > 8 and len(tested) > 8
    assert loaded.testing.digest == plain.testing.digest
    assert not set(loaded.field.photographs) & set(loaded.training.photographs)
    labels = dict(zip(loaded.training.paths, loaded.training.labels, strict=True))
    assert all(labels[path] == path.startswith("field/def_front") for path in joined)
    in_field = dict(zip(loaded.field.paths, loaded.field.labels, strict=True))
    assert all(in_field[path] == path.startswith("field/def_front") for path in tested)
    row = loaded.field.paths.index(sorted(tested)[0])
    assert loaded.field.images_as(TAKES)[row].shape == TAKES.shape
    assert list(loaded.training.labels) == sorted(loaded.training.labels, reverse=True)


def test_evaluation_tests_on_them_and_learns_from_none(folder):
    plain = split.load(folder, TAKES)
    approve(folder.path, 20)
    loaded = split.load(folder, TAKES, TEST_ONLY)
    assert loaded.training.digest == plain.training.digest
    assert set(loaded.field.paths) == {p for p, side in sides(folder).items() if side == "test"}


def test_without_use_or_images_nothing_changes(folder):
    plain = split.load(folder, TAKES)
    assert split.load(folder, TAKES, LEARN).field is None
    approve(folder.path, 3)
    again = split.load(folder, TAKES)
    assert (again.training.digest, again.field) == (plain.training.digest, None)
    assert not (folder.path / "field" / "split.csv").exists()


def test_sides_stay_when_more_images_come_and_the_share_changes(folder):
    approve(folder.path, 12)
    split.load(folder, TAKES, LEARN)
    before = sides(folder)
    approve(folder.path, 12, seed=3)
    split.load(folder, TAKES, FieldUse(1e-6, learn=True))
    after = sides(folder)
    assert {path: after[path] for path in before} == before
    assert {after[path] for path in after.keys() - before.keys()} == {"train"}


def test_share_of_the_photographs_is_drawn_whatever_comes_with_them(folder):
    approve(folder.path, 60)
    split.load(folder, TAKES, FieldUse(0.2, learn=True))
    assert 3 <= list(sides(folder).values()).count("test") <= 22
    together = sides(folder)
    (folder.path / "field" / "split.csv").unlink()
    rest = sorted((folder.path / "field" / "def_front").iterdir())[30:]
    for file in rest:
        file.unlink()
    split.load(folder, TAKES, FieldUse(0.2, learn=True))
    assert all(together[path] == side for path, side in sides(folder).items())


@pytest.mark.parametrize(("of", "expected"), [("train", "train"), ("test", "test")])
def test_image_of_a_known_photograph_goes_to_its_side(folder, of, expected):
    known = sorted((folder.path / of / "def_front").iterdir())[:6]
    target = folder.path / "field" / "def_front"
    target.mkdir(parents=True)
    for number, file in enumerate(known):
        shutil.copy(file, target / f"again-{number}.jpeg")
    loaded = split.load(folder, TAKES, LEARN)
    assert set(sides(folder).values()) == {expected}
    assert not any("again" in path for path in loaded.training.paths)  # no image twice


def test_photograph_with_many_images_has_no_greater_chance_to_test(folder):
    files = approve(folder.path, 60)
    (folder.path / "groups.csv").write_text(
        "path,photo\n"
        + "".join(f"{folder.relative(file)},p{number // 6}\n" for number, file in enumerate(files))
    )
    split.load(folder, TAKES, FieldUse(0.2, learn=True))
    assert list(sides(folder).values()).count("test") <= 24  # 4 of 10 photographs


def test_learned_image_stays_on_its_side_when_its_class_is_corrected(folder):
    files = approve(folder.path, 12)
    split.load(folder, TAKES, FieldUse(1e-6, learn=True))
    other = folder.path / "field" / "ok_front"
    other.mkdir()
    files[0].rename(other / files[0].name)
    split.load(folder, TAKES, FieldUse(0.999, learn=True))
    assert sides(folder)[f"field/ok_front/{files[0].name}"] == "train"


def test_unreadable_approved_image_is_named(folder, caplog):
    approve(folder.path, 3)[1].write_bytes(b"no image")
    split.load(folder, TAKES, LEARN)
    assert "field/def_front/1-01.jpeg is none of" in caplog.text and "skipped" in caplog.text


def test_sides_are_not_written_again_when_an_image_was_deleted(folder):
    approve(folder.path, 6)[0].unlink()
    split.load(folder, TAKES, LEARN)
    file = folder.path / "field" / "split.csv"
    for path in sorted((folder.path / "field" / "def_front").iterdir())[:2]:
        path.unlink()
    before = file.stat().st_mtime_ns, file.stat().st_ino
    split.load(folder, TAKES, LEARN)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before


def test_images_of_one_photograph_are_on_one_side(folder):
    files = approve(folder.path, 10)
    (folder.path / "groups.csv").write_text(
        "path,photo\n"
        + "".join(f"{folder.relative(file)},p{number // 5}\n" for number, file in enumerate(files))
    )
    split.load(folder, TAKES, LEARN)
    found = [sides(folder)[folder.relative(file)] for file in files]
    assert len(set(found[:5])) == len(set(found[5:])) == 1


def test_approved_label_replaces_the_one_in_train(folder):
    wrong = sorted((folder.path / "train" / "ok_front").iterdir())[0]
    target = folder.path / "field" / "def_front"
    target.mkdir(parents=True)
    shutil.copy(wrong, target / "corrected.jpeg")
    loaded = split.load(folder, TAKES, LEARN)
    labels = dict(zip(loaded.training.paths, loaded.training.labels, strict=True))
    assert labels["field/def_front/corrected.jpeg"] == 1
    assert folder.relative(wrong) not in labels


def test_folder_without_train_and_test_takes_them_too(tmp_path):
    data = draw_folders(tmp_path / "drawn", train=12, test=1)
    flat = tmp_path / "flat"
    shutil.copytree(data / "train", flat)
    approve(flat, 10, seed=9)
    loaded = split.load(DataFolder(flat, tmp_path / "cache"), TAKES, LEARN)
    assert loaded.field is not None
    assert any(path.startswith("field/") for path in loaded.training.paths)


def test_folders_of_labels_are_not_called_unknown(folder, caplog):
    (folder.path / "inbox").mkdir()
    approve(folder.path, 1)
    split.load(folder, TAKES)
    assert "inbox" not in caplog.text and "field" not in caplog.text
