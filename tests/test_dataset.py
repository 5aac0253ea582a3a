"""From folders to arrays."""

import logging

import numpy as np
import pytest

from conftest import draw_folders
from defect_detection import PipelineError, dataset, images

SIZE = (32, 32)


@pytest.fixture
def load(data, tmp_path):
    return lambda split="train": dataset.load(data, split, SIZE, tmp_path / "cache")


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
        expected = images.decode(data / loaded.paths[row], SIZE)
        np.testing.assert_array_equal(loaded.images[row], expected)


def test_second_load_decodes_nothing(load, monkeypatch):
    first = load()
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded again"))
    second = load()
    np.testing.assert_array_equal(first.images, second.images)
    assert first.digest == second.digest


@pytest.mark.parametrize("content", [b"", b"short", b"{"])
def test_damaged_cache_is_made_again(load, tmp_path, content):
    expected = np.array(load().images)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(content)
    np.testing.assert_array_equal(load().images, expected)


def test_changed_added_and_renamed_pictures_change_the_digest(load, data):
    digests = {load().digest}
    folder = data / "train" / "ok_front"
    (folder / "part_000.jpeg").write_bytes((folder / "part_001.jpeg").read_bytes())
    digests.add(load().digest)
    (folder / "more.jpeg").write_bytes((folder / "part_001.jpeg").read_bytes())
    digests.add(load().digest)
    (folder / "more.jpeg").rename(folder / "other.jpeg")
    digests.add(load().digest)
    assert len(digests) == 4


def test_only_the_newest_caches_are_kept(load, data, tmp_path):
    for number in range(dataset.CACHES_KEPT + 3):
        (data / "train" / "ok_front" / "part_000.jpeg").rename(
            data / "train" / "ok_front" / f"part_000_{number}.jpeg"
        )
        load()
        (data / "train" / "ok_front" / f"part_000_{number}.jpeg").rename(
            data / "train" / "ok_front" / "part_000.jpeg"
        )
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == dataset.CACHES_KEPT
    assert len(list((tmp_path / "cache").glob("*.json"))) == dataset.CACHES_KEPT


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_unreadable_picture_is_skipped_named_and_counted(tmp_path, content, caplog):
    data = draw_folders(tmp_path / "more", train=20, test=1)
    (data / "train" / "def_front" / "part_003.jpeg").write_bytes(content)
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = dataset.load(data, "train", SIZE, tmp_path / "cache")
        assert "train/def_front/part_003.jpeg is" in caplog.text
        assert "1 of 40 skipped" in caplog.text
        assert len(loaded) == len(loaded.images) == 39
        assert "train/def_front/part_003.jpeg" not in loaded.paths
        np.testing.assert_array_equal(
            loaded.images[3], images.decode(data / "train/def_front/part_004.jpeg", SIZE)
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
    with pytest.raises(PipelineError, match=r"ok_front holds no picture that can be read"):
        dataset.load(data, "train", SIZE, tmp_path / "cache")


def test_empty_class_folder_is_named(load, data):
    for path in (data / "train" / "ok_front").iterdir():
        path.unlink()
    with pytest.raises(PipelineError, match=r"train/ok_front holds no pictures\. Put"):
        load()


def test_missing_class_folder_is_named(load, data):
    (data / "train" / "ok_front").rename(data / "train" / "good")
    with pytest.raises(PipelineError, match=r"train/ok_front does not exist"):
        load()


def test_hidden_files_are_left_out_and_other_files_are_told(load, data, caplog):
    (data / "train" / "ok_front" / "._part_000.jpeg").write_bytes(b"finder")
    (data / "train" / "ok_front" / "notes.txt").write_text("notes")
    with caplog.at_level(logging.WARNING):
        assert len(load()) == 20
    assert "1 entries that are not .jpeg, .jpg or .png are ignored" in caplog.text


def test_validation_split_is_seeded_stratified_and_whole():
    labels = np.array([1] * 60 + [0] * 40)
    training, validation = dataset.split_validation(labels, 0.2, seed=5)
    assert sorted([*training, *validation]) == list(range(100))
    assert (len(validation), labels[validation].sum()) == (20, 12)
    again = dataset.split_validation(labels, 0.2, seed=5)[1]
    other = dataset.split_validation(labels, 0.2, seed=6)[1]
    np.testing.assert_array_equal(validation, again)
    assert list(validation) != list(other)


def test_too_few_pictures_to_split_is_said_with_their_number():
    with pytest.raises(PipelineError, match="hold 20% back for validation: 4 defects, 1 ok"):
        dataset.split_validation(np.array([1, 1, 1, 1, 0]), 0.2, seed=0)
