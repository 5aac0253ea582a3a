"""From folders to arrays, and to training and test images."""

import logging
import os

import numpy as np
import pytest

from conftest import draw_folders, resident
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


@pytest.fixture
def decode(folder):
    return lambda: decoded.decode(folder, folder.images("train"), "train", TAKES)


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


JSON = {
    "empty": b"",
    "cut": b'{"skipped": [',
    "null": b"null",
    "list": b"[[1, 2]]",
    "former": b"[]",
    "number": b"7",
    "zeroed": bytes(100),
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "object": b'{"ab": 1}',
    "no lists": b'{"skipped": null, "checks": null}',
    "other types": b'{"skipped": [[[], {}]], "checks": [null]}',
    "no checksums": b'{"skipped": [], "checks": []}',
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
@pytest.mark.parametrize("suffix", ["json", "pixels", "*"])
def test_damaged_cache_is_made_again_with_a_line(decode, tmp_path, content, suffix, caplog):
    expected = np.array(decode().images)
    for file in (tmp_path / "cache").glob(f"train-*.{suffix}"):
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(decode().images, expected)
        assert caplog.text.count("is damaged: the images are decoded again") == 1
        decode()
    assert caplog.text.count("is damaged") == 1


@pytest.mark.parametrize("where", [0, 5000, -1])
def test_pixels_that_a_disk_has_changed_are_noticed(decode, tmp_path, where, caplog):
    expected = np.array(decode().images)
    (file,) = (tmp_path / "cache").glob("train-*.pixels")
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)
    np.testing.assert_array_equal(decode().images, expected)
    assert "is damaged" in caplog.text


def test_zeroed_pixels_are_noticed(decode, tmp_path):
    expected = np.array(decode().images)
    (file,) = (tmp_path / "cache").glob("train-*.pixels")
    file.write_bytes(bytes(file.stat().st_size))
    np.testing.assert_array_equal(decode().images, expected)


def test_cache_under_the_name_of_another_is_noticed(decode, data, tmp_path):
    decode()
    kept = {path.suffix: path.read_bytes() for path in (tmp_path / "cache").glob("train-*")}
    first, second = sorted((data / "train" / "ok_front").iterdir())[:2]
    first.write_bytes(second.read_bytes())
    expected = np.array(decode().images)
    for path in (tmp_path / "cache").glob("train-*"):
        path.write_bytes(kept[path.suffix])
    np.testing.assert_array_equal(decode().images, expected)


def test_what_the_cache_says_was_skipped_is_checked_too(tmp_path):
    data = draw_folders(tmp_path / "more", train=20, test=1)
    (data / "train" / "def_front" / "part_003.jpeg").write_bytes(b"no image")
    folder = DataFolder(data, tmp_path / "cache")
    expected = decoded.decode(folder, folder.images("train"), "train", TAKES)
    (file,) = (tmp_path / "cache").glob("train-*.json")
    file.write_text(file.read_text().replace("part_003", "part_004"))
    found = decoded.decode(folder, folder.images("train"), "train", TAKES)
    assert found.paths == expected.paths and found.skipped == expected.skipped


@pytest.mark.parametrize("suffix", ["json", "pixels"])
def test_folder_in_place_of_a_cache_is_one_line(decode, tmp_path, suffix):
    decode()
    (file,) = (tmp_path / "cache").glob(f"train-*.{suffix}")
    file.unlink()
    file.mkdir()
    with pytest.raises(PipelineError, match=rf"{suffix}: cannot be read \(Is a directory\)"):
        decode()


def test_file_that_is_swapped_before_it_is_decoded_is_not_kept(decode, data, tmp_path, monkeypatch):
    """The name of the cache says what was read first."""
    swapped, other = sorted((data / "train" / "ok_front").iterdir())[:2]
    before, read = swapped.read_bytes(), preprocessing.read_file
    reads = []

    def read_file(path):
        reads.append(path)
        if reads.count(swapped) == 2:
            swapped.write_bytes(other.read_bytes())
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "read_file", read_file)
        with pytest.raises(PipelineError, match="part_000.jpeg was changed while the images were"):
            decode()
    assert not list((tmp_path / "cache").glob("train-*"))
    swapped.write_bytes(before)
    expected = [preprocessing.decode(data / path, TAKES) for path in decode().paths]
    np.testing.assert_array_equal(decode().images, expected)


def test_image_to_log_is_the_one_that_was_read(decode, data):
    loaded = decode()
    assert loaded.content(3) == (data / loaded.paths[3]).read_bytes()
    (data / loaded.paths[3]).unlink()
    with pytest.raises(PipelineError, match=r"part_003.jpeg was changed while the images were"):
        loaded.content(3)


def test_memory_of_the_checks_is_given_back(tmp_path):
    """The pixels of a large folder would count as memory of the process."""
    data = draw_folders(tmp_path / "more", train=20, test=1)
    folder, takes = DataFolder(data, tmp_path / "cache"), ImageFormat(1024, 1024)
    decoded.decode(folder, folder.images("train"), "train", takes)  # 42 MB
    before = resident()
    found = decoded.decode(folder, folder.images("train"), "train", takes)
    assert resident() - before < 20
    assert found.images[39].any()


def names_of_all_kinds() -> list[bytes]:
    texts = (
        "new\nline",
        "car\rriage",
        "a\r\nb",
        "tab\t",
        'quo"te',
        '"all"',
        "com,ma",
        "=1+1",
        "-r",
    )
    more = (" lead", "trail ", "\ufeffmark", "👨‍👩‍👧", "esc\x1b[31m", "\u202e", "x" * 250, "semi;")
    return [b"part_\xff.png", *(f"{text}.png".encode() for text in (*texts, *more))]


def test_names_of_all_kinds_are_written_and_read_back(tmp_path):
    data = draw_folders(tmp_path / "more", train=20, test=5)
    for side, name in ((side, name) for side in ("train", "test") for name in CLASSES):
        drawn = sorted((data / side / name).iterdir())
        for path, other in zip(drawn, names_of_all_kinds(), strict=False):
            path.rename(os.path.join(os.fsdecode(data / side / name), os.fsdecode(other)))
    folder = DataFolder(data, tmp_path / "cache")
    plain = split.load(folder, TAKES)
    named = [*plain.training.paths, *plain.testing.paths]
    written = split.resplit(folder, 0.2, 0, TAKES)
    write_mapping(folder.groups_file, "path", "photo", {path: path[-7:] for path in named})
    found = split.load(folder, TAKES)
    assert sorted([*found.training.paths, *found.testing.paths]) == sorted(named)
    assert split.load(folder, TAKES).training.digest == found.training.digest
    written.unlink()
    again = split.load(folder, TAKES)
    assert again.training.digest == plain.training.digest
    photographs = [*again.training.photographs, *again.testing.photographs]
    assert len(set(photographs)) == len({path[-7:] for path in named})


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
