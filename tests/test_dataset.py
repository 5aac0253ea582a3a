"""From folders to arrays."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import draw_folders
from defect_detection import PipelineError, dataset, images
from defect_detection.files import write_mapping

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
    labels, photographs = np.array([1] * 60 + [0] * 40), np.arange(100)
    training, validation = dataset.split_validation(labels, photographs, 0.2, seed=5)
    assert sorted([*training, *validation]) == list(range(100))
    assert (len(validation), labels[validation].sum()) == (20, 12)
    again = dataset.split_validation(labels, photographs, 0.2, seed=5)[1]
    other = dataset.split_validation(labels, photographs, 0.2, seed=6)[1]
    np.testing.assert_array_equal(validation, again)
    assert list(validation) != list(other)


@st.composite
def photographed(draw):
    """Labels and photographs: of each class at least two, of any sizes, some of both classes."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=4, max_size=30))
    labels, photographs = [], []
    for number, size in enumerate(sizes):
        both = number >= 4 and draw(st.booleans()) and draw(st.booleans())
        for picture in range(size):
            labels.append(picture % 2 if both else number % 2)
            photographs.append(number)
    order = draw(st.permutations(range(len(labels))))
    return np.array(labels)[order], np.array(photographs)[order]


@settings(max_examples=200, deadline=None)
@given(photographed(), st.floats(0.05, 0.5), st.integers(0, 2**32 - 1))
def test_no_photograph_is_on_both_sides_of_a_validation_split(pictures, share, seed):
    labels, photographs = pictures
    try:
        training, validation = dataset.split_validation(labels, photographs, share, seed)
    except PipelineError as error:
        assert "Too few photographs" in str(error)
        return
    assert sorted([*training, *validation]) == list(range(len(labels)))
    assert not set(photographs[training]) & set(photographs[validation])
    assert set(labels[training]) == set(labels[validation]) == {0, 1}


@settings(max_examples=100, deadline=None)
@given(photographed(), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_no_photograph_is_in_two_folds(pictures, count, seed):
    labels, photographs = pictures
    try:
        divided = dataset.folds(labels, photographs, count, seed)
    except PipelineError as error:
        assert f"Too few photographs for {count} folds" in str(error)
        return
    assert sorted(row for _, fold in divided for row in fold) == list(range(len(labels)))
    for others, fold in divided:
        assert not set(photographs[others]) & set(photographs[fold])
        assert len(others) + len(fold) == len(labels)


def test_many_photographs_are_always_split_and_near_the_share():
    labels = np.repeat([1, 0], [300, 200])
    photographs = np.repeat(np.arange(50), 10)
    for seed in range(50):
        validation = dataset.split_validation(labels, photographs, 0.2, seed)[1]
        assert (labels[validation].sum(), len(validation)) == (60, 100)


def test_too_few_photographs_to_split_is_said_with_their_number():
    expected = "hold 20% of the pictures back: 4 of def_front, 1 of ok_front"
    with pytest.raises(PipelineError, match=expected):
        dataset.split_validation(
            np.array([1, 1, 1, 1, 0, 0, 0]), np.array([1, 2, 3, 4, 5, 5, 5]), 0.2, seed=0
        )
    with pytest.raises(PipelineError, match="for 3 folds: 4 of def_front, 2 of ok_front"):
        dataset.folds(np.array([1, 1, 1, 1, 0, 0, 0]), np.array([1, 2, 3, 4, 5, 5, 6]), 3, seed=0)


def test_split_file_decides_whatever_the_folder(load, data, caplog):
    rows = {f"{s}/{c}/part_{n:03}.jpeg": s for s, c, n in everything(data)}
    rows["train/ok_front/part_003.jpeg"] = "test"
    rows["test/def_front/part_001.jpeg"] = "train"
    before = load("test").digest
    write_mapping(data / "split.csv", "path", "split", rows)
    with caplog.at_level(logging.INFO):
        training, testing = load("train"), load("test")
    assert f"Following {data / 'split.csv'}, delete it to go back: 8 in test" in caplog.text
    assert "test/def_front/part_001.jpeg" in training.paths
    assert "train/ok_front/part_003.jpeg" in testing.paths
    assert testing.counts == {"def_front": 3, "ok_front": 5}
    assert set(training.paths) | set(testing.paths) == set(rows)
    row = training.paths.index("test/def_front/part_001.jpeg")
    np.testing.assert_array_equal(
        training.images[row], images.decode(data / training.paths[row], SIZE)
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
        for name in dataset.CLASSES
        for number in range(count)
    ]
