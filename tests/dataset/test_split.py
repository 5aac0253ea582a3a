"""From folders to arrays, and to training and test images."""

import logging

import numpy as np
import pytest

from conftest import draw_folders
from defect_detection import PipelineError
from defect_detection.atomic import write_mapping
from defect_detection.dataset import decoded, split
from defect_detection.dataset.folder import DataFolder
from defect_detection.runtime import preprocessing
from defect_detection.runtime.decision import CLASSES
from defect_detection.runtime.preprocessing import ImageFormat

TAKES = ImageFormat(32, 32)


@pytest.fixture
def load(folder):
    def load(side="train"):
        loaded = split.load(folder, TAKES)
        return loaded.training if side == "train" else loaded.testing

    return load


def test_labels_and_counts_follow_the_folders(load):
    loaded = load()
    assert loaded.images.shape == (20, 32, 32, 1)
    assert loaded.images.dtype == np.uint8
    assert loaded.counts == {"def_front": 10, "ok_front": 10}
    for path, label in zip(loaded.paths, loaded.labels, strict=True):
        assert label == path.startswith("train/def_front/")


def test_rows_belong_to_their_paths(load, data):
    loaded = load()
    for row in (0, 9, 10, 19):
        expected = preprocessing.decode(data / loaded.paths[row], TAKES)
        np.testing.assert_array_equal(loaded.images[row], expected)


def test_second_load_decodes_nothing(load, monkeypatch):
    first = load()
    monkeypatch.setattr(preprocessing, "decode", lambda *_: pytest.fail("decoded again"))
    second = load()
    np.testing.assert_array_equal(first.images, second.images)
    assert first.digest == second.digest


@pytest.mark.parametrize("content", [b"", b"short", b"{"])
def test_damaged_cache_is_made_again(load, tmp_path, content):
    expected = np.array(load().images)
    for file in (tmp_path / "cache").glob("train-*"):
        file.write_bytes(content)
    np.testing.assert_array_equal(load().images, expected)


def test_changed_added_and_renamed_pictures_change_the_digest(load, data):
    digests = {load().digest}
    good = data / "train" / "ok_front"
    (good / "part_000.jpeg").write_bytes((good / "part_001.jpeg").read_bytes())
    digests.add(load().digest)
    (good / "more.jpeg").write_bytes((good / "part_001.jpeg").read_bytes())
    digests.add(load().digest)
    (good / "more.jpeg").rename(good / "other.jpeg")
    digests.add(load().digest)
    assert len(digests) == 4


def test_only_the_newest_caches_are_kept(load, data, tmp_path):
    for number in range(decoded.CACHES_KEPT + 3):
        (data / "train" / "ok_front" / "part_000.jpeg").rename(
            data / "train" / "ok_front" / f"part_000_{number}.jpeg"
        )
        load()
        (data / "train" / "ok_front" / f"part_000_{number}.jpeg").rename(
            data / "train" / "ok_front" / "part_000.jpeg"
        )
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == decoded.CACHES_KEPT
    assert len(list((tmp_path / "cache").glob("*.json"))) == decoded.CACHES_KEPT


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_unreadable_picture_is_skipped_named_and_counted(tmp_path, content, caplog):
    data = draw_folders(tmp_path / "more", train=20, test=1)
    (data / "train" / "def_front" / "part_003.jpeg").write_bytes(content)
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = split.load(DataFolder(data, tmp_path / "cache"), TAKES).training
        assert "train/def_front/part_003.jpeg is" in caplog.text
        assert "1 of 40 skipped" in caplog.text
        assert len(loaded) == len(loaded.images) == 39
        assert "train/def_front/part_003.jpeg" not in loaded.paths
        np.testing.assert_array_equal(
            loaded.images[3], preprocessing.decode(data / "train/def_front/part_004.jpeg", TAKES)
        )


def test_more_than_5_percent_unreadable_is_refused(load, data):
    for number in range(2):
        (data / "train" / "def_front" / f"part_00{number}.jpeg").write_bytes(b"")
    with pytest.raises(PipelineError, match=r"2 of 20 cannot be read, more than 5%.*part_000"):
        load()


def test_class_of_which_nothing_can_be_read_is_refused(tmp_path):
    data = draw_folders(tmp_path / "more", train=40, test=1)
    for path in list((data / "train" / "ok_front").iterdir())[2:]:
        path.unlink()
    for path in (data / "train" / "ok_front").iterdir():
        path.write_bytes(b"")
    with pytest.raises(PipelineError, match=r"train: no image of ok_front can be read"):
        split.load(DataFolder(data, tmp_path / "cache"), TAKES)


def test_empty_class_folder_is_named(load, data):
    for path in (data / "train" / "ok_front").iterdir():
        path.unlink()
    with pytest.raises(PipelineError, match=r"train/ok_front holds no images\. Put"):
        load()


def test_missing_class_folder_is_named(load, data):
    (data / "train" / "ok_front").rename(data / "train" / "good")
    expected = r"train holds no folder of ok_front: none is named ok_front. There are: def_front, g"
    with pytest.raises(PipelineError, match=expected):
        load()


def test_hidden_files_are_left_out_and_other_files_are_told(load, data, caplog):
    (data / "train" / "ok_front" / "._part_000.jpeg").write_bytes(b"finder")
    (data / "train" / "ok_front" / "notes.txt").write_text("notes")
    with caplog.at_level(logging.WARNING):
        assert len(load()) == 20
    assert "train/ok_front: not read: 1 .txt" in caplog.text


def test_split_file_decides_whatever_the_folder(load, data, caplog):
    rows = {f"{s}/{c}/part_{n:03}.jpeg": s for s, c, n in everything(data)}
    rows["train/ok_front/part_003.jpeg"] = "test"
    rows["test/def_front/part_001.jpeg"] = "train"
    before = load("test").digest
    write_mapping(data / "split.csv", "path", "split", rows)
    with caplog.at_level(logging.INFO):
        training, testing = load("train"), load("test")
    followed = f"Following {data / 'split.csv'}: 20 in train, 8 in test. Delete it to use the"
    assert followed in caplog.text
    assert "test/def_front/part_001.jpeg" in training.paths
    assert "train/ok_front/part_003.jpeg" in testing.paths
    assert testing.counts == {"def_front": 3, "ok_front": 5}
    assert set(training.paths) | set(testing.paths) == set(rows)
    row = training.paths.index("test/def_front/part_001.jpeg")
    np.testing.assert_array_equal(
        training.images[row], preprocessing.decode(data / training.paths[row], TAKES)
    )
    assert training.labels[row] == 1
    assert testing.digest != before
    (data / "split.csv").unlink()
    assert load("test").digest == before


def test_picture_that_the_split_file_lacks_is_named(load, data):
    rows = {f"{s}/{c}/part_{n:03}.jpeg": s for s, c, n in everything(data)}
    del rows["train/ok_front/part_003.jpeg"]
    write_mapping(data / "split.csv", "path", "split", rows)
    with pytest.raises(PipelineError, match=r"whether train/ok_front/part_003.jpeg is train or"):
        load()


def everything(data):
    return [
        (split, name, number)
        for split, count in (("train", 10), ("test", 4))
        for name in CLASSES
        for number in range(count)
    ]


def test_same_images_are_read_at_another_size(load, folder, data):
    loaded = load("test")
    larger = loaded.images_as(ImageFormat(48, 64))
    assert larger.shape == (8, 48, 64, 1)
    expected = preprocessing.decode(data / loaded.paths[3], ImageFormat(48, 64))
    np.testing.assert_array_equal(larger[3], expected)
    assert loaded.images_as(TAKES) is loaded.images


def test_files_that_changed_are_not_mixed_with_labels_from_before(load, data):
    loaded = load("test")
    changed = data / loaded.paths[0]
    changed.write_bytes((data / loaded.paths[1]).read_bytes())
    with pytest.raises(PipelineError, match="were changed while they were read"):
        loaded.images_as(ImageFormat(48, 64))
